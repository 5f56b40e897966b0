"""Models by name, with their weights."""
from __future__ import annotations

from pathlib import Path

import timm
from timm.utils import reparameterize_model
from torch import nn

from ..weights.fetch import HubError, fetch_model, fetch_weights, first_line
from ..weights.names import HUB_ORG, HUB_REVISIONS
from .networks import MixedFeatureNet

_PREFIXES = ('hf-hub', 'hf_hub')


def load_model(name: str, cache_dir: str | Path | None = None) -> nn.Module:
    """Create a timm model with its weights, checked before they are loaded where they come from the Hub.

    'hf-hub:' names of own weights: their SHA-256 must be the one that comes with the package, and the config is the
    package's own. Other 'hf-hub:' names: safetensors only, of the very commit the config is of, and the SHA-256 must
    be the one the Hub gives for the file, where it gives one. All other names go to `timm.create_model` as they are.

    Args:
        name: A registered name with weights, 'local-dir:PATH' or 'hf-hub:ORG/NAME[@REVISION]'.
        cache_dir: Cache folder instead of huggingface_hub's own.

    Raises:
        HubError: When a Hub model cannot be had or must not be loaded.
        RuntimeError: From timm, when there is no such model or no weights for it.
    """
    prefix, _, model_id = name.partition(':')
    if prefix.lower() not in _PREFIXES:
        return timm.create_model(name, pretrained=True, cache_dir=cache_dir)
    repo_id, _, revision = model_id.partition('@')
    org, _, weights = repo_id.partition('/')
    if org == HUB_ORG and weights in HUB_REVISIONS:
        path = fetch_weights(weights, revision or None, cache_dir)
        return timm.create_model(weights, pretrained=True, pretrained_cfg_overlay={'file': str(path)})
    commit = fetch_model(repo_id, revision or None, cache_dir)
    try:
        # The files of this commit are in the cache, so nothing is asked or fetched any more.
        return timm.create_model(f'hf-hub:{repo_id}@{commit}', pretrained=True, cache_dir=cache_dir)
    except Exception as error:  # other people's configs and files can raise nearly anything
        raise HubError(f"{repo_id} on the Hub is no model that can be loaded ({first_line(error)}).") from error


def load_for_inference(name: str) -> nn.Module:
    """`load_model` in eval mode, a network of this zoo reparameterised: the same outputs, faster, other parameters.

    Args:
        name: See `load_model`.

    Raises:
        HubError: See `load_model`.
        RuntimeError: See `load_model`.
    """
    model = load_model(name).eval()
    return reparameterize_model(model, inplace=True) if isinstance(model, MixedFeatureNet) else model
