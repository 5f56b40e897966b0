"""`timm-lfnsb reproduce`."""
from pathlib import Path
from typing import Any

import click

from ..errors import UserError
from ..experiments.plan import EXPERIMENTS, WEIGHTS, Plan
from ..experiments.plan import dry_run as print_commands


@click.group()
def reproduce() -> None:
    """Run the paper's experiments on a data folder, and print the results beside the paper's.

    Each row is a run of timm's train script. Called again, the command runs what is missing: finished rows are kept,
    interrupted ones go on from their last checkpoint. Options for all runs of train.py may follow after --.
    """


def _add_experiment(name: str, title: str) -> None:
    @reproduce.command(name, help=f'{title}.')
    @click.argument('extra', nargs=-1, type=click.UNPROCESSED, metavar='[-- TRAIN.PY OPTIONS]')
    @click.option('--data-dir', required=True, type=click.Path(resolve_path=True, path_type=Path),
                  help='Folder made by prepare.')
    @click.option('--out', required=True, type=click.Path(file_okay=False, resolve_path=True, path_type=Path),
                  help='Folder for runs and results; experiments that share it share their runs.')
    @click.option('--recipe', metavar='NAME_OR_YAML', help='Settings for train.py; default: named like the data set.')
    @click.option('--epochs', type=click.IntRange(min=1), help="In place of the recipe's.")
    @click.option('--seeds', default=1, show_default=True, type=click.IntRange(min=1), help='Runs of each row.')
    @click.option('--script', default='train.py', show_default=True,
                  help="timm's train script: a path, or a name in the folder TIMM_SCRIPTS.")
    @click.option('--jobs', default=1, show_default=True, type=click.IntRange(min=1), help='Runs side by side.')
    @click.option('--dry-run', is_flag=True, help='Print the commands and run nothing.')
    def command(dry_run: bool, **settings: Any) -> None:
        from ..experiments.run import reproduce as run_experiment
        from ..experiments.tables import results_markdown
        plan = Plan(name, **settings)
        if dry_run:
            click.echo(print_commands(plan))
            return
        results, failures = run_experiment(plan, report=lambda line: click.echo(line, err=True))
        click.echo(results_markdown(results))
        if failures:
            failed = f'{len(failures)} runs failed, call the same command again for these.'
            raise UserError('\n'.join([failed, *failures]))

    if name == 'table9':
        click.option('--folds', default=10, show_default=True, type=click.IntRange(min=2))(command)
    else:
        click.option('--subset', type=click.IntRange(min=1), metavar='N',
                     help='Train on N images, a fixed stratified subset.')(command)
        click.option('--split', help="Split to measure on; default: the recipe's validation split.")(command)
    if name.startswith('loss'):
        click.option('--feature-loss', 'losses', multiple=True, metavar='NAME[:WEIGHT[:key=value,...]]',
                     help='A loss to compare, WEIGHT in place of its paper\'s; may be repeated. Default: all.')(command)
    if name == 'losses':
        click.option('--weights', default='both', show_default=True, type=click.Choice(WEIGHTS),
                     help='Train with the weight of the paper, with the best of it, a tenth and ten times on '
                          'validation (one seed, half the epochs), or with both.')(command)


for _name, _title in EXPERIMENTS.items():
    _add_experiment(_name, _title)


@reproduce.command()
@click.argument('files', nargs=-1, type=click.Path(dir_okay=False, path_type=Path))
def show(files: tuple[Path, ...]) -> None:
    """Print result FILES as Markdown; without any, those that come with the package."""
    from ..experiments.tables import committed_results, read_results, results_markdown
    click.echo('\n\n'.join(results_markdown(read_results(path)) for path in files or committed_results()))
