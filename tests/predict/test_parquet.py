"""The folder of results: rows, interruptions, damage, and other runs."""
from __future__ import annotations

import pytest

pa = pytest.importorskip('pyarrow', reason='pip install "timm-lfnsb[ray]" brings pyarrow')
import pyarrow.parquet as pq  # noqa: E402

from timm_lfnsb.data.images import ImageError  # noqa: E402
from timm_lfnsb.errors import UserError  # noqa: E402
from timm_lfnsb.predict.parquet import Results, face_rows  # noqa: E402
from timm_lfnsb.predict.recognizer import Face  # noqa: E402

FACE = Face((1, 2, 3, 4), 'joy', 0.75, {'joy': 0.75, 'rage': 0.25}, 0.5, ((1., 2.),) * 5, 90)


def rows_of(*names):
    return pa.table({'path': list(names)})


def test_rows():
    numbers, rows = face_rows([[FACE, FACE], [], ImageError('damaged.')], ['joy', 'rage'])
    first, second, none, error = rows.to_pylist()
    assert numbers == [0, 0, 1, 2] and first == second == {**FACE.as_dict(), 'error': None}
    assert set(none.values()) == {None} and error == {**none, 'error': 'damaged.'}
    # The types do not hang on what is in a file: readers take the first one's for all.
    assert face_rows([[]], ['joy', 'rage'])[1].schema == face_rows([], ['joy', 'rage'])[1].schema == rows.schema


def test_goes_on_and_sets_damage_aside(tmp_path):
    results = Results(str(tmp_path / 'new' / 'out'), {'model': 'x'})
    for names in (['a', 'a', 'b'], ['c'], ['d'], ['d']):  # the last one again, as after a worker's death
        results.write(rows_of(*names))
    folder = tmp_path / 'new' / 'out'
    assert pq.read_table(folder)['path'].to_pylist().count('d') == 1
    cut, damaged = (next(path for path in folder.glob('*.parquet') if name in pq.read_table(path)['path'].to_pylist())
                    for name in 'bc')
    cut.write_bytes(cut.read_bytes()[:-20])
    damaged.write_bytes(b'')
    (folder / '.123.part').write_bytes(b'PAR1')
    again = Results(str(folder), {'model': 'x'})
    assert again.done.to_pylist() == ['d'] and len(again.problems) == 2
    assert pq.read_table(folder)['path'].to_pylist() == ['d']
    assert Results(str(folder), {'model': 'x'}).problems == []


def test_a_new_run_ends_the_writing_of_an_older_one(tmp_path):
    old = Results(str(tmp_path), {})
    new = Results(str(tmp_path), {})
    with pytest.raises(UserError, match='another run'):
        old.write(rows_of('a'))
    new.write(rows_of('a'))
    assert len(list(tmp_path.glob('*'))) == 2 and not list(tmp_path.glob('.*'))


def test_other_content_is_refused(tmp_path):
    Results(str(tmp_path / 'out'), {'model': 'x'}).write(rows_of('a'))
    with pytest.raises(UserError, match='other settings'):
        Results(str(tmp_path / 'out'), {'model': 'y'})
    pq.write_table(pa.table({'x': [1]}), tmp_path / 'foreign.parquet')
    with pytest.raises(UserError, match=r'foreign.parquet .* something else'):
        Results(str(tmp_path), {})
    with pytest.raises(UserError, match='cannot be used for results'):
        Results(str(tmp_path / 'foreign.parquet'), {})
