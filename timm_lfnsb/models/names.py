"""Names of models, as people type them."""
from __future__ import annotations

from pathlib import Path

import timm

from ..errors import UserError, did_you_mean


def check_model_name(name: str) -> None:
    """Refuse a name of which timm has no model, or no such tag; names with a source (local-dir:PATH) pass.

    Raises:
        UserError: The message says which names are near.
    """
    if ':' in name or '/' in name:
        return
    arch, _, tag = name.partition('.')
    tagged = timm.list_models(arch, include_tags=True)
    if not timm.is_model(arch):
        known = {*timm.list_models(), *timm.list_pretrained()}
        folder = f': it is a folder, whose name is local-dir:{name}' if Path(name).is_dir() else ''
        raise UserError(f'there is no model {name}{folder or did_you_mean(name, known)}.')
    if tag and tagged and name not in tagged:
        tags = [other.partition('.')[2] for other in tagged]
        raise UserError(f"{arch} has no tag {tag}{did_you_mean(tag, tags)}; it has {', '.join(filter(None, tags))}.")
