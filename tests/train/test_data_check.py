"""Folders and class map that do not fit are refused before training."""
from __future__ import annotations

import argparse
import shutil
import tarfile
from pathlib import Path

import pytest
from support.train_script import STANDIN, patched

from timm_lfnsb.errors import UserError
from timm_lfnsb.train import launch
from timm_lfnsb.train.data_check import check_class_folders
from timm_lfnsb.train.launch import run_script


def folders(tmp_path: Path, train=('anger', 'happiness', 'neutral'), validation=None, classes=None, **options):
    from PIL import Image
    for split, names in dict(train=train, validation=validation or train).items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True, exist_ok=True)
            Image.new('L', (8, 8)).save(tmp_path / split / name / 'a.png')
    defaults = dict(data_dir=str(tmp_path), train_split='train', val_split='validation', dataset='', class_map='')
    if classes is not None:
        (tmp_path / 'map.txt').write_text('\n'.join(classes) + '\n')
        defaults['class_map'] = str(tmp_path / 'map.txt')
    return argparse.Namespace(**{**defaults, **options})


CLASSES = ['neutral', 'happiness', 'anger']


def test_folders_that_fit_the_class_map_pass(tmp_path):
    options = folders(tmp_path, classes=CLASSES, validation=('anger', 'neutral'))
    (tmp_path / 'train' / 'empty').mkdir()
    shutil.copytree(tmp_path / 'train' / 'anger', tmp_path / 'train' / '.cache')
    check_class_folders(options)
    check_class_folders(argparse.Namespace(**{**vars(options), 'val_split': ''}))


def test_a_synonym_and_an_unknown_folder_are_refused_with_both_lists(tmp_path):
    options = folders(tmp_path, classes=CLASSES, validation=('anger', 'Happy', 'yawning'))
    with pytest.raises(UserError) as error:
        check_class_folders(options)
    message = str(error.value)
    assert f'{tmp_path}/validation has folders' in message and '\n' not in message
    assert 'Happy (which the class map calls happiness), yawning (folders: Happy, anger, yawning; class map' in message
    assert 'neutral, happiness, anger)' in message
    assert f'timm-lfnsb prepare folder {tmp_path}' in message and '--skip-folders' in message


@pytest.mark.parametrize('skip', [['yawning'], 'yawning'])
def test_folders_left_out_on_purpose(skip, tmp_path):
    options = folders(tmp_path, classes=CLASSES, train=('anger', 'yawning'), skip_folders=skip)
    check_class_folders(options)
    options.skip_folders = ['yaw']
    with pytest.raises(UserError, match=r'yawning'):
        check_class_folders(options)
    options.class_map = ''
    with pytest.raises(UserError, match=r'needs a --class-map'):
        check_class_folders(options)


def test_tar_files_are_looked_into(tmp_path):
    options = folders(tmp_path, classes=CLASSES, train=('anger', 'happy'))
    with tarfile.open(tmp_path / 'faces.tar', 'w') as tar:
        tar.add(tmp_path / 'train', 'train')
    options.data_dir, options.val_split = str(tmp_path / 'faces.tar'), ''
    with pytest.raises(UserError, match=r'faces.tar has folders.*happy \(which the class map calls happiness\)'):
        check_class_folders(options)
    (tmp_path / 'map.txt').write_text('happy\nanger\n')
    check_class_folders(options)


def test_zip_files_and_empty_splits_are_refused(tmp_path):
    options = folders(tmp_path, classes=CLASSES)
    shutil.rmtree(tmp_path / 'validation')
    (tmp_path / 'validation').mkdir()
    (tmp_path / 'validation' / 'faces.zip').write_bytes(b'')
    with pytest.raises(UserError, match=r"no images found for the split 'validation'.*no zip files.*prepare"):
        check_class_folders(options)


def test_a_class_map_that_cannot_be_read_or_is_too_large(tmp_path):
    options = folders(tmp_path, classes=CLASSES, num_classes=3)
    check_class_folders(options)
    options.num_classes = 2
    with pytest.raises(UserError, match=r'up to 2, counted from 0, but --num-classes is 2'):
        check_class_folders(options)
    options.class_map = str(tmp_path / 'none.txt')
    with pytest.raises(UserError, match=r'none.txt cannot be read'):
        check_class_folders(options)


def test_splits_numbered_differently_are_refused_without_a_class_map(tmp_path):
    """timm numbers the folders it finds in each split: one that is missing shifts the others."""
    with pytest.raises(UserError, match=r'anger, happiness, neutral.*anger, neutral'):
        check_class_folders(folders(tmp_path / 'a', validation=('anger', 'neutral')))
    check_class_folders(folders(tmp_path / 'b', validation=('anger', 'happiness')))
    with pytest.raises(UserError, match=r'give a class map'):
        check_class_folders(folders(tmp_path / 'c', validation=('anger', 'happiness', 'neutral', 'sadness')))


def test_the_launcher_checks_folders_before_all_else(tmp_path):
    options = folders(tmp_path, classes=CLASSES, train=('anger', 'happy'))
    with patched(), pytest.raises(UserError, match=r'happy'):
        run_script(str(STANDIN), ['--data-dir', str(tmp_path), '--class-map', options.class_map, '--output',
                                  str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()


def test_the_options_show_in_help_and_work_from_yaml(tmp_path, capsys):
    with patched(), pytest.raises(SystemExit):
        run_script(str(STANDIN), ['--help'])
    text = capsys.readouterr().out
    assert '--skip-folders NAME' in text and '--no-epoch-seeds' in text and 'Safe training' in text
    options = folders(tmp_path, classes=CLASSES, train=('anger', 'yawning'))
    config = tmp_path / 'config.yaml'
    config.write_text('skip_folders: [yawning]\nno_epoch_seeds: true\n')
    with patched():
        run_script(str(STANDIN), ['--config', str(config), '--data-dir', str(tmp_path), '--class-map',
                                  options.class_map, '--output', str(tmp_path)])
    assert launch.rank() == 0
    assert '"no_epoch_seeds": true' in (tmp_path / 'result.json').read_text()
