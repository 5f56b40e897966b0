"""Do an experiment: train each row with timm's train script, go on where one was interrupted, measure it."""
from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from importlib.metadata import version
from typing import Any

import torch
from filelock import FileLock, Timeout

from ..checkpoints.pack import pack
from ..data.subsets import write_folds, write_subset
from ..errors import UserError
from ..evaluate.report import evaluate_folder
from ..models.loading import load_model
from ..train.checkpoints import load_checkpoint
from ..train.launch import find_script
from ..util.files import replacing, write_json
from ..util.machine import available_cores, cpu_name, git_commit
from ..version import __version__
from .losses import write_features
from .plan import Plan, Run
from .tables import collect, draw, results_markdown


def reproduce(plan: Plan, report: Callable[[str], None] = print) -> tuple[dict[str, Any], list[str]]:
    """Run what is missing of an experiment, with a line to `report` for each step, and write OUT/NAME.json and .md.

    Returns the results, and a message for each run that failed; the others keep their results.

    Raises:
        UserError: When the output folder holds runs with other settings or is in use.
    """
    find_script(plan.script)
    failures: list[str] = []
    if plan.trials:
        failures += reproduce(plan.trials, report)[1]
        plan.lay_out()
    for run in plan.runs:
        run.check_settings()
    plan.out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(plan.out / '.lock', timeout=0)
    try:
        held = lock.acquire()
    except Timeout:
        raise UserError(f'another reproduce, or a training that it started, is at work in {plan.out}: wait for it, or '
                        'choose another --out.') from None
    with held:
        if plan.folds:
            write_folds(plan.data_dir, plan.folds, plan.parts_dir, plan.dataset['sha256'])
        elif plan.subset:
            write_subset(plan.data_dir, plan.train_split, plan.images, plan.parts_dir)
        steps = {run.title: _train_and_measure(run, lock, report) for run in plan.runs if not run.is_finished}
        report(f'{plan.name}: {len(plan.runs)} runs, {len(plan.runs) - len(steps)} finished before')
        try:
            while steps:
                for title in list(steps)[:plan.jobs]:
                    try:
                        next(steps[title])
                    except StopIteration:
                        del steps[title]
                    except Exception as error:
                        failures.append(f'{title}: {error}')
                        report(f'{title}: failed')
                        del steps[title]
                time.sleep(0.1 if steps else 0)
        finally:
            for step in steps.values():
                step.close()
            results = collect(plan)
            write_json(plan.out / f'{plan.name}.json', results)
    pictures = [f'![{path.stem}]({path.name})' for path in draw(plan, results)]
    with replacing(plan.out / f'{plan.name}.md') as path:
        path.write_text('\n\n'.join([results_markdown(results), *pictures]) + '\n', encoding='utf-8')
    return results, failures


def _train_and_measure(run: Run, lock: FileLock, report: Callable[[str], None]) -> Generator[None, None, None]:
    """Do what is missing of a run; yields while train.py is at work, and ends it when closed."""
    if not run.trained.is_file():
        yield from _train(run, lock, report)
    packed = run.folder / 'packed'
    shutil.rmtree(packed, ignore_errors=True)
    info = pack(run.last.parent if run.plan.val_split else run.last, packed)  # the best epoch, where one is validated
    write_json(run.report / 'checkpoint.json', {'epoch': int(info['epoch']) + 1, 'ema': info['ema']})
    # At the image size and with the preprocessing of its training, which the packed folder holds.
    model = f'local-dir:{packed}'
    if run.keeps_features:
        write_features(load_model(model, inference=True), run)
    metrics, _ = evaluate_folder(
        model, run.measured_dir, run.report, split=run.plan.split, workers=0, progress=False)
    report(f"{run.title}: accuracy {100 * metrics['accuracy']:.1f} on {run.plan.split}")


def _train(run: Run, lock: FileLock, report: Callable[[str], None]) -> Generator[None, None, None]:
    """Run train.py for the epochs that are missing.

    timm goes on after the epoch that a recovery checkpoint was made in, and would leave out the rest of it: those
    checkpoints are not used, and what an interruption costs is the epochs since the last validated one.
    """
    done, total, log = run.epochs_done(), run.plan.epochs, run.folder / 'log.txt'
    if done < total:
        report(f'{run.title}: {done} of {total} epochs trained, log in {log}')
        if not done:
            shutil.rmtree(run.folder / 'train', ignore_errors=True)
            write_json(run.folder / 'settings.json', run.settings)
        # The script inherits the lock: one that outlives us, when we are killed, keeps others out of its folder.
        descriptor = None if sys.platform == 'win32' else lock._context.lock_file_fd
        with open(log, 'ab') as file:
            process = subprocess.Popen(
                [sys.executable, *run.command[1:]], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                pass_fds=() if descriptor is None else (descriptor,))
        try:
            while process.poll() is None:
                yield
        finally:
            process.terminate()
            process.wait()
        if process.returncode or run.epochs_done() < total:  # timm's script ends with 0 after an interrupt
            lines = '\n    '.join(log.read_text('utf-8', 'replace').split('\n')[-6:])
            raise UserError(f'train.py ended with {process.returncode} after epoch {run.epochs_done()} of {total}, see '
                            f'{log}; its last lines:\n    {lines.rstrip()}')
    device = str(load_checkpoint(run.last)['args'].device)
    cuda = device.startswith('cuda') and torch.cuda.is_available()
    write_json(run.trained, {
        'resumed_after_epoch': done or None,
        'device': torch.cuda.get_device_name(device) if cuda else f'{cpu_name()}, {available_cores()} CPUs',
        'versions': {'timm_lfnsb': __version__, 'timm': version('timm'), 'torch': str(torch.__version__)},
        'commit': git_commit(),
    })
