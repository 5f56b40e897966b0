"""Folders and class map that do not fit are refused before training; weights of other labels are warned of."""
from __future__ import annotations

import argparse
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from support.train_script import standin

from timm_lfnsb.errors import UserError
from timm_lfnsb.labels import EXPRESSIONS_7, EXPRESSIONS_8
from timm_lfnsb.train.checkpoints import run_label_names
from timm_lfnsb.train.data_check import check_class_folders, warn_of_other_labels

CLASSES = ['neutral', 'happiness', 'anger']


def folders(tmp_path: Path, train=('anger', 'happiness', 'neutral'), validation=None, classes=None, **options):
    for split, names in dict(train=train, validation=validation or train).items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            Image.new('L', (8, 8)).save(tmp_path / split / name / 'a.png')
    defaults = dict(data_dir=str(tmp_path), train_split='train', val_split='validation', dataset='', class_map='',
                    skip_folders=[], num_classes=None, input_key=None)
    if classes is not None:
        (tmp_path / 'map.txt').write_text('\n'.join(classes) + '\n')
        defaults['class_map'] = str(tmp_path / 'map.txt')
    return argparse.Namespace(**{**defaults, **options})


def test_a_synonym_and_an_unknown_folder_are_refused_with_both_lists(tmp_path):
    with pytest.raises(UserError) as error:
        check_class_folders(folders(tmp_path, classes=CLASSES, validation=('anger', 'Happy', 'yawning')))
    message = str(error.value)
    assert f'{tmp_path}/validation has folders' in message and '\n' not in message
    assert 'Happy (which the class map calls happiness), yawning; it names neutral, happiness, anger' in message
    assert f'timm-lfnsb prepare folder {tmp_path}' in message and '--skip-folders' in message


@pytest.mark.parametrize('skip', [['yawning'], 'yawning'])
def test_folders_left_out_on_purpose(skip, tmp_path):
    options = folders(tmp_path, classes=CLASSES, train=('anger', 'yawning'), skip_folders=skip)
    shutil.copytree(tmp_path / 'train' / 'anger', tmp_path / 'train' / '.cache')
    check_class_folders(options)
    for other, words in (
            (dict(skip_folders=['yaw']), r'yawning'), (dict(class_map=''), r'needs a --class-map'),
            (dict(class_map='none.txt'), r'none.txt cannot be read'),
            (dict(num_classes=2), r'map.txt has more classes than --num-classes 2'),
            (dict(num_classes=4), r'map.txt has 3 names and --num-classes is 4')):
        with pytest.raises(UserError, match=words):
            check_class_folders(argparse.Namespace(**{**vars(options), **other}))


def test_a_misspelt_folder_says_which_name_is_near(tmp_path):
    with pytest.raises(UserError, match=r'leave their images out: hapiness \(did you mean happiness\?\); it names'):
        check_class_folders(folders(tmp_path, classes=CLASSES, train=('anger', 'hapiness')))
    options = folders(tmp_path / 'b', classes=['fear', 'sad', 'sadness'], train=('fear',))
    with pytest.raises(UserError, match=r'map.txt names one class twice \(sad, sadness\)'):
        check_class_folders(options)


MESSY = b'\xef\xbb\xbfneutral\r\n\r\nhappiness \r\nsadness\r\nanger\r\n\r\n \r\n'


def test_a_messy_class_map_trains_as_a_clean_one(tmp_path, face_folder):
    """timm itself would count the empty lines and call the first class '\\ufeffneutral'."""
    (tmp_path / 'data').mkdir()
    for split in ('train', 'validation'):
        (tmp_path / 'data' / split).symlink_to(face_folder / split)
    (tmp_path / 'data' / 'messy.txt').write_bytes(MESSY)
    common = '--num-classes', 4, '--seed', 1
    clean = standin(tmp_path, '--data-dir', face_folder, '--class-map', face_folder / 'class_map.txt', *common)
    messy = standin(tmp_path, '--data-dir', tmp_path / 'data', '--class-map', 'messy.txt', *common)  # in the folder
    assert messy['labels'] == clean['labels'] and sorted(set(messy['labels'][0])) == [0, 1, 2, 3]
    assert run_label_names(argparse.Namespace(**messy['args'])) == ['neutral', 'happiness', 'sadness', 'anger']


def test_tar_files_are_looked_into_and_zip_files_refused(tmp_path):
    options = folders(tmp_path, classes=CLASSES, train=('anger', 'happy'))
    with tarfile.open(tmp_path / 'faces.tar', 'w') as tar:
        tar.add(tmp_path / 'train', 'train')
    tarred = argparse.Namespace(**{**vars(options), 'data_dir': str(tmp_path / 'faces.tar'), 'val_split': ''})
    with pytest.raises(UserError, match=r'faces.tar has folders.*happy \(which the class map calls happiness\)'):
        check_class_folders(tarred)
    shutil.rmtree(tmp_path / 'validation')
    (tmp_path / 'validation').mkdir()
    (tmp_path / 'validation' / 'faces.zip').write_bytes(b'')
    with pytest.raises(UserError, match=r"no images found for the split 'validation'.*no zip files.*prepare"):
        check_class_folders(options)


def test_splits_numbered_differently_are_refused_without_a_class_map(tmp_path):
    """timm numbers the folders it finds in each split: one that is missing shifts the others."""
    with pytest.raises(UserError, match=r'anger, happiness, neutral.*anger, neutral.*give a class map'):
        check_class_folders(folders(tmp_path / 'a', validation=('anger', 'neutral')))
    check_class_folders(folders(tmp_path / 'b', validation=('anger', 'happiness')))


@pytest.fixture
def warning(tmp_path, caplog):
    """The warning for a run with these options and class names, '' where there is none."""
    def check(names=None, **options) -> str:
        if names is not None:
            options['class_map'] = str(tmp_path / 'map.txt')
            Path(options['class_map']).write_text('\n'.join(names) + '\n')
        options = dict(dict(
            class_map='', data_dir=None, dataset='', train_split='train', num_classes=None, resume='', model='lfnsb',
            initial_checkpoint='', pretrained_path=None, pretrained=False), **options)
        caplog.clear()
        warn_of_other_labels(argparse.Namespace(**options))
        return caplog.text
    return check


ALPHABETICAL = sorted(EXPRESSIONS_8)
IN_ORDER = ', '.join(EXPRESSIONS_8)


@pytest.mark.parametrize('names, options, words', [
    (ALPHABETICAL, dict(model='lfnsb.ferplus'),
     ['WARNING', IN_ORDER, ', '.join(ALPHABETICAL), 'map.txt', '--class-map', '--head-init-scale 0']),
    (['neutral', 'yawning', *EXPRESSIONS_8[2:]], dict(num_classes=8), ['neutral, yawning', 'order of the weights']),
])
def test_other_labels_are_warned_of(names, options, words, warning):
    text = warning(names, **{'model': 'lfnsb', 'pretrained': True, **options})
    for word in words:
        assert word in text


@pytest.mark.parametrize('names, options', [
    (EXPRESSIONS_8, dict(model='lfnsb')),
    (['Neutral', 'Happy', 'sad', 'surprised', 'fearful', 'disgusted', 'angry', 'contempt'], dict(model='lfnsb')),
    (ALPHABETICAL, dict(model='lfnsb', pretrained=False)),
    (ALPHABETICAL, dict(model='lfnsb', resume='last.pth.tar')),
    (ALPHABETICAL, dict(model='hf-hub:nobody/nothing')),  # not fetched
    (ALPHABETICAL, dict(model='resnet18')),               # has no label names
    (ALPHABETICAL, dict(model='local-dir:no_such_folder')),
    (EXPRESSIONS_7, dict(model='lfnsb', num_classes=7)),  # gets a new classifier
    (ALPHABETICAL, dict(model='lfnsb', pretrained=False, initial_checkpoint='no_such.pth.tar')),
])
def test_the_same_labels_and_unknown_ones_are_not_warned_of(names, options, warning):
    assert warning(names, **{'pretrained': True, **options}) == ''


def test_labels_of_timm_folders_and_of_runs_of_train_py(warning, face_folder, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(dict(label_names=EXPRESSIONS_8)))
    assert ', '.join(ALPHABETICAL) in warning(ALPHABETICAL, model=f'local-dir:{tmp_path}', pretrained=True)
    checkpoint = str(tmp_path / 'last.pth.tar')
    args = argparse.Namespace(model='lfnsb', class_map=str(face_folder / 'class_map.txt'))
    torch.save(dict(state_dict={}, args=args), checkpoint)
    text = warning(initial_checkpoint=checkpoint, data_dir=str(face_folder))
    assert 'neutral, happiness, sadness, anger' in text and 'anger, happiness, neutral, sadness' in text
    assert warning(['neutral', 'happy', 'sad', 'angry'], initial_checkpoint=checkpoint) == ''


def test_the_launcher_warns_once(tmp_path, caplog):
    (tmp_path / 'map.txt').write_text('\n'.join(ALPHABETICAL))
    standin(tmp_path, '--model', 'lfnsb', '--pretrained', '--class-map', tmp_path / 'map.txt')
    assert caplog.text.count('other classes') == 1 and IN_ORDER in caplog.text
