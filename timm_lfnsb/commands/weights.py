"""`timm-lfnsb weights`."""
from pathlib import Path
from typing import Any

import click

from .rebalance import COST

DATA_DIR = click.option(
    '--data-dir', required=True, type=click.Path(path_type=Path), help='Folder made by timm-lfnsb prepare.')
NOTES = click.option(
    '--note', 'notes', multiple=True, metavar='TEXT',
    help='A sentence for the card that no figure tells; may be given several times.')
ROBUSTNESS = click.option(
    '--robustness/--no-robustness', default=True,
    help='Measure the robustness table too, a dozen times the test split.')


@click.group()
def weights() -> None:
    """The weights inside the package: list them, measure them again, put new ones there."""


@weights.command('list')
def list_weights() -> None:
    """Print the embedded weights and what was measured of them on the test split."""
    from ..hub.card import weights_table
    click.echo(weights_table())


@weights.command()
@click.argument('names', nargs=-1)
@DATA_DIR
@ROBUSTNESS
def verify(names: tuple[str, ...], data_dir: Path, robustness: bool) -> None:
    """Measure embedded weights (default: all) again.

    Fails where an accuracy is off by more than 0.2 points, a calibration error by more than 0.5, or the temperature by
    more than 0.02.
    """
    from ..hub.ship import verify
    from ..weights.names import embedded_weights
    for name in names or embedded_weights():
        for line in verify(name, data_dir, None if robustness else ()):
            click.echo(line)


@weights.command()
@click.argument('name')
@DATA_DIR
@click.option('--replace', is_flag=True, help='Take the new metrics and checksum even where they differ from the old.')
def measure(name: str, data_dir: Path, replace: bool) -> None:
    """Measure the embedded weights NAME and update their JSON.

    Adds calibration temperature, robustness table and recipe names. The metrics of the splits must agree with what the
    JSON has of them.
    """
    from ..evaluate.robustness import robustness_table
    from ..hub.ship import remeasure
    info = remeasure(name, data_dir, replace)
    before, after = info['calibration']['ece'], info['calibration']['ece_scaled']
    click.echo(f"{name}: temperature {info['temperature']:.3f}, ECE on test {before:.3f} without it, {after:.3f} with "
               f"it\n\n{robustness_table(info['robustness'])}")


@weights.command()
@click.argument('name')
@DATA_DIR
@click.option('--split', default='test', show_default=True, help='Folder in the data folder.')
@click.option('--only', 'names', multiple=True, metavar='ROW', help='One row alone; may be given several times.')
@click.option('--workers', default=2, show_default=True, help='Processes that read images.')
@click.option('--device', default='auto', show_default=True)
def robustness(name: str, data_dir: Path, split: str, names: tuple[str, ...], **options: Any) -> None:
    """Print how the accuracy of NAME holds on turned, shifted, blurred, compressed, ... images.

    NAME is an embedded one, or anything else that timm.create_model loads (local-dir:PATH). Nothing is stored:
    `weights measure` does that.
    """
    from ..evaluate.robustness import PERTURBATIONS, measure_robustness, robustness_table
    click.echo(robustness_table(measure_robustness(name, data_dir, split, names or tuple(PERTURBATIONS), **options)))


@weights.command()
@click.argument('folders', nargs=-1, type=click.Path(exists=True, file_okay=False, path_type=Path))
def runs(folders: tuple[Path, ...]) -> None:
    """Print one table of the runs of train.py in FOLDERS, or of those that led to the embedded weights."""
    from ..train.history import embedded_runs, read_runs, runs_table
    from ..weights.names import embedded_weights, weights_info
    described = [run for folder in folders for run in read_runs(folder)]
    click.echo(runs_table(described if folders else embedded_runs(map(weights_info, embedded_weights()))))


@weights.command()
@click.argument('name')
@click.argument('runs', nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@DATA_DIR
@ROBUSTNESS
@NOTES
@click.option('--after', metavar='NAME',
              help='Embedded weights that the first run started from: their runs become part of the record.')
def ship(
        name: str, runs: tuple[Path, ...], data_dir: Path, robustness: bool, notes: tuple[str, ...], after: str | None,
) -> None:
    """Store the last of RUNS as the embedded weights NAME (ARCH.TAG), with a JSON of what it measures."""
    from ..hub.card import weights_table
    from ..hub.ship import ship
    ship(name, runs, data_dir, None if robustness else (), notes, after)
    click.echo(weights_table())


@weights.command()
@click.argument('name')
@click.argument('base')
@DATA_DIR
@ROBUSTNESS
@NOTES
@COST
def rebalance(
        name: str, base: str, data_dir: Path, robustness: bool, notes: tuple[str, ...], cost: float) -> None:
    """Store the embedded weights BASE as NAME, calibrated and with the prior of their training labels out of the bias.

    Where NAME is BASE, it is replaced. See `timm-lfnsb rebalance`, which does it to a folder.
    """
    from ..hub.card import weights_table
    from ..hub.ship import ship_rebalanced
    ship_rebalanced(name, base, data_dir, None if robustness else (), notes, cost)
    click.echo(weights_table())
