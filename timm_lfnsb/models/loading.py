"""Models by name, with their weights, on their device."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.utils import reparameterize_model
from torch import nn

from ..errors import one_sentence
from ..util.files import read_json
from ..weights.fetch import fetch_model, fetch_weights
from ..weights.names import HUB_ORG, HUB_REVISIONS, embedded_weights, weights_info
from .names import check_model_name
from .networks import MixedFeatureNet
from .temperature import TEMPERATURE_KEY, check_temperature


def load_model(name: str, inference: bool = False, cache_dir: str | Path | None = None) -> nn.Module:
    """Create a timm model with its weights, checked before they are loaded where they come from the Hub.

    'hf-hub:' names of own weights: their SHA-256 must be the one that comes with the package, and the config is the
    package's own. Other 'hf-hub:' names: safetensors only, of the very commit the config is of, and the SHA-256 must
    be the one the Hub gives for the file, where it gives one. All other names go to `timm.create_model` as they are.

    Outputs are plain logits; `model_temperature` tells the temperature that comes with the weights.

    Args:
        name: A registered name with weights, 'local-dir:PATH' or 'hf-hub:ORG/NAME[@REVISION]'.
        inference: In eval mode and, if of this zoo, reparameterised: the same outputs, faster, other parameters.
        cache_dir: Cache folder instead of huggingface_hub's own.

    Raises:
        UserError: When there is no such model, it has no weights, or they cannot be had or must not be loaded.
    """
    with one_sentence(f'cannot load the model {name}'):
        model, temperature = _create_model(name, cache_dir)
        setattr(model, TEMPERATURE_KEY, check_temperature(temperature, name))
    if not inference:
        return model
    model.eval()
    return reparameterize_model(model, inplace=True) if isinstance(model, MixedFeatureNet) else model


def _create_model(name: str, cache_dir: str | Path | None) -> tuple[nn.Module, Any]:
    """The model, and what comes with its weights as their temperature, if anything."""
    model: Any
    prefix, _, model_id = name.partition(':')
    if prefix.lower() in ('hf-hub', 'hf_hub'):
        repo_id, _, revision = model_id.partition('@')
        org, _, weights = repo_id.partition('/')
        if org == HUB_ORG and weights in HUB_REVISIONS:
            path = fetch_weights(weights, revision or None, cache_dir)
            model = timm.create_model(weights, pretrained=True, pretrained_cfg_overlay={'file': str(path)})
            return model, weights_info(weights).get('temperature')
        prefix, model_id = 'local-dir', str(fetch_model(repo_id, revision or None, cache_dir))
        name = f'{prefix}:{model_id}'
    else:
        check_model_name(name)
    model = timm.create_model(name, pretrained=True, cache_dir=cache_dir)
    if prefix.lower() == 'local-dir':
        return model, read_json(Path(model_id) / 'config.json').get(TEMPERATURE_KEY)
    weights = '.'.join(str(model.pretrained_cfg.get(key)) for key in ('architecture', 'tag'))
    return model, weights_info(weights).get('temperature') if weights in embedded_weights() else None


def to_device(model: nn.Module, device: str | torch.device = 'auto') -> nn.Module:
    """Move a model to a torch device; 'auto' is CUDA where there is one, else Apple's MPS, else the CPU.

    Raises:
        UserError: When there is no such device.
    """
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    with one_sentence(f"cannot use the device '{device}'"):
        model = model.to(device)
    return model
