"""Figures by group: the file is checked first, and the figures are those of each group's images alone."""
from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, recall_score

from timm_lfnsb.errors import UserError
from timm_lfnsb.evaluate.groups import group_rows, measure_groups, read_groups
from timm_lfnsb.evaluate.metrics import percent
from timm_lfnsb.evaluate.predictions import Predictions

FILES = ['calm/a.png', 'calm/b.png', 'cross/c.png', 'cross/d.png']
GOOD = 'image,age,sex\ncalm/a.png,old,f\ncalm/b.png,young,m\ncross/c.png,old,m\ncross\\d.png,young,f\n'


def test_a_good_file(tmp_path):
    (tmp_path / 'groups.csv').write_text('\ufeff' + GOOD, encoding='utf-8')  # as spreadsheets save it
    assert read_groups(tmp_path / 'groups.csv', FILES, FILES) == {
        'age': dict(zip(FILES, ['old', 'young', 'old', 'young'], strict=True)),
        'sex': dict(zip(FILES, ['f', 'm', 'm', 'f'], strict=True))}
    assert read_groups(tmp_path / 'groups.csv', FILES, FILES[:2])['sex'][FILES[3]] == 'f'  # named, but not needed


@pytest.mark.parametrize('old, new, message', [
    (GOOD, '', 'is no CSV file'), (GOOD, 'image,age\n"calm/a.png,old', 'is no CSV file'),
    ('image,', 'file,', 'image and one or more for groups, not file, age, sex'),
    ('sex', 'age', 'different column names'),
    (GOOD, 'image\ncalm/a.png\n', 'not image'), (',old,f', ',,f', 'empty or missing cell.* row 2'),
    (',young,m', ',young', 'row 3'), (',young,m', ',young,m,x', 'row 3'),
    ('calm/b', 'calm/a', r'images more than once \(1, such as calm/a.png\)'),
    ('calm/b', 'calm/x', r'not in the data \(1, such as calm/x.png\)'),
    ('calm/b.png,young,m\n', '', r'lacks images of the data, .* \(1, such as calm/b.png\)'),
    ('young', 'old', 'nothing to compare in .* age'),
    ('calm/b.png,young,m\ncross/c.png,old', 'calm/b.png,old,m\ncross/c.png,young', 'nothing to compare in .* age'),
])
def test_a_file_that_does_not_fit(tmp_path, old, new, message):
    assert old in GOOD
    (tmp_path / 'groups.csv').write_text(GOOD.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_groups(tmp_path / 'groups.csv', FILES, FILES)


def test_figures_are_those_of_each_groups_images():
    rng, n = np.random.default_rng(0), 600
    names = ('calm', 'cross', 'rare', 'never')
    labels = rng.integers(0, 2, n)
    group = np.array(['a', 'b', 'c'])[rng.integers(0, 3, n)]
    labels[np.flatnonzero(group == 'a')[:3]] = 2  # a class of one group alone, always taken for another
    logits = rng.standard_normal((n, 4)) - [0, 0, 9, 9]
    logits[np.arange(n), labels] += (group == 'b') + 0.5
    probabilities = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)
    files = [f'{names[label]}/{i}.png' for i, label in enumerate(labels)]
    predictions = Predictions(files, labels, probabilities, names)
    measured = measure_groups(predictions, {'letter': dict(zip(files, group.tolist(), strict=True))})['letter']
    assert measured['classes'] == ['calm', 'cross'] and list(measured['groups']) == ['a', 'b', 'c']
    for name, metrics in measured['groups'].items():
        true, guess = labels[group == name], probabilities[group == name].argmax(1)
        assert metrics['count'] == len(true) and metrics['accuracy'] == pytest.approx(accuracy_score(true, guess))
        assert metrics['balanced_accuracy'] == pytest.approx(  # without the rare class, which would lower a's alone
            recall_score(true, guess, labels=[0, 1], average='macro'))
        assert metrics['macro_f1'] == pytest.approx(f1_score(true, guess, labels=[0, 1], average='macro'))
        assert metrics['macro_f1_interval'][0] < metrics['macro_f1'] < metrics['macro_f1_interval'][1]

    gap = measured['largest_gap']['accuracy']
    by_accuracy = sorted(measured['groups'], key=lambda name: measured['groups'][name]['accuracy'])
    assert gap['high'] == by_accuracy[-1] == 'b' and gap['low'] == by_accuracy[0]
    top, bottom = (measured['groups'][gap[end]] for end in ('high', 'low'))
    assert gap['gap'] == pytest.approx(top['accuracy'] - bottom['accuracy'])
    (l1, u1), (l2, u2), p1, p2 = (*(g['accuracy_interval'] for g in (top, bottom)), top['accuracy'], bottom['accuracy'])
    assert gap['gap_interval'] == pytest.approx([
        p1 - p2 - math.sqrt((p1 - l1) ** 2 + (u2 - p2) ** 2), p1 - p2 + math.sqrt((u1 - p1) ** 2 + (p2 - l2) ** 2)])
    classes = measured['largest_gap']['per_class']
    assert classes['rare']['recall'] is None is classes['never']['f1'] and classes['calm']['recall']['gap'] > 0
    rows = group_rows({'letter': measured}, percent)
    assert [row[1] for row in rows] == ['a', 'b', 'c', 'largest gap']
    assert rows[1][3] == percent(top, 'accuracy') and rows[3][3] == f"{percent(gap, 'gap')} b - {gap['low']}"


def test_newcombes_own_example():
    """Of Newcombe, Statistics in Medicine 17 (1998) 873, table II (a): 56/70 against 48/80, 0.0524 to 0.3339."""
    right = np.concatenate([np.arange(70) < 56, np.arange(80) < 48])
    files = [f'{"xy"[i % 2]}/{i}' for i in range(150)]
    labels = np.arange(150) % 2
    probabilities = np.eye(2, dtype=np.float32)[np.where(right, labels, 1 - labels)]
    groups = {'arm': dict(zip(files, ['first'] * 70 + ['second'] * 80, strict=True))}
    measured = measure_groups(Predictions(files, labels, probabilities, ('x', 'y')), groups)
    gap = measured['arm']['largest_gap']['accuracy']
    assert gap['gap'] == pytest.approx(0.2) and gap['gap_interval'] == pytest.approx([0.0524, 0.3339], abs=5e-5)
