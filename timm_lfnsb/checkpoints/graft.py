"""Start one network from another's backbone: LFN and LFNSB are the same up to the head."""
from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from ..errors import UserError
from ..models.loading import load_model
from ..models.names import check_model_name
from ..util.files import replacing


def graft(model: str, donor: str, out: Path, seed: int = 0) -> tuple[int, list[str]]:
    """Write an initial checkpoint of `model`, a timm name, whose backbone is `donor`'s and whose head is random.

    Args:
        donor: A network with weights, see `load_model`.
        out: The .safetensors file to write, for train.py's --initial-checkpoint.
        seed: Seed of the parameters that are left random.

    Returns:
        The number of tensors taken over, and the keys of those that are not.

    Raises:
        UserError: When there is no such model, the donor has no weights, or the two share no backbone.
    """
    check_model_name(model)
    source = load_model(donor)
    torch.manual_seed(seed)
    target = timm.create_model(model, num_classes=source.num_classes)
    taken, state = source.state_dict(), target.state_dict()
    names = [key for key in state if not key.startswith(('head.', 'fc.'))]
    other = [key for key in names if key not in taken or taken[key].shape != state[key].shape]
    if other:
        raise UserError(
            f"{model} and {donor} have different backbones ({len(other)} of {len(names)} tensors, {other[0]} the "
            'first): only networks with the same one can lend it, such as lfn_small and lfnsb.')
    state.update({key: taken[key] for key in names})
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        save_file(state, temporary)
    return len(names), [key for key in state if key not in names]
