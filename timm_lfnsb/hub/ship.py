"""Weights inside the package: put a trained run there with what was measured of it, and measure it again."""
from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoints.pack import pack
from ..data.prepare import read_description
from ..evaluate.calibration import measure_calibration
from ..evaluate.predictions import compute_metrics, load_model, predict_folder
from ..evaluate.robustness import PERTURBATIONS, measure_robustness
from ..train.checkpoints import find_checkpoint, load_checkpoint
from ..train.history import clean_settings, find_recipe, read_curve
from ..util.files import file_sha256 as sha256
from ..util.files import write_json
from ..util.machine import git_commit
from ..version import __version__
from ..weights.names import WEIGHTS_DIR, ReleaseError, embedded_weights, weights_info

__all__ = [
    'ReleaseError', 'compare', 'embedded_weights', 'measure', 'remeasure', 'sha256', 'ship', 'verify', 'weights_info',
    'weights_table',
]

TOLERANCE = 0.002
"""Disagreement of an accuracy (a fraction) with the stored one that `verify` lets pass: 0.2 points."""

ECE_TOLERANCE = 0.005
TEMPERATURE_TOLERANCE = 0.02

SPLITS = ('validation', 'test')


def measure(name: str, data_dir: Path, robustness: Sequence[str] = tuple(PERTURBATIONS)) -> dict[str, Any]:
    """Measure weights on the validation and test split of a prepared data folder: one crop, no test-time augmentation.

    Args:
        name: A name for `load_model`.
        data_dir: Folder made by `prepare`.
        robustness: Which of `PERTURBATIONS` to evaluate on the test split; each takes as long as the split does.

    Returns:
        What the JSON of embedded weights holds under these keys: `metrics` by split (see `compute_metrics`),
        `temperature`, `calibration` (see `measure_calibration`), `robustness` (see `measure_robustness`; not there
        where nothing was asked for) and `measured_with`, the versions of the packages.
    """
    model = load_model(name, inference=True)
    predictions = {split: predict_folder(model, data_dir, split=split) for split in SPLITS}
    calibration = measure_calibration(predictions['validation'], predictions['test'])
    measured = {
        'metrics': {split: compute_metrics(of_split) for split, of_split in predictions.items()},
        'temperature': calibration.pop('temperature'),
        'calibration': calibration,
    }
    if robustness:
        measured['robustness'] = measure_robustness(
            model, data_dir, names=robustness, clean=predictions['test'])
    measured['measured_with'] = {
        'timm_lfnsb': __version__,
        **{package: version(package) for package in ('torch', 'torchvision', 'timm', 'pillow', 'numpy')}}
    return measured


def compare(stored: dict[str, Any], measured: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Compare what was measured with what a JSON says; what only one of the two has is left out.

    Returns:
        A line for each split, the temperature and each row of the robustness table; and a clause for each figure that
        differs by more than its tolerance.
    """
    lines, wrong = [], []

    def check(where: str, key: str, new: float, old: float, tolerance: float) -> None:
        if not abs(new - old) <= tolerance:
            wrong.append(f'{where}: {key} is {new:.4g}, its JSON says {old:.4g}')

    for split, new in measured.get('metrics', {}).items():
        old = stored['metrics'][split]
        for key, tolerance in (('count', 0), ('accuracy', TOLERANCE), ('balanced_accuracy', TOLERANCE)):
            check(f'on {split}', key, new[key], old[key], tolerance)
        lines.append(f'on {split}: accuracy {new["accuracy"]:.4f} (JSON {old["accuracy"]:.4f}), balanced '
                     f'{new["balanced_accuracy"]:.4f} (JSON {old["balanced_accuracy"]:.4f}), {new["count"]} faces')
    if 'temperature' in stored and 'temperature' in measured:
        check('calibration', 'temperature', measured['temperature'], stored['temperature'], TEMPERATURE_TOLERANCE)
        new, old = measured['calibration'], stored['calibration']
        for key in ('ece', 'ece_scaled'):
            check('calibration', key, new[key], old[key], ECE_TOLERANCE)
        lines.append(f'temperature {measured["temperature"]:.3f} (JSON {stored["temperature"]:.3f}), with it ECE '
                     f'{new["ece_scaled"]:.4f} (JSON {old["ece_scaled"]:.4f}), without {new["ece"]:.4f} '
                     f'(JSON {old["ece"]:.4f})')
    old_rows = stored.get('robustness', {}).get('rows', {})
    for name, new in measured.get('robustness', {}).get('rows', {}).items():
        if name in old_rows:
            old = old_rows[name]
            check(name, 'accuracy', new['accuracy'], old['accuracy'], TOLERANCE)
            lines.append(f'{name}: accuracy {new["accuracy"]:.4f} (JSON {old["accuracy"]:.4f})')
    return lines, wrong


def verify(name: str, data_dir: Path, robustness: Sequence[str] = tuple(PERTURBATIONS)) -> list[str]:
    """Measure embedded weights again and compare with their JSON.

    Args:
        name: Name of embedded weights.
        data_dir: Folder made by `prepare`.
        robustness: See `measure`; rows that the JSON lacks are left out.

    Returns:
        A line for each split, the temperature and each row of the robustness table, with both figures.

    Raises:
        ReleaseError: When the file is not the one the JSON describes; when an accuracy differs by over 0.2 points, an
            ECE by over 0.5, or the temperature by over 0.02.
    """
    info = _checked_info(name)
    rows = info.get('robustness', {}).get('rows', {})
    lines, wrong = compare(info, measure(name, data_dir, [row for row in robustness if row in rows]))
    if wrong:
        raise ReleaseError(f'{name} {"; ".join(wrong)}: the data folder was prepared otherwise, or preprocessing '
                           'changed.')
    for key in ('temperature', 'robustness'):
        if key not in info:
            lines.append(f'{key}: not in its JSON, see timm-lfnsb weights measure')
    return [f'{name} {line}' for line in lines]


def remeasure(name: str, data_dir: Path, replace: bool = False) -> dict[str, Any]:
    """Measure embedded weights again and put temperature, calibration, robustness and recipes into their JSON.

    The metrics of the splits stay as they are, unless `replace` is set. The JSON is replaced as a whole.

    Args:
        name: Name of embedded weights.
        data_dir: The prepared data folder they were measured on.
        replace: Take the newly measured metrics, and the checksum of the file, as well.

    Returns:
        What the JSON holds now.

    Raises:
        ReleaseError: When the data folder is another one than the JSON's; without `replace` also when the file is not
            the one the JSON describes, or its metrics differ by over 0.2 points from what is measured.
    """
    info = weights_info(name) if replace else _checked_info(name)
    if read_description(data_dir)['sha256'] != info['data']['sha256']:
        raise ReleaseError(f'{data_dir} is not the data of {name}: its dataset.json has another checksum.')
    before = sha256(WEIGHTS_DIR / f'{name}.safetensors')
    measured = measure(name, data_dir)
    if sha256(WEIGHTS_DIR / f'{name}.safetensors') != before:
        raise ReleaseError(f'{name}.safetensors was replaced while it was measured: start again.')
    if replace:
        info['sha256'] = before
    else:
        _, wrong = compare({'metrics': info['metrics']}, measured)
        if wrong:
            raise ReleaseError(f'{name} {"; ".join(wrong)}: find out why first.')
        measured['metrics'] = info['metrics']
    info['runs'] = [{**run, **find_recipe(run['settings'])} for run in info['runs']]
    info.update(measured)
    write_json(WEIGHTS_DIR / f'{name}.json', info)
    return info


def _checked_info(name: str) -> dict[str, Any]:
    info = weights_info(name)
    if sha256(WEIGHTS_DIR / f'{name}.safetensors') != info['sha256']:
        raise ReleaseError(f'{name}.safetensors is not the file its JSON describes: install the package again.')
    return info


def describe_run(run: Path) -> dict[str, Any]:
    """Settings, recipe, validation curve and chosen epoch of a run of train.py, without the paths of its machine."""
    checkpoint = load_checkpoint(find_checkpoint(run))
    settings = clean_settings(vars(checkpoint['args']))
    return {
        'settings': settings, **find_recipe(settings), 'chosen_epoch': checkpoint['epoch'], 'curve': read_curve(run)}


def ship(
        name: str,
        runs: Sequence[Path],
        data_dir: Path,
        robustness: bool = True,
        notes: Sequence[str] = (),
        after: str | None = None,
) -> dict[str, Any]:
    """Store the last of a chain of runs as embedded weights, in half precision, with a JSON of what it measures.

    Everything is measured with the stored file. Half precision is compared with full on the test split.

    Args:
        name: 'ARCH.TAG', for instance 'lfnsb.ferplus'.
        runs: Folders of the runs of train.py that led to the weights, in order, each started from the one before.
        data_dir: Prepared data folder with dataset.json.
        robustness: Measure the robustness table as well, which takes a dozen times as long as the test split.
        notes: Sentences for the card that no figure tells, for instance how the weights were chosen.
        after: The embedded weights that the first run started from, whose runs become part of the record.

    Raises:
        ReleaseError: When the run is of another model, or the data folder was not made by `prepare`.
    """
    data = read_description(data_dir)
    described = [*(_checked_info(after)['runs'] if after else []), *(describe_run(run) for run in runs)]
    WEIGHTS_DIR.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WEIGHTS_DIR) as temporary:
        half, full = Path(temporary) / 'half', Path(temporary) / 'full'
        packed = pack(runs[-1], half, half=True)
        if packed['model'] != name.split('.')[0]:
            raise ReleaseError(f"{runs[-1]} trained {packed['model']}, not {name.split('.')[0]}.")
        pack(runs[-1], full)
        stored = predict_folder(f'local-dir:{half}', data_dir, split='test')
        exact = predict_folder(f'local-dir:{full}', data_dir, split='test')
        config = json.loads((half / 'config.json').read_text(encoding='utf-8'))
        info = {
            'model': name,
            'sha256': sha256(half / 'model.safetensors'),
            'label_names': packed['label_names'],
            'input_size': config['pretrained_cfg']['input_size'],
            'data': data,
            'commit': git_commit(),
            'ema': packed['ema'],
            'runs': described,
            'notes': list(notes),
            'half_precision_changes': int((stored.predicted != exact.predicted).sum()),
            **measure(f'local-dir:{half}', data_dir, tuple(PERTURBATIONS) if robustness else ()),
        }
        write_json(Path(temporary) / 'info.json', info)
        os.replace(half / 'model.safetensors', WEIGHTS_DIR / f'{name}.safetensors')
        os.replace(Path(temporary) / 'info.json', WEIGHTS_DIR / f'{name}.json')
    return info


def weights_table() -> str:
    """The embedded weights as a Markdown table: what their JSON says of the test split."""
    lines = [
        '| weights | test accuracy | balanced accuracy | macro F1 | ECE | faces | file |',
        '|---|---|---|---|---|---|---|',
    ]
    for name in embedded_weights():
        test = weights_info(name)['metrics']['test']

        def with_interval(key: str, test: dict[str, Any] = test) -> str:
            low, high = test[f'{key}_interval']
            return f'{test[key]:.3f} [{low:.3f}, {high:.3f}]'

        size = (WEIGHTS_DIR / f'{name}.safetensors').stat().st_size
        lines.append(
            f"| `{name}` | {with_interval('accuracy')} | {with_interval('balanced_accuracy')} | {test['macro_f1']:.3f} "
            f"| {test['ece']:.3f} | {test['count']} | {size / 1e6:.1f} MB |")
    return '\n'.join(lines)
