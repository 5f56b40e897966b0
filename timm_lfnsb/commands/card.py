"""`timm-lfnsb card`."""
from pathlib import Path

import click


@click.command()
@click.argument('names', nargs=-1)
@click.option('--out', default='hub_cards', show_default=True, type=click.Path(file_okay=False, path_type=Path),
              help='Folder for NAME.md.')
@click.option('--check', is_flag=True, help='Write nothing; fail where a card is not what its JSON says.')
@click.option('--folder', type=click.Path(exists=True, file_okay=False, path_type=Path),
              help='Print the card of a folder made by timm-lfnsb pack instead.')
def card(names: tuple[str, ...], out: Path, check: bool, folder: Path | None) -> None:
    """Write the model cards of embedded weights (default: all) from their JSON."""
    from ..hub.card import check_cards, render_card_for_folder, write_cards
    from ..weights.names import embedded_weights
    if folder is not None and (names or check):
        raise click.UsageError('--folder goes with neither NAMES nor --check.')
    names = names or tuple(embedded_weights())
    if folder is not None:
        click.echo(render_card_for_folder(folder), nl=False)
    elif check:
        check_cards(names, out)
        click.echo(f'{len(names)} card(s) as they should be')
    else:
        for path in write_cards(names, out):
            click.echo(path)
