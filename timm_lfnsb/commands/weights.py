"""`timm-lfnsb weights`."""
from __future__ import annotations

from pathlib import Path

import click


@click.group()
def weights() -> None:
    """The weights inside the package: list them, measure them again, put new ones there."""


def _release():
    try:
        from .. import release
    except ModuleNotFoundError as error:
        raise click.ClickException(f"this needs {error.name}: pip install 'timm-lfnsb[eval]' brings it.") from None
    return release


@weights.command('list')
def list_weights() -> None:
    """Print the embedded weights and what was measured of them on the test split."""
    click.echo(_release().weights_table())


@weights.command()
@click.argument('names', nargs=-1)
@click.option('--data-dir', required=True, type=click.Path(path_type=Path), help='Folder made by timm-lfnsb prepare.')
def verify(names: tuple[str, ...], data_dir: Path) -> None:
    """Measure embedded weights (default: all) again; fails where an accuracy is off by more than 0.2 points."""
    release = _release()
    try:
        for name in names or release.embedded_weights():
            for line in release.verify(name, data_dir):
                click.echo(line)
    except (release.ReleaseError, ValueError) as error:
        raise click.ClickException(str(error)) from None


@weights.command()
@click.argument('name')
@click.argument('runs', nargs=-1, required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option('--data-dir', required=True, type=click.Path(path_type=Path), help='Folder made by timm-lfnsb prepare.')
def ship(name: str, runs: tuple[Path, ...], data_dir: Path) -> None:
    """Store the last of RUNS as the embedded weights NAME (ARCH.TAG), with a JSON of what it measures."""
    release = _release()
    from ..pack import PackError
    try:
        release.ship(name, runs, data_dir)
    except (release.ReleaseError, PackError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(release.weights_table())
