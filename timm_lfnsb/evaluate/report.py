"""The report of an evaluation: the files of `timm-lfnsb evaluate`, and its text."""
from __future__ import annotations

import csv
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tabulate import tabulate
from timm.data import resolve_model_data_config

from ..data.prepare import DESCRIPTION, read_description
from ..models.loading import load_model
from ..models.temperature import model_temperature
from ..util.files import replacing, write_json
from ..version import __version__
from .calibration import scale
from .figures import confusion_figure, coverage_figure, reliability_figure
from .metrics import compare_predictions, compute_coverage, compute_metrics, percent
from .predictions import predict_folder

PACKAGES = ('torch', 'timm', 'torchvision', 'pillow', 'numpy', 'scikit-learn', 'scipy')


def evaluate_folder(
        model_name: str, data_dir: str | Path, out_dir: str | Path, split: str = 'test', compare: str | None = None,
        tta: str | None = None, calibration: bool = True, **options: Any,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Evaluate a model on DATA_DIR/SPLIT, with options as for `predict_folder`, and write the report into a folder.

    Writes metrics.json, predictions.csv, confusion.png, reliability.png and coverage.png, and compare.json where there
    is another model to `compare` with on the same images. Files of these names are replaced, each as a whole.

    Probabilities are calibrated by the model's temperature (with `tta`, after the mean), unless none is known or
    `calibration` is off; metrics.json says so in `temperature` and `calibrated`, and has `ece_plain` of plain softmax.

    Returns:
        The content of metrics.json, and of compare.json or None.

    Raises:
        UserError: See `predict_folder`; also when dataset.json in the data folder is damaged.
    """
    data_dir, out_dir = Path(data_dir), Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    model = load_model(model_name, inference=True)
    other = load_model(compare, inference=True) if compare else None
    data_config = resolve_model_data_config(model)
    setting = {
        'split': split,
        'data_checksum': read_description(data_dir)['sha256'] if (data_dir / DESCRIPTION).is_file() else None,
        'tta': tta,
        'versions': {'timm_lfnsb': __version__, **{name: version(name) for name in PACKAGES}},
    }
    predictions = predict_folder(model, data_dir, split, tta, **options)
    comparison = None
    if other is not None:
        second = predict_folder(other, data_dir, split, tta, **options)
        comparison = {
            'first': model_name, 'second': compare,
            'accuracy_first': float(predictions.correct.mean()), 'accuracy_second': float(second.correct.mean()),
            **compare_predictions(predictions, second), **setting,
        }
        write_json(out_dir / 'compare.json', comparison)
    temperature, ece_plain = model_temperature(model), compute_metrics(predictions)['ece']
    if calibration and temperature is not None:
        predictions = scale(predictions, temperature)
    metrics = {
        'model': model_name, **compute_metrics(predictions), 'coverage': compute_coverage(predictions),
        'ece_plain': ece_plain, 'temperature': temperature,
        'calibrated': calibration and temperature is not None, **setting,
        'image_size': list(data_config['input_size'][1:]),
        'preprocessing': {key: value for key, value in data_config.items() if key != 'input_size'},
    }
    names = predictions.label_names
    with replacing(out_dir / 'predictions.csv') as path, open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['file', 'label', 'prediction', *names])
        for image, label, predicted, row in zip(
                predictions.files, predictions.labels, predictions.predicted, predictions.probabilities, strict=True):
            writer.writerow([image, names[label], names[predicted], *row])
    for name, figure in (('confusion.png', confusion_figure(metrics['confusion'], names)),
                         ('reliability.png', reliability_figure(metrics['calibration'], metrics['ece'])),
                         ('coverage.png', coverage_figure(metrics['coverage']))):
        with replacing(out_dir / name) as path:
            figure.savefig(path)
    write_json(out_dir / 'metrics.json', metrics)
    return metrics, comparison


def _probabilities(metrics: dict[str, Any]) -> str:
    """What the probabilities are, in a sentence."""
    if metrics['calibrated']:
        return (f"probabilities with the model's temperature {metrics['temperature']:.3f}; as plain softmax they have "
                f"an ece of {percent(metrics, 'ece_plain')} %")
    return 'probabilities are plain softmax' + (
        '' if metrics['temperature'] else ': no temperature comes with the model (pack --calibrate fits one)')


def format_metrics(metrics: dict[str, Any], comparison: dict[str, Any] | None = None) -> str:
    """Format what `evaluate_folder` returns as a table, in percent, with 95 % intervals in brackets."""
    averages = ('accuracy', 'balanced_accuracy', 'macro_f1', 'ece')
    classes = [
        [name, figures['count'], *(percent(figures, key) for key in ('precision', 'recall', 'f1'))]
        if figures['count'] else [name, 0, 'absent from the data'] for name, figures in metrics['per_class'].items()]
    table = partial(tabulate, tablefmt='plain', disable_numparse=True)
    parts = [
        f"{metrics['model']} on {metrics['split']}: {metrics['count']} images",
        table([[key.replace('_', ' '), percent(metrics, key)] for key in averages]),
        table(classes, ['class', 'count', 'precision', 'recall', 'F1']),
        'percent, with 95 % intervals; averages over the classes that occur',
        table([[f"{100 * row['coverage']:.0f} %", percent(row, 'accuracy'), f"{row['threshold']:.3f}"]
               for row in metrics['coverage'][1::2]], ['surest images', 'accuracy', 'predict --unsure']),
        _probabilities(metrics),
    ]
    if comparison is not None:
        parts.append(
            f"compared with {comparison['second']}: {percent(comparison, 'accuracy_second')} accuracy, difference "
            f"{percent(comparison, 'difference', '+')} points\n"
            f"only {comparison['first']} right: {comparison['only_first_right']}, only {comparison['second']} right: "
            f"{comparison['only_second_right']}, McNemar's exact test p = {comparison['p_value']:.3g}")
    return '\n\n'.join(parts)
