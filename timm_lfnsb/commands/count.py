"""`timm-lfnsb count`."""
import click


@click.command()
@click.argument('models', nargs=-1)
@click.option('--json', 'as_json', is_flag=True, help='One JSON object a model a line.')
def count(models: tuple[str, ...], as_json: bool) -> None:
    """Count parameters and multiply-accumulates of MODELS (default: all of this zoo), per stage."""
    import json
    from dataclasses import asdict

    from ..models.count import count_model, format_counts
    from ..models.networks import default_cfgs
    counts = [count_model(name) for name in models or default_cfgs]
    click.echo('\n'.join(json.dumps(asdict(item)) for item in counts) if as_json else format_counts(counts))
