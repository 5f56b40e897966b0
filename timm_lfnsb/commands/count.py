"""`timm-lfnsb count`."""
from __future__ import annotations

import click


@click.command()
@click.argument('models', nargs=-1)
@click.option('--json', 'as_json', is_flag=True, help='One JSON object a model a line.')
def count(models: tuple[str, ...], as_json: bool) -> None:
    """Count parameters and multiply-accumulates of MODELS (default: all of this zoo), per stage."""
    import json

    from ..models.count import count_model, format_counts
    from ..models.networks import default_cfgs
    try:
        counts = [count_model(name) for name in models or default_cfgs]
    except (RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        for item in counts:
            click.echo(json.dumps(item.as_dict()))
    else:
        click.echo(format_counts(counts))
