"""The report of an evaluation: the files of `timm-lfnsb evaluate`, and its text."""
from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image
from tabulate import tabulate

from ..data.prepare import DESCRIPTION, read_description
from ..labels import canonical_name
from ..util.files import replacing, write_json
from ..util.text import markdown_table
from ..version import __version__
from .calibration import scale
from .classifiers import counted_classes, load_classifier, measure_latency
from .comparison import holm
from .figures import confusion_figure, coverage_figure, reliability_figure
from .groups import group_rows, measure_groups, read_groups
from .metrics import FIGURES, compare_predictions, compute_coverage, compute_metrics, percent
from .predictions import Predictions, folder_name, labelled_images, predict_folder

PACKAGES = ('torch', 'timm', 'torchvision', 'pillow', 'numpy', 'scikit-learn', 'scipy')
FIGURE_NAMES = [key.replace('_', ' ') for key in FIGURES]


def evaluate_folder(
        models: str | Sequence[str], data_dir: str | Path, out_dir: str | Path, split: str = 'test',
        tta: str | None = None, common: bool = False, groups: str | Path | None = None, seconds: float = 2.,
        calibration: bool = True, device: str = 'auto', **options: Any,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Evaluate models on DATA_DIR/SPLIT, with options as for `predict_folder`, and write the report into a folder.

    Writes metrics.json, predictions.csv, confusion.png, reliability.png and coverage.png of the first model; of each
    other one into a folder of its own, NUMBER-NAME, and compare.json and compare.md of all. Files of these names are
    replaced, each as a whole.

    Probabilities are calibrated by the model's temperature (with `tta`, after the mean), unless none is known or
    `calibration` is off; metrics.json says so in `temperature` and `calibrated`, and has `ece_plain` of plain softmax.

    Args:
        models: Names for `load_classifier`.
        common: Leave out the classes that the data or one of the models lacks, see `counted_classes`.
        groups: A file for `read_groups`, where figures are wanted by group as well.
        seconds: How long to time each of several models, see `measure_latency`; 0 for not at all.

    Returns:
        The content of the first metrics.json, and of compare.json or None.

    Raises:
        UserError: See `predict_folder`, `load_classifier` and `read_groups`; also when dataset.json in the data folder
            is damaged.
    """
    data_dir, out_dir = Path(data_dir), Path(out_dir)
    names = [models] if isinstance(models, str) else models
    classifiers = [load_classifier(name, device) for name in names]
    files = labelled_images(data_dir, split)
    counts = Counter(map(folder_name, files))
    classes = counted_classes(classifiers, counts, common)
    counted = [file for file in files if canonical_name(folder_name(file)) in classes]
    of_image = read_groups(groups, files, counted) if groups else None
    setting = {
        'split': split,
        'data_checksum': read_description(data_dir)['sha256'] if (data_dir / DESCRIPTION).is_file() else None,
        'tta': tta,
        'versions': {'timm_lfnsb': __version__, **{name: version(name) for name in PACKAGES}},
    }
    out_dir.mkdir(parents=True, exist_ok=True)
    predictions = [predict_folder(classifier, data_dir, split, tta, classes=classes if common else None, **options)
                   for classifier in classifiers]
    plain = [compute_metrics(predicted)['ece'] for predicted in predictions]
    if calibration:
        predictions = [scale(predicted, classifier.temperature) if classifier.temperature else predicted
                       for classifier, predicted in zip(classifiers, predictions, strict=True)]
    measured = [{
        'model': classifier.name, **compute_metrics(predicted), 'coverage': compute_coverage(predicted),
        'ece_plain': ece_plain, 'temperature': classifier.temperature,
        'calibrated': calibration and classifier.temperature is not None, **setting,
        'left_out': {'images': {name: count for name, count in counts.items() if canonical_name(name) not in classes},
                     'outputs': [name for name in classifier.label_names if name not in predicted.label_names]},
        'image_size': [*classifier.input_config.get('input_size', ())[1:]],
        'preprocessing': {key: value for key, value in classifier.input_config.items() if key != 'input_size'},
        **({'groups': measure_groups(predicted, of_image)} if of_image else {}),
    } for classifier, predicted, ece_plain in zip(classifiers, predictions, plain, strict=True)]
    comparison = None
    if len(names) > 1:
        indices = [*combinations(range(len(names)), 2)]
        pairs = [compare_predictions(predictions[i], predictions[j]) for i, j in indices]
        comparison = {'models': measured, **setting, 'pairs': [
            {'first': names[i], 'second': names[j], **pair, 'p_holm': p_holm}
            for (i, j), pair, p_holm in zip(indices, pairs, holm([pair['p_value'] for pair in pairs]), strict=True)]}
        if seconds:
            with Image.open(data_dir / split / counted[0]) as image:
                comparison['latency'] = measure_latency(names, image, seconds)
    for number, (metrics, predicted) in enumerate(zip(measured, predictions, strict=True), 1):
        name = re.sub(r'[^\w.-]+', '-', metrics['model'])
        _write_report(out_dir if number == 1 else out_dir / f'{number}-{name}', metrics, predicted)
    if comparison:
        write_json(out_dir / 'compare.json', comparison)
        with replacing(out_dir / 'compare.md') as path:
            path.write_text(f'{format_comparison(comparison)}\n', encoding='utf-8')
    return measured[0], comparison


def _write_report(folder: Path, metrics: dict[str, Any], predictions: Predictions) -> None:
    folder.mkdir(exist_ok=True)
    names = predictions.label_names
    with replacing(folder / 'predictions.csv') as path, open(path, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['file', 'label', 'prediction', *names])
        for image, label, predicted, row in zip(
                predictions.files, predictions.labels, predictions.predicted, predictions.probabilities, strict=True):
            writer.writerow([image, names[label], names[predicted], *row])
    for name, figure in (('confusion.png', confusion_figure(metrics['confusion'], names)),
                         ('reliability.png', reliability_figure(metrics['calibration'], metrics['ece'])),
                         ('coverage.png', coverage_figure(metrics['coverage']))):
        with replacing(folder / name) as path:
            figure.savefig(path)
    write_json(folder / 'metrics.json', metrics)


def _probabilities(metrics: dict[str, Any]) -> str:
    """What the probabilities are, in a sentence."""
    if metrics['calibrated']:
        return (f"probabilities with the model's temperature {metrics['temperature']:.3f}; as plain softmax they have "
                f"an ece of {percent(metrics, 'ece_plain')} %")
    return 'probabilities are plain softmax' + (
        '' if metrics['temperature'] else ': no temperature comes with the model (pack --calibrate fits one)')


def format_metrics(metrics: dict[str, Any], comparison: dict[str, Any] | None = None) -> str:
    """Format what `evaluate_folder` returns as a table, in percent, with 95 % intervals in brackets."""
    classes = [
        [name, figures['count'], *(percent(figures, key) for key in ('precision', 'recall', 'f1'))]
        if figures['count'] else [name, 0, 'absent from the data'] for name, figures in metrics['per_class'].items()]
    table = partial(tabulate, tablefmt='plain', disable_numparse=True)
    parts = [
        f"{metrics['model']} on {metrics['split']}: {metrics['count']} images",
        table([[name, percent(metrics, key)] for name, key in zip(FIGURE_NAMES, FIGURES, strict=True)]),
        table(classes, ['class', 'count', 'precision', 'recall', 'F1']),
        'percent, with 95 % intervals; averages over the classes that occur',
        table([[f"{100 * row['coverage']:.0f} %", percent(row, 'accuracy'), f"{row['threshold']:.3f}"]
               for row in metrics['coverage'][1::2]], ['surest images', 'accuracy', 'predict --unsure']),
        _probabilities(metrics),
    ]
    parts += [format_comparison(comparison)] if comparison else _notes([metrics])
    return '\n\n'.join(parts)


def format_comparison(comparison: dict[str, Any]) -> str:
    """The content of compare.json as Markdown, in percent and points, with 95 % intervals in brackets."""
    models, latency = comparison['models'], comparison.get('latency')
    headers = ['model', *FIGURE_NAMES]
    rows = [[metrics['model'], *(percent(metrics, key) for key in FIGURES)] for metrics in models]
    notes = [f"Percent and points with 95 % intervals, {models[0]['count']} images of {comparison['split']}.",
             "p of McNemar's exact test, two-sided; behind it corrected for the number of pairs (Holm)."]
    if latency:
        headers += ['ms an image', 'time, the first = 1']
        for row, *times in zip(rows, latency['ms'], latency['ratio'], strict=True):
            row += ['{median:.3g} [{q1:.3g}, {q3:.3g}]'.format(**time) for time in times]
        notes.append('Time: median and quartiles of one image at a time, preprocessing and network, on one thread, '
                     'measured in turns.')
    pairs = [[pair['first'], pair['second'], percent(pair, 'difference', '+'), pair['only_first_right'],
              pair['only_second_right'], f"{pair['p_value']:.3g}", f"{pair['p_holm']:.3g}"]
             for pair in comparison['pairs']]
    return '\n\n'.join([
        markdown_table(headers, rows),
        markdown_table(['first', 'second', 'difference in accuracy', 'only first right', 'only second right', 'p',
                        'p (Holm)'], pairs), ' '.join(notes), *_notes(models)])


def _notes(models: Sequence[dict[str, Any]]) -> list[str]:
    """What was left out, and the figures by group."""
    counts = ', '.join(f'{count} of {name}' for name, count in models[0]['left_out']['images'].items())
    notes = [f'Images left out: {counts}'] if counts else []
    for key, what in (('outputs', 'answers left out'), ('absent', 'may also answer what the data lack')):
        found = [(metrics['model'], metrics['left_out'].get(key, metrics.get(key))) for metrics in models]
        notes += [f"{model}, {what}: {', '.join(names)}" for model, names in found if names]
    if 'groups' in models[0]:
        rows = [[metrics['model'], *row] for metrics in models for row in group_rows(metrics['groups'], percent)]
        notes.append(markdown_table(['model', 'by', 'group', 'images', *FIGURE_NAMES], rows))
        notes += [f"Averages by {column} run over the classes that all its groups have: {', '.join(of['classes'])}."
                  for column, of in models[0]['groups'].items()]
        notes.append('The largest of several gaps is large by chance, too: its interval is that of the two groups.')
    return notes
