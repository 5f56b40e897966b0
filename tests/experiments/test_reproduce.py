"""`timm-lfnsb reproduce`: with a stand-in for train.py always, with timm's own where TIMM_SCRIPTS is set."""
from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from PIL import Image
from support import ROOT

from timm_lfnsb.cli import main
from timm_lfnsb.commands.reproduce import EXPERIMENTS
from timm_lfnsb.data.subsets import (
    FoldError,
    LabelledFile,
    assign_folds,
    choose_subset,
    list_images,
    near_identical_groups,
    write_folds,
)
from timm_lfnsb.evaluate.predictions import predict_folder
from timm_lfnsb.experiments import run as logic
from timm_lfnsb.experiments.run import Plan, ReproduceError, Run, dry_run, format_results, results_markdown
from timm_lfnsb.train.checkpoints import PackError
from timm_lfnsb.train.history import read_curve

LABELS = ('neutral', 'happiness', 'sadness', 'anger')
EPOCHS, METRICS = 3, (50., 70., 60.)

# Writes what train.py would, without training. It notes its arguments, and can fail, or be killed after an epoch.
FAKE = '''
import argparse, json, os, shutil, signal, sys, time
from pathlib import Path
if __name__ != '__main__':  # under the launcher, which replaces the task
    from timm.task import ClassificationTask
parser = argparse.ArgumentParser()
for flag in ('--config', '--experiment', '--output', '--resume', '--data-dir', '--model', '--class-map'):
    parser.add_argument(flag, default='')
parser.add_argument('--epochs', type=int)
parser.add_argument('--seed', type=int)

def main():
    args, _ = parser.parse_known_args()
    here = Path(__file__).parent
    with open(here / 'calls.txt', 'a') as file:
        file.write(json.dumps(sys.argv[1:]) + '\\n')
    name = Path(args.output).name
    print('a line of the log')
    if os.environ.get('FAKE_FAIL', 'nothing') in name:
        sys.exit('CUDA out of memory, or so')
    if 'FAKE_SLEEP' in os.environ:
        (here / 'pid').write_text(str(os.getpid()))
        time.sleep(600)
    run = Path(args.output) / args.experiment
    run.mkdir(parents=True, exist_ok=True)
    start = int(Path(args.resume + '.epoch').read_text()) + 1 if args.resume else 0
    best = -1
    for epoch in range(start, args.epochs):
        with open(run / 'summary.csv', 'a') as file:
            if epoch == start:  # a resumed run of an older script writes the header again
                file.write('epoch,train_loss,eval_loss,eval_top1,lr\\n')
            file.write(f'{epoch},{2 - 0.5 * epoch},{1.5 - 0.25 * epoch},{50 + epoch},0.1\\n')
        shutil.copy(here / f'{epoch}.pth.tar', run / 'tmp')
        os.replace(run / 'tmp', run / 'last.pth.tar')
        (run / 'last.pth.tar.epoch').write_text(str(epoch))
        shutil.copy(here / f'{epoch}.pth.tar', run / f'checkpoint-{epoch}.pth.tar')
        if epoch == start:  # an older script forgets what was best before it was resumed
            shutil.copy(here / f'{epoch}.pth.tar', run / 'model_best.pth.tar')
        if os.environ.get('FAKE_KILL') == f'{name}:{epoch}':
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get('FAKE_END') == f'{name}:{epoch}':
            return

if __name__ == '__main__':
    main()
'''


@pytest.fixture(scope='session')
def fake_folder(tmp_path_factory, face_folder) -> Path:
    """The stand-in, and the checkpoints it hands out: one for each epoch, of different weights."""
    folder = tmp_path_factory.mktemp('fake')
    (folder / 'fake_train.py').write_text(FAKE)
    for epoch, metric in enumerate(METRICS):
        torch.manual_seed(epoch)
        model = timm.create_model('mobilefacenet', num_classes=4, img_size=32)
        torch.nn.init.normal_(model.get_classifier().weight)
        args = argparse.Namespace(
            model='mobilefacenet', num_classes=4, img_size=32, class_map=str(face_folder / 'class_map.txt'),
            data_dir=str(face_folder), eval_metric='top1', device='cpu')
        torch.save(
            dict(epoch=epoch, version=2, arch='mobilefacenet', metric=metric, args=args,
                 state_dict=model.state_dict()), folder / f'{epoch}.pth.tar')
    return folder


@pytest.fixture
def data(tmp_path, face_folder) -> Path:
    """A copy of the face folder with a checksum, as `prepare` writes it."""
    folder = tmp_path / 'data'
    shutil.copytree(face_folder, folder)
    (folder / 'dataset.json').write_text(json.dumps(dict(name='faces', sha256='abc')))
    return folder


@pytest.fixture
def recipe(tmp_path, face_folder) -> Path:
    path = tmp_path / 'tiny.yaml'
    path.write_text(yaml.safe_dump(dict(
        model='lfnsb', num_classes=4, class_map=str(face_folder / 'class_map.txt'), img_size=32, epochs=EPOCHS,
        batch_size=8, opt='adamw', lr=1e-3, warmup_epochs=0, device='cpu', workers=1, seed=7, cosine_harmony=1.)))
    return path


@pytest.fixture
def fake(tmp_path, fake_folder, data, recipe, monkeypatch):
    """Plans whose train.py is the stand-in, started without the launcher: that imports for seconds."""
    for file in fake_folder.iterdir():
        (tmp_path / 'fake').mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / 'fake')
    script = tmp_path / 'fake' / 'fake_train.py'
    plain = Run.command
    monkeypatch.setattr(Run, 'command', lambda self, resume=False: plain(self, resume)[3:])

    class Fake:
        out = tmp_path / 'out'

        def plan(self, experiment: str, **settings) -> Plan:
            usual = dict(data_dir=data, out=self.out, recipe=str(recipe), script=str(script))
            return Plan(**{**usual, 'experiment': experiment, **settings})

        def run(self, experiment: str, **settings):
            return logic.reproduce(self.plan(experiment, **settings), report=lambda line: None)

        def calls(self) -> list[list[str]]:
            path = script.parent / 'calls.txt'
            calls = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
            path.unlink(missing_ok=True)
            return calls

    return Fake()


def accuracy_of(checkpoint: Path, data: Path) -> float:
    """Measured without pack and without the report."""
    model = timm.create_model('mobilefacenet', num_classes=4, img_size=32)
    model.load_state_dict(torch.load(checkpoint, weights_only=False)['state_dict'])
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, 32, 32), label_names=LABELS)
    return float(predict_folder(model, data, 'validation', workers=0, progress=False).correct.mean())


# --- running -------------------------------------------------------------------------------------------------------

def test_rows_are_trained_measured_and_written(fake, fake_folder, data):
    results, failures = fake.run('table5', seeds=2)
    assert not failures and results['complete']
    calls = fake.calls()
    assert len(calls) == 4
    assert sorted((call[call.index('--model') + 1], call[call.index('--seed') + 1]) for call in calls) == [
        ('lfn_small', '7'), ('lfn_small', '8'), ('lfnsb', '7'), ('lfnsb', '8')]
    assert not any('--resume' in call for call in calls)

    best = accuracy_of(fake_folder / '1.pth.tar', data)  # of the highest metric, not model_best
    for row in results['rows']:
        assert [seed['seed'] for seed in row['seeds']] == [7, 8]
        assert [seed['accuracy'] for seed in row['seeds']] == [best, best]
        assert row['mean']['accuracy'] == pytest.approx(best) and row['std']['accuracy'] == 0
        assert all(seed['epoch'] == 2 and seed['ema'] is False for seed in row['seeds'])
    stored = json.loads((fake.out / 'table5.json').read_text())
    assert stored == json.loads(json.dumps(results))
    assert stored['data']['sha256'] == 'abc' and stored['recipe']['settings']['batch_size'] == 8
    assert set(stored['versions']) == {'timm', 'torch', 'timm_lfnsb'} and 'CPU' in stored['device']
    assert stored['measured'] == dict(
        split='validation', images=[24], checkpoint='best', checkpoint_split='validation')
    assert str(fake.out) not in json.dumps(results['rows'])  # no places of this machine


def test_the_last_epoch_can_be_measured_without_training_again(fake, fake_folder, data):
    fake.run('figure6')
    results, _ = fake.run('figure6', checkpoint='last')
    assert len(fake.calls()) == 1
    assert results['rows'][0]['seeds'][0]['accuracy'] == accuracy_of(fake_folder / '2.pth.tar', data)
    assert results['rows'][0]['seeds'][0]['epoch'] == 3
    assert (fake.out / 'figure6.json').is_file() and (fake.out / 'figure6-last.json').is_file()
    assert 'last epoch' in format_results(results)


def test_finished_rows_are_not_run_again_and_experiments_share_runs(fake):
    first, _ = fake.run('figure5')
    assert len(fake.calls()) == 2
    again, _ = fake.run('figure5')
    assert not fake.calls() and again == first
    fake.run('figure6')  # the second row of figure 5
    assert not fake.calls()
    assert (fake.out / 'figure6.png').read_bytes().startswith(b'\x89PNG')
    fake.run('figure6', seeds=2)
    call, = fake.calls()
    assert call[call.index('--seed') + 1] == '8'


def test_an_interrupted_row_goes_on(fake, monkeypatch):
    name = 'lfnsb-reference-alpha0.1-seed7'
    monkeypatch.setenv('FAKE_KILL', f'{name}:0')
    results, failures = fake.run('figure5')
    assert len(failures) == 1 and '-9' in failures[0] and not results['complete']
    assert results['rows'][0]['seeds'] and not results['rows'][1]['seeds']
    assert 'resume' in dry_run(fake.plan('figure5'), estimate=False)
    fake.calls()

    monkeypatch.delenv('FAKE_KILL')
    results, failures = fake.run('figure5')
    call, = fake.calls()
    assert call[call.index('--resume') + 1] == str(fake.out / 'runs' / name / 'train' / 'last.pth.tar')
    assert not failures and results['complete']
    seed, = results['rows'][1]['seeds']
    assert seed['resumed_after_epoch'] == 1 and seed['epoch'] == 2
    assert [row['train_loss'] for row in seed['curve']] == [2, 1.5, 1]  # one line an epoch, whatever the file says
    assert (fake.out / 'figure5.png').is_file()


def test_a_row_killed_after_its_last_epoch_is_not_trained_again(fake, monkeypatch):
    monkeypatch.setenv('FAKE_KILL', 'lfnsb-reference-alpha0.1-seed7:2')
    assert fake.run('figure6')[1]
    fake.calls()
    results, failures = fake.run('figure6')
    assert not failures and results['complete'] and not fake.calls()


def test_a_row_without_a_checkpoint_starts_anew(fake, monkeypatch):
    monkeypatch.setenv('FAKE_FAIL', 'lfnsb')
    fake.run('figure6')
    train = fake.out / 'runs' / 'lfnsb-reference-alpha0.1-seed7' / 'train'
    train.mkdir()
    (train / 'recovery-0-100.pth.tar').write_bytes(b'timm would leave out the rest of this epoch')
    monkeypatch.delenv('FAKE_FAIL')
    fake.calls()
    _, failures = fake.run('figure6')
    assert not failures and '--resume' not in fake.calls()[0] and not (train / 'recovery-0-100.pth.tar').exists()


def test_a_script_that_ends_early_is_a_failure(fake, monkeypatch):
    """timm's script ends with 0 after Ctrl-C."""
    monkeypatch.setenv('FAKE_END', 'lfnsb-reference-alpha0.1-seed7:1')
    results, failures = fake.run('figure6')
    assert 'after epoch 2 of 3' in failures[0] and not results['rows'][0]['seeds'] and not results['complete']


def test_a_failing_row_leaves_the_others(fake, monkeypatch):
    monkeypatch.setenv('FAKE_FAIL', 'lfn_small')
    results, failures = fake.run('table5', seeds=2, jobs=2)
    assert len(failures) == 2 and failures[0].startswith('lfn_small, seed 7: ')
    assert 'CUDA out of memory' in failures[0] and 'a line of the log' in failures[0]
    log = fake.out / 'runs' / 'lfn_small-reference-alpha0.1-seed7' / 'log.txt'
    assert str(log) in failures[0] and 'out of memory' in log.read_text()
    assert [len(row['seeds']) for row in results['rows']] == [0, 2]
    assert not json.loads((fake.out / 'table5.json').read_text())['complete']
    assert '(0 of 2 runs)' in format_results(results) and 'Not complete.' in results_markdown(results)

    monkeypatch.delenv('FAKE_FAIL')
    fake.calls()
    results, failures = fake.run('table5', seeds=2)
    assert len(fake.calls()) == 2 and not failures and results['complete']


def test_settings_of_a_row_without_a_trained_epoch_may_change(fake, monkeypatch):
    monkeypatch.setenv('FAKE_FAIL', 'lfnsb')
    fake.run('figure6')
    monkeypatch.delenv('FAKE_FAIL')
    results, failures = fake.run('figure6', epochs=2)
    assert not failures and results['epochs'] == 2
    with pytest.raises(ReproduceError, match='epochs: 2 there, 3 asked for'):
        fake.run('figure6')


def test_a_damaged_checkpoint_is_named(fake, monkeypatch):
    monkeypatch.setenv('FAKE_KILL', 'lfnsb-reference-alpha0.1-seed7:0')
    fake.run('figure6')
    run, = fake.plan('figure6').runs
    run.last.write_bytes(run.last.read_bytes()[:1000])
    with pytest.raises(PackError, match=r'last\.pth\.tar is damaged'):
        fake.run('figure6')


@pytest.mark.parametrize('change, word', [
    (dict(epochs=2), 'epochs: 3 there, 2 asked for'),
    (dict(extra=['--lr', '0.1']), 'extra'),
    (dict(subset=16), 'subset: None there, 16 asked for'),
    ('recipe', 'recipe batch_size: 8 there, 4 asked for'),
    ('data', 'data'),
    ('unfinished', 'epochs: 3 there, 2 asked for'),
])
def test_changed_settings_are_refused(change, word, fake, data, recipe, monkeypatch):
    if change == 'unfinished':
        monkeypatch.setenv('FAKE_KILL', 'lfnsb-reference-alpha0.1-seed7:0')
    fake.run('figure6')
    monkeypatch.delenv('FAKE_KILL', raising=False)
    before = (fake.out / 'figure6.json').read_bytes()
    fake.calls()
    settings = change if isinstance(change, dict) else {}
    if change == 'recipe':
        recipe.write_text(recipe.read_text().replace('batch_size: 8', 'batch_size: 4'))
    elif change == 'data':
        (data / 'dataset.json').write_text(json.dumps(dict(name='faces', sha256='other')))
    elif change == 'unfinished':
        settings = dict(epochs=2)
    for attempt in (fake.run, lambda *args, **kwargs: dry_run(fake.plan(*args, **kwargs))):
        with pytest.raises(ReproduceError, match='trained with other settings') as error:
            attempt('figure6', **settings)
        assert word in str(error.value) and '--out' in str(error.value)
    assert not fake.calls() and (fake.out / 'figure6.json').read_bytes() == before


def test_the_checksum_of_data_without_dataset_json_covers_the_images(fake, data):
    (data / 'dataset.json').unlink()
    plan = fake.plan('figure6')
    listing = subprocess.run(
        "find . -mindepth 3 -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum", shell=True,
        cwd=data, capture_output=True, text=True, check=True)
    assert plan.dataset['sha256'] == listing.stdout.split()[0]
    next(data.glob('train/anger/*.png')).unlink()
    assert fake.plan('figure6').dataset['sha256'] != plan.dataset['sha256']


def test_a_folder_in_use_is_refused(fake):
    fcntl = pytest.importorskip('fcntl')
    fake.out.mkdir()
    with open(fake.out / '.lock', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ReproduceError, match='at work'):
            fake.run('figure6')
    assert fake.run('figure6')[0]['complete']


@pytest.mark.parametrize('sent', [signal.SIGINT, signal.SIGKILL])
def test_stopped_from_outside(sent, fake, tmp_path, data, recipe):
    """Ctrl-C ends the training too; after a kill it lives on, and nobody else may train in its folder meanwhile."""
    # Processes started in the background inherit that SIGINT is ignored.
    code = ('import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); '
            'from timm_lfnsb import reproduce as r; plain = r.Run.command; '
            'r.Run.command = lambda self, resume=False: plain(self, resume)[3:]; '
            'from timm_lfnsb.cli import main; main(sys.argv[1:])')
    arguments = ['reproduce', 'figure6', '--data-dir', data, '--recipe', recipe, '--out', fake.out, '--script',
                 tmp_path / 'fake' / 'fake_train.py']
    process = subprocess.Popen(
        [sys.executable, '-c', code, *map(str, arguments)], stderr=subprocess.PIPE, text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT), FAKE_SLEEP='1', OMP_NUM_THREADS='1'))
    pid_file = tmp_path / 'fake' / 'pid'
    while not (pid_file.is_file() and pid_file.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    pid = int(pid_file.read_text())
    try:
        process.send_signal(sent)
        if sent == signal.SIGINT:
            assert process.wait(60) == 1 and 'Error: interrupted; the same command goes on' in process.stderr.read()
            assert not json.loads((fake.out / 'figure6.json').read_text())['complete']
        else:
            process.wait(60)
            with pytest.raises(ReproduceError, match='at work'):
                fake.run('figure6')
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()
    while True:
        try:
            assert fake.run('figure6')[0]['complete']
            break
        except ReproduceError:  # the killed script is not quite gone
            time.sleep(0.05)


def test_through_the_launcher(fake, fake_folder, data, recipe, tmp_path, monkeypatch):
    """The whole way without a clone of timm: command line, launcher, stand-in, evaluation, table, figure."""
    monkeypatch.undo()
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    out = tmp_path / 'launched'
    arguments = ['reproduce', 'figure6', '--data-dir', data, '--recipe', recipe, '--out', out, '--script',
                 tmp_path / 'fake' / 'fake_train.py', '--', '--class-map', data / 'class_map.txt']
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    call, = fake.calls()
    assert call[call.index('--class-map') + 1] == str(data / 'class_map.txt')
    accuracy = 100 * accuracy_of(fake_folder / '1.pth.tar', data)
    assert 'Figure 6' in result.output and f'{accuracy:.2f}' in result.output
    width, height = Image.open(out / 'figure6.png').size
    assert width > 500 and height > 400


# --- dry run and settings ------------------------------------------------------------------------------------------

def test_dry_run_runs_and_writes_nothing(fake):
    text = dry_run(fake.plan('table3', seeds=2, subset=16))
    assert not fake.calls() and not fake.out.exists()
    commands = [line for line in text.splitlines() if line.startswith('python ')]
    assert len(commands) == 10 == text.count(': to do')
    assert sum('--cosine-harmony 0' in command for command in commands) == 2
    assert sum('--cosine-harmony-fixed-centers' in command for command in commands) == 2
    assert all(f'{fake.out}/data/subset-16' in command and '--epochs 3' in command for command in commands)
    assert 'ESTIMATED time: about' in text and '(lfnsb ' in text


def test_dry_run_counts_finished_rows_as_zero(fake):
    fake.run('figure6')
    text = dry_run(fake.plan('figure6'))
    assert '1 runs, 1 finished' in text and 'estimated time: none' in text and 'python' not in text


def test_rows_of_every_experiment(fake):
    rows = {name: fake.plan(name).rows for name in logic.EXPERIMENTS}
    assert [row.model for row in rows['table2']] == ['lfnsb', 'lfn_small', 'mfn', 'ddamfn', 'mobilefacenet']
    assert [(row.weight, row.variant, row.fixed_centers) for row in rows['table3'][1:]] == [
        (1, 'reference', False), (1, 'paper', False), (1, 'intended', False), (1, 'intended', True)]
    assert rows['table3'][0].weight == 0 and rows['table3'][0].flags == ['--model', 'lfnsb', '--cosine-harmony', '0']
    assert [row.alpha for row in rows['table4']] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [row.fold for row in rows['table9']] == list(range(10))
    for name, table in rows.items():
        assert len({run.folder for run in fake.plan(name, seeds=3).runs}) == 3 * len(table)
    for name, paper in logic.PAPER.items():
        known = {row.name for row in rows[name]} | {'mean of the folds', 'best fold'}
        assert set(paper) <= known, name


def test_networks_of_a_fixed_size_are_built_for_the_recipes(fake):
    """timm does not hand --img-size to the model; lfnsb takes any size."""
    for run in fake.plan('table5').runs:
        command = ' '.join(run.command())
        assert ('--model-kwargs img_size=32' in command) == (run.row.model == 'lfn_small')
    own = fake.plan('table5', extra=['--model-kwargs', 'img_size=48'])
    assert ' '.join(own.runs[0].command()).count('--model-kwargs') == 1


def test_command_and_logic_name_the_same_experiments():
    assert set(EXPERIMENTS) == set(logic.EXPERIMENTS)


@pytest.mark.parametrize('settings, word', [
    (dict(extra=['--output', 'there']), '--output is set'),
    (dict(extra=['--epo', '3']), '--epo is set'),
    (dict(extra=['-c', 'rafdb']), '-c is set'),
    (dict(extra=['--cosine-harmony-alpha=0.3']), '--cosine-harmony-alpha is set'),
    (dict(extra=['--batch-size', 'many']), 'options for train.py'),
    (dict(recipe='no-such'), 'neither a YAML file nor a recipe'),
    (dict(recipe=None), '--recipe'),
    (dict(data_dir='no-such'), 'timm-lfnsb prepare'),
    (dict(seeds=0), '1 or more'),
    (dict(experiment='table9', subset=8), 'without --subset'),
    (dict(experiment='table9', split='test'), 'leave --split out'),
    (dict(experiment='table7'), 'table2'),
])
def test_wrong_settings_are_refused(settings, word, fake):
    with pytest.raises(ReproduceError, match=word):
        fake.plan(**dict(dict(experiment='figure6'), **settings))
    assert not fake.out.exists()


def test_the_command_says_it_in_one_sentence(tmp_path, data, recipe, monkeypatch):
    monkeypatch.delenv('TIMM_SCRIPTS', raising=False)
    for arguments, word in (
            (['--recipe', recipe], 'TIMM_SCRIPTS'),
            (['--recipe', 'no-such'], 'no-such'),
            (['--recipe', recipe, '--subset', '1'], '4 classes')):
        result = CliRunner().invoke(main, list(map(str, [
            'reproduce', 'table3', '--data-dir', data, '--out', tmp_path / 'out', *arguments])))
        assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
        assert len(result.output.strip().splitlines()) == 1 and word in result.output, result.output
    assert not (tmp_path / 'out').exists()


# --- subset --------------------------------------------------------------------------------------------------------

def numbered(**counts: int) -> list[LabelledFile]:
    return [LabelledFile(f'train/{label}/{i}.png', label) for label, n in counts.items() for i in range(n)]


def test_subset_is_stratified_exact_and_fixed():
    images = numbered(neutral=9093, happiness=7183, fear=571, disgust=142, contempt=148)
    chosen = choose_subset(images, 2500)
    assert chosen == choose_subset(images[::-1], 2500) and len(set(chosen)) == 2500
    counts = Counter(image.label for image in chosen)
    assert sum(counts.values()) == 2500
    for label, total in Counter(image.label for image in images).items():
        assert abs(counts[label] - 2500 * total / len(images)) < 1
    assert choose_subset(images, 2500, seed=1) != chosen
    assert {image.label: image for image in chosen}['fear'] != images[0]


def test_a_small_subset_has_every_class():
    images = numbered(neutral=9093, happiness=7183, fear=3, disgust=1)
    for count in (4, 5, 6, 7, 10):
        counts = Counter(image.label for image in choose_subset(images, count))
        assert sum(counts.values()) == count and len(counts) == 4
    with pytest.raises(FoldError, match='4 classes'):
        choose_subset(images, 3)
    with pytest.raises(FoldError):
        choose_subset(images[:5], 6)


def test_rows_train_on_the_subset_and_are_measured_on_the_whole_split(fake):
    plan = fake.plan('figure6', subset=16)
    results, _ = fake.run('figure6', subset=16)
    folder = fake.out / 'data' / 'subset-16'
    call, = fake.calls()
    assert call[call.index('--data-dir') + 1] == str(folder)
    assert list_images(folder, 'train') == plan.subset_images
    assert Counter(image.label for image in list_images(folder, 'train')) == dict.fromkeys(LABELS, 4)
    assert len(list_images(folder, 'validation')) == 24 and results['measured']['images'] == [24]
    assert results['data']['subset'] == 16 == results['data']['train_images']
    assert 'no conclusion' in format_results(results)

    next(folder.glob('train/anger/*.png')).unlink()
    with pytest.raises(FoldError, match='other images'):
        fake.run('figure6', subset=16)


# --- folds ---------------------------------------------------------------------------------------------------------

def smooth_faces(count: int, seed: int = 0) -> list[np.ndarray]:
    """Smooth random pictures of 48 px, unlike each other."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(40, 200, (9, 9)).astype(np.uint8))
        images.append(np.asarray(small.resize((48, 48), Image.Resampling.BICUBIC)))
    return images


def copies(image: np.ndarray) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    bright = np.clip(1.2 * image.astype(float) + 15, 0, 255).astype(np.uint8)
    noisy = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
    return [bright, np.roll(image, 1, axis=1), np.roll(image, (1, 1), axis=(0, 1)), noisy, image[:, ::-1].copy(),
            np.asarray(Image.fromarray(image).resize((100, 100)))]


def test_near_identical_images_are_found():
    images = smooth_faces(30)
    groups = near_identical_groups(images)
    assert len(set(groups)) == 30
    groups = near_identical_groups([*images, *copies(images[3]), *copies(images[20])[:2]])
    assert set(groups[30:36]) == {groups[3]} and set(groups[36:]) == {groups[20]}
    assert len(set(groups)) == 30
    flat = [np.full((48, 48), value, np.uint8) for value in (0, 100, 255)]
    assert len(set(near_identical_groups(flat))) == 3  # no picture, nothing to compare


def test_a_chain_of_near_identical_images_is_one_group():
    # Two pictures without correlation, mixed so that neighbours correlate by cos(20 degrees) = 0.94.
    first, second = ((image - image.mean()) / image.std() for image in smooth_faces(2))
    second = second - (first * second).mean() * first
    second /= second.std()
    mixed = [
        (128 + 25 * (np.cos(angle) * first + np.sin(angle) * second)).astype(np.uint8)
        for angle in np.deg2rad([0, 20, 40, 60])]
    assert len(set(near_identical_groups([mixed[0], mixed[3]]))) == 2
    assert len(set(near_identical_groups([mixed[i] for i in (0, 3, 1, 2)]))) == 1


@pytest.fixture
def fold_data(tmp_path) -> Path:
    """Three splits, four classes of 12 images; two pictures have near-identical copies in other splits."""
    root = tmp_path / 'folds-data'
    images = iter(smooth_faces(48))
    for split, count in (('train', 6), ('validation', 3), ('test', 3)):
        for label in LABELS:
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(next(images)).save(folder / f'{i}.png')
    original = np.asarray(Image.open(root / 'train' / 'anger' / '0.png'))
    for i, (split, copy) in enumerate(zip(('train', 'validation', 'test'), copies(original), strict=False)):
        Image.fromarray(copy).save(root / split / 'anger' / f'copy{i}.png')
    (root / 'class_map.txt').write_text('\n'.join(LABELS) + '\n')
    return root


def test_folds_cover_every_image_once(fold_data, tmp_path):
    target = tmp_path / 'folds'
    description = write_folds(fold_data, 3, target, 'sum')
    assert description['near_identical_groups'] == 1
    assert description['images_in_them'] == description['largest_group'] == 4
    everything = Counter(path.read_bytes() for path in fold_data.glob('*/*/*.png'))
    assert sum(everything.values()) == 51
    for i in range(3):
        parts = [[(target / f'run-{i}' / image.path) for image in list_images(target / f'run-{i}', split)]
                 for split in ('train', 'validation')]
        contents = [Counter(path.read_bytes() for path in part) for part in parts]
        assert contents[0] + contents[1] == everything and not contents[0] & contents[1]
        held_out = Counter(path.parent.name for path in parts[1])
        assert all(3 <= held_out[label] <= 6 for label in LABELS) and description['counts'][i] == held_out
    copied = [path for path in target.glob('fold-*/anger/*') if 'copy' in path.name or path.name == 'train-0.png']
    assert len(copied) == 4 and len({path.parent.parent for path in copied}) == 1
    reader = timm.data.create_dataset(
        '', root=str(target / 'run-0'), split='train', class_map=str(fold_data / 'class_map.txt')).reader
    assert len(reader.samples) == 51 - sum(description['counts'][0].values())
    assert all(LABELS[label] == Path(path).parent.name for path, label in reader.samples)

    assert write_folds(fold_data, 3, target, 'sum') == description
    with pytest.raises(FoldError, match='other folds'):
        write_folds(fold_data, 3, target, 'other')
    assert write_folds(fold_data, 3, tmp_path / 'again', 'sum') == description


def test_folds_of_too_few_images_are_refused():
    with pytest.raises(FoldError, match='2 fear'):
        assign_folds(['fear'] * 3 + ['anger'] * 9, np.array([0, 0, *range(1, 11)]), 3)


def test_a_broken_image_is_named(fold_data, tmp_path):
    (fold_data / 'test' / 'anger' / '0.png').write_bytes(b'no image')
    with pytest.raises(FoldError, match=r'0\.png is not a readable image'):
        write_folds(fold_data, 3, tmp_path / 'folds', 'sum')
    assert not (tmp_path / 'folds').exists()


def test_table9_trains_on_folds_and_measures_the_one_held_out(fake, fold_data):
    results, failures = fake.run('table9', folds=3, data_dir=fold_data)
    assert not failures
    calls = fake.calls()
    assert [call[call.index('--data-dir') + 1] for call in calls] == [
        str(fake.out / 'data' / 'folds-3' / f'run-{i}') for i in range(3)]
    assert sum(json.loads((run.report / 'metrics.json').read_text())['count']
               for run in fake.plan('table9', folds=3, data_dir=fold_data).runs) == 51
    accuracies = [row['mean']['accuracy'] for row in results['rows']]
    mean, best = results['summary']
    assert mean['mean']['accuracy'] == pytest.approx(np.mean(accuracies))
    assert mean['std']['accuracy'] == pytest.approx(np.std(accuracies, ddof=1))
    assert best['mean']['accuracy'] == max(accuracies)
    text = format_results(results)
    assert 'RAF-DB 90.45, AffectNet-7 65.62' in text and '3 folds' in text
    assert results['data']['fold_images']['images'] == 51


# --- tables --------------------------------------------------------------------------------------------------------

def results_of(experiment: str, rows: list[dict], **changes) -> dict:
    return dict(dict(
        experiment=experiment, title=logic.EXPERIMENTS[experiment], complete=True, epochs=80, seeds=3, extra=[],
        recipe=dict(name='ferplus', settings={}), measured=dict(
            split='validation', images=[3328], checkpoint='best', checkpoint_split='validation'),
        data=dict(name='ferplus', sha256='abc', subset=None, folds=None, train_images=25278), device='NVIDIA H200',
        versions=[dict(timm='1.0.31', torch='2.5.1'), dict(timm='1.0.31', torch='2.15.0')], commit='c0ffee',
        rows=rows), **changes)


def row_of(name: str, accuracy: float, std: float | None, seeds: int = 3, **more) -> dict:
    figures = dict(accuracy=accuracy, balanced_accuracy=0.5, macro_f1=0.51, ece=0.1)
    return dict(dict(
        name=name, mean=figures, std=None if std is None else dict.fromkeys(figures, std), paper=None,
        seeds=[{}] * seeds), **more)


def test_markdown(tmp_path):
    results = results_of('table4', [
        row_of('alpha 0.1', 0.81234, 0.0021, paper=logic.PAPER['table4']['alpha 0.1']),
        row_of('alpha 0.2', 0.8, None, seeds=1)])
    path = tmp_path / 'table4.json'
    path.write_text(json.dumps(results))
    text = results_markdown(path)
    assert text == results_markdown(results)
    lines = text.splitlines()
    assert lines[0] == '### Table 4: alpha of the Cosine-Harmony loss'
    assert lines[2].count('|') == lines[3].count('|') == lines[4].count('|')
    assert '| 81.23 ± 0.21 |' in lines[4] and '| the best of the five |' in lines[4]
    assert '| 80.00 |' not in lines[5] and '(1 of 3 runs)' in lines[5] and lines[5].endswith('| - |')
    assert '25,278 training images' in lines[-1] and '3,328 images' in lines[-1] and 'NVIDIA H200' in lines[-1]
    assert 'timm 1.0.31, torch 2.5.1 and 2.15.0' in lines[-1] and '3 seeds, mean ± standard deviation' in lines[-1]
    assert 'flatters all rows' in lines[-1]
    shown = CliRunner().invoke(main, ['reproduce', 'show', str(path), str(path)])
    assert shown.exit_code == 0 and shown.output.count('### Table 4') == 2


def test_table2_has_sizes_beside_the_papers(tmp_path):
    plan_size = dict(params=2676147, macs=397180000, input_size=[3, 112, 112], paper_size=(2.676, 397.35))
    text = format_results(results_of('table2', [
        row_of('lfnsb', 0.8, 0.01, paper=logic.PAPER['table2']['lfnsb'], **plan_size),
        row_of('ddamfn', 0.8, 0.01, **dict(plan_size, paper_size=None))]))
    assert '2.676 M' in text and '397.2 M' in text and '2.676 M / 397.35 M' in text
    assert 'RAF-DB 91.07, AffectNet-7 66.57, AffectNet-8 63.12' in text


def test_a_subset_or_one_seed_never_passes_for_a_result():
    rows = [row_of('a', 0.8, None, seeds=1), row_of('b', 0.7, None, seeds=1)]
    assert 'may be chance' in results_markdown(results_of('table3', rows, seeds=1))
    subset = dict(name='ferplus', sha256='abc', subset=2500, folds=None, train_images=2500)
    assert 'no conclusion' in results_markdown(results_of('table3', rows, seeds=1, data=subset))


def test_show_refuses_other_files(tmp_path):
    (tmp_path / 'other.json').write_text('{"rows": []}')
    (tmp_path / 'broken.json').write_text('{')
    for name in ('other.json', 'broken.json', 'missing.json'):
        result = CliRunner().invoke(main, ['reproduce', 'show', str(tmp_path / name)])
        assert result.exit_code == 1 and name in result.output and len(result.output.splitlines()) == 1


def test_committed_results_render():
    assert logic.committed_results()
    for path in logic.committed_results():
        assert results_markdown(path).startswith('### ')


# --- timm's own train script ---------------------------------------------------------------------------------------

def test_real_train_script(timm_scripts, data, recipe, tmp_path, monkeypatch):
    """A row on a subset, and the same as if it had been killed in its second epoch."""
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    recipe.write_text(recipe.read_text() + 'model_ema: true\nmodel_ema_decay: 0.5\n')
    plan = Plan('figure6', data, tmp_path / 'out', recipe=str(recipe), epochs=2, subset=16,
                script=str(timm_scripts / 'train.py'), extra=['--log-interval', '1'])
    lines: list[str] = []
    results, failures = logic.reproduce(plan, report=lines.append)
    assert not failures and 'starts' in lines[1]
    run, = plan.runs
    seed, = results['rows'][0]['seeds']
    curve = read_curve(run.last.parent)
    assert [entry['epoch'] for entry in curve] == [0, 1] and seed['ema'] is True
    # Measured at the size and with the preprocessing of training: as train.py itself measured that epoch.
    assert 100 * seed['accuracy'] == pytest.approx(curve[seed['epoch'] - 1]['eval_top1'], abs=1e-3)
    assert np.sum(seed['confusion']) == 24

    train = run.folder / 'train'
    shutil.copy(train / 'checkpoint-0.pth.tar', train / 'copy')
    os.replace(train / 'copy', train / 'last.pth.tar')
    (train / 'checkpoint-1.pth.tar').unlink()
    (run.folder / 'trained.json').unlink()
    shutil.rmtree(run.report)
    results, failures = logic.reproduce(plan, report=lines.append)
    assert not failures and 'goes on after epoch 1 of 2' in lines[-2]
    assert results['rows'][0]['seeds'][0]['resumed_after_epoch'] == 1
    assert [entry['epoch'] for entry in read_curve(run.last.parent)] == [0, 1]
