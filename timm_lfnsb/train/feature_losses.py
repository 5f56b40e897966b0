"""The option --feature-loss NAME[:WEIGHT[:key=value,...]]: losses on features, what each is told, and their weights."""
from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import UserError
from ..losses import LOSSES, create_loss, loss_settings

_FORM = 'NAME[:WEIGHT[:key=value,...]]'


class _Collect(argparse.Action):
    """Like 'append', but what the command line names takes the place of the default, which a YAML file may set."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [values] if given is self.default else [*given, values])


def add_loss_option(group: argparse._ArgumentGroup) -> None:
    """Add --feature-loss to a group of a parser's options."""
    losses = ', '.join(f'{name} {entry.weight:g} ({", ".join(loss_settings(name))})' for name, entry in LOSSES.items())
    group.add_argument('--feature-loss', action=_Collect, default=[], metavar=_FORM,
                       help='add a loss on the features, such as center, center:0.01 or '
                            'cosine-harmony:1:variant=margin,margin=0.4; may be given more than once. NAME, its '
                            f'default weight and its settings: {losses}. The last three need pip install '
                            '"timm-lfnsb[losses]" and labels that are not mixed')


def feature_losses(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The losses that --cosine-harmony and --feature-loss ask for: settings by name, the weight among them.

    Raises:
        UserError: When one is unknown, is named twice, or cannot be made with its settings.
    """
    losses: dict[str, dict[str, Any]] = {}
    if options.cosine_harmony:
        losses['cosine-harmony'] = dict(
            weight=options.cosine_harmony, alpha=options.cosine_harmony_alpha, variant=options.cosine_harmony_variant,
            learn_centers=not options.cosine_harmony_fixed_centers)
    texts: str | Sequence[str] = options.feature_loss or []  # a YAML file may name one, or a list
    for text in [texts] if isinstance(texts, str) else texts:
        name, settings = _parse(text)
        if name in losses:
            raise UserError(f'--feature-loss {text}: {name} is named twice, so leave one of the two out.')
        losses[name] = settings
    return losses


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of one loss; the settings are tried, so that no run starts with wrong ones."""
    name, _, rest = str(text).partition(':')
    number, _, pairs = rest.partition(':')
    settings = {}
    try:
        for pair in filter(None, pairs.split(',')):
            key, equals, value = pair.partition('=')
            if not equals:
                raise ValueError(f'{pair} is not key=value.')
            settings[key.strip()] = _value(value.strip())
        defaults = loss_settings(name)
        for key, value in settings.items():
            if key in defaults and not _fits(value, defaults[key]):
                raise ValueError(f'{key} is {value}, but must be like its default, {defaults[key]}.')
        with torch.random.fork_rng(devices=[]):
            create_loss(name, 2, 2, **settings)
        weight = _value(number) if number else LOSSES[name].weight
        if not _fits(weight, 1.) or weight <= 0:
            raise ValueError(f'the weight must be a number above 0, not {number}.')
    except ValueError as error:
        reason = str(error).rstrip('.')
        raise UserError(f'--feature-loss {text} ({_FORM}): {reason}.') from None
    return name, {'weight': float(weight), **settings}


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a default: text, true or false, a whole number, or any finite number."""
    if isinstance(default, float):
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return type(value) is type(default)


def _value(text: str) -> Any:
    """A number, true, false, or text."""
    try:
        return json.loads(text.lower())
    except ValueError:
        return text
