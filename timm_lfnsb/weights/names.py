"""The weights inside the package: their names, their repositories on the Hugging Face Hub, what their JSON says."""
from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import UserError, did_you_mean

WEIGHTS_DIR = Path(__file__).parent

DEFAULT_ORG = 'timm-lfnsb'
HUB_ORG = os.environ.get('TIMM_LFNSB_HUB_ORG') or DEFAULT_ORG
"""Organisation of the weights' repositories, one for each, named as the weights; read at import."""

HUB_REVISIONS: dict[str, str | None] = {
    'lfnsb.ferplus': None, 'lfnsb.ferplus_64': None, 'lfnsb.ferplus_balanced': None, 'lfn_small.ferplus': None,
    'mfn.ferplus': None}
"""The embedded weights, each with the commit of its repository (of `DEFAULT_ORG`): None until it is published there."""


def hub_id(name: str) -> str:
    """Hub repository of own weights, for instance 'timm-lfnsb/lfnsb.ferplus'."""
    return f'{HUB_ORG}/{name}'


def embedded_weights() -> list[str]:
    """Names of the weights inside the package, as `timm.create_model` takes them."""
    return sorted(path.stem for path in WEIGHTS_DIR.glob('[!.]*.json'))


def weights_info(name: str) -> dict[str, Any]:
    """What is known of embedded weights: data, training, metrics, SHA-256 of the file.

    Raises:
        UserError: When there are none of this name.
    """
    if name not in embedded_weights():
        names = embedded_weights()
        raise UserError(f"there are no embedded weights {name!r}{did_you_mean(name, names)}; there are "
                        f"{', '.join(names) or 'none'}.")
    return json.loads((WEIGHTS_DIR / f'{name}.json').read_text(encoding='utf-8'))
