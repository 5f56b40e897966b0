"""`timm-lfnsb evaluate`."""
from typing import Any

import click


@click.command()
@click.option('--model', required=True, metavar='NAME', help='A timm name with weights, local-dir:PATH or hf-hub:ID.')
@click.option('--data-dir', required=True, type=click.Path(), help='Folder with SPLIT/LABEL/IMAGE.')
@click.option('--split', default='test', show_default=True, help='Folder of the split.')
@click.option('--out', required=True, type=click.Path(file_okay=False), help='Folder for the report.')
@click.option('--compare', metavar='NAME', help='Another model to compare with on the same images.')
@click.option('--detector', type=click.Choice(['yunet']),
              help='Search whole pictures for the faces, and say how many are found; LABEL may be their number.')
@click.option('--min-score', default=0.7, show_default=True, type=click.FloatRange(0, 1, True, True),
              help="The detector's, as of `predict`.")
@click.option('--enlarge', default=1, show_default=True, type=click.IntRange(min=1), help='Enlarge before the search.')
@click.option('--border', default=0., show_default=True, metavar='FRACTION', type=click.FloatRange(min=0),
              help='Repeat the outermost pixels around what is searched.')
@click.option('--tta', type=click.Choice(['hflip']), help='Average over each image and its mirror image.')
@click.option('--calibration/--no-calibration', default=True, show_default=True,
              help="Apply the model's temperature to the probabilities, if it has one, or take plain softmax.")
@click.option('--batch-size', default=64, show_default=True, type=click.IntRange(min=1))
@click.option('--device', default='auto', show_default=True, help='A torch device; auto takes CUDA or MPS if there.')
@click.option('--workers', default=2, show_default=True, type=click.IntRange(min=0), help='Processes that read images.')
def evaluate(
        model: str, data_dir: str, out: str, split: str, device: str, detector: str | None, min_score: float,
        enlarge: int, border: float, **options: Any,
) -> None:
    """Measure a model on a folder of labelled faces.

    Label folders are matched to the model's classes by name, in any order and with the usual synonyms. Writes
    metrics.json, predictions.csv, confusion.png, reliability.png and coverage.png, with --compare also compare.json;
    with --detector only detection.json.
    """
    if detector and (options['compare'] or options['tta'] or not options['calibration']):
        raise click.UsageError('--compare, --tta and --no-calibration are for crops, without --detector.')
    if detector:
        from ..evaluate.detection import evaluate_detector, format_detection
        click.echo(format_detection(evaluate_detector(
            model, data_dir, out, split, detector, enlarge, border, device=device, min_score=min_score)))
        return
    from ..evaluate.report import evaluate_folder, format_metrics
    click.echo(format_metrics(*evaluate_folder(model, data_dir, out, split, device=device, **options)))
