"""`timm-lfnsb predict`."""
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument('images', nargs=-1, type=click.Path(path_type=Path), metavar='IMAGE_OR_FOLDER...')
@click.option('--sample', is_flag=True, help="Take NASA's portrait of Eileen Collins, which scikit-image brings.")
@click.option('--model', default='lfnsb', show_default=True, metavar='NAME',
              help='A timm name with weights, local-dir:PATH, hf-hub:ID or a file that `timm-lfnsb export` wrote.')
@click.option('--detector', default='yunet', show_default=True, metavar='yunet|none',
              help="OpenCV's detector YuNet, or none for images that are faces already.")
@click.option('--min-score', default=0.7, show_default=True, type=click.FloatRange(0, 1, True, True),
              help='Score of the faintest face that the detector may report.')
@click.option('--turn/--no-turn', default=True, show_default=True,
              help='Whether to search pictures without an upright face turned by 90, 180 and 270 degrees, too.')
@click.option('--margin', default=0., show_default=True, metavar='FRACTION',
              help='Fraction of the found box to add on each side; negative cuts tighter.')
@click.option('--align', is_flag=True, help='Cut faces out by eyes, nose and mouth in place of their boxes.')
@click.option('--calibration/--no-calibration', default=True, show_default=True,
              help="Divide the logits by the weights' temperature, if they have one, or take plain softmax.")
@click.option('--unsure', default=0., metavar='P', type=click.FloatRange(0, 1),
              help='Say "unsure" of faces whose highest probability is below P.')
@click.option('--json', 'as_json', is_flag=True, help='One JSON object an image a line: its faces, or its error.')
@click.option('--annotate', type=click.Path(path_type=Path, file_okay=False), metavar='FOLDER',
              help='Write pictures with boxes and probability bars there.')
@click.option('--batch-size', default=8, show_default=True, type=click.IntRange(min=1))
@click.option('--workers', type=click.IntRange(min=0), help='Threads that read and search; one a core by default.')
@click.option('--device', default='auto', show_default=True, help='A torch device; auto takes CUDA or MPS if there.')
@click.option('--runtime', default='torch', show_default=True, type=click.Choice(['torch', 'onnxruntime', 'auto']),
              help='onnxruntime: export the model once into a cache, and run that; auto: if it is faster here.')
def predict(images: tuple[Path, ...], sample: bool, detector: str, **options: Any) -> None:
    """Find the faces in images and name their expressions.

    Folders are searched recursively. An image that cannot be read, or a folder without any, is reported, the others
    go on, and the exit code is 1. Boxes are pixels of the upright image: left,top widthxheight.
    """
    if not images and not sample:
        raise click.UsageError('give images or folders of images, or --sample.')
    from ..data.images import sample_picture
    from ..predict.run import predict_lines
    if sample:
        images = (*images, sample_picture())
    failed = False
    for line, kind in predict_lines(images, detector=None if detector == 'none' else detector, **options):
        click.echo(line, err=kind != 'result')
        failed |= kind == 'problem'
    if failed:
        raise SystemExit(1)
