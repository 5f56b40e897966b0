"""timm's train script and its stand-in, in this process and, where a test needs one, in a process of their own."""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch
from click.testing import CliRunner, Result
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask

from timm_lfnsb.cli import main
from timm_lfnsb.train.checkpoints import SafeSaver
from timm_lfnsb.train.launch import run_script

from . import ROOT, TESTS

STANDIN = TESTS / 'support' / 'standin_train.py'
CPU = torch.device('cpu')


@contextmanager
def patched() -> Iterator[None]:
    """Undo what a run changes in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', sys.argv)
        patch.setattr(sys, 'path', list(sys.path))
        yield


def launch(*args: object, env: dict[str, str] | None = None) -> Result:
    """`timm-lfnsb run` in this process."""
    with patched():
        return CliRunner().invoke(main, ['run', *map(str, args)], env=env, catch_exceptions=False)


def standin(output: Path, *args: object) -> dict:
    """What the stand-in script says of its run."""
    result = launch(STANDIN, '--output', output, *args)
    assert result.exit_code == 0, result.output
    return json.loads((output / 'result.json').read_text())


def changed_standin(tmp_path: Path, *changes: tuple[str, str]) -> Path:
    """The stand-in with other text in places."""
    text = STANDIN.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    script = tmp_path / 'changed_train.py'
    script.write_text(text)
    return script


def one_sentence(result: Result, *words: str) -> None:
    """A run was refused, with these words."""
    assert result.exit_code == 1
    assert result.output.startswith('Error: ') and len(result.output.strip().splitlines()) == 1, result.output
    for word in words:
        assert word in result.output


TORCHRUN = ('-m', 'torch.distributed.run', '--nproc-per-node', '2', '--standalone', '-m', 'timm_lfnsb', 'run')


def python(*args: object) -> subprocess.CompletedProcess[str]:
    """A Python process of its own."""
    environ = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, env=environ)


# Four batches an epoch, with randomness in the order, the workers, the collation (mixup), the loader (erasing) and the
# network (dropout).
BASE = ['--model', 'test_resnet', '--num-classes', '4', '--img-size', '32', '--device', 'cpu', '-j', '0', '-b', '6',
        '--opt', 'adamw', '--lr', '1e-3', '--warmup-epochs', '0', '--log-interval', '1', '--seed', '3',
        '--cosine-harmony', '1', '--checkpoint-hist', '3']
RANDOM = ['--mixup', '0.2', '--cutmix', '1', '--reprob', '0.5', '--drop', '0.3', '--aa', 'rand-m5-n2',
          '--model-ema', '--model-ema-decay', '0.9', '--model-ema-warmup', '--clip-grad', '5']


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


STATE = ('state_dict', 'state_dict_ema', 'task_state', 'task_state_ema', 'optimizer', 'epoch', 'metric')


def assert_same_end(a: Path, b: Path, keys=STATE) -> None:
    """Two runs ended alike, to the last bit."""
    first, second = load(a / 'last.pth.tar'), load(b / 'last.pth.tar')
    for key in keys:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, msg=key)


class Run:
    """A task with its optimizer, and savers for it."""

    def __init__(self, ema: bool = False):
        model = timm.create_model('mobilefacenet', num_classes=4, img_size=32)
        self.task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), device=CPU, verbose=False)
        if ema:
            self.task.setup_ema(decay=0.9)
        self.optimizer = create_optimizer_v2(self.task.get_trainable_module(), opt='adamw', lr=1e-3)

    def saver(self, folder: Path, resume: str = '', **kwargs) -> SafeSaver:
        args = argparse.Namespace(model='mobilefacenet', epochs=3, resume=resume)
        return SafeSaver(self.task.get_trainable_module(), self.optimizer, args=args, task=self.task,
                         checkpoint_dir=str(folder), recovery_dir=str(folder), **kwargs)
