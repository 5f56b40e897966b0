"""YAML recipes and class maps for timm's train script: `timm-lfnsb run train.py --config NAME --class-map NAME`."""
from __future__ import annotations

from pathlib import Path

from ..errors import UserError, did_you_mean


def recipe_names() -> list[str]:
    """Names of the recipes in this package."""
    return sorted(path.stem for path in Path(__file__).parent.glob('*.yaml'))


def recipe_path(name: str) -> Path:
    """Path of a recipe's file.

    Raises:
        UserError: When there is no such recipe; the message lists those there are.
    """
    if name not in (names := recipe_names()):
        raise UserError(f"no recipe {name!r}{did_you_mean(name, names)}; there are {', '.join(names)}.")
    return Path(__file__).parent / f'{name}.yaml'


def recipe_summary(name: str) -> str:
    """First comment line of a recipe."""
    return recipe_path(name).read_text(encoding='utf-8').splitlines()[0].lstrip('# ')


def class_map_names() -> list[str]:
    """Names of the class maps in this package."""
    return sorted(path.name.removesuffix('.classes.txt') for path in Path(__file__).parent.glob('*.classes.txt'))


def class_map_path(name: str) -> Path | None:
    """Path of a class map of this package (the canonical label order of a data set), or None where there is none."""
    path = Path(__file__).parent / f'{name}.classes.txt'
    return path if path.is_file() else None
