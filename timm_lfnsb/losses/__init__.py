"""Training losses; those on features by name, with the weight that their papers give them beside cross entropy."""
from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from .affinity import AffinityLoss
from .angular import AngularMarginLoss, ArcFaceLoss, CosFaceLoss, SphereFaceLoss
from .base import FeatureLoss
from .center import CenterLoss
from .cosine_harmony import CosineHarmonyLoss
from .dacl import SparseCenterLoss
from .dda import DDALoss
from .island import IslandLoss
from .separate import SeparateLoss


class Entry(NamedTuple):
    """A loss class, and the weight of its paper."""

    loss: type[FeatureLoss] | type[AngularMarginLoss]
    weight: float


LOSSES: dict[str, Entry] = {
    'cosine-harmony': Entry(CosineHarmonyLoss, 1.),
    'center': Entry(CenterLoss, 0.003),
    'island': Entry(IslandLoss, 0.01),
    'affinity': Entry(AffinityLoss, 1.),
    'separate': Entry(SeparateLoss, 1.),
    'dda': Entry(DDALoss, 1.),
    'dacl': Entry(SparseCenterLoss, 0.01),
    'arcface': Entry(ArcFaceLoss, 1.),
    'cosface': Entry(CosFaceLoss, 1.),
    'sphereface': Entry(SphereFaceLoss, 1.),
}


def loss_settings(name: str) -> dict[str, Any]:
    """Settings of a loss by name, in the order of its arguments, with their defaults.

    Raises:
        ValueError: When there is no such loss.
    """
    if name not in LOSSES:
        raise ValueError(f'there is no loss {name}, choose one of {", ".join(LOSSES)}.')
    parameters = list(inspect.signature(LOSSES[name].loss).parameters.values())
    return {one.name: one.default for one in parameters[2:]}  # without num_classes and feat_dim


def create_loss(name: str, num_classes: int, feat_dim: int, **settings: Any) -> Any:
    """Make one of `LOSSES` for C classes and features of D values.

    Raises:
        ValueError: When there is no such loss or setting, or a value is out of range.
        UserError: When the loss needs a library that is not installed.
    """
    known = loss_settings(name)
    if unknown := [key for key in settings if key not in known]:
        raise ValueError(f'{name} has no setting {unknown[0]}, only {", ".join(known)}.')
    try:
        return LOSSES[name].loss(num_classes, feat_dim, **settings)
    except TypeError as error:
        raise ValueError(f'{name} cannot be made with {settings}: {error}.') from None
