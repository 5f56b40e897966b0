"""Expression label names and their orders.

One canonical order serves every weight of this zoo (AffectNet's). Other data sets number the same
expressions differently, and a mixed-up order is the most common silent bug among users of facial
expression models: whatever crosses a border of this package crosses it by name.
"""
from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .errors import UserError, did_you_mean

EXPRESSIONS_8: tuple[str, ...] = (
    'neutral', 'happiness', 'sadness', 'surprise', 'fear', 'disgust', 'anger', 'contempt',
)
"""Canonical order of the eight expressions, AffectNet's own numbering."""

EXPRESSIONS_7: tuple[str, ...] = EXPRESSIONS_8[:7]
"""Canonical order of the seven basic expressions (without contempt)."""

SYNONYMS: dict[str, str] = {
    'happy': 'happiness',
    'sad': 'sadness',
    'angry': 'anger',
    'fearful': 'fear',
    'disgusted': 'disgust',
    'surprised': 'surprise',
    'none-expression': 'neutral',
    'contemptuous': 'contempt',
}
"""Names that folders and spreadsheets use for the same expressions."""

UNSURE = 'unsure'
"""What a face is called whose most probable expression is less probable than was asked for."""


class LabelError(UserError, ValueError):
    """Label names that do not fit; a ValueError too, for callers in Python."""


def canonical_name(name: str) -> str:
    """Return the canonical spelling of an expression name; an unknown name comes back stripped and lower-cased."""
    key = name.strip().lower()
    return SYNONYMS.get(key, key)


def match_labels(names: Iterable[str], label_names: Sequence[str]) -> dict[str, int]:
    """Map class names of a data set to class indices of a model, by name and never by position.

    Args:
        names: Class names of the data set, for instance its folder names.
        label_names: The model's label names in the order of its outputs.

    Returns:
        Class index for each of the given names.

    Raises:
        LabelError: When a name is not among the model's labels, or when two names mean the same class.
    """
    index = {canonical_name(label): i for i, label in enumerate(label_names)}
    names = list(names)
    unknown = [name for name in names if canonical_name(name) not in index]
    if unknown:
        named = [f'{name!r}{did_you_mean(canonical_name(name), index)}' for name in unknown]
        raise LabelError(
            f"unknown class name(s) {', '.join(named)}: the data has [{', '.join(names)}], "
            f"the model knows [{', '.join(label_names)}]; rename the folders or give the matching model.")
    matched = {name: index[canonical_name(name)] for name in names}
    if len(set(matched.values())) != len(matched):
        raise LabelError(f"two of the class names [{', '.join(names)}] mean the same expression; merge their folders.")
    return matched


def read_class_map(path: Path) -> list[str]:
    """Label names of a class map, one a line, in their order.

    As people write it: a byte order mark, Windows' line ends, spaces around a name and empty lines do not count.

    Raises:
        LabelError: When it is not text, has no names, or two that mean the same expression.
        OSError: When there is no such file.
    """
    data = path.read_bytes()
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        lines = data.decode('utf-16' if utf16 else 'utf-8-sig').splitlines()
    except UnicodeDecodeError:
        raise LabelError(f'the class map {path} is not text in UTF-8: save it so, one label name a line.') from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise LabelError(f'the class map {path} has no names: write one label name a line.')
    if double := {name for name in names if [*map(canonical_name, names)].count(canonical_name(name)) > 1}:
        raise LabelError(f"the class map {path} names one class twice ({', '.join(sorted(double))}): leave one out.")
    return names


def model_label_names(model: Any) -> tuple[str, ...]:
    """Label names of a timm model in the order of its outputs.

    Raises:
        LabelError: When its `pretrained_cfg` has none, another number of them than the model has classes, or two that
            mean the same expression.
    """
    names = (getattr(model, 'pretrained_cfg', None) or {}).get('label_names')
    if not names:
        raise LabelError(
            'the model has no label_names in its pretrained_cfg, so its outputs cannot be told apart: add them to its '
            'config.json, in the order of its outputs.')
    if isinstance(names, dict):  # timm also allows index -> name
        names = [names[index] for index in sorted(names, key=int)]
    different = {canonical_name(name) for name in names} - {''}
    if not model.num_classes == len(names) == len(different):
        raise LabelError(
            f"the model has {model.num_classes} classes, but the label_names of its pretrained_cfg are "
            f"[{', '.join(names)}]: give one name for each output, in the order of its outputs.")
    return tuple(names)
