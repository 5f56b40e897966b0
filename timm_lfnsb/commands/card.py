"""`timm-lfnsb card`."""
from pathlib import Path

import click


@click.command()
@click.argument('names', nargs=-1)
@click.option('--out', default='hub_cards', show_default=True, type=click.Path(file_okay=False, path_type=Path),
              help='Folder for NAME.md.')
@click.option('--folder', type=click.Path(exists=True, file_okay=False, path_type=Path),
              help='Print the card of a folder made by timm-lfnsb pack instead.')
def card(names: tuple[str, ...], out: Path, folder: Path | None) -> None:
    """Write the model cards of embedded weights (default: all) from their JSON."""
    from ..hub.card import render_card_for_folder, write_cards
    from ..weights.names import embedded_weights
    if folder is not None:
        click.echo(render_card_for_folder(folder), nl=False)
        return
    for path in write_cards(names or embedded_weights(), out):
        click.echo(path)
