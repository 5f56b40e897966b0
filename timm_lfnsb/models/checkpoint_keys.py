"""Keys of checkpoints: those of the authors' released code renamed to ours, all checked to be the model's."""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.models import clean_state_dict
from torch import nn

from ..errors import UserError

# Their prefix, with numbers or names -> ours; a second group counts the blocks of a stage after the one of stride 2.
_PREFIXES: tuple[tuple[str, str], ...] = (
    (r'^(features\.0|conv1)\.', 'stem.0.'),
    (r'^(features\.1|conv2_dw)\.', 'stem.1.'),
    (r'^(features\.2|conv_23)\.', 'stages.0.0.'),
    (r'^(features\.3|conv_3)\.model\.(\d+)\.', 'stages.0.{}.'),
    (r'^(features\.4|conv_34)\.', 'stages.1.0.'),
    (r'^(features\.5|conv_4)\.model\.(\d+)\.', 'stages.1.{}.'),
    (r'^(features\.6|conv_45)\.', 'stages.2.0.'),
    (r'^(features\.7|conv_5)\.model\.(\d+)\.', 'stages.2.{}.'),
    (r'^(features\.8|conv_?6_sep)\.', 'stages.2.7.'),
    (r'^conv_?6_dw\.', 'head.gdconv.'),
    (r'^linear\.', 'head.linear.'),
    (r'^bn\.', 'head.bn.'),
    (r'^sb\.feature_reduction\.0\.', 'head.reduce.conv.'),
    (r'^sb\.feature_reduction\.1\.', 'head.reduce.bn.'),
    (r'^sb\.sb_conv\.', 'head.conv.'),
    (r'^cat_head0\.CoordAtt\.', 'head.attn1.'),
    (r'^cat_head1\.CoordAtt\.', 'head.attn2.'),
    (r'^Linear\.', 'head.gdconv.'),
)
_PARTS: tuple[tuple[str, str], ...] = (
    (r'(stages\.(?!2\.7\.)\d\.\d+\.)conv\.(conv|bn)\.', r'\1expand.\2.'),
    (r'(stages\.(?!2\.7\.)\d\.\d+\.)conv\.prelu\.', r'\1expand.act.'),
    (r'\.mixed_depthwise_conv\.', '.convs.'),
    (r'\.CA\.', '.attn.'),
    (r'(attn\d?)\.conv2\.', r'\1.conv_h.'),
    (r'(attn\d?)\.conv3\.', r'\1.conv_w.'),
    (r'\.Linear_([hw])\.', r'.strip_\1.'),
    (r'^(stem\.\d|head\.gdconv)\.c\.', r'\1.conv.'),
    (r'\.prelu\.', '.act.'),
)
# Keys the authors' modules own but never use in their forward.
_DEAD = re.compile(r'\.conv_dw\.(bn|prelu)\.|\.CoordAtt\.Linear\.')


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, torch.Tensor]:
    """Unwrap a checkpoint, and rename the keys of the authors' released code (dead ones dropped).

    Raises:
        UserError: When, the classifier aside, its keys are not the model's. timm loads leniently as soon as class
            counts differ, and would leave what is missing at random values.
    """
    for wrapper in ('model_state_dict', 'state_dict'):
        state_dict = state_dict.get(wrapper, state_dict)
    state_dict = rename_keys(clean_state_dict(state_dict), model)
    given, wanted = (
        {key for key in keys if not key.startswith('fc.') and not key.endswith('.num_batches_tracked')}
        for keys in (state_dict, model.state_dict()))
    _refuse(sorted(wanted - given), sorted(given - wanted))
    return state_dict


def take_features(features: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """Turn a whole network's state dict, in place, into that of timm's `features_only` network: a hook before loading.

    Raises:
        UserError: When it lacks something of that network.
    """
    wanted = features.state_dict().keys()
    # Such networks have it whole under a name, or without its head and with stages_0 in place of stages.0.
    renamed = {
        name: value for key, value in clean_state_dict(state_dict).items()
        for name in (key, f'model.{key}', f'graph_module.{key}', re.sub(r'^(stem|stages)\.', r'\1_', key))
        if name in wanted}
    _refuse(sorted(key for key in wanted - renamed.keys() if not key.endswith('.num_batches_tracked')), [])
    state_dict.clear()
    state_dict.update(renamed)


def _refuse(missing: Sequence[str], foreign: Sequence[str]) -> None:
    if missing or foreign:
        raise UserError(f'The checkpoint is of another network. Missing keys: {len(missing)} {missing[:3]}; '
                        f'unexpected keys: {len(foreign)} {foreign[:3]}.')


def rename_keys(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The state dict with the keys of `model`, if it has those of the released code, else as it is.

    Parts that the released code never uses are left out.
    """
    if not any('.mixed_depthwise_conv.' in key for key in state_dict):
        return state_dict
    out: dict[str, Any] = {}
    for key, value in state_dict.items():
        # Their networks with an embedding head call its norm 'bn'; in the others that name is dead.
        if _DEAD.search(key) or (key.startswith('bn.') and not hasattr(model.head, 'bn')):
            continue
        for pattern, prefix in _PREFIXES:
            match = re.match(pattern, key)
            if match:
                block = int(match[2]) + 1 if match.lastindex == 2 else 0
                key = prefix.format(block) + key[match.end():]
                break
        for pattern, part in _PARTS:
            key = re.sub(pattern, part, key)
        out[key] = value
    return out
