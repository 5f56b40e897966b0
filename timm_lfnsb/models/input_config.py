"""How a model wants its images."""
from __future__ import annotations

from typing import Any

from timm.data import resolve_model_data_config
from torch import nn


def input_config(model: nn.Module) -> dict[str, Any]:
    """timm's input settings of a model, for as many channels as it takes."""
    config = resolve_model_data_config(model)
    chans = getattr(model, 'in_chans', config['input_size'][0])
    config['input_size'] = (chans, *config['input_size'][1:])
    if chans != len(config['mean']):  # as timm's loaders do when the config still has the values of RGB weights
        config.update({key: (sum(config[key]) / len(config[key]),) * chans for key in ('mean', 'std')})
    return config
