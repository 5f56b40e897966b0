"""Training tasks for timm: classification loss plus losses on features, for any timm model."""
from __future__ import annotations

import logging
from typing import Any, Callable, Dict, List, Mapping, Optional, Set, Tuple

import torch
import torch.nn as nn
from timm.models import group_parameters
from timm.task import ClassificationTask, TrainingTask
from timm.utils import unwrap_model

from ..losses import LOSSES, create_loss

_logger = logging.getLogger(__name__)


def average_features(features: torch.Tensor, output_fmt: str = 'NCHW', num_prefix_tokens: int = 0) -> torch.Tensor:
    """Average what a timm model's `forward_features` returns over space: features (B, C).

    These are maps (B, C, H, W) or (B, H, W, C), told apart by timm's `output_fmt` ('NCHW' or 'NHWC'), tokens (B, N, C),
    of which class and register tokens are left out (`num_prefix_tokens`), or already pooled (B, C).

    Raises:
        ValueError: When they are of another shape.
    """
    if features.ndim == 2:
        return features
    if features.ndim == 3:
        return features[:, num_prefix_tokens:].mean(dim=1)
    if features.ndim == 4:
        return features.mean(dim=(1, 2) if output_fmt == 'NHWC' else (2, 3))
    raise ValueError('losses on features need them of shape (B, C, H, W), (B, H, W, C), (B, N, C) or (B, C) from '
                     f'forward_features, got {tuple(features.shape)}.')


class FeatureLossModule(nn.Module):
    """Model and losses on its features as one trainable module, so that DDP, EMA and the optimizer see both."""

    model: Any  # a timm model, whose interface nn.Module does not know
    loss: Any

    def __init__(self, model: nn.Module, losses: Mapping[str, nn.Module]):
        super().__init__()
        self.model = model
        self.loss = nn.ModuleDict(losses)
        # timm models name their map format where it is not NCHW, as a string or as timm.layers.Format
        output_fmt = getattr(model, 'output_fmt', 'NCHW')
        self.output_fmt: str = getattr(output_fmt, 'value', output_fmt)
        self.num_prefix_tokens: int = getattr(model, 'num_prefix_tokens', 0)

    def losses(self) -> Dict[str, nn.Module]:
        """The losses by name, with _ for -."""
        return dict(self.loss.items())

    def no_weight_decay(self) -> Set[str]:
        names = self.model.no_weight_decay() if hasattr(self.model, 'no_weight_decay') else set()
        return {f'model.{name}' for name in names} | {f'loss.{name}' for name, _ in self.loss.named_parameters()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layer numbers for layer-wise learning rate decay: the model's own, and the losses with its last layer."""
        layers = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values())
        return lambda name: layers.get(name.removeprefix('model.'), last)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """Return the logits (B, C) and each loss (scalar) by its name, of images (B, 3, H, W)."""
        features = self.model.forward_features(input)
        logits = self.model.forward_head(features)
        features = average_features(features, self.output_fmt, self.num_prefix_tokens)
        return logits, {name: loss(features, target) for name, loss in self.losses().items()}


class FeatureLossMixin(TrainingTask):
    """What a task of timm needs for losses on features beside its own; see `FeatureLossTask`."""

    trainable_module: Any
    eval_model: Any
    criterion: Any

    def __init__(self, model: Any, *args: Any, losses: Mapping[str, Mapping[str, Any]], **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        if not (hasattr(model, 'forward_features') and hasattr(model, 'forward_head')):
            raise ValueError(
                f'losses on features need forward_features and forward_head, {type(model).__name__} lacks them.')
        self.weights: Dict[str, float] = {}
        modules = {}
        for name, settings in losses.items():
            settings, key = dict(settings), name.replace('-', '_')
            weight = settings.pop('weight', None)
            modules[key] = create_loss(name, model.num_classes, model.num_features, **settings).to(self.device)
            self.weights[key] = LOSSES[name].weight if weight is None else weight
        self.trainable_module = FeatureLossModule(model, modules)

    def _losses(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, nn.Module]:
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return unwrap_model(module).losses() if module is not None else {}

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> Any:
        # Ranks draw with seeds of their own, and DDP may be told to leave buffers (fixed centers) alone.
        for loss in self._losses().values():
            for tensor in loss.state_dict().values():
                torch.distributed.broadcast(tensor, src=0)
        return super().prepare_distributed(device_ids, **ddp_kwargs)

    def compile(  # type: ignore[override]  # timm's own signature, not nn.Module's
            self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs: Any) -> nn.Module:
        model = self.trainable_module.model
        super().compile(backend=backend, mode=mode, **compile_kwargs)  # with the losses, for training
        self.eval_model = torch.compile(model, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        module = super().get_eval_model(module=module, ema=ema)
        bare = unwrap_model(module) if module is not None else None
        return bare.model if isinstance(bare, FeatureLossModule) else module

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        return {name: loss.state_dict() for name, loss in self._losses(module, ema).items()}

    def load_task_state(
            self, state: dict | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False) -> None:
        losses = self._losses(module, ema)
        if state and not ema and state.keys() != losses.keys():
            _logger.warning(f"The checkpoint is of a run with the losses {', '.join(state)}, and this one has "
                            f"{', '.join(losses)}: what only one of the two has starts anew, or is dropped.")
        for name, loss in losses.items():
            if state and name in state:
                loss.load_state_dict(state[name], strict=strict)

    def get_clip_parameters(self, exclude_head: bool = False) -> List[nn.Parameter]:
        trainable = unwrap_model(self.trainable_module)
        parameters = list(trainable.model.parameters())
        # timm's convention: the last two parameters are the classifier's
        return parameters[:-2 if exclude_head else None] + list(trainable.loss.parameters())

    def weighted_sum(self, result: Mapping[str, torch.Tensor]) -> Any:
        """What the losses on features add to the total (scalar), of what `forward` returns."""
        return sum(weight * result[f'{name}_loss'] for name, weight in self.weights.items())

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        output, losses = self.trainable_module(input, target)
        task_loss = self.criterion(output, target)
        parts = {f'{name}_loss': loss for name, loss in losses.items()}
        return {'loss': task_loss + self.weighted_sum(parts), 'output': output, 'task_loss': task_loss, **parts}


class FeatureLossTask(FeatureLossMixin, ClassificationTask):
    """Classification task whose loss is `criterion` + the weighted sum of losses on features.

    Works for every timm model whose `forward_features` returns one tensor: the losses see it averaged over space. The
    eval model and the checkpoint's `state_dict` are the bare model; centers and all else that belongs to the losses are
    trained without weight decay, and travel in the task state.

    Args:
        model, ...: Those of the installed timm's `ClassificationTask`.
        losses: Settings of each loss by its name in `timm_lfnsb.losses.LOSSES`, and its `weight` (default: its
            paper's), such as `{'center': {}, 'cosine-harmony': {'weight': 1., 'variant': 'margin'}}`.

    The forward returns `loss` (total), `output` (logits), `task_loss` and each loss without its weight under its name
    with `_` for `-`, such as `center_loss`.

    Raises:
        ValueError: When the model has no separate features, or a loss or setting is unknown or out of range.
        UserError: When a loss needs a library that is not installed.
    """


class CosineHarmonyModule(FeatureLossModule):
    """Model and Cosine-Harmony loss; its parameters have the names they have in a `CosineHarmonyTask`."""

    def __init__(self, model: nn.Module, loss: nn.Module):
        super().__init__(model, {})
        self.loss = loss

    def losses(self) -> Dict[str, nn.Module]:
        return {'cosine_harmony': self.loss}


class CosineHarmonyMixin(FeatureLossMixin):
    """`FeatureLossMixin` with the Cosine-Harmony loss alone; see `CosineHarmonyTask`."""

    def __init__(
            self, model: Any, *args: Any, weight: float = 1.0, alpha: float = 0.1, variant: str = 'reference',
            learn_centers: bool = True, **kwargs: Any):
        settings = dict(weight=weight, alpha=alpha, variant=variant, learn_centers=learn_centers)
        super().__init__(model, *args, losses={'cosine-harmony': settings}, **kwargs)
        self.trainable_module = CosineHarmonyModule(model, self.trainable_module.loss['cosine_harmony'])

    @property
    def weight(self) -> float:
        """Weight of the loss."""
        return self.weights['cosine_harmony']

    @weight.setter
    def weight(self, weight: float) -> None:
        self.weights['cosine_harmony'] = weight

    @property
    def centers(self) -> torch.Tensor:
        """Class centers (C, D) of the loss."""
        return unwrap_model(self.trainable_module).loss.centers


class CosineHarmonyTask(CosineHarmonyMixin, ClassificationTask):
    """Classification task whose loss is `criterion` + weight * Cosine-Harmony: a `FeatureLossTask` for this loss alone.

    Works for every timm model whose `forward_features` returns one tensor: the loss sees it averaged over space. The
    eval model and the checkpoint's `state_dict` are the bare model; the centers travel in the task state.

    Arguments are those of the installed timm's `ClassificationTask`, and `weight` of the Cosine-Harmony loss, `alpha`,
    `variant` and `learn_centers` (see `CosineHarmonyLoss`). The forward returns `loss` (total), `output` (logits),
    `task_loss` and `cosine_harmony_loss` (unweighted).

    Raises:
        ValueError: When the model has no separate features, or a loss setting is out of range.
    """
