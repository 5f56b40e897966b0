"""`timm-lfnsb reproduce`."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

# Not imported from the logic, which is slow to import; a test compares the two.
EXPERIMENTS = {
    'table2': 'the networks: parameters, MACs and accuracy',
    'table3': 'cross entropy against cross entropy + each variant of the Cosine-Harmony loss',
    'table4': 'alpha of the Cosine-Harmony loss from 0.1 to 0.5',
    'table5': 'lfn_small against lfnsb, which has Spatial Bias',
    'table9': 'cross-validation over all images, near-identical ones kept in one fold',
    'figure5': 'loss curves without and with the Cosine-Harmony loss',
    'figure6': "confusion matrix of the recipe's network",
}

OPTIONS: list[Callable[[Any], Any]] = [
    click.argument('extra', nargs=-1, type=click.UNPROCESSED, metavar='[-- TRAIN.PY OPTIONS]'),
    click.option('--data-dir', required=True, type=click.Path(path_type=Path), help='Folder made by prepare.'),
    click.option('--out', required=True, type=click.Path(file_okay=False, path_type=Path),
                 help='Folder for runs and results; experiments that share it share their runs.'),
    click.option('--recipe', metavar='NAME_OR_YAML', help="Settings for train.py; default: named like the data set."),
    click.option('--epochs', type=click.IntRange(min=1), help="In place of the recipe's."),
    click.option('--seeds', default=1, show_default=True, type=click.IntRange(min=1), help='Runs of each row.'),
    click.option('--subset', type=click.IntRange(min=1), metavar='N',
                 help='Train on N images, a fixed stratified subset.'),
    click.option('--split', help="Split to measure on; default: the recipe's validation split."),
    click.option('--checkpoint', type=click.Choice(['best', 'last']), default='best', show_default=True,
                 help='Epoch to measure: the best on the validation split, or the last.'),
    click.option('--script', default='train.py', show_default=True,
                 help="timm's train script: a path, or a name in the folder TIMM_SCRIPTS."),
    click.option('--jobs', default=1, show_default=True, type=click.IntRange(min=1), help='Runs side by side.'),
    click.option('--dry-run', is_flag=True, help='Print the commands and an estimate of the time, and run nothing.'),
]


@click.group()
def reproduce() -> None:
    """Run the paper's experiments on a data folder, and print the results beside the paper's.

    Each row is a run of timm's train script. Called again, the command runs what is missing: finished rows are kept,
    interrupted ones go on from their last checkpoint. Options for all runs of train.py may follow after --.
    """


def _add_experiment(name: str, summary: str) -> None:
    def callback(dry_run: bool, **settings: Any) -> None:
        try:
            from ..data.subsets import FoldError
            from ..errors import LaunchError
            from ..evaluate.predictions import EvaluationError
            from ..experiments import run as logic
            from ..train.checkpoints import PackError
        except ModuleNotFoundError as error:
            raise click.ClickException(
                f"reproduce needs {error.name}: pip install 'timm-lfnsb[eval]' brings it.") from None
        try:
            plan = logic.Plan(name, **settings)
            if dry_run:
                click.echo(logic.dry_run(plan))
                return
            results, failures = logic.reproduce(plan, report=lambda line: click.echo(line, err=True))
        except (logic.ReproduceError, FoldError, LaunchError, PackError, EvaluationError, OSError) as error:
            raise click.ClickException(str(error)) from None
        except KeyboardInterrupt:
            raise click.ClickException('interrupted; the same command goes on.') from None
        click.echo(logic.format_results(results))
        if failures:
            raise click.ClickException(
                f'{len(failures)} of {len(plan.runs)} runs failed, call the same command again for these.\n'
                + '\n'.join(failures))

    callback.__doc__ = f'{summary[0].upper()}{summary[1:]}.'
    if name == 'table9':
        callback = click.option(
            '--folds', default=10, show_default=True, type=click.IntRange(min=2), help='Number of folds.')(callback)
    for option in reversed(OPTIONS):
        callback = option(callback)
    reproduce.command(name)(callback)


for _name, _summary in EXPERIMENTS.items():
    _add_experiment(_name, _summary)


@reproduce.command()
@click.argument('files', nargs=-1, type=click.Path(dir_okay=False, path_type=Path))
def show(files: tuple[Path, ...]) -> None:
    """Print result FILES as Markdown; without any, those that come with the package."""
    from ..experiments.run import ReproduceError, committed_results, results_markdown
    paths = list(files) or committed_results()
    if not paths:
        raise click.ClickException('this package holds no results yet: name the JSON files of your own.')
    try:
        click.echo('\n\n'.join(results_markdown(path) for path in paths))
    except ReproduceError as error:
        raise click.ClickException(str(error)) from None
