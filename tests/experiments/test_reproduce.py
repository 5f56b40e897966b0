"""`timm-lfnsb reproduce`: with a stand-in for train.py always, with timm's own where TIMM_SCRIPTS is set."""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import filelock
import numpy as np
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from matplotlib.figure import Figure
from scipy.stats import ttest_rel
from support import TESTS

from timm_lfnsb.cli import main
from timm_lfnsb.data.subsets import list_images
from timm_lfnsb.errors import UserError
from timm_lfnsb.evaluate import report
from timm_lfnsb.evaluate.features import class_distances
from timm_lfnsb.evaluate.predictions import Predictions, predict_folder
from timm_lfnsb.experiments import plan as plans
from timm_lfnsb.experiments.plan import EXPERIMENTS, Plan, dry_run
from timm_lfnsb.experiments.run import reproduce
from timm_lfnsb.experiments.tables import PAPER, committed_results, read_results, results_markdown
from timm_lfnsb.train.history import read_curve

LABELS = ('neutral', 'happiness', 'sadness', 'anger')
EPOCHS, BEST = 3, 1
NAME = 'lfnsb-cosine-harmony-1-alpha-0.1-variant-reference-seed7'  # the run of figure 6


@pytest.fixture(scope='session')
def fake_folder(tmp_path_factory, face_folder) -> Path:
    """The stand-in, and the checkpoints it hands out: one for each epoch, of different weights."""
    folder = tmp_path_factory.mktemp('fake')
    shutil.copy(TESTS / 'support' / 'fake_train.py', folder)
    args = argparse.Namespace(
        model='mobilefacenet', num_classes=4, img_size=32, class_map=str(face_folder / 'class_map.txt'),
        data_dir=str(face_folder), device='cpu')
    for epoch in range(EPOCHS):
        torch.manual_seed(epoch)
        model = timm.create_model('mobilefacenet', num_classes=4, img_size=32)
        head = model.get_classifier()
        torch.nn.init.normal_(head.weight)
        with torch.no_grad():  # logits that are 0 in the mean over grey levels: not one class for all images
            head.bias -= model.eval()(torch.linspace(-2, 2, 9).view(9, 1, 1, 1).expand(9, 3, 32, 32)).mean(dim=0)
        torch.save(dict(epoch=epoch, version=2, arch='mobilefacenet', args=args, state_dict=model.state_dict()),
                   folder / f'{epoch}.pth.tar')
    return folder


@pytest.fixture
def data(tmp_path, face_folder) -> Path:
    shutil.copytree(face_folder, tmp_path / 'data')
    (tmp_path / 'data' / 'dataset.json').write_text(json.dumps(dict(name='faces', sha256='abc')))
    return tmp_path / 'data'


@pytest.fixture
def recipe(tmp_path, face_folder) -> Path:
    path = tmp_path / 'tiny.yaml'
    path.write_text(yaml.safe_dump(dict(
        model='lfnsb', num_classes=4, class_map=str(face_folder / 'class_map.txt'), img_size=32, epochs=EPOCHS,
        batch_size=8, opt='adamw', lr=1e-3, warmup_epochs=0, device='cpu', workers=1, seed=7, cosine_harmony=1.)))
    return path


class Fake:
    """Plans whose train.py is the stand-in."""

    def __init__(self, folder: Path, data: Path, recipe: Path) -> None:
        self.out, self.script = folder / 'out', folder / 'fake' / 'fake_train.py'
        self.usual = dict(data_dir=data, out=self.out, recipe=str(recipe), script=str(self.script))

    def plan(self, experiment: str, **settings) -> Plan:
        return Plan(experiment, **{**self.usual, **settings})

    def run(self, experiment: str, **settings):
        return reproduce(self.plan(experiment, **settings), report=lambda line: None)

    def calls(self) -> list[list[str]]:
        """Arguments of the stand-in since they were last asked for."""
        path = self.script.parent / 'calls.txt'
        calls = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        path.unlink(missing_ok=True)
        return calls


@pytest.fixture
def fake(tmp_path, fake_folder, data, recipe, monkeypatch) -> Fake:
    shutil.copytree(fake_folder, tmp_path / 'fake')
    monkeypatch.setattr(plans, 'LAUNCHER', ('python',))  # which imports for seconds
    for name in ('confusion_figure', 'reliability_figure'):  # which take half of a run's time
        monkeypatch.setattr(report, name, lambda *_: Figure(figsize=(1, 1)))
    return Fake(tmp_path, data, recipe)


def option(call: list[str], flag: str) -> str:
    return call[call.index(flag) + 1]


def command(*arguments):
    return CliRunner().invoke(main, ['reproduce', *map(str, arguments)])


def predictions_of(checkpoint: Path, data: Path) -> Predictions:
    model = timm.create_model('mobilefacenet', num_classes=4, img_size=32)
    model.load_state_dict(torch.load(checkpoint, weights_only=False)['state_dict'])
    model.pretrained_cfg = dict(model.pretrained_cfg, input_size=(3, 32, 32), label_names=LABELS)
    return predict_folder(model, data, 'validation', workers=0, progress=False)


def accuracy_of(checkpoint: Path, data: Path) -> float:
    return float(predictions_of(checkpoint, data).correct.mean())


def test_rows_are_trained_measured_and_written(fake, fake_folder, data):
    results, failures = fake.run('table5', seeds=2, jobs=2)
    assert not failures and results['complete']
    calls = fake.calls()
    assert sorted((option(call, '--model'), option(call, '--seed')) for call in calls) == [
        ('lfn_small', '7'), ('lfn_small', '8'), ('lfnsb', '7'), ('lfnsb', '8')]
    assert not any('--resume' in call for call in calls)

    best = accuracy_of(fake_folder / f'{BEST}.pth.tar', data)
    for row in results['rows']:
        assert [(seed['seed'], seed['accuracy'], seed['epoch']) for seed in row['seeds']] == [
            (7, best, BEST + 1), (8, best, BEST + 1)]
        assert row['mean']['accuracy'] == pytest.approx(best) and row['std']['accuracy'] == 0
    assert read_results(fake.out / 'table5.json') == json.loads(json.dumps(results))
    assert results['data']['sha256'] == 'abc' and 'CPU' in results['device']
    assert str(fake.out) not in json.dumps(results['rows'])  # no places of this machine


def test_finished_rows_are_kept_and_shared(fake, fake_folder, data, recipe):
    first, _ = fake.run('figure5')
    assert len(fake.calls()) == 2 and (fake.out / 'figure5.png').is_file()
    assert [row['train_loss'] for row in first['rows'][1]['seeds'][0]['curve']] == [2, 1.5, 1]
    assert fake.run('figure5')[0] == first
    fake.run('figure6')  # the second row of figure 5
    assert not fake.calls()
    assert (fake.out / 'figure6.png').read_bytes().startswith(b'\x89PNG')
    fake.run('figure6', split='train')
    assert not fake.calls() and read_results(fake.out / 'figure6-train.json')['measured']['split'] == 'train'

    recipe.write_text(recipe.read_text() + "val_split: ''\n")  # nothing chooses an epoch
    results, _ = fake.run('figure6', out=fake.out.parent / 'other')
    seed, = results['rows'][0]['seeds']
    assert seed['accuracy'] == accuracy_of(fake_folder / '2.pth.tar', data) and seed['epoch'] == EPOCHS
    assert 'last epoch' in results_markdown(results)


@pytest.mark.parametrize('variable, epoch, words', [
    ('FAKE_KILL', 0, 'ended with -9 after epoch 1 of 3'),
    ('FAKE_END', 1, 'ended with 0 after epoch 2 of 3'),  # as timm's script does after Ctrl-C
    ('FAKE_KILL', 2, 'ended with -9 after epoch 3 of 3'),
])
def test_an_interrupted_row_goes_on_and_a_trained_one_is_only_measured(variable, epoch, words, fake, monkeypatch):
    monkeypatch.setenv(variable, f'{NAME}:{epoch}')
    results, failures = fake.run('figure6')
    assert words in failures[0] and not results['complete'] and not results['rows'][0]['seeds']
    assert f'{epoch + 1} of 3 epochs' in dry_run(fake.plan('figure6'))
    fake.calls()
    monkeypatch.delenv(variable)
    results, failures = fake.run('figure6')
    last = str(fake.out / 'runs' / NAME / 'train' / 'last.pth.tar')
    assert [option(call, '--resume') for call in fake.calls()] == [last] * (epoch < 2)
    seed, = results['rows'][0]['seeds']
    assert not failures and seed['resumed_after_epoch'] == epoch + 1 and seed['epoch'] == BEST + 1


def test_a_failing_row_leaves_the_others_and_starts_anew(fake, monkeypatch):
    monkeypatch.setenv('FAKE_FAIL', 'lfn_small')
    results, (failure,) = fake.run('table5')
    folder = fake.out / 'runs' / NAME.replace('lfnsb', 'lfn_small')
    for word in ('lfn_small, seed 7: ', 'CUDA out of memory', 'a line of the log', str(folder / 'log.txt')):
        assert word in failure
    assert [len(row['seeds']) for row in results['rows']] == [0, 1]
    text = results_markdown(read_results(fake.out / 'table5.json'))
    assert '(0 of 1 runs)' in text and 'Not complete.' in text

    (folder / 'train').mkdir()
    recovery = folder / 'train' / 'recovery-0-100.pth.tar'
    recovery.write_bytes(b'timm would leave out the rest of this epoch')
    monkeypatch.delenv('FAKE_FAIL')
    fake.calls()
    results, failures = fake.run('table5')
    call, = fake.calls()
    assert '--resume' not in call and not recovery.exists() and not failures and results['complete']


def test_changed_settings_are_refused(fake, data, recipe, monkeypatch):
    monkeypatch.setenv('FAKE_KILL', f'{NAME}:0')
    fake.run('figure6')
    fake.calls()
    recipe.write_text(recipe.read_text().replace('batch_size: 8', 'batch_size: 4'))
    (data / 'dataset.json').write_text(json.dumps(dict(name='faces', sha256='other')))
    plan = fake.plan('figure6', epochs=2, subset=16, extra=['--lr', '0.1'])
    for attempt in (reproduce, dry_run):
        with pytest.raises(UserError, match=r'other settings \(recipe, epochs, extra, data, subset; .*--out'):
            attempt(plan)
    assert not fake.calls()


@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
def test_ctrl_c_ends_the_training_and_one_that_outlives_us_keeps_others_out(how, fake, monkeypatch):
    monkeypatch.setenv('FAKE_SLEEP', '1')

    def start() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a process of the background
        fake.run('figure6')

    process = multiprocessing.get_context('fork').Process(target=start)
    process.start()
    pid_file = fake.script.parent / 'pid'
    while not (pid_file.is_file() and pid_file.read_text()):
        time.sleep(0.05)
    os.kill(process.pid, how)
    process.join()
    if how == signal.SIGKILL:
        with pytest.raises(UserError, match='at work'):
            fake.run('figure6')
        os.kill(int(pid_file.read_text()), signal.SIGKILL)
    with filelock.FileLock(fake.out / '.lock', timeout=30):  # the training is gone
        assert how == signal.SIGKILL or not read_results(fake.out / 'figure6.json')['complete']


def test_a_subset_through_the_launcher(fake, fake_folder, data, recipe, monkeypatch):
    """The whole way without a clone of timm; the row trains on the subset and is measured on the whole split."""
    monkeypatch.setattr(plans, 'LAUNCHER', ('python', '-m', 'timm_lfnsb', 'run'))
    result = command('figure6', '--data-dir', data, '--recipe', recipe, '--out', fake.out, '--script', fake.script,
                     '--subset', 16, '--', '--class-map', data / 'class_map.txt')
    assert result.exit_code == 0, result.output
    call, = fake.calls()
    folder, results = fake.out / 'data' / 'subset-16', read_results(fake.out / 'figure6.json')
    assert (option(call, '--class-map'), option(call, '--data-dir')) == (str(data / 'class_map.txt'), str(folder))
    assert len(list_images(folder, 'train')) == 16 and results['measured']['images'] == [24]
    for word in ('Figure 6', f"{100 * accuracy_of(fake_folder / f'{BEST}.pth.tar', data):.2f}", 'no conclusion'):
        assert word in result.output


def test_table9_trains_on_folds_and_measures_the_one_held_out(fake):
    results, failures = fake.run('table9', folds=2)
    assert not failures
    assert [option(call, '--data-dir') for call in fake.calls()] == [
        str(fake.out / 'data' / 'folds-2' / f'run-{i}') for i in range(2)]
    assert sum(seed['count'] for row in results['rows'] for seed in row['seeds']) == 48
    accuracies = [row['mean']['accuracy'] for row in results['rows']]
    mean, best = results['summary']
    assert mean['mean']['accuracy'] == pytest.approx(np.mean(accuracies)) and mean['std']
    assert best['mean']['accuracy'] == max(accuracies)
    assert 'RAF-DB 90.45, AffectNet-7 65.62' in results_markdown(results)


def test_dry_run_prints_the_rows_of_every_experiment_and_writes_nothing(fake):
    text = dry_run(fake.plan('table3', seeds=2, subset=16))
    assert not fake.calls() and not fake.out.exists()
    for part, count in ((': 0 of 3 epochs', 10), ('--feature-loss', 8), ('learn_centers=false', 2),
                        (f'{fake.out}/data/subset-16', 10), ('--epochs 3', 10)):
        assert text.count(part) == count, part
    by_name = {name: fake.plan(name, seeds=3) for name in EXPERIMENTS}
    assert [str(row.loss) for row in by_name['table3'].rows[1:]] == [
        f'cosine-harmony:1:alpha=0.1,variant={variant}' for variant in (
            'reference', 'paper', 'intended', 'intended,learn_centers=false')]
    assert [str(row.loss) for row in by_name['table4'].rows] == [
        f'cosine-harmony:1:alpha=0.{tenths},variant=reference' for tenths in (1, 2, 3, 4, 5)]
    assert [row.fold for row in by_name['table9'].rows] == list(range(10))
    for name, plan in by_name.items():
        assert len({run.folder for run in plan.runs}) == 3 * len(plan.rows)
        assert set(PAPER.get(name, {})) <= {'mean of the folds', 'best fold'}.union(*(
            {row.name, row.loss and row.loss.kind} for row in plan.rows))
    for run in by_name['table2'].runs:  # timm does not hand --img-size to the model; lfnsb takes any size
        assert ('--model-kwargs img_size=32' in ' '.join(run.command)) == (run.row.model != 'lfnsb'), run.row.model


@pytest.mark.parametrize('arguments, word', [
    (['--', '--epo', '3'], '--epo is set'),
    (['--', '-c', 'rafdb'], '-c is set'),
    (['--recipe', '{data}/train/anger/anger0.png'], 'not a YAML file'),
    (['--data-dir', 'no-such'], 'timm-lfnsb prepare'),
    (['--split', 'test'], 'no images in test'),
    (['--out', '{data}/out'], 'inside the data folder'),
    (['--subset', '1'], '4 classes'),
    ([], 'TIMM_SCRIPTS'),
])
def test_wrong_settings_are_refused_in_one_sentence(arguments, word, data, recipe, tmp_path, monkeypatch):
    monkeypatch.delenv('TIMM_SCRIPTS', raising=False)
    arguments = [argument.format(data=data) for argument in arguments]
    result = command('table3', '--data-dir', data, '--recipe', recipe, '--out', tmp_path / 'out', *arguments)
    assert result.exit_code == 1 and len(result.output.strip().splitlines()) == 1 and word in result.output
    assert not (tmp_path / 'out').exists() and not (data / 'out').exists()


LOSSES = ('center', 'cosine-harmony::variant=margin')


def test_losses_are_compared_at_weights_chosen_before(fake, fake_folder, data, monkeypatch):
    first, best = (accuracy_of(fake_folder / f'{epoch}.pth.tar', data) for epoch in (0, BEST))
    assert first != best
    # Of the three weights of the center loss the last one tried is the best, and so is the first of the other loss.
    monkeypatch.setenv('FAKE_BEST', 'center-0.03-2epochs:0' if first > best else 'center-0.00:0')
    plan = fake.plan('losses', seeds=2, losses=LOSSES, weights='chosen')
    assert "or the papers'" in dry_run(plan)
    twice = fake.plan('losses', losses=('center:0.01', 'center:0.1'), weights='chosen').trials
    assert len({run.row.name for run in twice.runs}) == len(twice.runs) == 4  # 0.01, 0.001, 0.1 and 1
    results, failures = reproduce(plan, report=lambda line: None)
    assert not failures and results['complete']
    calls = fake.calls()
    assert [(call[call.index('--feature-loss') + 1], option(call, '--epochs')) for call in calls[:6]] == [
        (f'{name}:{weight}{settings}', '2') for name, settings, weights in (
            ('center', '', ('0.003', '0.0003', '0.03')), ('cosine-harmony', ':variant=margin', ('1', '0.1', '10')))
        for weight in weights]
    assert [call[call.index('--feature-loss') + 1] if '--feature-loss' in call else '' for call in calls[6:]] == [
        loss for loss in ('', 'center:0.03', 'cosine-harmony:1:variant=margin') for _ in range(2)]
    assert {option(call, '--epochs') for call in calls[6:]} == {'3'}
    assert [row['used'] for row in results['trials']['rows']] == [False, False, True, True, False, False]
    for word in ('+ 0.03 center', 'which flatters the losses', 'paired t-tests', 'before, one seed, 2 epochs'):
        assert word in (fake.out / 'losses.md').read_text()
    assert fake.run('losses', seeds=2, losses=LOSSES, weights='chosen')[0] == results and not fake.calls()

    fake.run('losses', seeds=2, losses=LOSSES, weights='both')  # needs the paper's weight of the one that had another
    assert [option(call, '--feature-loss') for call in fake.calls()] == ['center:0.003'] * 2
    monkeypatch.delenv('FAKE_BEST')
    shutil.rmtree(fake.out)
    results, _ = fake.run('losses', losses=LOSSES[:1], weights='paper')
    assert [row['name'] for row in results['rows']] == ['cross entropy', '+ 0.003 center'] and 'trials' not in results


def test_a_trial_that_fails_is_never_chosen_and_does_not_end_the_comparison(fake, monkeypatch):
    monkeypatch.setenv('FAKE_FAIL', 'center-0.003-2epochs')
    results, (failure,) = fake.run('losses', losses=['center'], weights='chosen')
    assert failure.startswith('+ 0.003 center, seed 7: ') and results['complete']
    assert results['rows'][1]['name'] == '+ 0.0003 center'
    assert results['trials']['rows'][0]['accuracy'] is None and '| + 0.003 center' in results_markdown(results)


def test_losses_have_tests_distances_and_pictures(fake, fake_folder, data, monkeypatch):
    monkeypatch.setenv('FAKE_BEST', 'center:0')
    results, _ = fake.run('losses', seeds=2, losses=['center', 'separate'], weights='paper')
    plain, center, separate = results['rows']
    correct = [predictions_of(fake_folder / f'{epoch}.pth.tar', data).correct.astype(float) for epoch in (BEST, 0)]
    tests = center['against_baseline']
    assert tests['difference'] == pytest.approx(correct[1].mean() - correct[0].mean()) and tests['p_seeds'] is None
    assert tests['p_images'] == pytest.approx(ttest_rel(correct[1], correct[0]).pvalue)
    assert tests['p_images_holm'] == pytest.approx(min(1, 2 * tests['p_images']))
    assert separate['against_baseline']['p_images_holm'] == 1 and 'against_baseline' not in plain

    with np.load(fake.out / 'runs' / 'lfnsb-separate-1-seed8' / 'report-validation' / 'features.npz') as arrays:
        assert arrays['features'].shape[0] == 24 and arrays['correct'].tolist() == correct[0].tolist()
        assert separate['seeds'][1]['distances'] == class_distances(arrays['features'], arrays['labels'])
    for picture in ('features', 'distances'):
        assert (fake.out / f'losses-{picture}.png').read_bytes().startswith(b'\x89PNG')
        assert f'(losses-{picture}.png)' in (fake.out / 'losses.md').read_text()
    assert 'RAF-DB 86.38' in results_markdown(results).splitlines()[6]

    (fake.out / 'runs' / 'lfnsb-center-0.003-seed7' / 'report-validation' / 'features.npz').unlink()
    fake.calls()
    assert fake.run('losses', seeds=2, losses=['center', 'separate'], weights='paper')[0] == results
    assert not fake.calls()  # measured again, not trained


@pytest.mark.parametrize('arguments, word', [
    (['--feature-loss', 'nonsense'], 'no loss nonsense'),
    (['--feature-loss', 'center:-1'], 'above 0'),
    (['--feature-loss', 'center:1:power=2'], 'no setting power'),
])
def test_wrong_losses_are_refused_in_one_sentence(arguments, word, data, recipe, tmp_path):
    result = command('losses', '--data-dir', data, '--recipe', recipe, '--out', tmp_path / 'out', *arguments)
    assert result.exit_code == 1 and len(result.output.strip().splitlines()) == 1 and word in result.output


def test_a_recipe_with_losses_of_its_own_is_refused(fake, recipe):
    recipe.write_text(recipe.read_text() + 'feature_loss: center\n')
    with pytest.raises(UserError, match='take it out'):
        fake.plan('losses')


def test_markdown(tmp_path):
    figures = dict(accuracy=0.81234, balanced_accuracy=0.5, macro_f1=0.51, ece=0.1)
    stored = read_results(next(path for path in committed_results() if path.name.startswith('table3')))
    path = tmp_path / 'table4.json'
    path.write_text(json.dumps({**stored, 'seeds': 3, 'data': {**stored['data'], 'subset': None}, 'rows': [
        dict(name='first', mean=figures, std=dict.fromkeys(figures, 0.0021), seeds=[{}] * 3, paper='RAF-DB 90.22'),
        dict(name='second', mean=figures, std=None, seeds=[{}], paper=None)]}))
    shown = command('show', path, path)
    assert shown.exit_code == 0 and shown.output.count('### Table 3') == 2
    lines = results_markdown(read_results(path)).splitlines()
    assert '| 81.23 ± 0.21 ' in lines[4] and '| RAF-DB 90.22 ' in lines[4]
    assert '| 81.23 (1 of 3 runs) ' in lines[5] and lines[5].split('|')[-2].strip() == '-'
    for word in ('2,500 training images', '3,328 images', 'AMD EPYC', 'timm 1.0.31', '3 seeds', 'flatters all rows'):
        assert word in lines[-1]
    assert 'may be chance' in results_markdown({**read_results(path), 'seeds': 1})
    assert command('show').output.count('### ') == len(committed_results()) > 0


def test_the_page_of_the_losses_has_the_figures_of_its_json():
    path, = (path for path in committed_results() if path.name.startswith('losses'))
    assert results_markdown(read_results(path)).partition('\n\n')[2] in path.with_suffix('.md').read_text()


def test_real_train_script(timm_scripts, data, recipe, tmp_path):
    recipe.write_text(recipe.read_text() + 'model_ema: true\nmodel_ema_decay: 0.5\n')
    plan = Plan('figure6', data, tmp_path / 'out', recipe=str(recipe), epochs=2, subset=16,
                script=str(timm_scripts / 'train.py'), extra=['--log-interval', '1'])
    results, failures = reproduce(plan)
    assert not failures
    run, = plan.runs
    seed, = results['rows'][0]['seeds']
    curve = read_curve(run.last.parent)
    assert [entry['epoch'] for entry in curve] == [0, 1] and seed['ema'] is True
    # Measured at the size and with the preprocessing of training: as train.py itself measured that epoch.
    assert 100 * seed['accuracy'] == pytest.approx(curve[seed['epoch'] - 1]['eval_top1'], abs=1e-3)
    assert np.sum(seed['confusion']) == 24
