"""Count parameters and multiply-accumulates with fvcore, which calls them flops, whole and per stage."""
from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import timm
import torch
from fvcore.nn import FlopCountAnalysis

from ..errors import one_sentence
from .names import check_model_name

# Parameters and "FLOPs" in millions, as Table 2 of the paper prints them.
PAPER_TABLE_2: dict[str, tuple[float, float]] = {
    'lfnsb': (2.676, 397.35),
    'mfn': (3.973, 550.74),
    'mobilefacenet': (1.148, 230.34),
}


@dataclass(frozen=True)
class Count:
    """Parameters and multiply-accumulates (MACs) of one model at one image of `input_size` (channels, height, width).

    `stages` has both for each part of the network, `uncounted` the operators that fvcore has no handler for and how
    often they run.
    """

    model: str
    input_size: tuple[int, int, int]
    num_classes: int
    params: int
    macs: int
    stages: dict[str, tuple[int, int]]
    uncounted: dict[str, int]


def _count_pool(inputs: list[Any], outputs: list[Any]) -> int:
    """One operation per input value, as fvcore counts its adaptive average pool, however the pool is written."""
    return math.prod(inputs[0].type().sizes() or [])


def count_model(name: str, model: Any = None, **kwargs: Any) -> Count:
    """Count a timm model at batch 1 and its own input size.

    Args:
        name: Name for `timm.create_model`.
        model: Count this nn.Module instead of creating one.
        **kwargs: Further arguments of `timm.create_model`.

    Raises:
        UserError: When there is no such model.
    """
    if model is None:
        check_model_name(name)
        with one_sentence(f'cannot create the model {name}'):
            model = timm.create_model(name, pretrained=False, **kwargs)
    model = model.eval()
    input_size = tuple(timm.data.resolve_model_data_config(model)['input_size'])
    analysis = FlopCountAnalysis(model, torch.zeros(1, *input_size))
    analysis.set_op_handle('aten::mean', _count_pool, 'aten::avg_pool2d', _count_pool)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)

    by_module = analysis.by_module()
    modules = dict(model.named_modules())
    parts = [part for part in modules if re.fullmatch(r'stages\.\d|(?!stages$|head_drop$)\w+', part)]
    params = {part: sum(p.numel() for p in modules[part].parameters()) for part in ('', *parts)}
    return Count(
        name, input_size, model.num_classes, params[''], int(analysis.total()),
        {part: (params[part], int(by_module[part])) for part in parts}, dict(analysis.unsupported_ops().most_common()))


def format_counts(counts: list[Count]) -> str:
    """The counts as a table for a terminal, beside the paper's Table 2."""
    lines = [f'{"model":<24} {"params":>10} {"MACs":>10}   paper: {"params":>9} {"FLOPs":>10}']
    for count in counts:
        paper = PAPER_TABLE_2.get(count.model.split('.')[0])
        printed = f'{paper[0]:>15.3f} M {paper[1]:>8.2f} M' if paper else f'{"-":>17} {"-":>10}'
        lines.append(f'{count.model:<24} {count.params / 1e6:>8.3f} M {count.macs / 1e6:>8.1f} M {printed}')
        for stage, (params, macs) in count.stages.items():
            lines.append(f'  {stage:<22} {params / 1e6:>8.3f} M {macs / 1e6:>8.1f} M')
        ops = ', '.join(f'{op} x{times}' for op, times in count.uncounted.items())
        lines.append(f'  at {"x".join(map(str, count.input_size))}, {count.num_classes} classes; '
                     f'operators fvcore does not count: {ops or "none"}')
    lines.append('MACs: multiply-accumulates of one image by fvcore (which calls them flops).')
    return '\n'.join(lines)
