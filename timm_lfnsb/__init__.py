"""Lightweight facial expression recognition networks, their loss and their weights, as a plugin of timm.

Importing this package registers the models with timm; nothing is fetched and nothing heavy is imported.
"""
from . import networks as networks
from .loss import CosineHarmonyLoss
from .task import CosineHarmonyTask

from .version import __version__

__all__ = ['CosineHarmonyLoss', 'CosineHarmonyTask', '__version__']
