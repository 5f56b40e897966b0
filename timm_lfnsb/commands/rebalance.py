"""`timm-lfnsb rebalance`."""
from pathlib import Path

import click

COST = click.option(
    '--cost', default=0.03, show_default=True, type=click.FloatRange(0, 1),
    help='Accuracy on the validation split that it may cost.')


@click.command()
@click.argument('folder', type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument('out_dir', type=click.Path(path_type=Path))
@click.option('--data-dir', required=True, type=click.Path(path_type=Path), help='Folder made by timm-lfnsb prepare.')
@COST
def rebalance(folder: Path, out_dir: Path, data_dir: Path, cost: float) -> None:
    """Make the network in FOLDER find rare classes: OUT_DIR's bias loses the prior of the training labels.

    Its classifier is divided by the temperature that fits the validation split, so that plain softmax is calibrated.
    """
    from ..checkpoints.rebalance import rebalance as rebalance_folder
    found = rebalance_folder(folder, out_dir, data_dir, cost)
    (accuracy, accuracy_after), (balanced, balanced_after) = found['accuracy'], found['balanced_accuracy']
    click.echo(f"{out_dir}: tau {found['tau']:.2f}; on validation accuracy {accuracy:.3f} -> {accuracy_after:.3f}, "
               f"balanced accuracy {balanced:.3f} -> {balanced_after:.3f}; temperature {found['temperature']:.3f}")
