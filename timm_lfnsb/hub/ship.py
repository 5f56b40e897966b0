"""Weights inside the package: put a trained run there with what was measured of it, and measure it again."""
from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
from timm.models import save_for_hf

from ..checkpoints.pack import pack
from ..checkpoints.rebalance import rebalance
from ..data.prepare import read_description
from ..errors import UserError
from ..models.loading import load_model
from ..models.temperature import TEMPERATURE_KEY
from ..train.checkpoints import find_checkpoint, load_checkpoint
from ..train.history import clean_settings, find_recipe, read_curve
from ..util.files import file_sha256, write_json
from ..util.machine import git_commit
from ..version import __version__
from ..weights.names import WEIGHTS_DIR, weights_info

SPLITS = ('validation', 'test')
TOLERANCES = {
    'count': 0, 'accuracy': 0.002, 'balanced_accuracy': 0.002, 'temperature': 0.02, 'ece': 0.005, 'ece_scaled': 0.005}
"""By how much a figure may differ from the stored one; accuracies and errors are fractions."""


def measure(name: str, data_dir: Path, robustness: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure weights on the validation and test split of a prepared data folder: one crop, no test-time augmentation.

    Args:
        name: A name for `load_model`.
        data_dir: Folder made by `prepare`.
        robustness: Rows of the robustness table, default all; each takes as long as the test split does.

    Returns:
        `metrics` by split, `temperature`, `calibration`, `robustness` (where rows were asked for) and `measured_with`,
        the versions of the packages, as the JSON of embedded weights has them.
    """
    from ..evaluate.calibration import measure_calibration
    from ..evaluate.metrics import compute_metrics
    from ..evaluate.predictions import predict_folder
    from ..evaluate.robustness import PERTURBATIONS, measure_robustness
    model = load_model(name, inference=True)
    predictions = {split: predict_folder(model, data_dir, split=split) for split in SPLITS}
    calibration = measure_calibration(predictions['validation'], predictions['test'])
    measured = {
        'metrics': {split: compute_metrics(of_split) for split, of_split in predictions.items()},
        'temperature': calibration.pop('temperature'), 'calibration': calibration}
    rows = tuple(PERTURBATIONS) if robustness is None else robustness
    if rows:
        measured['robustness'] = measure_robustness(model, data_dir, names=rows, clean=predictions['test'])
    packages = ('torch', 'torchvision', 'timm', 'pillow', 'numpy')
    return {**measured, 'measured_with': {'timm_lfnsb': __version__, **{name: version(name) for name in packages}}}


def compare(stored: dict[str, Any], measured: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare what was measured with what a JSON says: all figures, and those that differ by more than `TOLERANCES`."""
    old, lines, wrong = _figures(stored), [], []
    for (where, key), value in _figures(measured).items():
        lines.append(f'{where} {key} {round(value, 4)} (JSON {round(old[where, key], 4)})')
        if not abs(value - old[where, key]) <= TOLERANCES[key]:
            wrong.append(lines[-1])
    return lines, wrong


def _figures(info: dict[str, Any]) -> dict[tuple[str, str], float]:
    places = {f'on {split}': metrics for split, metrics in info.get('metrics', {}).items()}
    if 'temperature' in info:
        places['calibration'] = {'temperature': info['temperature'], **info['calibration']}
    places |= info.get('robustness', {}).get('rows', {})
    return {(where, key): figures[key] for where, figures in places.items() for key in TOLERANCES if key in figures}


def verify(name: str, data_dir: Path, robustness: Sequence[str] | None = None) -> list[str]:
    """Measure embedded weights again and compare with their JSON; a line for each figure, with both values.

    Raises:
        UserError: When the file is not the one the JSON describes, or a figure differs by more than its tolerance.
    """
    info = checked_info(name)
    rows = [row for row in info.get('robustness', {}).get('rows', ()) if robustness is None or row in robustness]
    lines, wrong = compare(info, measure(name, data_dir, rows))
    if wrong:
        raise UserError(f'{name} {"; ".join(wrong)}: the data folder was prepared otherwise, or preprocessing changed.')
    return [f'{name} {line}' for line in lines]


def remeasure(name: str, data_dir: Path, replace: bool = False) -> dict[str, Any]:
    """Measure embedded weights again and put temperature, calibration and robustness into their JSON.

    Returns what it holds now. Its metrics and checksum stay as they are, unless `replace` is set.

    Raises:
        UserError: When the data are others than the JSON's, or, without `replace`, the file or what is measured of it.
    """
    info = weights_info(name) if replace else checked_info(name)
    if read_description(data_dir)['sha256'] != info['data']['sha256']:
        raise UserError(f'{data_dir} is not the data of {name}: its dataset.json has another checksum.')
    measured = measure(name, data_dir)
    if not replace:
        _, wrong = compare(info, {'metrics': measured['metrics']})
        if wrong:
            raise UserError(f'{name} {"; ".join(wrong)}: find out why first.')
        measured['metrics'] = info['metrics']
    info |= {'sha256': file_sha256(WEIGHTS_DIR / f'{name}.safetensors'), **measured}
    write_json(WEIGHTS_DIR / f'{name}.json', info)
    return info


def checked_info(name: str) -> dict[str, Any]:
    """`weights_info`, once the file is the one that it describes."""
    info = weights_info(name)
    if file_sha256(WEIGHTS_DIR / f'{name}.safetensors') != info['sha256']:
        raise UserError(f'{name}.safetensors is not the file its JSON describes: install the package again.')
    return info


def ship(
        name: str, runs: Sequence[Path], data_dir: Path, robustness: Sequence[str] | None = None,
        notes: Sequence[str] = (), after: str | None = None,
) -> dict[str, Any]:
    """Store the last of a chain of runs as embedded weights, in half precision, with a JSON of what it measures.

    Everything is measured with the stored file, at the input size of the run. Half precision is compared with full on
    the test split. A new name must be entered in `timm_lfnsb.weights.names` before `timm.create_model` knows it.

    Args:
        name: 'ARCH.TAG', for instance 'lfnsb.ferplus'.
        runs: Folders of the runs of train.py that led to the weights, in order, each started from the one before.
        data_dir, robustness: See `measure`.
        notes: Sentences for the card that no figure tells, for instance how the weights were chosen.
        after: The embedded weights that the first run started from, whose runs become part of the record.

    Raises:
        UserError: When the run is of another model, or the data folder was not made by `prepare`.
    """
    from ..evaluate.predictions import predict_folder
    data = read_description(data_dir)
    described = checked_info(after)['runs'] if after else []
    for run in runs:
        checkpoint = load_checkpoint(find_checkpoint(run))
        settings = clean_settings(vars(checkpoint['args']))  # without the paths of its machine
        described.append({'settings': settings, **find_recipe(settings), 'chosen_epoch': checkpoint['epoch'],
                          'curve': read_curve(run)})
    with tempfile.TemporaryDirectory(dir=WEIGHTS_DIR) as temporary:
        half, full = Path(temporary) / 'half', Path(temporary) / 'full'
        packed = pack(runs[-1], half, half=True)
        if packed['model'].split('.')[0] != name.split('.')[0]:
            raise UserError(f"{runs[-1]} trained {packed['model']}, not {name.split('.')[0]}.")
        pack(runs[-1], full)
        stored, exact = (
            predict_folder(f'local-dir:{folder}', data_dir, split='test').predicted for folder in (half, full))
        info = {
            'model': name, 'sha256': file_sha256(half / 'model.safetensors'), 'label_names': packed['label_names'],
            'input_size': list(packed['input_size']), 'data': data, 'commit': git_commit(), 'ema': packed['ema'],
            'runs': described, 'notes': list(notes), 'half_precision_changes': int((stored != exact).sum()),
            **measure(f'local-dir:{half}', data_dir, robustness)}
        os.replace(half / 'model.safetensors', WEIGHTS_DIR / f'{name}.safetensors')
        write_json(WEIGHTS_DIR / f'{name}.json', info)
    return info


def ship_rebalanced(
        name: str, base: str, data_dir: Path, robustness: Sequence[str] | None = None, notes: Sequence[str] = (),
        cost: float = 0.03,
) -> dict[str, Any]:
    """Store embedded weights once more, with the prior out of their bias and calibrated, see `rebalance`.

    Args:
        name: 'ARCH.TAG' of the new weights, which must be entered in `timm_lfnsb.weights.names`, too; or that of the
            base, which is replaced then.
        base: Embedded weights.
        data_dir, robustness: See `measure`.
        notes: Sentences for the card, behind those of the base.
        cost: See `rebalance`.

    Raises:
        UserError: When the base is not there or damaged, or would be replaced a second time, or the data folder is not
            one of `prepare`.
    """
    info = checked_info(base)
    if name == base and 'prior_correction' in info:
        raise UserError(f'{name} was rebalanced before: ship its run once more, and rebalance that.')
    for measured_before in ('robustness', 'half_precision_changes'):
        info.pop(measured_before, None)
    if name != base:
        info['base'] = base
    with tempfile.TemporaryDirectory(dir=WEIGHTS_DIR) as temporary:
        plain, corrected = Path(temporary) / 'plain', Path(temporary) / 'corrected'
        write_embedded(base, plain)
        info |= {
            'model': name, 'prior_correction': rebalance(plain, corrected, data_dir, cost),
            'sha256': file_sha256(corrected / 'model.safetensors'), 'notes': [*info['notes'], *notes],
            'data': read_description(data_dir), 'commit': git_commit(),
            **measure(f'local-dir:{corrected}', data_dir, robustness)}
        os.replace(corrected / 'model.safetensors', WEIGHTS_DIR / f'{name}.safetensors')
        write_json(WEIGHTS_DIR / f'{name}.json', info)
    return info


def write_embedded(name: str, folder: Path) -> None:
    """Write embedded weights as a timm folder, with the very file whose SHA-256 is known."""
    info = checked_info(name)
    known = {TEMPERATURE_KEY: info['temperature']} if 'temperature' in info else {}
    save_for_hf(
        timm.create_model(name), str(folder), model_config={'label_names': info['label_names'], **known},
        safe_serialization=True)
    shutil.copyfile(WEIGHTS_DIR / f'{name}.safetensors', folder / 'model.safetensors')
