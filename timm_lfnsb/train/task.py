"""Training task for timm: classification loss plus Cosine-Harmony loss, for any timm model."""
from __future__ import annotations

from typing import Any, Callable, Dict, List, Optional, Set, Tuple

import torch
import torch.nn as nn
from timm.models import group_parameters
from timm.task import ClassificationTask, TrainingTask
from timm.utils import unwrap_model

from ..losses.cosine_harmony import CosineHarmonyLoss


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
    raise ValueError('Cosine-Harmony needs features of shape (B, C, H, W), (B, H, W, C), (B, N, C) or (B, C) from '
                     f'forward_features, got {tuple(features.shape)}.')


class CosineHarmonyModule(nn.Module):
    """Model and Cosine-Harmony loss as one trainable module, so that DDP, EMA and the optimizer see the centers."""

    model: Any  # a timm model, whose interface nn.Module does not know

    def __init__(self, model: nn.Module, loss: CosineHarmonyLoss):
        super().__init__()
        self.model = model
        self.loss = loss
        # timm models name their map format where it is not NCHW, as a string or as timm.layers.Format
        output_fmt = getattr(model, 'output_fmt', 'NCHW')
        self.output_fmt: str = getattr(output_fmt, 'value', output_fmt)
        self.num_prefix_tokens: int = getattr(model, 'num_prefix_tokens', 0)

    def no_weight_decay(self) -> Set[str]:
        names = self.model.no_weight_decay() if hasattr(self.model, 'no_weight_decay') else set()
        return {f'model.{name}' for name in names} | {'loss.centers'}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Layer numbers for layer-wise learning rate decay: the model's own, and the centers with its last layer."""
        layers = group_parameters(self.model, self.model.group_matcher(coarse=coarse), reverse=True)
        last = max(layers.values())
        return lambda name: layers.get(name.removeprefix('model.'), last)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (B, C) and the Cosine-Harmony loss (scalar) of images (B, 3, H, W)."""
        features = self.model.forward_features(input)
        logits = self.model.forward_head(features)
        return logits, self.loss(average_features(features, self.output_fmt, self.num_prefix_tokens), target)


class CosineHarmonyMixin(TrainingTask):
    """What a task of timm needs for the Cosine-Harmony loss beside its own; see `CosineHarmonyTask`."""

    trainable_module: Any
    eval_model: Any
    criterion: Any

    def __init__(
            self, model: Any, *args: Any, weight: float = 1.0, alpha: float = 0.1, variant: str = 'reference',
            learn_centers: bool = True, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        if not (hasattr(model, 'forward_features') and hasattr(model, 'forward_head')):
            raise ValueError(
                f'the Cosine-Harmony loss needs forward_features and forward_head, {type(model).__name__} lacks them.')
        self.weight = weight
        loss = CosineHarmonyLoss(
            model.num_classes, model.num_features, alpha=alpha, variant=variant, learn_centers=learn_centers)
        self.trainable_module = CosineHarmonyModule(model, loss.to(self.device))

    @property
    def centers(self) -> torch.Tensor:
        """Class centers (C, D) of the loss."""
        return unwrap_model(self.trainable_module).loss.centers

    def prepare_distributed(self, device_ids: Optional[list] = None, **ddp_kwargs: Any) -> Any:
        # Ranks draw with seeds of their own, and DDP may be told to leave buffers (fixed centers) alone.
        torch.distributed.broadcast(self.centers.data, src=0)
        return super().prepare_distributed(device_ids, **ddp_kwargs)

    def compile(  # type: ignore[override]  # timm's own signature, not nn.Module's
            self, backend: str = 'inductor', mode: Optional[str] = None, **compile_kwargs: Any) -> nn.Module:
        model = self.trainable_module.model
        super().compile(backend=backend, mode=mode, **compile_kwargs)  # with the loss, for training
        self.eval_model = torch.compile(model, backend=backend, mode=mode, **compile_kwargs)
        return self.eval_model

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        module = super().get_eval_model(module=module, ema=ema)
        bare = unwrap_model(module) if module is not None else None
        return bare.model if isinstance(bare, CosineHarmonyModule) else module

    def _loss_module(self, module: Optional[nn.Module], ema: bool) -> Optional[CosineHarmonyLoss]:
        module = module if module is not None else self.get_trainable_module(ema=ema)
        return unwrap_model(module).loss if module is not None else None

    def get_task_state(self, module: Optional[nn.Module] = None, ema: bool = False) -> Dict[str, Any]:
        loss = self._loss_module(module, ema)
        return {'cosine_harmony': loss.state_dict()} if loss is not None else {}

    def load_task_state(
            self, state: dict | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False) -> None:
        loss = self._loss_module(module, ema)
        if loss is not None and state and 'cosine_harmony' in state:  # else the centers start anew
            loss.load_state_dict(state['cosine_harmony'], strict=strict)

    def get_clip_parameters(self, exclude_head: bool = False) -> List[nn.Parameter]:
        trainable = unwrap_model(self.trainable_module)
        parameters = list(trainable.model.parameters())
        # timm's convention: the last two parameters are the classifier's
        return parameters[:-2 if exclude_head else None] + list(trainable.loss.parameters())

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> Dict[str, torch.Tensor]:
        output, harmony = self.trainable_module(input, target)
        task_loss = self.criterion(output, target)
        loss = task_loss + self.weight * harmony
        return {'loss': loss, 'output': output, 'task_loss': task_loss, 'cosine_harmony_loss': harmony}


class CosineHarmonyTask(CosineHarmonyMixin, ClassificationTask):
    """Classification task whose loss is `criterion` + weight * Cosine-Harmony.

    Works for every timm model whose `forward_features` returns one tensor: the loss sees it averaged over space. The
    eval model and the checkpoint's `state_dict` are the bare model; the centers travel in the task state.

    Arguments are those of the installed timm's `ClassificationTask`, and `weight` of the Cosine-Harmony loss, `alpha`,
    `variant` and `learn_centers` (see `CosineHarmonyLoss`). The forward returns `loss` (total), `output` (logits),
    `task_loss` and `cosine_harmony_loss` (unweighted).

    Raises:
        ValueError: When the model has no separate features, or a loss setting is out of range.
    """
