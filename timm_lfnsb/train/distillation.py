"""Distillation from one teacher or several, alone or together with losses on features."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.task import DistillationTeacher, LogitDistillationTask

from ..errors import UserError
from ..labels import canonical_name, model_label_names
from ..models.loading import load_model
from .task import CosineHarmonyMixin, FeatureLossMixin


class SizedTeacher(DistillationTeacher):
    """A teacher at its own input size, mean and std: a network in eval mode, for timm's tasks."""

    mean_kd: Any
    std_kd: Any

    def __init__(self, model: Any, device: torch.device | None = None, dtype: torch.dtype | None = None):
        super().__init__(model.to(device=device, dtype=dtype), device=device, dtype=dtype)
        self.requires_grad_(False)
        self.size = tuple(model.pretrained_cfg['input_size'][-2:])

    def normalize_input(self, input: torch.Tensor, student_mean: Any = None, student_std: Any = None) -> torch.Tensor:
        """Undo the student's normalisation; the teacher's own is applied in `forward`."""
        return input if student_mean is None else input * student_std + student_mean

    def forward(self, input: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        """Logits (B, C) or pooled features (B, F) of images (B, 3, H, W) with values in [0, 1]."""
        if input.shape[-2:] != self.size:
            # In float32, because half precision has no antialiasing on the CPU.
            input = F.interpolate(
                input.float(), self.size, mode='bilinear', antialias=input.shape[-1] > self.size[-1]).to(input.dtype)
        return super().forward((input - self.mean_kd) / self.std_kd, return_features)


class TeacherEnsemble(SizedTeacher):
    """Teachers whose probabilities are averaged, each at its own input size, mean and std: one for timm's tasks.

    Args:
        teachers: Networks in eval mode with their weights and `label_names`.
        label_names: The run's label names; each teacher's outputs are put into this order by name.
        adjustment: Logits (C,) to subtract from their answer, as `LogitAdjustment` adds them in the student's loss.
        device: Where they run, in `dtype` (None for float32).
    """

    teachers: Any
    adjustment: Any

    def __init__(
            self, teachers: Sequence[Any], label_names: Sequence[str], adjustment: torch.Tensor | None = None,
            device: torch.device | None = None, dtype: torch.dtype | None = None):
        nn.Module.__init__(self)
        self.training = False
        self.orders = [output_order(teacher, label_names) for teacher in teachers]
        self.teachers = nn.ModuleList(SizedTeacher(teacher, device, dtype) for teacher in teachers)
        self.register_buffer('adjustment', None if adjustment is None else adjustment.to(device), persistent=False)

    def compile(self, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]  # without timm's own options
        for teacher in self.teachers:
            teacher.compile(*args, **kwargs)

    def forward(self, input: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        """Logits (B, C) in the run's order, of images (B, 3, H, W) with values in [0, 1]; never features."""
        answers = [teacher(input)[:, order].float().softmax(dim=-1)
                   for teacher, order in zip(self.teachers, self.orders, strict=True)]
        logits = torch.stack(answers).mean(dim=0).clamp_min(1e-12).log()
        return logits if self.adjustment is None else logits - self.adjustment


def output_order(teacher: nn.Module, label_names: Sequence[str]) -> list[int]:
    """Number of the teacher's output for each of the run's labels, found by name; UserError if they are others."""
    names = [canonical_name(name) for name in model_label_names(teacher)]
    wanted = [canonical_name(name) for name in label_names]
    if sorted(names) != sorted(wanted):
        raise UserError(
            f"--kd-model-name: the teacher's labels ({', '.join(names)}) are not those of the run "
            f"({', '.join(wanted)}): take a teacher of the same classes, and a folder of images or a --class-map.")
    return [names.index(name) for name in wanted]


def load_teachers(names: str, in_chans: int, label_names: Sequence[str] | None, *args: Any) -> TeacherEnsemble:
    """The teachers that --kd-model-name lists, separated by commas; `args` are further ones of `TeacherEnsemble`."""
    return TeacherEnsemble([load_network(name, in_chans) for name in names.split(',')], label_names or (), *args)


def load_feature_teacher(name: str, in_chans: int, *args: Any) -> SizedTeacher:
    """The one teacher whose features count, so that its labels may be others; `args` are those of `SizedTeacher`."""
    return SizedTeacher(load_network(name, in_chans), *args)


def load_network(name: str, in_chans: int) -> Any:
    """A teacher's network with its weights, for images of as many channels as the run has."""
    teacher: Any = load_model(name.strip(), inference=True)
    if teacher.pretrained_cfg['input_size'][0] != in_chans:
        raise UserError(f'--kd-model-name {name} takes images of other channels than the run ({in_chans}).')
    return teacher


class FeatureLossDistillationTask(FeatureLossMixin, LogitDistillationTask):
    """timm's `LogitDistillationTask` with losses on features beside it.

    Loss = task weight * criterion + distillation weight * KL divergence from the teacher + weighted sum of the losses.
    Arguments are those of `LogitDistillationTask`, and `losses`, see `FeatureLossTask`; the forward returns `kd_loss`,
    too.
    """

    student_mean: Any
    student_std: Any

    def __init__(self, student_model: Any, *args: Any, **kwargs: Any):  # under timm's name of the argument
        super().__init__(student_model, *args, **kwargs)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        result = super().forward(input, target)
        with torch.no_grad():
            answer = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        student = (result['output'].float() / self.temperature).log_softmax(dim=-1)
        teacher = (answer.float() / self.temperature).log_softmax(dim=-1)
        kd_loss = F.kl_div(student, teacher, reduction='batchmean', log_target=True) * self.temperature ** 2
        loss = self.task_loss_weight * result['task_loss'] + self.distill_loss_weight * kd_loss
        return {**result, 'loss': loss + self.weighted_sum(result), 'kd_loss': kd_loss}


class CosineHarmonyDistillationTask(CosineHarmonyMixin, FeatureLossDistillationTask):
    """`FeatureLossDistillationTask` with the Cosine-Harmony loss alone, whose arguments `CosineHarmonyTask` lists."""

    def __init__(self, student_model: Any, *args: Any, **kwargs: Any):
        super().__init__(student_model, *args, **kwargs)
