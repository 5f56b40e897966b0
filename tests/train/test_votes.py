"""Labels drawn from votes: the file, the draw, the dataset in worker processes, the launcher."""
from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.train_script import CPU, standin
from timm.data import create_dataset, create_loader

from timm_lfnsb.errors import UserError
from timm_lfnsb.train.datasets import SeededDataset
from timm_lfnsb.train.votes import VotedDataset, match_votes, read_votes

LABELS = ('neutral', 'happiness', 'sadness', 'anger')


@pytest.fixture(scope='module')
def votes_file(face_folder, tmp_path_factory) -> Path:
    """Eight votes for the folder's label, two for neutral; one image has none, votes for unknown are left out."""
    lines = ['file,split,unknown,' + ','.join(LABELS)]
    for path in sorted(face_folder.glob('train/*/*.png')):
        votes = [8 * (label == path.parent.name) + 2 * (label == 'neutral') for label in LABELS]
        lines.append(','.join(map(str, [path.name, 'train', 3, *([0] * 4 if path.name == 'anger0.png' else votes)])))
    file = tmp_path_factory.mktemp('votes') / 'votes.csv'
    file.write_text('\n'.join(lines))
    return file


def voted(face_folder: Path, votes_file: Path, seed: int = 0) -> VotedDataset:
    dataset = create_dataset(
        '', root=str(face_folder), split='train', is_training=True, class_map=str(face_folder / 'class_map.txt'))
    return VotedDataset(dataset, votes_file, LABELS, seed)


def labels(dataset, *epochs: int) -> dict[str, int]:
    for epoch in epochs:
        dataset.set_epoch(epoch)
    return {Path(str(file)).name: target for file, target in dataset.reader.samples}


def test_the_file_is_matched_by_name(tmp_path):
    (tmp_path / 'votes.csv').write_text('Happy,file,neutral,anger,sad,contempt,NF\n3,x/a.png,1,0,2,9,4\n')
    votes = read_votes(tmp_path / 'votes.csv', LABELS)
    assert votes['a.png'].tolist() == [1, 3, 2, 0]  # contempt is no label of the run, NF no expression


@pytest.mark.parametrize('text, words', [
    ('neutral,happiness\n', 'no column for file'),
    ('file,neutral,happiness,sadness\n', 'no column for anger'),
    ('file,neutral,happiness,sadness,anger\na.png,1,x,0,0\n', 'line 2'),
    ('file,neutral,happiness,sadness,anger\na.png,1,-1,0,0\n', 'line 2'),
    ('file,neutral,happiness,sadness,anger\na.png,1\n', 'line 2'),
])
def test_a_file_that_cannot_be_understood_is_refused(text, words, tmp_path):
    (tmp_path / 'votes.csv').write_text(text)
    with pytest.raises(UserError, match=r'--label-votes .*votes.csv') as error:
        read_votes(tmp_path / 'votes.csv', LABELS)
    assert words in str(error.value)


def test_votes_of_other_images_or_labels_are_refused():
    votes = {f'{i}.png': np.eye(2)[i % 2] * 10 for i in range(10)}
    files, targets = [f'a/{i}.png' for i in range(10)], [i % 2 for i in range(10)]
    assert match_votes(votes, files, targets, 2).tolist() == np.eye(2)[targets].tolist()
    for names, labels, words in (
            ([f'b{i}.png' for i in range(10)], targets, 'other images'),
            (files, [1 - target for target in targets], 'mixed up'),
            (['a/0.png', 'b/0.png'], [0, 0], 'two images are called')):
        with pytest.raises(UserError, match=words):
            match_votes(votes, names, labels, 2)


def test_labels_are_drawn_in_proportion_to_the_votes(face_folder, votes_file):
    dataset = voted(face_folder, votes_file)
    drawn = [labels(dataset, epoch) for epoch in range(400)]
    happy = np.mean([epoch['happiness3.png'] == 1 for epoch in drawn])
    assert happy == pytest.approx(0.8, abs=0.06)
    assert {epoch['happiness3.png'] for epoch in drawn} == {0, 1}  # and never what nobody said
    assert {epoch['anger0.png'] for epoch in drawn} == {3}  # without votes the folder's
    assert {epoch['neutral1.png'] for epoch in drawn} == {0}
    again, other = voted(face_folder, votes_file), voted(face_folder, votes_file, seed=4)
    assert drawn[7] == labels(again, 2, 7) != labels(other, 7)  # a function of seed, epoch and name


def test_workers_that_live_on_see_each_epochs_labels(face_folder, votes_file):
    dataset = SeededDataset(voted(face_folder, votes_file), 0)
    loader = create_loader(dataset, (3, 32, 32), 6, is_training=True, no_aug=True, num_workers=1, device=CPU,
                           persistent_workers=True)
    seen = []
    for epoch in (0, 1, 2):
        dataset.set_epoch(epoch)
        seen.append(sorted(target for _, targets in loader for target in targets.tolist()))
        assert seen[-1] == sorted(labels(dataset).values())
    assert len({tuple(epoch) for epoch in seen}) > 1
    assert len(pickle.loads(pickle.dumps(dataset))) == 24  # for workers that are spawned


def test_the_launcher_draws_labels(face_folder, votes_file, tmp_path):
    flags = ['--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt', '--label-votes', votes_file]
    first, again, other = (standin(tmp_path, *flags, '--seed', seed) for seed in ('1', '1', '2'))
    assert first['labels'] == again['labels'] != other['labels'] and first['labels'][0] != first['labels'][1]
    assert first['args']['label_votes'] == str(votes_file)
    shutil.copytree(face_folder, tmp_path / 'faces')
    shutil.copy(votes_file, tmp_path / 'faces' / 'beside.csv')  # found in the data folder by its bare name
    beside = standin(tmp_path, *flags, '--data-dir', tmp_path / 'faces', '--label-votes', 'beside.csv', '--seed', '1')
    assert beside['labels'] == first['labels']


@pytest.mark.parametrize('flags', [[], ['--cosine-harmony', '1']])
def test_the_launcher_adjusts_logits_by_labels_or_votes(flags, face_folder, votes_file, tmp_path):
    data = ['--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt', *flags]
    plain, equal, by_votes = (standin(tmp_path, *data, *more)['parts'] for more in (
        [], ['--logit-adjustment', '1'], ['--logit-adjustment', '1', '--label-votes', votes_file]))
    assert equal['loss'] == pytest.approx(plain['loss'])  # the folders are of one size
    assert by_votes['loss'] != pytest.approx(plain['loss'], abs=1e-3)
    harmony = 'cosine_harmony_loss'
    assert by_votes.get(harmony) == pytest.approx(plain.get(harmony))
