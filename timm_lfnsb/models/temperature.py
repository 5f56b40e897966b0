"""The temperature of a classifier: what its logits are divided by before the softmax, to be as sure as it is right.

It is fitted on a validation split (`evaluate.calibration`). Folders have it at the top level of config.json, since timm
refuses unknown keys inside `pretrained_cfg`; exported files in their metadata; models that `load_model` returns as an
attribute: all under `TEMPERATURE_KEY`. Nothing but this package's own readers divides by it. `rebalance` divides the
classifier by it instead, so that 1 is left: so it is with the embedded weights.
"""
from __future__ import annotations

import math
from typing import Any

from ..errors import UserError

# Not 'temperature': transformers takes that for a setting of text generation, and drops it.
TEMPERATURE_KEY = 'softmax_temperature'


def model_temperature(model: Any) -> float | None:
    """The temperature of a loaded model or exported file; None, for plain softmax, where none is known."""
    return getattr(model, TEMPERATURE_KEY, None)


def check_temperature(value: Any, source: object) -> float | None:
    """The temperature that a source gives, None where it gives none; UserError where it is no positive number."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(
            f'the {TEMPERATURE_KEY} of {source} is {value!r}, no positive number: correct it or take it out.')
    return float(value)
