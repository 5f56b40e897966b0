"""Where a model runs."""
from __future__ import annotations

import torch
from torch import nn

from ..errors import UserError


def to_device(model: nn.Module, device: str | torch.device = 'auto') -> nn.Module:
    """Move a model to a torch device; 'auto' is CUDA where there is one, else the CPU.

    Raises:
        UserError: When there is no such device.
    """
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        return model.to(device)
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"cannot use the device '{device}': {str(error).splitlines()[0]}") from error
