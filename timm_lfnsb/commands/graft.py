"""`timm-lfnsb graft`."""
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
    from ..checkpoints.graft import graft as graft_backbone
    count, left = graft_backbone(model, donor, out, seed)
    click.echo(f"{out}: {count} tensors of {donor}'s backbone; random: {', '.join(left)}")
