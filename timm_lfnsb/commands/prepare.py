"""`timm-lfnsb prepare`."""
from pathlib import Path

import click

DATA_SETS = {
    'ferplus': 'FER+: train.zip, validation.zip, test.zip (and votes.csv), or fer2013.csv (icml_face_data.csv) and '
               'fer2013new.csv.',
    'rafdb': 'RAF-DB: EmoLabel/list_patition_label.txt and Image/aligned.',
    'affectnet7': 'AffectNet without contempt: train_set and val_set with images and annotations.',
    'affectnet8': 'AffectNet with contempt: train_set and val_set with images and annotations.',
    'folder': 'Any tree [SPLIT/]LABEL/IMAGE whose folders carry names of expressions, such as Happy or anger.',
}


@click.group()
def prepare() -> None:
    """Turn a data set's original files into the folder tree that timm's train.py reads.

    Writes TARGET/SPLIT/LABEL/FILE, class_map.txt for --class-map, votes.csv for --label-votes where the data set has
    votes, and dataset.json with counts and a checksum. SOURCE is only read; TARGET appears when it is complete.
    """


def _add_data_set(name: str, summary: str) -> None:
    @prepare.command(name, help=summary)
    @click.argument('source', type=click.Path(path_type=Path))
    @click.argument('target', type=click.Path(path_type=Path))
    def command(source: Path, target: Path, hard_link: bool = False) -> None:
        from ..data.prepare import format_description, prepare_dataset
        description, done = prepare_dataset(name, source, target, hard_link)
        click.echo(f'{target} {done}.\n{format_description(description, target)}')

    if name != 'ferplus':  # whose images come out of archives or tables
        click.option('--hard-link', is_flag=True, help='Link the images (same drive only) instead of copying.')(command)


for _name, _summary in DATA_SETS.items():
    _add_data_set(_name, _summary)
