"""Tests of `timm-lfnsb prepare` on small synthetic copies of every layout, and on the real FER+ zips where they are."""
from __future__ import annotations

import hashlib
import io
import json
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from support import ROOT
from timm.data import create_dataset

from timm_lfnsb.cli import main
from timm_lfnsb.data import prepare
from timm_lfnsb.data.prepare import PrepareError, prepare_dataset, top_vote

EIGHT = ['neutral', 'happiness', 'sadness', 'surprise', 'fear', 'disgust', 'anger', 'contempt']
SEVEN = EIGHT[:7]


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ['prepare', *map(str, args)])


def assert_refused(result: Result, *words: str) -> None:
    """One clear sentence on stderr, exit code 1, no traceback."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    message = result.output.strip().splitlines()[-1]
    assert message.startswith('Error: ') and message.endswith('.')
    assert not [word for word in words if word not in message], message


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def images(folder: Path) -> set[str]:
    return {name for name in tree(folder) if '/' in name}


def described(folder: Path) -> dict:
    return json.loads((folder / 'dataset.json').read_text())


def encode(seed: int, kind: str = 'png', mode: str = 'L', size: int = 48) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size) if mode == 'L' else (size, size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# Small copies of the layouts


def make_zips(folder: Path, **members: dict[str, bytes]) -> Path:
    """One zip for each split with a face for every label, plus the given extra members."""
    folder.mkdir(exist_ok=True)
    for number, split in enumerate(('train', 'validation', 'test')):
        with zipfile.ZipFile(folder / f'{split}.zip', 'w') as archive:
            archive.writestr(f'{split}/', b'')
            for i, label in enumerate(EIGHT):
                archive.writestr(f'{split}/{label}/fer{number}{i:06}.png', encode(10 * number + i))
            for name, content in members.get(split, {}).items():
                archive.writestr(name, content)
    return folder


# Seed of the pixels, usage, ten votes (neutral happiness surprise sadness anger disgust fear contempt unknown NF),
# and where the face has to end, by hand.
FER = [
    (0, 'Training', (8, 0, 0, 0, 0, 0, 1, 0, 1, 0), 'train/neutral'),
    (1, 'Training', (0, 6, 4, 0, 0, 0, 0, 0, 0, 0), 'train/happiness'),
    (2, 'Training', (0, 0, 4, 3, 3, 0, 0, 0, 0, 0), 'train/surprise'),
    (3, 'Training', (3, 0, 0, 4, 0, 0, 0, 0, 3, 0), 'train/sadness'),
    (4, 'Training', (5, 5, 0, 0, 0, 0, 0, 0, 0, 0), None),      # tie
    (5, 'Training', (0, 0, 0, 0, 5, 0, 0, 0, 5, 0), None),      # tie with unknown
    (6, 'Training', (0, 0, 0, 0, 0, 0, 0, 0, 6, 4), None),      # unknown
    (7, 'Training', (0, 0, 0, 0, 0, 0, 0, 0, 0, 10), None),     # not a face, no image name
    (0, 'Training', (9, 0, 0, 0, 0, 0, 0, 0, 1, 0), None),      # duplicate within train
    (20, 'Training', (0, 0, 0, 0, 9, 0, 0, 0, 1, 0), None),     # also in test
    (10, 'PublicTest', (0, 0, 0, 0, 9, 0, 0, 0, 1, 0), 'validation/anger'),
    (11, 'PublicTest', (0, 0, 0, 0, 0, 4, 3, 3, 0, 0), 'validation/disgust'),
    (21, 'PublicTest', (0, 0, 0, 0, 0, 4, 3, 3, 0, 0), None),   # also in test, under another label
    (20, 'PrivateTest', (0, 0, 0, 0, 0, 0, 9, 0, 1, 0), 'test/fear'),
    (21, 'PrivateTest', (0, 0, 0, 0, 0, 0, 0, 9, 1, 0), 'test/contempt'),
    (4, 'PrivateTest', (0, 9, 0, 0, 0, 0, 0, 0, 1, 0), 'test/happiness'),  # its copy in train was no duplicate: a tie
]


def fer_pixels(seed: int) -> list[int]:
    return list(random.Random(seed).randbytes(48 * 48))


def make_csv(folder: Path, kaggle: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    pixels = ['emotion, Usage, pixels' if kaggle else 'emotion,pixels,Usage']
    votes = ['Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF']
    for i, (seed, usage, counts, _) in enumerate(FER):
        values = ' '.join(map(str, fer_pixels(seed)))
        pixels.append(f'0,{usage},{values}' if kaggle else f'0,"{values}",{usage}')
        name = '' if counts[-1] == 10 else f'fer{i:07}.png'
        votes.append(','.join(map(str, (usage, name, *counts))))
    (folder / ('icml_face_data.csv' if kaggle else 'fer2013.csv')).write_text('\n'.join(pixels) + '\n')
    (folder / 'fer2013new.csv').write_bytes(('\r\n'.join(votes) + '\r\n').encode())
    return folder


# RAF-DB's numbering, by hand.
RAF = {1: 'surprise', 2: 'fear', 3: 'disgust', 4: 'happiness', 5: 'sadness', 6: 'anger', 7: 'neutral'}


def make_rafdb(folder: Path) -> Path:
    lines = []
    for split in ('train', 'test'):
        for number in RAF:
            lines.append(f'{split}_{number:05}.jpg {number}')
            write(folder / 'Image' / 'aligned' / f'{split}_{number:05}_aligned.jpg', encode(number, 'jpeg', 'RGB', 100))
    write(folder / 'EmoLabel' / 'list_patition_label.txt', '\n'.join(lines).encode())
    return folder


def make_affectnet(folder: Path) -> Path:
    """Class numbers 0 to 10 in each set, as text in the training set and as numbers in the other."""
    for name in ('train_set', 'val_set'):
        for number in range(11):
            write(folder / name / 'images' / f'{100 + number}.jpg', encode(number, 'jpeg', 'RGB', 64))
            write(folder / name / 'annotations' / f'{100 + number}_exp.npy', b'')
            np.save(folder / name / 'annotations' / f'{100 + number}_exp.npy',
                    str(number) if name == 'train_set' else np.int64(number))
            np.save(folder / name / 'annotations' / f'{100 + number}_val.npy', 0.5)
    return folder


def make_folder(folder: Path) -> Path:
    for split in ('Train', 'val', 'test'):
        for i, label in enumerate(('Neutral', 'happy', 'SAD', 'surprise', 'fearful', 'disgust', 'angry')):
            write(folder / split / label / f'{i}.png', encode(i))
    write(folder / 'Train' / 'happy' / 'Thumbs.db', b'')
    (folder / '__MACOSX').mkdir()
    return folder


LAYOUTS = {
    'ferplus': make_zips, 'rafdb': make_rafdb, 'affectnet7': make_affectnet, 'affectnet8': make_affectnet,
    'folder': make_folder,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / 'source'


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / 'target'


# What is written


def test_ferplus_zips(source, target):
    result = run('ferplus', make_zips(source), target)
    assert result.exit_code == 0, result.output
    assert images(target) == {
        f'{split}/{label}/fer{n}{i:06}.png'
        for n, split in enumerate(('train', 'validation', 'test')) for i, label in enumerate(EIGHT)}
    assert (target / 'test' / 'surprise' / 'fer2000003.png').read_bytes() == encode(23)
    assert '--val-split validation' in result.output


@pytest.mark.parametrize('kaggle', [False, True])
def test_ferplus_csv(source, target, kaggle):
    assert run('ferplus', make_csv(source, kaggle), target).exit_code == 0
    expected = {f'{place}/fer{i:07}.png': seed for i, (seed, _, _, place) in enumerate(FER) if place}
    assert images(target) == set(expected)
    for name, seed in expected.items():
        with Image.open(target / name) as image:
            assert (image.mode, image.size, image.format) == ('L', (48, 48), 'PNG')
            assert list(image.tobytes()) == fer_pixels(seed)
    splits = described(target)['splits']
    assert splits['train']['dropped'] == {
        'tie for most votes': 2, 'most votes for unknown': 1, 'most votes for not a face': 1,
        'exact duplicate of a kept image': 2}
    assert splits['validation']['dropped'] == {'exact duplicate of a kept image': 1}
    assert splits['test']['dropped'] == {}


def test_ferplus_name_listed_twice(source, target):
    votes = make_csv(source) / 'fer2013new.csv'
    votes.write_text(votes.read_text().replace('fer0000001.png', 'fer0000000.png'))
    assert run('ferplus', source, target).exit_code == 0
    assert described(target)['splits']['train']['dropped']['image name listed twice'] == 1
    assert 'train/neutral/fer0000000.png' in images(target)
    assert described(target)['splits']['train']['counts']['happiness'] == 0


@pytest.mark.parametrize('votes, column', [
    ((4, 0, 0, 1, 3, 2, 0, 0, 0, 0), 'neutral'), ((0, 0, 0, 0, 0, 0, 3, 2, 2, 2), 'fear'),
    ((0, 0, 0, 0, 0, 0, 0, 2, 1, 3), 'NF'), ((0,) * 10, None), ((0, 3, 0, 0, 0, 0, 0, 0, 3, 0), None),
])
def test_top_vote(votes, column):
    assert top_vote(votes) == column


@pytest.mark.parametrize('parent', ['', 'basic'])
def test_rafdb(source, target, parent):
    make_rafdb(source / parent)
    result = run('rafdb', source, target)
    assert result.exit_code == 0, result.output
    assert images(target) == {
        f'{split}/{label}/{split}_{number:05}_aligned.jpg'
        for split in ('train', 'test') for number, label in RAF.items()}
    assert described(target)['label_names'] == SEVEN
    assert '--val-split test' in result.output  # timm would otherwise validate on the whole tree


@pytest.mark.parametrize('count', [7, 8])
def test_affectnet(source, target, count):
    assert run(f'affectnet{count}', make_affectnet(source), target).exit_code == 0
    assert images(target) == {
        f'{split}/{label}/{100 + number}.jpg'
        for split in ('train', 'validation') for number, label in enumerate(EIGHT[:count])}
    dropped = {'no expression (class 8 or higher)': 3}
    if count == 7:
        dropped['contempt (not among the 7 classes)'] = 1
    assert [split['dropped'] for split in described(target)['splits'].values()] == [dropped, dropped]
    assert described(target)['name'] == f'affectnet{count}'


def test_folder(source, target):
    result = run('folder', make_folder(source), target)
    assert result.exit_code == 0, result.output
    order = ['neutral', 'happiness', 'sadness', 'surprise', 'fear', 'disgust', 'anger']
    assert images(target) == {
        f'{split}/{label}/{i}.png' for split in ('train', 'validation', 'test') for i, label in enumerate(order)}
    assert 'fearful as fear' in result.output and 'SAD as sadness' in result.output
    assert described(target)['splits']['train']['dropped'] == {'not a png or jpg file': 1}


def test_folder_without_splits_and_with_contempt(source, target):
    for label in ('Contempt', 'happy'):
        write(source / label / 'a.PNG', encode(0))
    result = run('folder', source, target)
    assert images(target) == {'train/contempt/a.PNG', 'train/happiness/a.PNG'}
    assert described(target)['label_names'] == EIGHT
    assert 'no split folders' in result.output and 'hold some images out' in result.output


@pytest.mark.parametrize('dataset', LAYOUTS)
def test_timm_reads_the_canonical_order(source, target, dataset):
    prepare_dataset(dataset, LAYOUTS[dataset](source), target)
    order = SEVEN if dataset in ('rafdb', 'affectnet7', 'folder') else EIGHT
    assert (target / 'class_map.txt').read_text().split() == order
    for split in described(target)['splits']:
        data = create_dataset('', root=str(target), split=split, class_map=str(target / 'class_map.txt'))
        names = [Path(name).parent.name for name in data.filenames(absolute=True)]
        assert sorted(names) == sorted(order)
        assert [order[label] for _, label in data] == names


@pytest.mark.parametrize('dataset', LAYOUTS)
def test_counts_and_checksum(source, target, dataset):
    result = run(dataset, LAYOUTS[dataset](source), target)
    description = described(target)
    files = {name: content for name, content in tree(target).items() if '/' in name}
    for split, values in description['splits'].items():
        assert values['total'] == sum(values['counts'].values()) == sum(name.startswith(f'{split}/') for name in files)
    lines = [f'{hashlib.sha256(files[name]).hexdigest()}  {name}\n' for name in sorted(files)]
    assert description['sha256'] == hashlib.sha256(''.join(lines).encode()).hexdigest()
    table = [line.split() for line in result.output.splitlines()]
    assert list(description['splits']) in table
    for label in description['label_names']:
        assert [label, *(str(values['counts'][label]) for values in description['splits'].values())] in table
    assert ['total', *(str(values['total']) for values in description['splits'].values())] in table


def test_hard_link_and_copy(source, target, tmp_path):
    make_rafdb(source)
    original = source / 'Image' / 'aligned' / 'train_00001_aligned.jpg'
    assert run('rafdb', source, target).exit_code == 0
    assert not os.path.samefile(original, target / 'train' / 'surprise' / original.name)
    assert run('rafdb', source, tmp_path / 'linked', '--hard-link').exit_code == 0
    assert os.path.samefile(original, tmp_path / 'linked' / 'train' / 'surprise' / original.name)
    assert tree(target) == tree(tmp_path / 'linked')


def test_hard_link_impossible(source, target, monkeypatch):
    def link(*args):
        raise OSError(18, 'Invalid cross-device link')
    monkeypatch.setattr(os, 'link', link)
    assert_refused(run('rafdb', make_rafdb(source), target, '--hard-link'), 'leave --hard-link out', 'cross-device')
    assert os.listdir(target.parent) == ['source']


# Repeats, interruptions, targets that hold something else


@pytest.mark.parametrize('dataset', LAYOUTS)
def test_repeat(source, target, dataset):
    LAYOUTS[dataset](source)
    assert run(dataset, source, target).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in target.rglob('*')}
    result = run(dataset, source, target)
    assert result.exit_code == 0 and 'already prepared' in result.output
    assert before == {path: path.stat().st_mtime_ns for path in target.rglob('*')}
    assert set(os.listdir(target.parent)) == {'source', 'target'}


@pytest.mark.parametrize('change', ['gone', 'edited', 'extra', 'class map', 'source', 'json'])
def test_changed_target_is_refused(source, target, change):
    make_folder(source)
    prepare_dataset('folder', source, target)
    image = target / 'train' / 'anger' / '6.png'
    if change == 'gone':
        image.unlink()
    elif change == 'edited':
        image.write_bytes(encode(99))
    elif change == 'extra':
        write(target / 'train' / 'anger' / 'new.png', encode(99))
    elif change == 'class map':
        (target / 'class_map.txt').write_text('\n'.join(sorted(SEVEN)))
    elif change == 'source':
        write(source / 'test' / 'angry' / 'new.png', encode(99))
    else:
        (target / 'dataset.json').write_text('{')
    before = tree(target)
    assert_refused(run('folder', source, target), 'target', 'something else')
    assert tree(target) == before


def test_foreign_target(source, target):
    make_rafdb(source)
    target.mkdir()
    assert run('rafdb', source, target).exit_code == 0  # an empty folder is welcome
    write(source.parent / 'thesis' / 'chapter.tex', b'text')
    assert_refused(run('rafdb', source, source.parent / 'thesis'), 'thesis', 'something else')
    assert_refused(run('rafdb', source, source.parent / 'thesis' / 'chapter.tex'), 'chapter.tex', 'something else')
    assert_refused(run('rafdb', source, source / 'prepared'), 'inside the source')
    assert tree(source.parent / 'thesis') == {'chapter.tex': b'text'}


@pytest.mark.parametrize('empty_target', [False, True])
def test_interrupted_run(source, target, monkeypatch, empty_target):
    make_rafdb(source)
    if empty_target:
        target.mkdir()
    check, calls = prepare._check_image, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        check(*args)

    monkeypatch.setattr(prepare, '_check_image', interrupt)
    result = run('rafdb', source, target)
    assert result.exit_code == 1 and 'Aborted!' in result.output
    assert set(os.listdir(target.parent)) == ({'source', 'target'} if empty_target else {'source'})
    assert not empty_target or not os.listdir(target)
    monkeypatch.undo()
    assert run('rafdb', source, target).exit_code == 0


def test_full_disk(source, target, monkeypatch):
    def write_bytes(*args):
        raise OSError(28, 'No space left on device')
    make_folder(source)
    monkeypatch.setattr(Path, 'write_bytes', write_bytes)
    assert_refused(run('folder', source, target), 'target', 'No space left')
    assert os.listdir(target.parent) == ['source']


# Damaged and missing files


def test_source_missing(source, target):
    assert_refused(run('folder', source, target), 'source', 'is not a folder')
    source.mkdir()
    assert_refused(run('ferplus', source, target), 'train.zip', 'fer2013new.csv', 'icml_face_data.csv')
    assert_refused(run('rafdb', source, target), 'list_patition_label.txt')
    assert_refused(run('affectnet8', source, target), os.path.join('train_set', 'images'))
    assert_refused(run('folder', source, target), 'holds no images')


def test_zip_missing(source, target):
    (make_zips(source) / 'validation.zip').unlink()
    assert_refused(run('ferplus', source, target), 'validation.zip is missing')


@pytest.mark.parametrize('damage', ['crc', 'truncated', 'not a zip'])
def test_zip_damaged(source, target, damage):
    path = make_zips(source) / 'test.zip'
    content = bytearray(path.read_bytes())
    if damage == 'crc':
        content[content.index(encode(23)) + 100] ^= 0xff
    path.write_bytes({'crc': content, 'truncated': content[:-500], 'not a zip': b'<html>'}[damage])
    assert_refused(run('ferplus', source, target), 'test.zip is damaged', *(
        ['test/surprise/fer2000003.png'] if damage == 'crc' else []))
    assert not target.exists()


@pytest.mark.parametrize('member', [
    '../../evil.png', '/etc/evil.png', 'train/neutral/../../../evil.png', 'train/../evil.png', 'train/neutral/..',
    'train/neutral/a\\..\\..\\evil.png', 'train/neutral/C:evil.png', 'train/evil.png', 'train/neutral/read.me',
])
def test_zip_member_outside_the_tree(source, target, member):
    make_zips(source, train={member: encode(99)})
    result = run('ferplus', source, target)
    assert_refused(result, 'train.zip holds')
    assert set(os.listdir(target.parent)) == {'source'}
    assert not list(target.parent.parent.rglob('evil*'))


def test_zip_unknown_label_wrong_split_broken_image(source, target):
    make_zips(source, train={'train/boredom/fer0000099.png': encode(99)})
    assert_refused(run('ferplus', source, target), 'train/boredom/fer0000099.png', "'boredom'", ', '.join(EIGHT))
    make_zips(source, validation={'test/fear/fer0000099.png': encode(99)})
    assert_refused(run('ferplus', source, target), 'validation.zip', 'test/fear/fer0000099.png')
    make_zips(source, train={'train/fear/fer0000099.png': encode(99)[:500]})
    assert_refused(run('ferplus', source, target), 'train/fear/fer0000099.png', 'not a readable image')


@pytest.mark.parametrize('damage, words', [
    ('short pixels', ['fer2013.csv, line 4', '48 x 48']),
    ('pixel 256', ['fer2013.csv, line 4', '0 to 255']),
    ('cut in a row', ['fer2013.csv', 'cannot be read as csv']),
    ('cut between rows', ['fer2013.csv ends before line 10', 'cut off']),
    ('cut votes', ['fer2013new.csv ends before line 16', 'cut off']),
    ('cut votes in a row', ['fer2013new.csv, line 17', 'values where the header names 12']),
    ('no column', ['fer2013new.csv', 'no column contempt']),
    ('other order', ['line 2', 'PrivateTest', 'Training']),
    ('unknown usage', ['line 2', 'Holdout']),
    ('vote', ['fer2013new.csv, line 2', 'not a number']),
    ('binary', ['fer2013new.csv', 'cannot be read as csv']),
    ('path', ['fer2013new.csv, line 2', '../../evil.png']),
])
def test_csv_damaged(source, target, damage, words):
    make_csv(source)
    pixels_csv, votes_csv = source / 'fer2013.csv', source / 'fer2013new.csv'
    pixels, votes = pixels_csv.read_text(), votes_csv.read_text()
    rows, vote_rows = pixels.splitlines(keepends=True), votes.splitlines(keepends=True)
    third = ' '.join(map(str, fer_pixels(2)))
    if damage == 'short pixels':
        pixels = pixels.replace(third, third[:300])
    elif damage == 'pixel 256':
        pixels = pixels.replace(third, third.replace(third.split()[0], '256', 1))
    elif damage == 'cut in a row':
        pixels = ''.join(rows)[:-3000]
    elif damage == 'cut between rows':
        pixels = ''.join(rows[:9])
    elif damage == 'cut votes':
        votes = ''.join(vote_rows[:15])
    elif damage == 'cut votes in a row':
        votes = votes.rstrip()[:-6]
    elif damage == 'no column':
        votes = votes.replace('contempt', 'despise', 1)
    elif damage == 'other order':
        votes = ''.join([vote_rows[0], *vote_rows[:0:-1]])
    elif damage == 'unknown usage':
        pixels, votes = pixels.replace('Training', 'Holdout'), votes.replace('Training', 'Holdout')
    elif damage == 'vote':
        votes = votes.replace('png,8', 'png,eight', 1)
    elif damage == 'path':
        votes = votes.replace('fer0000000.png', '../../evil.png')
    pixels_csv.write_text(pixels)
    votes_csv.write_bytes(b'\xff\xfe\x00' if damage == 'binary' else votes.encode())
    assert_refused(run('ferplus', source, target), *words)
    assert not target.exists()


def test_rafdb_damaged(source, target):
    make_rafdb(source)
    image = source / 'Image' / 'aligned' / 'test_00003_aligned.jpg'
    content = image.read_bytes()
    image.write_bytes(content[:len(content) // 2])
    assert_refused(run('rafdb', source, target), image.name, 'not a readable image')
    image.unlink()
    assert_refused(run('rafdb', source, target), image.name, 'missing')
    image.write_bytes(content)
    label_file = source / 'EmoLabel' / 'list_patition_label.txt'
    lines = label_file.read_text()
    for bad in ('train_00001.jpg 8', 'train_00001.jpg', '../../evil.jpg 1', 'val_00001.jpg 1'):
        label_file.write_text(f'{lines}\n{bad}\n')
        assert_refused(run('rafdb', source, target), 'line 15', bad)
    label_file.write_text(f'{lines}\ntrain_00001.jpg 1\n')
    assert_refused(run('rafdb', source, target), 'two images', 'train/surprise/train_00001_aligned.jpg')
    label_file.write_bytes(b'\xff\xfe')
    assert_refused(run('rafdb', source, target), 'list_patition_label.txt', 'cannot be read')
    assert not target.exists()


def test_affectnet_missing_pair(source, target):
    image = make_affectnet(source) / 'val_set' / 'images' / '103.jpg'
    content = image.read_bytes()
    image.unlink()
    assert_refused(run('affectnet8', source, target), image.name, 'missing')
    image.write_bytes(content)
    (source / 'train_set' / 'annotations' / '103_exp.npy').unlink()
    assert_refused(run('affectnet8', source, target), '103_exp.npy', 'missing')


@pytest.mark.parametrize('value', ['', 'happy', -1, 2.5, float('nan'), float('inf'), 1j, [1, 2], object(), b'npy'])
def test_affectnet_annotation_damaged(source, target, value):
    path = make_affectnet(source) / 'train_set' / 'annotations' / '104_exp.npy'
    if value == b'npy':
        path.write_bytes(value)
    else:
        np.save(path, np.array(value), allow_pickle=True)
    assert_refused(run('affectnet8', source, target), '104_exp.npy', 'damaged')


def test_annotation_pickle_is_not_run(source, target):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(source.parent / 'evil'),))
    path = make_affectnet(source) / 'train_set' / 'annotations' / '104_exp.npy'
    np.save(path, np.array(Evil(), dtype=object), allow_pickle=True)
    assert_refused(run('affectnet8', source, target), '104_exp.npy', 'damaged')
    assert not (source.parent / 'evil').exists()


def test_folder_refusals(source, target):
    make_folder(source)
    write(source / 'test' / 'Boredom' / 'a.png', encode(0))
    assert_refused(run('folder', source, target), "'Boredom'", 'Neutral', 'fearful', ', '.join(SEVEN))
    (source / 'test' / 'Boredom').rename(source / 'test' / 'happiness')
    assert_refused(run('folder', source, target), 'happy', 'mean the same expression')
    (source / 'test' / 'happiness').rename(source / 'test' / 'happy' / 'more')
    assert_refused(run('folder', source, target), 'more', 'inside a label folder')
    (source / 'test' / 'happy' / 'more').rename(source / 'extra')
    assert_refused(run('folder', source, target), 'extra', 'no split')
    (source / 'extra').rename(source / 'validation')
    assert_refused(run('folder', source, target), 'both the split validation')


def test_python_callers_get_prepare_error(source, target):
    with pytest.raises(PrepareError, match='is not a folder'):
        prepare_dataset('rafdb', source, target)


# The real data


def test_real_ferplus_counts(tmp_path):
    """The zips hold what counts.json says, and their images are sound (the test split is written, for time's sake)."""
    folder = Path(os.environ.get(
        'TIMM_LFNSB_FERPLUS', ROOT.parent / 'shared' / 'data' / 'ferplus'))
    if not (folder / 'counts.json').is_file():
        pytest.skip('no FER+ zips: set TIMM_LFNSB_FERPLUS to the folder with train.zip, validation.zip, test.zip and '
                    'counts.json')
    expected = json.loads((folder / 'counts.json').read_text())
    faces = prepare.read_ferplus(folder)
    assert not faces.dropped and len({sample.path for sample in faces.samples}) == len(faces.samples)
    for split, values in prepare._describe(faces, {})['splits'].items():
        assert values['counts'] == expected[split]['counts'] and values['total'] == expected[split]['total']
    faces.samples = [sample for sample in faces.samples if sample.split == 'test']
    assert len(prepare._store(faces.samples, tmp_path)) == len(images(tmp_path)) == 3355
