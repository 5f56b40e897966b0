"""The weights inside the package: their names, and what their JSON says."""
from __future__ import annotations

import json
from typing import Any

from .networks import WEIGHTS_DIR


class ReleaseError(RuntimeError):
    """Weights that are not there, cannot be stored, or do not hold what their JSON says."""


def embedded_weights() -> list[str]:
    """Names of the weights inside the package, as `timm.create_model` takes them."""
    return sorted(path.stem for path in WEIGHTS_DIR.glob('[!.]*.json'))


def weights_info(name: str) -> dict[str, Any]:
    """What is known of embedded weights: data, training, metrics, SHA-256 of the file.

    Raises:
        ReleaseError: When there are none of this name.
    """
    if name not in embedded_weights():
        there_are = ', '.join(embedded_weights()) or 'none'
        raise ReleaseError(f'there are no embedded weights {name!r}; there are {there_are}.')
    return json.loads((WEIGHTS_DIR / f'{name}.json').read_text(encoding='utf-8'))
