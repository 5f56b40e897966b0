"""`timm-lfnsb prepare` on small synthetic copies of every layout, and on the real FER+ zips where they are."""
from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from timm.data import create_dataset

from timm_lfnsb.cli import main
from timm_lfnsb.data.prepare import prepare_dataset, read_description
from timm_lfnsb.data.readers import read_ferplus
from timm_lfnsb.train.votes import read_votes

EIGHT = ['neutral', 'happiness', 'sadness', 'surprise', 'fear', 'disgust', 'anger', 'contempt']
SEVEN = EIGHT[:7]
SPLITS = ('train', 'validation', 'test')


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ['prepare', *map(str, args)])


def assert_refused(result: Result, *words: str) -> None:
    """One clear sentence on stderr, exit code 1, no traceback."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    message = result.output.strip().splitlines()[-1]
    assert message.startswith('Error: ')
    assert not [word for word in words if word not in message], message


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def images(folder: Path) -> set[str]:
    return {name for name in tree(folder) if '/' in name}


def encode(seed: int, kind: str = 'png', mode: str = 'L', size: int = 48) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size) if mode == 'L' else (size, size, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def make_zips(folder: Path, **members: dict[str, bytes]) -> Path:
    """One zip for each split with a face for every label, plus the given extra members."""
    folder.mkdir(exist_ok=True)
    for number, split in enumerate(SPLITS):
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
    (30, 'PublicTest', (0, 9, 0, 0, 0, 0, 0, 0, 1, 0), None),   # named like the first
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
        name = '' if counts[-1] == 10 else f'fer{i % 16:07}.png'
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


# Who makes a layout, the images that come of it, and some words of what the command then prints.
LAYOUTS = {
    'ferplus': (make_zips, {f'{split}/{label}/fer{n}{i:06}.png'
                            for n, split in enumerate(SPLITS) for i, label in enumerate(EIGHT)},
                ['--val-split validation']),
    'rafdb': (make_rafdb, {f'{split}/{label}/{split}_{number:05}_aligned.jpg'
                           for split in ('train', 'test') for number, label in RAF.items()},
              ['--val-split test']),  # timm would otherwise validate on the whole tree
    **{f'affectnet{count}': (
        make_affectnet, {f'{split}/{label}/{100 + number}.jpg'
                         for split in ('train', 'validation') for number, label in enumerate(EIGHT[:count])},
        [f'{split}: dropped 1 (class 10, not among the {count})' for split in ('train', 'validation')] + [
            'train: dropped 1 (class 7, not among the 7)'] * (count == 7)) for count in (7, 8)},
    'folder': (make_folder, {f'{split}/{label}/{i}.png' for split in SPLITS for i, label in enumerate(SEVEN)},
               ['train: dropped 1 (not a png or jpg file)']),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tmp_path / 'source'


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / 'target'


@pytest.mark.parametrize('kaggle', [False, True])
def test_ferplus_csv(source, target, kaggle):
    result = run('ferplus', make_csv(source, kaggle), target)
    assert result.exit_code == 0 and f"--label-votes {target / 'votes.csv'}" in result.output
    expected = {f'{place}/fer{i:07}.png': seed for i, (seed, _, _, place) in enumerate(FER) if place}
    assert images(target) == set(expected)
    for name, seed in expected.items():
        with Image.open(target / name) as image:
            assert (image.mode, image.size, image.format) == ('L', (48, 48), 'PNG')
            assert list(image.tobytes()) == fer_pixels(seed)
    splits = read_description(target)['splits']
    assert splits['train']['dropped'] == {
        'tie for most votes': 2, 'most votes for unknown': 1, 'most votes for not a face': 1,
        'exact duplicate of a kept image': 2}
    assert splits['validation']['dropped'] == {'exact duplicate of a kept image': 1, 'image name listed twice': 1}
    assert splits['test']['dropped'] == {}
    votes = read_votes(target / 'votes.csv', EIGHT)  # by name, from FER+'s order to the canonical one
    assert {name: votes[name].tolist() for name in votes} == {
        f'fer{i:07}.png': [n, h, sad, sur, f, d, a, c]
        for i, (_, _, (n, h, sur, sad, a, d, f, c, _, _), place) in enumerate(FER) if place}


def test_votes_beside_the_zips_come_along(source, target):
    votes = write(make_zips(source) / 'votes.csv', b'file,split,anger\r\nfer0000006.png,train,9\r\n')
    result = run('ferplus', source, target)
    assert f"--label-votes {target / 'votes.csv'}" in result.output
    assert (target / 'votes.csv').read_text() == votes.read_text()
    assert 'already prepared' in run('ferplus', source, target).output
    (target / 'votes.csv').unlink()
    assert_refused(run('ferplus', source, target), 'something else')


def test_folder_without_splits_and_with_contempt(source, target):
    for label in ('Contempt', 'happy'):
        write(source / label / 'a.PNG', encode(0))
    result = run('folder', source, target)
    assert images(target) == {'train/contempt/a.PNG', 'train/happiness/a.PNG'}
    assert read_description(target)['label_names'] == EIGHT
    assert 'move some images there' in result.output


@pytest.mark.parametrize('dataset', LAYOUTS)
def test_what_is_written_is_what_timm_reads_and_a_repeat_leaves_it(source, target, dataset):
    make, expected, words = LAYOUTS[dataset]
    result = run(dataset, make(source), target)
    assert result.exit_code == 0 and not [word for word in words if word not in result.output], result.output
    assert '--label-votes' not in result.output and images(target) == expected
    order = EIGHT if dataset in ('ferplus', 'affectnet8') else SEVEN
    assert (target / 'class_map.txt').read_text().split() == order
    description = read_description(target)
    assert description['name'] == dataset and description['label_names'] == order
    for split, values in description['splits'].items():
        data = create_dataset('', root=str(target), split=split, class_map=str(target / 'class_map.txt'))
        names = [Path(name).parent.name for name in data.filenames(absolute=True)]
        assert sorted(names) == sorted(order) and [order[label] for _, label in data] == names
        assert values['total'] == sum(values['counts'].values()) == len(names)
    files = {name: content for name, content in tree(target).items() if '/' in name}
    lines = [f'{hashlib.sha256(files[name]).hexdigest()}  {name}\n' for name in sorted(files)]
    assert description['sha256'] == hashlib.sha256(''.join(lines).encode()).hexdigest()
    table = [line.split() for line in result.output.splitlines()]
    assert list(description['splits']) in table
    assert all([label] + ['1'] * len(description['splits']) in table for label in order)
    assert ['total'] + [str(len(order))] * len(description['splits']) in table

    before = {path: path.stat().st_mtime_ns for path in target.rglob('*')}
    assert 'already prepared' in run(dataset, source, target).output
    assert before == {path: path.stat().st_mtime_ns for path in target.rglob('*')}
    assert set(os.listdir(target.parent)) == {'source', 'target'}


def test_hard_link_and_copy(source, target, tmp_path):
    original = make_rafdb(source / 'basic') / 'Image' / 'aligned' / 'train_00001_aligned.jpg'
    assert run('rafdb', source, target).exit_code == 0
    assert not os.path.samefile(original, target / 'train' / 'surprise' / original.name)
    assert run('rafdb', source, tmp_path / 'linked', '--hard-link').exit_code == 0
    assert os.path.samefile(original, tmp_path / 'linked' / 'train' / 'surprise' / original.name)
    assert tree(target) == tree(tmp_path / 'linked')


@pytest.mark.parametrize('file', [
    'target/train/anger/6.png', 'target/train/anger/new.png', 'target/notes.txt', 'source/test/angry/new.png'])
def test_changed_target_is_refused(source, target, file):
    prepare_dataset('folder', make_folder(source), target)
    write(target.parent / file, encode(99))
    before = tree(target)
    assert_refused(run('folder', source, target), 'target', 'something else')
    assert tree(target) == before


def test_foreign_target(source, target):
    make_rafdb(source)
    file = write(target / 'chapter.tex', b'text')
    for place, words in ((target, 'something else'), (file, 'Not a directory'), (source / 'new', 'lies inside')):
        assert_refused(run('rafdb', source, place), str(place), words)
    assert tree(target) == {'chapter.tex': b'text'}


def test_interrupted_run(source, target, monkeypatch):
    make_rafdb(source)
    target.mkdir()  # an empty folder is welcome

    def interrupt(original, path):
        if path.name.startswith('test_00003'):
            raise OSError(28, 'No space left on device')
        path.write_bytes(original.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(shutil, 'copyfile', interrupt)
        assert_refused(run('rafdb', source, target), 'No space left on device')
    assert sorted(os.listdir(target.parent)) == ['source', 'target'] and not list(target.iterdir())
    assert run('rafdb', source, target).exit_code == 0


@pytest.mark.parametrize('damage, words', [
    (lambda content: content.replace(encode(23)[100:], encode(24)[100:], 1), 'test/surprise/fer2000003.png'),
    (lambda content: content[:-500], 'is damaged'), (lambda content: b'<html>', 'is damaged')])
def test_zip_damaged(source, target, damage, words):
    path = make_zips(source) / 'test.zip'
    path.write_bytes(damage(path.read_bytes()))
    assert_refused(run('ferplus', source, target), 'test.zip', words)
    path.unlink()
    assert_refused(run('ferplus', source, target), 'test.zip', 'No such file')
    assert not target.exists()


@pytest.mark.parametrize('member', [
    '../../evil.png', '/etc/evil.png', 'train/neutral/../../../evil.png', 'train/neutral/..',
    'train/neutral/a\\..\\..\\evil.png', 'train/neutral/read.me', 'train/boredom/evil.png', 'test/fear/evil.png'])
def test_zip_member_outside_the_tree(source, target, member):
    make_zips(source, train={member: encode(99)})
    assert_refused(run('ferplus', source, target), 'train.zip holds', member.split('/')[-1][-6:], ', '.join(EIGHT))
    # Two levels up other tests leave files of that name, but none beside their own folders.
    assert not list(target.parent.parent.glob('evil*')) and not list(target.parent.rglob('evil*'))
    assert set(os.listdir(target.parent)) == {'source'}


THIRD = ' '.join(map(str, fer_pixels(2)))


@pytest.mark.parametrize('file, change, words', [
    ('fer2013.csv', lambda text: text.replace(THIRD, THIRD[:300]), ['line 4', 'reshape']),
    ('fer2013.csv', lambda text: text.replace(THIRD, f'256 {THIRD[THIRD.index(" "):]}'), ['line 4', 'above 255']),
    ('fer2013.csv', lambda text: text[:-3000], ['unexpected end']),
    ('fer2013new.csv', lambda text: text[:text.index('PrivateTest')], ['line 15']),
    ('fer2013new.csv', lambda text: text.replace('PublicTest', 'PrivateTest'), ['line 12', 'other faces']),
    ('fer2013new.csv', lambda text: text.rstrip()[:-6], ['line 18', 'NoneType']),
    ('fer2013new.csv', lambda text: text.replace('contempt', 'despise'), ["KeyError('contempt')"]),
    ('fer2013new.csv', lambda text: text.replace('fer0000000', '../../evil'), ['line 2', '../../evil.png']),
])
def test_csv_damaged(source, target, file, change, words):
    path = make_csv(source) / file
    path.write_text(change(path.read_text()))
    assert_refused(run('ferplus', source, target), 'fer2013.csv and fer2013new.csv', *words)
    assert not target.exists()


def test_rafdb_damaged(source, target):
    image = make_rafdb(source) / 'Image' / 'aligned' / 'test_00003_aligned.jpg'
    content = image.read_bytes()
    image.write_bytes(content[:len(content) // 2])
    assert_refused(run('rafdb', source, target), str(image), 'not a readable image')
    image.unlink()
    assert_refused(run('rafdb', source, target), image.name, 'No such file')
    image.write_bytes(content)
    label_file = source / 'EmoLabel' / 'list_patition_label.txt'
    lines = label_file.read_bytes()
    for more, words in ((b'train_00001.jpg 8', ['line 15', 'jpg 8']), (b'../../evil.jpg 1', ['line 15']),
                        (b'\xff', ['line 15']), (b'train_00001.jpg 1', ['two images', 'train_00001_aligned.jpg'])):
        label_file.write_bytes(lines + b'\n' + more + b'\n')
        assert_refused(run('rafdb', source, target), *words)
    assert not target.exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ('evil',)


@pytest.mark.parametrize('value', ['', 'happy', float('nan'), float('inf'), [1, 2], Evil()])
def test_affectnet_damaged(source, target, value, monkeypatch):
    path = make_affectnet(source) / 'train_set' / 'annotations' / '104_exp.npy'
    np.save(path, np.array(value), allow_pickle=True)
    monkeypatch.chdir(source)
    assert_refused(run('affectnet8', source, target), '104_exp.npy', 'damaged')
    assert not (source / 'evil').exists()
    path.unlink()
    assert_refused(run('affectnet8', source, target), '104_exp.npy', 'No such file')


def test_folder_refusals(source, target):
    folder = write(make_folder(source) / 'test' / 'Boredom' / 'a.png', encode(0)).parent
    for place, *words in (
            ('test/Boredom', "'Boredom'", 'Neutral', 'fearful', ', '.join(SEVEN)),
            ('test/happiness', 'happy', 'mean the same expression'), ('test/happy/more', 'inside a label folder'),
            ('extra', 'extra', 'no split'), ('validation', 'validation', 'two folders of one')):
        folder = folder.rename(source / place)
        assert_refused(run('folder', source, target), *words)


def test_real_ferplus_counts(ferplus_source):
    """The zips hold what counts.json says, each face has votes, and most are for its label."""
    expected = json.loads((ferplus_source / 'counts.json').read_text())
    faces = read_ferplus(ferplus_source)
    assert not faces.dropped and len({sample.name for sample in faces.samples}) == len(faces.samples)
    for split in SPLITS:
        labels = [sample.label for sample in faces.samples if sample.split == split]
        assert {label: labels.count(label) for label in EIGHT} == expected[split]['counts']
    votes = read_votes(ferplus_source / 'votes.csv', EIGHT)
    assert all(EIGHT[votes[sample.name].argmax()] == sample.label for sample in faces.samples)
