"""`timm-lfnsb prepare`."""
from __future__ import annotations

from pathlib import Path

import click


@click.group()
def prepare() -> None:
    """Turn a data set's original files into the folder tree that timm's train.py reads.

    Writes TARGET/SPLIT/LABEL/FILE, class_map.txt for --class-map, and dataset.json with counts and a checksum. SOURCE
    is only read; TARGET appears when it is complete.
    """


def _prepare_command(dataset: str, source: Path, target: Path, hard_link: bool = False) -> None:
    from ..data.prepare import PrepareError, format_description, prepare_dataset
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
