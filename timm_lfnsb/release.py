"""Weights inside the package: put a trained run there with what was measured of it, and measure it again."""
from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .evaluate import compute_metrics, load_model, predict_folder
from .networks import WEIGHTS_DIR
from .pack import find_checkpoint, load_checkpoint, pack

TOLERANCE = 0.002
"""Disagreement of an accuracy (a fraction) with the stored one that `verify` lets pass: 0.2 points."""

SPLITS = ('validation', 'test')
# Settings that name places on the machine of the run, or say nothing about the weights.
_LEFT_OUT = {
    'data', 'data_dir', 'output', 'experiment', 'class_map', 'resume', 'initial_checkpoint', 'pretrained_path',
    'local_rank', 'rank', 'world_size', 'distributed', 'device_modules', 'prefetcher',
}


class ReleaseError(RuntimeError):
    """Weights that cannot be stored or do not hold what their JSON says."""


def embedded_weights() -> list[str]:
    """Names of the weights inside the package, as `timm.create_model` takes them."""
    return sorted(path.stem for path in WEIGHTS_DIR.glob('*.json'))


def weights_info(name: str) -> dict[str, Any]:
    """What is known of embedded weights: data, training, metrics, SHA-256 of the file.

    Raises:
        ReleaseError: When there are none of this name.
    """
    path = WEIGHTS_DIR / f'{name}.json'
    if not path.is_file():
        there_are = ', '.join(embedded_weights()) or 'none'
        raise ReleaseError(f'there are no embedded weights {name!r}; there are {there_are}.')
    return json.loads(path.read_text(encoding='utf-8'))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def measure(name: str, data_dir: Path, splits: Sequence[str]) -> dict[str, Any]:
    """Evaluate weights on splits of a prepared data folder, one crop, no test-time augmentation."""
    model = load_model(name)
    return {split: compute_metrics(predict_folder(model, data_dir, split=split)) for split in splits}


def verify(name: str, data_dir: Path) -> list[str]:
    """Measure embedded weights again and compare with their JSON.

    Returns:
        A line for each split with the stored and the measured accuracy.

    Raises:
        ReleaseError: When the file is not the one the JSON describes, or an accuracy differs by over 0.2 points.
    """
    info = weights_info(name)
    if sha256(WEIGHTS_DIR / f'{name}.safetensors') != info['sha256']:
        raise ReleaseError(f'{name}.safetensors is not the file its JSON describes: install the package again.')
    lines = []
    for split, measured in measure(name, data_dir, list(info['metrics'])).items():
        stored = info['metrics'][split]
        for key in ('count', 'accuracy', 'balanced_accuracy'):
            if abs(measured[key] - stored[key]) > (0 if key == 'count' else TOLERANCE):
                raise ReleaseError(
                    f'{name} on {split}: {key} is {measured[key]:.4g}, its JSON says {stored[key]:.4g}: the data '
                    'folder was prepared otherwise, or preprocessing changed.')
        lines.append(f'{name} on {split}: accuracy {measured["accuracy"]:.4f} (JSON {stored["accuracy"]:.4f}), '
                     f'balanced {measured["balanced_accuracy"]:.4f} (JSON {stored["balanced_accuracy"]:.4f}), '
                     f'{measured["count"]} faces')
    return lines


def describe_run(run: Path) -> dict[str, Any]:
    """Settings, validation curve and chosen epoch of a run of train.py, without the paths of its machine."""
    checkpoint = load_checkpoint(find_checkpoint(run))
    settings = {
        key: value for key, value in sorted(vars(checkpoint['args']).items())
        if key not in _LEFT_OUT and value not in (None, '', [], {}, False)}
    if not (run / 'summary.csv').is_file():
        raise ReleaseError(f'{run} has no summary.csv: give the folders of runs of train.py.')
    with open(run / 'summary.csv', newline='', encoding='utf-8') as file:
        curve = [{key: round(float(value), 5) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return {'settings': settings, 'chosen_epoch': checkpoint['epoch'], 'curve': curve}


def ship(name: str, runs: Sequence[Path], data_dir: Path) -> dict[str, Any]:
    """Store the last of a chain of runs as embedded weights, in half precision, with a JSON of what it measures.

    The validation and test accuracies are measured with the stored file. Half precision is compared with full on the
    test split.

    Args:
        name: 'ARCH.TAG', for instance 'lfnsb.ferplus'.
        runs: Folders of the runs of train.py that led to the weights, in order, each started from the one before.
        data_dir: Prepared data folder with dataset.json.

    Raises:
        ReleaseError: When the run is of another model, or the data folder was not made by `prepare`.
    """
    dataset_json = data_dir / 'dataset.json'
    if not dataset_json.is_file():
        raise ReleaseError(f'{data_dir} has no dataset.json: make the folder with timm-lfnsb prepare.')
    WEIGHTS_DIR.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WEIGHTS_DIR) as temporary:
        half, full = Path(temporary) / 'half', Path(temporary) / 'full'
        packed = pack(runs[-1], half, half=True)
        if packed['model'] != name.split('.')[0]:
            raise ReleaseError(f"{runs[-1]} trained {packed['model']}, not {name.split('.')[0]}.")
        pack(runs[-1], full)
        model = load_model(f'local-dir:{half}')
        stored = {split: predict_folder(model, data_dir, split=split) for split in SPLITS}
        exact = predict_folder(load_model(f'local-dir:{full}'), data_dir, split='test')
        config = json.loads((half / 'config.json').read_text(encoding='utf-8'))
        info = {
            'model': name,
            'sha256': sha256(half / 'model.safetensors'),
            'label_names': packed['label_names'],
            'input_size': config['pretrained_cfg']['input_size'],
            'data': json.loads(dataset_json.read_text(encoding='utf-8')),
            'commit': git_commit(),
            'ema': packed['ema'],
            'runs': [describe_run(run) for run in runs],
            'half_precision_changes': int((stored['test'].predicted != exact.predicted).sum()),
            'metrics': {split: compute_metrics(predictions) for split, predictions in stored.items()},
        }
        (Path(temporary) / 'info.json').write_text(json.dumps(info, indent=1, allow_nan=False) + '\n', encoding='utf-8')
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


def git_commit() -> str | None:
    """Commit of the code the weights were packed with, None outside a checkout."""
    if not shutil.which('git'):
        return None
    result = subprocess.run(
        ['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


