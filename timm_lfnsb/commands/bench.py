"""`timm-lfnsb bench`."""
from __future__ import annotations

from pathlib import Path

import click


def _names(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in value.split(','))))


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in _names(ctx, param, value))
    except ValueError:
        raise click.BadParameter(f"'{value}' is not a list of whole numbers such as 1,8,32.") from None


def _writable(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not Path(value).resolve().parent.is_dir():
        raise click.BadParameter(f"there is no folder {Path(value).resolve().parent} to write it to.")
    return value


@click.command()
@click.argument('models', nargs=-1)
@click.option('--peer', 'peers', multiple=True, metavar='MODEL[@SIZE]', default=('resnet18@112',), show_default=True,
              help='A timm model to compare with, may be repeated; ratios refer to the first. none for none.')
@click.option('--runtime', default='', callback=_names, metavar='LIST',
              help='Of eager, compiled, onnxruntime, openvino.  [default: eager, and the last two where installed]')
@click.option('--batch', default='1,8,32', show_default=True, callback=_numbers, metavar='LIST',
              help='Images of a prediction.')
@click.option('--threads', type=click.IntRange(min=1), help="Of every runtime.  [default: torch's choice]")
@click.option('--plain', is_flag=True, help='Also measure networks without reparameterisation.')
@click.option('--unoptimised', is_flag=True,
              help="Also measure networks from textbook parts (timm's coordinate attention, torch's PReLU and memory "
                   'format).')
@click.option('--floor', is_flag=True,
              help='Also measure what their convolutions take alone, without PReLU and the attention of the blocks.')
@click.option('--profile', is_flag=True, help='Also show where the time goes, operator by operator.')
@click.option('--memory-format', default='contiguous,channels_last', show_default=True, callback=_names, metavar='LIST',
              help='For eager and compiled; the better one is shown.')
@click.option('--train', is_flag=True, help='Also time training steps: eager, and compiled where --runtime names it.')
@click.option('--train-batch', default=32, show_default=True, type=click.IntRange(min=2), help='Images of such a step.')
@click.option('--seconds', default=2., show_default=True, type=click.FloatRange(min=0, min_open=True),
              help='Time for each network, runtime and batch; three times that where the machine is noisy.')
@click.option('--rounds', default=10, show_default=True, type=click.IntRange(min=1), help='Least number of turns.')
@click.option('--cold-starts', default=3, show_default=True, type=click.IntRange(min=0),
              help='Fresh processes of each network and runtime; 0 leaves out cold start and memory.')
@click.option('--device', default='cpu', show_default=True, type=click.Choice(['cpu', 'cuda']))
@click.option('--amp', is_flag=True, help='bfloat16 autocast, for eager and compiled.')
@click.option('--json', 'json_file', type=click.Path(dir_okay=False), callback=_writable, help='Write the report.')
@click.option('--plot', type=click.Path(dir_okay=False), callback=_writable,
              help='Draw accuracy, or parameters, over time: .png, .svg or .pdf.')
@click.option('--show', type=click.Path(dir_okay=False), metavar='FILE',
              help='Measure nothing: print a report of --json as markdown.')
def bench(
        models: tuple[str, ...], peers: tuple[str, ...], runtime: tuple[str, ...], batch: tuple[int, ...],
        threads: int | None, plain: bool, unoptimised: bool, floor: bool, profile: bool,
        memory_format: tuple[str, ...], train: bool, train_batch: int, seconds: float, rounds: int, cold_starts: int,
        device: str, amp: bool, json_file: str | None, plot: str | None, show: str | None,
) -> None:
    """Measure the speed of MODELS (NAME or NAME@SIZE; default: lfnsb lfn_small mfn mobilefacenet) beside peers.

    Also files of `timm-lfnsb export` (.onnx, .xml). Networks run in turns, reparameterised and in float32. Ratios to
    the peer may be compared between runs and commits on one machine; milliseconds only within a run. Ctrl-C ends a run
    early and keeps what was measured.
    """
    from ..bench import measure as module
    from ..bench import report as bench_report
    if plot:
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError:
            raise click.ClickException("--plot needs matplotlib: pip install 'timm-lfnsb[eval]' brings it.") from None
        if Path(plot).suffix[1:] not in Figure().canvas.get_supported_filetypes():
            raise click.ClickException(f'--plot {plot}: give a file name that ends in .png, .svg or .pdf.')
    try:
        if show:
            report = bench_report.load_report(show)
            click.echo(bench_report.format_markdown(report))
        else:
            report = module.run_benchmark(
                module.Settings(
                    models=models or module.DEFAULT_MODELS, peers=() if peers == ('none',) else peers, runtimes=runtime,
                    batches=batch, threads=threads, plain=plain, unoptimised=unoptimised, floor=floor,
                    profile=profile, memory_formats=memory_format, train=train, train_batch=train_batch,
                    seconds=seconds, rounds=rounds, cold_starts=cold_starts, device=device, amp=amp),
                progress=lambda message: click.echo(message, err=True),
                save=lambda report: bench_report.save_report(report, json_file) if json_file else None)
            click.echo(bench_report.format_report(report))
        if plot:
            bench_report.save_figure(report, plot)
    except (module.BenchError, OSError) as error:
        raise click.ClickException(str(error)) from None
    if not report['complete'] and not show:
        raise SystemExit(130)
    failed = [row for row in report['results'] if 'error' in row]
    if failed and not show:
        raise click.ClickException(
            f'{len(failed)} of {len(report["results"])} measurements failed; the table says which.')
