"""`timm-lfnsb graft`."""
from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument('model')
@click.argument('out', type=click.Path(dir_okay=False, path_type=Path))
@click.option('--donor', default='lfnsb.ferplus', show_default=True, metavar='NAME',
              help='A timm name with weights, local-dir:PATH or hf-hub:ID.')
@click.option('--seed', default=0, show_default=True, help='Seed of the parameters that stay random.')
def graft(model: str, out: Path, donor: str, seed: int) -> None:
    """Start MODEL from the backbone of a trained donor.

    OUT is a .safetensors file for train.py's --initial-checkpoint.
    """
    try:
        from ..checkpoints.graft import graft as graft_backbone
    except ModuleNotFoundError as error:
        raise click.ClickException(f"graft needs {error.name}: pip install 'timm-lfnsb[eval]' brings it.") from None
    try:
        count, left = graft_backbone(model, donor, out, seed)
    except (ValueError, RuntimeError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{out}: {count} tensors of {donor}'s backbone; random: {', '.join(left)}")
