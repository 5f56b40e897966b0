"""timm's train script and its stand-in, run in processes of their own and in this one."""
from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, TrainingTask

from timm_lfnsb.cli import main
from timm_lfnsb.train.checkpoints import SafeSaver
from timm_lfnsb.train.launch import run_script

from . import ROOT, TESTS

STANDIN = TESTS / 'support' / 'standin_train.py'


def run(*args: str, env: dict[str, str] | None = None, launcher: list[str] | None = None):
    """As a user would: a process of its own."""
    command = [*(launcher or [sys.executable, '-m', 'timm_lfnsb']), 'run', *map(str, args)]
    environ = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', **(env or {}))
    return subprocess.run(command, capture_output=True, text=True, env=environ)


# Its processes are forked from one that imported the libraries once, which takes longer than any of these tests.
FORKS = multiprocessing.get_context('forkserver')
FORKS.set_forkserver_preload(['timm', 'torch', 'timm.task', 'timm_lfnsb.cli'])


def _main(args: list[str], env: dict[str, str], outputs: list[str]) -> None:
    for stream, output in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.environ.update(env)
    sys.argv = ['timm-lfnsb', *args]
    main()


def run_forked(*args: str, env: dict[str, str] | None = None):
    with tempfile.TemporaryDirectory() as folder:
        outputs = [f'{folder}/stdout', f'{folder}/stderr']
        process = FORKS.Process(target=_main, args=(['run', *map(str, args)], env or {}, outputs))
        process.start()
        try:
            process.join()
        finally:
            process.kill()  # does nothing to one that has ended; a time-out must not leave it
        stdout, stderr = (Path(output).read_text() for output in outputs)
    return subprocess.CompletedProcess(args, process.exitcode, stdout, stderr)


def standin(tmp_path, *args: str) -> dict:
    result = run_forked(STANDIN, '--output', tmp_path, *args)
    assert result.returncode == 0, result.stderr
    return json.loads((tmp_path / 'result.json').read_text())


def one_sentence(result, *words: str) -> None:
    assert result.returncode != 0
    assert 'Traceback' not in result.stderr
    assert result.stderr.startswith('Error: ') and len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr


CPU = torch.device('cpu')
# Four batches an epoch, with randomness in the order, the workers, the collation (mixup), the loader (erasing) and the
# network (dropout).
BASE = ['--model', 'lfnsb', '--num-classes', '4', '--img-size', '32', '--device', 'cpu', '-j', '0', '-b', '6',
        '--opt', 'adamw', '--lr', '1e-3', '--warmup-epochs', '0', '--log-interval', '1', '--seed', '3',
        '--cosine-harmony', '1', '--checkpoint-hist', '3']
RANDOM = ['--mixup', '0.2', '--cutmix', '1', '--reprob', '0.5', '--drop', '0.3', '--aa', 'rand-m5-n2',
          '--model-ema', '--model-ema-decay', '0.9', '--model-ema-warmup', '--clip-grad', '5']


@contextmanager
def patched() -> Iterator[pytest.MonkeyPatch]:
    """Undo what a run changes in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingTask, '__init__', TrainingTask.__init__)
        patch.setattr(sys, 'argv', sys.argv)
        patch.setattr(sys, 'path', list(sys.path))
        yield patch


def train(scripts: Path, data: Path, output: Path, experiment: str, *flags: object) -> Path:
    """Run train.py in this process; returns the folder of the run."""
    args = [*BASE, '--data-dir', data, '--class-map', data / 'class_map.txt', '--output', output,
            '--experiment', experiment, *flags]
    with patched():
        run_script(str(scripts / 'train.py'), [str(arg) for arg in args])
    return output / experiment


def load(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def assert_equal(a, b, where: str = '') -> None:
    """Equal to the last bit, tensors and all."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f'{where}/{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f'{where}/{i}')
    else:
        assert a == b, where


STATE = ('state_dict', 'state_dict_ema', 'task_state', 'task_state_ema', 'optimizer', 'epoch', 'metric')


def assert_same_end(a: Path, b: Path, keys=STATE) -> None:
    first, second = load(a / 'last.pth.tar'), load(b / 'last.pth.tar')
    for key in keys:
        assert_equal(first[key], second[key], key)


def environment(**more: str) -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', **more)


class Run:
    """A task with its optimizer, and savers for it."""

    def __init__(self, opt: str = 'adamw', ema: bool = False, model: str = 'mobilefacenet'):
        self.task = ClassificationTask(
            timm.create_model(model, num_classes=4, img_size=32), torch.nn.CrossEntropyLoss(), device=CPU,
            verbose=False)
        if ema:
            self.task.setup_ema(decay=0.9)
        self.optimizer = create_optimizer_v2(self.task.get_trainable_module(), opt=opt, lr=1e-3, momentum=0.9)

    def step(self) -> None:
        self.task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))['loss'].backward()
        self.optimizer.step()

    def saver(self, folder: Path, **kwargs) -> SafeSaver:
        args = argparse.Namespace(
            model='mobilefacenet', epochs=kwargs.pop('epochs', 3), resume=kwargs.pop('resume', ''))
        return SafeSaver(self.task.get_trainable_module(), self.optimizer, args=args, task=self.task,
                         checkpoint_dir=str(folder), recovery_dir=str(folder), **kwargs)
