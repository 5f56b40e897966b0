"""Lightweight facial expression recognition networks, their loss and their weights, as a plugin of timm.

Importing this package registers the models with timm; nothing is fetched and nothing heavy is imported.
"""
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .losses.cosine_harmony import CosineHarmonyLoss
from .models import networks as networks
from .train.task import CosineHarmonyTask, FeatureLossTask
from .version import __version__

if TYPE_CHECKING:
    from .predict.faces import align_face
    from .predict.recognizer import ExpressionRecognizer

__all__ = ['CosineHarmonyLoss', 'CosineHarmonyTask', 'ExpressionRecognizer', 'FeatureLossTask', '__version__',
           'align_face']

_LAZY = {'ExpressionRecognizer': 'predict.recognizer', 'align_face': 'predict.faces'}  # these import OpenCV


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{_LAZY[name]}', __name__), name)
