"""The `timm-lfnsb` command."""
from __future__ import annotations

from pathlib import Path

import click

from .version import __version__


@click.group(context_settings=dict(help_option_names=['-h', '--help']))
@click.version_option(__version__)
def main() -> None:
    """Lightweight facial expression recognition with timm."""


@main.command(context_settings=dict(ignore_unknown_options=True, allow_interspersed_args=False))
@click.argument('script')
@click.argument('args', nargs=-1, type=click.UNPROCESSED)
def run(script: str, args: tuple[str, ...]) -> None:
    """Run one of timm's scripts with this zoo registered.

    SCRIPT is a path, or a name such as train.py in the folder that TIMM_SCRIPTS names (a clone of timm). All further
    arguments are the script's own; train.py also takes --cosine-harmony and friends, see `run train.py --help`.
    """
    from .launch import LaunchError, run_script
    try:
        run_script(script, args)
    except LaunchError as error:
        raise click.ClickException(str(error)) from None


@main.command()
@click.option('--model', required=True, metavar='NAME', help='A timm name with weights, local-dir:PATH or hf-hub:ID.')
@click.option('--data-dir', required=True, type=click.Path(), help='Folder with SPLIT/LABEL/IMAGE.')
@click.option('--split', default='test', show_default=True, help='Folder of the split.')
@click.option('--out', required=True, type=click.Path(file_okay=False), help='Folder for the report.')
@click.option('--compare', metavar='NAME', help='Another model to compare with on the same images.')
@click.option('--tta', type=click.Choice(['hflip']), help='Average over each image and its mirror image.')
@click.option('--batch-size', default=64, show_default=True, type=click.IntRange(min=1))
@click.option('--device', default='auto', show_default=True, help='A torch device; auto is CUDA where there is one.')
@click.option('--workers', default=2, show_default=True, type=click.IntRange(min=0), help='Processes that read images.')
def evaluate(
        model: str, data_dir: str, split: str, out: str, compare: str | None, tta: str | None, batch_size: int,
        device: str, workers: int,
) -> None:
    """Measure a model on a folder of labelled faces.

    Label folders are matched to the model's classes by name, in any order and with the usual synonyms. Writes
    metrics.json, predictions.csv, confusion.png and reliability.png, with --compare also compare.json.
    """
    try:
        from .evaluate import EvaluationError, evaluate_folder, format_metrics
    except ModuleNotFoundError as error:
        raise click.ClickException(
            f"evaluate needs {error.name}: pip install 'timm-lfnsb[eval]' brings it.") from None
    try:
        report = evaluate_folder(
            model, data_dir, out, split=split, compare=compare, tta=tta, batch_size=batch_size, device=device,
            workers=workers)
    except (EvaluationError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(format_metrics(*report))


@main.command()
@click.argument('models', nargs=-1)
@click.option('--json', 'as_json', is_flag=True, help='One JSON object a model a line.')
def count(models: tuple[str, ...], as_json: bool) -> None:
    """Count parameters and multiply-accumulates of MODELS (default: all of this zoo), per stage."""
    import json

    from .count import count_model, format_counts
    from .networks import default_cfgs
    try:
        counts = [count_model(name) for name in models or default_cfgs]
    except (RuntimeError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        for item in counts:
            click.echo(json.dumps(item.as_dict()))
    else:
        click.echo(format_counts(counts))


@main.command()
@click.argument('run', type=click.Path(path_type=Path))
@click.argument('out_dir', type=click.Path(path_type=Path))
@click.option('--labels', help='Label names in the order of training, comma separated; only where the run is silent.')
@click.option('--ema/--no-ema', default=True, help='Take the moving average of the weights, if the run kept one.')
@click.option('--half', is_flag=True, help='Store kernels and matrices as float16.')
def pack(run: Path, out_dir: Path, labels: str | None, ema: bool, half: bool) -> None:
    """Turn RUN (a run folder or a checkpoint of train.py) into a timm folder OUT_DIR for 'local-dir:OUT_DIR'."""
    from .pack import PackError
    from .pack import pack as pack_run
    names = [name.strip() for name in labels.split(',')] if labels else None
    try:
        packed = pack_run(run, out_dir, names, ema=ema, half=half)
    except (PackError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{out_dir}: {packed['model']}{' (EMA)' if packed['ema'] else ''} from {packed['checkpoint']}, "
               f"epoch {packed['epoch']}, labels {', '.join(packed['label_names'])}")


@main.group()
def prepare() -> None:
    """Turn a data set's original files into the folder tree that timm's train.py reads.

    Writes TARGET/SPLIT/LABEL/FILE, class_map.txt for --class-map, and dataset.json with counts and a checksum. SOURCE
    is only read; TARGET appears when it is complete.
    """


def _prepare_command(dataset: str, source: Path, target: Path, hard_link: bool = False) -> None:
    from .prepare import PrepareError, format_description, prepare_dataset
    try:
        description, already = prepare_dataset(dataset, source, target, hard_link)
    except PrepareError as error:
        raise click.ClickException(str(error)) from None
    splits = description['splits']
    click.echo(format_description(description))
    click.echo(f"{target} {'is already prepared' if already else 'is ready'}.")
    val_split = next((split for split in ('validation', 'test') if split in splits), None)
    if val_split is None:
        click.echo('There is no validation or test split: hold some images out before you train.')
    elif 'train' in splits:
        # Without --val-split, timm takes the whole tree where a split 'validation' is missing.
        click.echo(f"train.py reads it with --data-dir {target} --class-map {target / 'class_map.txt'} "
                   f"--num-classes {len(description['label_names'])} --val-split {val_split}")


_source = click.argument('source', type=click.Path(path_type=Path))
_target = click.argument('target', type=click.Path(path_type=Path))
_hard_link = click.option('--hard-link', is_flag=True, help='Link the images (same drive only) instead of copying.')


@prepare.command('ferplus')
@_source
@_target
def prepare_ferplus(source: Path, target: Path) -> None:
    """FER+: train.zip, validation.zip, test.zip, or fer2013.csv (icml_face_data.csv) and fer2013new.csv."""
    _prepare_command('ferplus', source, target)


@prepare.command('rafdb')
@_source
@_target
@_hard_link
def prepare_rafdb(source: Path, target: Path, hard_link: bool) -> None:
    """RAF-DB: EmoLabel/list_patition_label.txt and Image/aligned."""
    _prepare_command('rafdb', source, target, hard_link)


@prepare.command('affectnet7')
@_source
@_target
@_hard_link
def prepare_affectnet7(source: Path, target: Path, hard_link: bool) -> None:
    """AffectNet without contempt: train_set and val_set with images and annotations."""
    _prepare_command('affectnet7', source, target, hard_link)


@prepare.command('affectnet8')
@_source
@_target
@_hard_link
def prepare_affectnet8(source: Path, target: Path, hard_link: bool) -> None:
    """AffectNet with contempt: train_set and val_set with images and annotations."""
    _prepare_command('affectnet8', source, target, hard_link)


@prepare.command('folder')
@_source
@_target
@_hard_link
def prepare_folder(source: Path, target: Path, hard_link: bool) -> None:
    """Any tree [SPLIT/]LABEL/IMAGE whose folders carry names of expressions, such as Happy or anger."""
    _prepare_command('folder', source, target, hard_link)


@main.command()
@click.argument('images', nargs=-1, type=click.Path(path_type=Path), metavar='IMAGE_OR_FOLDER...')
@click.option('--sample', is_flag=True, help="Take NASA's portrait of Eileen Collins, which scikit-image brings.")
@click.option('--model', default='lfnsb', show_default=True, metavar='NAME',
              help='A timm name with weights, local-dir:PATH or hf-hub:ID.')
@click.option('--detector', default='haar', show_default=True, type=click.Choice(['haar', 'none']),
              help="OpenCV's frontal face cascade, or none for images that are faces already.")
@click.option('--margin', type=float, metavar='FRACTION',
              help='Fraction of the found box to add on each side; negative cuts tighter. [default: 0]')
@click.option('--json', 'as_json', is_flag=True, help='One JSON object an image a line.')
@click.option('--annotate', type=click.Path(path_type=Path, file_okay=False), metavar='FOLDER',
              help='Write pictures with boxes and probability bars there.')
@click.option('--batch-size', default=32, show_default=True, type=click.IntRange(min=1))
@click.option('--device', default='auto', show_default=True, help='A torch device; auto is CUDA where there is one.')
def predict(
        images: tuple[Path, ...], sample: bool, model: str, detector: str, margin: float | None, as_json: bool,
        annotate: Path | None, batch_size: int, device: str,
) -> None:
    """Find the faces in images and name their expressions.

    Folders are searched recursively. An image that cannot be read is reported, the others go on, and the exit code
    is 1. Boxes are pixels of the upright image: left,top widthxheight.
    """
    import json

    import timm
    from tqdm import tqdm

    from .annotate import annotation_paths, draw_faces, save_picture
    from .faces import ImageError, find_images
    from .recognizer import ExpressionRecognizer
    if sample:
        import skimage
        images = (*images, Path(skimage.__file__).parent / 'data' / 'astronaut.png')
    if not images:
        raise click.UsageError('give images or folders of images, or --sample.')
    if margin is not None and detector == 'none':
        raise click.UsageError('--margin needs a detector: with --detector none the whole image is the face.')
    if annotate and any(path.is_dir() and path.resolve() == annotate.resolve() for path in images):
        raise click.UsageError('--annotate needs another folder than the one the images are in.')
    try:
        found = find_images(images, skip=annotate)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    try:
        network = timm.create_model(model, pretrained=True)
    except Exception as error:  # timm, the Hub and the file formats each raise types of their own
        if 'No pretrained weights exist' in str(error):
            message = f'{model} has no trained weights: give a model that has some, local-dir:PATH or hf-hub:ID.'
        else:
            message = f"cannot load the model {model}: {' '.join(str(error).split())}"
        raise click.ClickException(message) from None
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

    failed = False
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


@main.group()
def weights() -> None:
    """The weights inside the package: list them, measure them again, put new ones there."""


def _release():
    try:
        from . import release
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
    from .pack import PackError
    try:
        release.ship(name, runs, data_dir)
    except (release.ReleaseError, PackError, ValueError, OSError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(release.weights_table())


@main.group()
def recipe() -> None:
    """Settings for timm's train script that come with the package: run train.py --config NAME."""


@recipe.command('list')
def list_recipes() -> None:
    """Print the names, and what each is for."""
    from .recipes import recipe_names, recipe_summary
    names = recipe_names()
    for name in names:
        click.echo(f'{name:<{max(map(len, names))}}  {recipe_summary(name)}')


def _recipe_path(name: str) -> Path:
    from .recipes import recipe_path
    try:
        return recipe_path(name)
    except KeyError as error:
        raise click.ClickException(error.args[0]) from None


@recipe.command()
@click.argument('name')
def show(name: str) -> None:
    """Print the recipe NAME with its explanations."""
    click.echo(_recipe_path(name).read_text(encoding='utf-8'), nl=False)


@recipe.command('path')
@click.argument('name')
def print_recipe_path(name: str) -> None:
    """Print where the file of the recipe NAME is, to copy and change it."""
    click.echo(_recipe_path(name))
