"""`timm-lfnsb bench`."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ..errors import UserError
from ..util.files import write_json


def _list_of(kind: click.ParamType) -> Callable[[str], tuple[Any, ...]]:
    """Values with commas between them."""
    return lambda text: tuple(kind.convert(part.strip(), None, None) for part in text.split(','))


@click.command()
@click.argument('models', nargs=-1)
@click.option('--peer', 'peers', multiple=True, metavar='MODEL[@SIZE]', default=('resnet18@112',), show_default=True,
              help='A timm model to compare with, may be repeated; ratios refer to the first. none for none.')
@click.option('--runtime', 'runtimes', metavar='LIST',
              type=_list_of(click.Choice(['eager', 'compiled', 'onnxruntime', 'openvino'])),
              help='Of eager, compiled, onnxruntime, openvino.  [default: eager, and the last two where installed]')
@click.option('--batch', 'batches', default='1,8,32', show_default=True, metavar='LIST',
              type=_list_of(click.IntRange(min=1)), help='Images of a prediction.')
@click.option('--threads', type=click.IntRange(min=1), help="Of every runtime.  [default: torch's choice]")
@click.option('--train', is_flag=True, help='Also time training steps: eager, and compiled where --runtime names it.')
@click.option('--train-batch', default=32, show_default=True, type=click.IntRange(min=2), help='Images of such a step.')
@click.option('--seconds', default=2., show_default=True, type=click.FloatRange(min=0, min_open=True),
              help='Time for each network, runtime and batch.')
@click.option('--rounds', default=10, show_default=True, type=click.IntRange(min=1), help='Number of turns.')
@click.option('--cold-starts', default=3, show_default=True, type=click.IntRange(min=0),
              help='Fresh processes of each network and runtime; 0 leaves out cold start and memory.')
@click.option('--json', 'json_file', type=click.Path(dir_okay=False), help='Write the report.')
@click.option('--plot', type=click.Path(dir_okay=False),
              help='Draw accuracy, or parameters, over time: .png, .svg or .pdf.')
@click.option('--show', type=click.Path(dir_okay=False), metavar='FILE',
              help='Measure nothing: print a report of --json.')
@click.option('--photographs', type=click.IntRange(min=1), metavar='N',
              help='Measure this in place of all else: N photographs as a stream of the recognizer beside a loop.')
def bench(
        models: tuple[str, ...], peers: tuple[str, ...], json_file: str | None, plot: str | None, show: str | None,
        photographs: int | None, **options: Any,
) -> None:
    """Measure the speed of MODELS (NAME or NAME@SIZE; default: lfnsb lfn_small mfn mobilefacenet) beside peers.

    Also files of `timm-lfnsb export` (.onnx, .xml). Networks run in turns, reparameterised and in float32. Ratios to
    the peer may be compared between runs and commits on one machine; milliseconds only within a run.
    """
    from ..bench import measure
    from ..bench import report as reports
    if photographs:
        if show or plot or len(models) > 1:
            raise click.UsageError('--photographs takes one model, and neither --show nor --plot.')
        from ..bench.photographs import format_photographs, measure_photographs
        figures = measure_photographs(
            photographs, (models or ('lfnsb',))[0], rounds=options['rounds'],
            progress=lambda message: click.echo(message, err=True))
        if json_file:
            write_json(Path(json_file), figures)
        click.echo(format_photographs(figures))
        return
    if plot:
        reports.check_figure(plot)
    if show:
        report = reports.load_report(show)
    else:
        settings = measure.Settings(
            models=models or measure.Settings.models, peers=() if peers == ('none',) else peers, **options)
        report = measure.run_benchmark(settings, progress=lambda message: click.echo(message, err=True))
        if json_file:
            write_json(Path(json_file), report)
    click.echo(reports.format_report(report))
    if plot:
        reports.save_figure(report, plot)
    if not show and any('error' in row for row in report['results']):
        raise UserError('some measurements failed; the notes say which.')
