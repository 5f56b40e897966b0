"""Do an experiment: train each row with timm's train script, go on where one was interrupted, measure it."""
from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..checkpoints.pack import pack
from ..errors import UserError
from ..evaluate.report import evaluate_folder
from ..train.checkpoints import load_checkpoint
from ..train.launch import find_script
from ..util.files import write_json
from ..util.machine import available_cores, cpu_name, git_commit
from ..version import __version__
from .plan import Plan, Run
from .tables import collect, draw


def reproduce(plan: Plan, report: Callable[[str], None] = print) -> tuple[dict[str, Any], list[str]]:
    """Run what is missing of an experiment, with a line to `report` for each step, and write OUT/NAME.json.

    Returns the results, and a message for each run that failed; the others keep their results.

    Raises:
        UserError: When the output folder holds runs with other settings or is in use, and after Ctrl-C.
    """
    find_script(plan.script)
    for run in plan.runs:
        run.check_settings()
    plan.out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(plan.out / '.lock', timeout=0)
    try:
        held = lock.acquire()
    except Timeout:
        raise UserError(f'another reproduce, or a training that it started, is at work in {plan.out}: wait for it, or '
                        'choose another --out.') from None
    failures: dict[str, str] = {}
    with held:
        plan.prepare_data()
        steps = {run.title: _train_and_measure(run, lock, report) for run in plan.runs if not run.is_finished}
        report(f'{plan.name}: {len(plan.runs)} runs, {len(plan.runs) - len(steps)} finished before')
        try:
            while steps:
                for title in list(steps)[:plan.jobs]:
                    try:
                        at_work = next(steps[title], False)
                    except Exception as error:
                        failures[title], at_work = f'{title}: {error}', False
                        report(f'{title}: failed')
                    if not at_work:
                        del steps[title]
                time.sleep(0.1 if steps else 0)
        except KeyboardInterrupt:
            raise UserError('interrupted; the same command goes on.') from None
        finally:
            for step in steps.values():
                step.close()
            results = collect(plan)
            write_json(plan.out / f'{plan.name}.json', results)
    draw(plan.out / f'{plan.name}.png', results)
    return results, [failures[run.title] for run in plan.runs if run.title in failures]


def _train_and_measure(run: Run, lock: FileLock, report: Callable[[str], None]) -> Generator[bool, None, None]:
    """Do what is missing of a run; yields True while train.py is at work, and ends it when closed."""
    if not run.is_trained:
        yield from _train(run, lock, report)
    packed = run.folder / f'packed-{run.plan.checkpoint}'
    shutil.rmtree(packed, ignore_errors=True)
    info = pack(_chosen_checkpoint(run), packed)
    write_json(run.report / 'checkpoint.json', {'epoch': int(info['epoch']) + 1, 'ema': info['ema']})
    # At the image size and with the preprocessing of its training, which the packed folder holds.
    metrics, _ = evaluate_folder(
        f'local-dir:{packed}', run.measured_dir, run.report, split=run.plan.split, workers=0, progress=False)
    report(f"{run.title}: accuracy {100 * metrics['accuracy']:.1f} on {run.plan.split}")


def _train(run: Run, lock: FileLock, report: Callable[[str], None]) -> Generator[bool, None, None]:
    """Run train.py for the epochs that are missing.

    timm goes on after the epoch that a recovery checkpoint was made in, and would leave out the rest of it: those
    checkpoints are not used, and what an interruption costs is the epochs since the last validated one.
    """
    done, total, log, started = run.epochs_done(), run.plan.epochs, run.folder / 'log.txt', time.monotonic()
    if done < total:
        report(f"{run.title}: {f'goes on after epoch {done} of {total}' if done else 'starts'}, log in {log}")
        if not done:
            shutil.rmtree(run.folder / 'train', ignore_errors=True)
            write_json(run.folder / 'settings.json', run.settings)
        # The script inherits the lock: one that outlives us, when we are killed, keeps others out of its folder.
        descriptor = None if sys.platform == 'win32' else lock._context.lock_file_fd
        with open(log, 'ab') as file:
            process = subprocess.Popen(
                [sys.executable, *run.command[1:], *(['--resume', str(run.last)] if done else [])],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                pass_fds=() if descriptor is None else (descriptor,))
        try:
            while (code := process.poll()) is None:
                yield True
        finally:
            process.terminate()
            process.wait()
        reached = run.epochs_done()
        if code or reached < total:  # timm's script ends with 0 after an interrupt
            lines = [line.strip()[:300] for line in log.read_text('utf-8', 'replace').splitlines() if line.strip()]
            said = '\n    '.join(['its last lines:', *lines[-5:]]) if lines else 'it printed nothing.'
            raise UserError(f'train.py ended with {code} after epoch {reached} of {total}, see {log}; {said}')
    device = str(load_checkpoint(run.last)['args'].device)
    cuda = device.startswith('cuda') and torch.cuda.is_available()
    write_json(run.folder / 'trained.json', {
        'epochs': total,
        'resumed_after_epoch': done or None,
        'seconds': round(time.monotonic() - started, 1),  # since it was resumed
        'device': torch.cuda.get_device_name(device) if cuda else f'{cpu_name()}, {available_cores()} CPUs',
        'versions': {'timm_lfnsb': __version__, 'timm': version('timm'), 'torch': str(torch.__version__)},
        'commit': git_commit(),
    })


def _chosen_checkpoint(run: Run) -> Path:
    """The checkpoint to measure: not simply model_best, for older train scripts forget it when they resume."""
    if run.plan.checkpoint == 'last' or not run.plan.val_split:
        return run.last
    ranked = [(float('-inf'), 0, run.last)]
    for path in [*run.last.parent.glob('checkpoint-*.pth.tar'), run.last]:
        checkpoint = load_checkpoint(path)
        if checkpoint.get('metric') is not None:
            sign = -1 if 'loss' in str(getattr(checkpoint['args'], 'eval_metric', 'top1')) else 1
            ranked.append((sign * float(checkpoint['metric']), -int(checkpoint['epoch']), path))
    return max(ranked)[2]
