"""`timm-lfnsb predict`."""
from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument('images', nargs=-1, type=click.Path(path_type=Path), metavar='IMAGE_OR_FOLDER...')
@click.option('--sample', is_flag=True, help="Take NASA's portrait of Eileen Collins, which scikit-image brings.")
@click.option('--model', default='lfnsb', show_default=True, metavar='NAME',
              help='A timm name with weights, local-dir:PATH, hf-hub:ID or a file that `timm-lfnsb export` wrote.')
@click.option('--detector', default='haar', show_default=True, type=click.Choice(['haar', 'none']),
              help="OpenCV's frontal face cascade, or none for images that are faces already.")
@click.option('--margin', type=float, metavar='FRACTION',
              help='Fraction of the found box to add on each side; negative cuts tighter. [default: 0]')
@click.option('--json', 'as_json', is_flag=True, help='One JSON object an image a line: its faces, or its error.')
@click.option('--annotate', type=click.Path(path_type=Path, file_okay=False), metavar='FOLDER',
              help='Write pictures with boxes and probability bars there.')
@click.option('--batch-size', default=32, show_default=True, type=click.IntRange(min=1))
@click.option('--device', default='auto', show_default=True, help='A torch device; auto is CUDA where there is one.')
def predict(
        images: tuple[Path, ...], sample: bool, model: str, detector: str, margin: float | None, as_json: bool,
        annotate: Path | None, batch_size: int, device: str,
) -> None:
    """Find the faces in images and name their expressions.

    Folders are searched recursively. An image that cannot be read, or a folder without any, is reported, the others
    go on, and the exit code is 1. Boxes are pixels of the upright image: left,top widthxheight.
    """
    import json

    from tqdm import tqdm

    from ..models.loading import load_model
    from ..predict.annotate import annotation_paths, draw_faces, save_picture
    from ..predict.exported import is_exported
    from ..predict.faces import ImageError, find_images
    from ..predict.recognizer import ExpressionRecognizer
    if sample:
        import skimage
        images = (*images, Path(skimage.__file__).parent / 'data' / 'astronaut.png')
    if not images:
        raise click.UsageError('give images or folders of images, or --sample.')
    if margin is not None and detector == 'none':
        raise click.UsageError('--margin needs a detector: with --detector none the whole image is the face.')
    if annotate and any(path.is_dir() and path.resolve() == annotate.resolve() for path in images):
        raise click.UsageError('--annotate needs another folder than the one the images are in.')
    found, problems = [], []
    for path in images:
        try:
            found += find_images([path], skip=annotate)
        except ValueError as error:
            problems.append(str(error))
    if not found:
        raise click.ClickException(' '.join(problems))
    network = model if is_exported(model) else load_model(model, inference=True)
    try:
        recognizer = ExpressionRecognizer(
            network, None if detector == 'none' else detector, margin or 0., batch_size, device)
    except (RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    targets = annotation_paths(found, annotate) if annotate else []

    name_width = max(len('image'), *(len(click.format_filename(path)) for path, _ in found))
    label_width = max(len('expression'), *(len(name) for name in recognizer.label_names))

    def row(*cells: str) -> None:
        widths = name_width, 4, 19, label_width, 5, 0
        click.echo('  '.join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)).rstrip())

    for problem in problems:
        click.echo(problem, err=True)
    failed = bool(problems)
    if not as_json:
        row('image', 'face', 'box', 'expression', 'score', 'runner-up')
    # On a terminal only, and not for a few single images.
    bar = tqdm(found, unit='image', leave=False, disable=None if len(found) > 10 else True)
    try:
        for i, faces in enumerate(recognizer.stream(path for path, _ in bar)):
            path = found[i][0]
            with tqdm.external_write_mode():
                if isinstance(faces, ImageError):
                    click.echo(str(faces), err=True)
                    if as_json:
                        click.echo(json.dumps({'image': str(path), 'error': str(faces)}))
                    failed = True
                    continue
                if as_json:
                    click.echo(json.dumps({'image': str(path), 'faces': [face.as_dict() for face in faces]}))
                elif not faces:
                    row(click.format_filename(path), '-', 'no face found')
                else:
                    for number, face in enumerate(faces, 1):
                        x, y, width, height = face.box
                        others = sorted(face.probabilities.items(), key=lambda item: -item[1])[1:2]
                        row(click.format_filename(path), str(number), f'{x},{y} {width}x{height}', face.label,
                            f'{face.score:.2f}', *(f'{name} {value:.2f}' for name, value in others))
            if annotate:
                save_picture(draw_faces(path, faces), targets[i])
    except (ImageError, OSError, RuntimeError) as error:
        raise click.ClickException(' '.join(str(error).split())) from None
    if failed:
        raise SystemExit(1)
