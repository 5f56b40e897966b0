"""`timm-lfnsb evaluate`."""
from typing import Any

import click
from click.core import ParameterSource

FOR_CROPS = 'compare common groups seconds tta calibration batch_size workers'.split()
FOR_PICTURES = 'min_score enlarge border'.split()


@click.command()
@click.option('--model', 'models', required=True, multiple=True, metavar='NAME',
              help='See above; several are compared on the same images.')
@click.option('--data-dir', required=True, type=click.Path(), help='Folder with SPLIT/LABEL/IMAGE.')
@click.option('--split', default='test', show_default=True, help='Folder of the split.')
@click.option('--out', required=True, type=click.Path(file_okay=False), help='Folder for the report.')
@click.option('--compare', metavar='NAME', help='The same as another --model.')
@click.option('--common-classes', 'common', is_flag=True,
              help='Leave out classes that the data or a model lacks, images and answers, and name them.')
@click.option('--groups', type=click.Path(dir_okay=False, exists=True), metavar='FILE.csv',
              help='Figures by group: a column image (LABEL/FILE) and a column for each grouping.')
@click.option('--seconds', default=2., show_default=True, type=click.FloatRange(min=0),
              help='How long to time each of several models; 0 for not at all.')
@click.option('--detector', type=click.Choice(['yunet']),
              help='Search whole pictures for the faces, and say how many are found; LABEL may be their number.')
@click.option('--min-score', default=0.7, show_default=True, type=click.FloatRange(0, 1, True, True),
              help="The detector's, as of `predict`.")
@click.option('--enlarge', default=1, show_default=True, type=click.IntRange(min=1), help='Enlarge before the search.')
@click.option('--border', default=0., show_default=True, metavar='FRACTION', type=click.FloatRange(min=0),
              help='Repeat the outermost pixels around what is searched.')
@click.option('--tta', type=click.Choice(['hflip']), help='Average over each image and its mirror image.')
@click.option('--calibration/--no-calibration', default=True, show_default=True,
              help="Divide the logits by the weights' temperature, if they have one, or take plain softmax.")
@click.option('--batch-size', default=64, show_default=True, type=click.IntRange(min=1))
@click.option('--device', default='auto', show_default=True, help='A torch device; auto takes CUDA or MPS if there.')
@click.option('--workers', default=2, show_default=True, type=click.IntRange(min=0), help='Processes that read images.')
def evaluate(
        models: tuple[str, ...], data_dir: str, out: str, split: str, device: str, compare: str | None,
        detector: str | None, min_score: float, enlarge: int, border: float, **options: Any,
) -> None:
    """Measure models on a folder of labelled faces.

    \b
    A model is one of
      NAME, local-dir:PATH, hf-hub:ID   a timm model with its weights
      FILE.onnx, .xml, .pt2, .pte       a file of timm-lfnsb export
      transformers:NAME_OR_FOLDER       any image-classification pipeline
      MODULE:FUNCTION                   a function of your own

    A function gets a list of uint8 RGB arrays (H, W, 3) and returns probabilities (N, C); its attribute label_names
    names the C, as timm_lfnsb.evaluate.peers:fer does. Label folders are matched to the model's classes by
    name, in any order and with the usual synonyms. Writes metrics.json, predictions.csv, confusion.png, reliability.png
    and coverage.png; with several models those of the others into a folder each, and compare.json and compare.md: one
    table with McNemar's test of each pair and the time of an image. With --detector only detection.json.
    """
    models += (compare,) if compare else ()
    context = click.get_current_context()
    wrong = ['/'.join([*parameter.opts, *parameter.secondary_opts]) for parameter in context.command.params
             if parameter.name in (FOR_CROPS if detector else FOR_PICTURES)
             and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE]
    if detector and len(models) > 1:
        wrong = [*wrong, 'a second --model']
    if wrong:
        raise click.UsageError(f'{wrong[0]} is for crops, without --detector.' if detector else
                               f'{wrong[0]} is for whole pictures: add --detector yunet.')
    if detector:
        from ..evaluate.detection import evaluate_detector, format_detection
        click.echo(format_detection(evaluate_detector(
            models[0], data_dir, out, split, detector, enlarge, border, device=device, min_score=min_score)))
        return
    from ..evaluate.report import evaluate_folder, format_metrics
    click.echo(format_metrics(*evaluate_folder(models, data_dir, out, split, device=device, **options)))
