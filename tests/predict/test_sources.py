"""Pictures in folders, patterns, lists and Parquet."""
from __future__ import annotations

import pytest

pa = pytest.importorskip('pyarrow', reason='pip install "timm-lfnsb[ray]" brings pyarrow')
import pyarrow.fs as pafs  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from timm_lfnsb.data.images import ImageError  # noqa: E402
from timm_lfnsb.errors import UserError  # noqa: E402
from timm_lfnsb.predict.sources import Source, find_pictures, locate  # noqa: E402

ALL = ['_DSC1.jpg', 'a.PNG', 'b.jpg', 'trip/a.jpg', 'trip/deep/x#1 ü.jpg']


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ('b.jpg', 'a.PNG', 'trip/a.jpg', 'trip/deep/x#1 ü.jpg', 'notes.txt', '.hidden.jpg', '_DSC1.jpg'):
        (tmp_path / 'photos' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'photos' / name).write_bytes(name.encode())
    return tmp_path


@pytest.mark.parametrize('source, names', [
    ('photos', ALL), ('photos/', ALL), ('file://{}/photos', ALL),
    ('photos/*.jpg', ['_DSC1.jpg', 'b.jpg']),
    ('photos/**/[ax]*.jpg', ['trip/a.jpg', 'trip/deep/x#1 ü.jpg']),
    ('file://{}/photos/tr?p/*.jpg', ['trip/a.jpg']),
    ('photos/b.jpg', ['b.jpg']),
    ('list.txt', ['b.jpg', 'gone.jpg', 'trip/a.jpg']),
])
def test_files(folder, source, names):
    (folder / 'list.txt').write_text(f'photos/trip/a.jpg\n\n{folder}/photos/b.jpg\r\nphotos/b.jpg\nphotos/gone.jpg\n')
    pictures, found = find_pictures(source.format(folder))
    assert found.to_pylist() == [str(folder / 'photos' / name) for name in names]
    assert list(pictures.read(found.to_pylist())) == found.to_pylist()  # local paths are opened where they are decoded


def parquet(path, values, kind, **columns):
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({'image': pa.array(values, kind), **columns}), path, row_group_size=7)


def test_parquet(folder):
    """Rows over the ends of row groups (7) and of batches (8), in a folder of two files of different types."""
    contents = [bytes([65 + i]) for i in range(26)]
    parquet(folder / 'data' / 'b.parquet', contents, pa.large_binary())
    parquet(folder / 'data' / 'a.parquet', [{'bytes': b'first', 'path': 'x'}, None, {'bytes': None, 'path': 'y'}],
            pa.struct({'bytes': pa.binary(), 'path': pa.string()}), label=pa.array([1, 2, 3]))
    for source in ('data', 'data/*.parquet'):
        pictures, names = find_pictures(source)
        assert names.to_pylist() == [f'{folder}/data/{file}.parquet#{i}' for file, n in (('a', 3), ('b', 26))
                                     for i in range(n)]
    chosen = [0, 1, 2, 3 + 6, 3 + 7, 3 + 13, 3 + 22, 3 + 25]
    first, *missing, six, seven, thirteen, late, last = pictures.read(names.take(chosen).to_pylist())
    assert (first, six, seven, thirteen, late, last) == (b'first', b'G', b'H', b'N', b'W', b'Z')
    assert all(isinstance(error, ImageError) for error in missing)
    (folder / 'data' / 'b.parquet').write_bytes(b'cut off')
    content, *errors = pictures.read(names.take([0, 5, 6]).to_pylist())
    assert content == b'first' and ['cannot be read' in str(error) for error in errors] == [True, True]


def test_other_file_systems(folder):
    """What is read over the network comes as bytes, and a missing file is an error in its place."""
    far = Source(pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem()), 's3://')
    first, error, last = far.read(['s3://photos/b.jpg', 's3://photos/gone.jpg', 's3://photos/trip/a.jpg'])
    assert (first, last) == (b'b.jpg', b'trip/a.jpg') and 'gone.jpg cannot be read' in str(error)
    system, path, prefix = locate('s3://user:secret@bucket/photos?region=eu-west-1')
    assert isinstance(system, pafs.S3FileSystem) and (path, prefix) == ('bucket/photos', 's3://')


@pytest.mark.parametrize('source, message', [
    ('gone', 'there is no gone'), ('empty', 'has no pictures'), ('photos/*.gif', 'has no pictures'),
    ('none.txt', 'has no pictures'), ('data/text.parquet', 'no column image .* --image-column names another: scan'),
    ('bad.parquet', 'cannot be read'), ('nix://bucket', 'cannot be reached'), ('picture.bin', 'cannot be read'),
])
def test_wrong_sources_are_one_sentence(folder, source, message):
    (folder / 'empty').mkdir()
    (folder / 'none.txt').write_text('\n')
    (folder / 'bad.parquet').write_bytes(b'PAR1')
    (folder / 'picture.bin').write_bytes(b'\xff\xd8\xff')
    parquet(folder / 'data' / 'text.parquet', ['x.jpg'], pa.string(), scan=pa.array([b'1']))
    with pytest.raises(UserError, match=message) as caught:
        find_pictures(source)
    assert '\n' not in str(caught.value)
