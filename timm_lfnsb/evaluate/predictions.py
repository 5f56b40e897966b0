"""Evaluation of a model on a folder of labelled faces: predictions, metrics with intervals, and their report.

Needs the packages of the extra `eval`. The folder names of the data meet the model's `label_names` by name only.
"""
from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.prepare import DESCRIPTION, read_description
from ..labels import match_labels, model_label_names
from ..models import loading
from ..util.files import replacing, write_json
from ..version import __version__
from .figures import confusion_figure, reliability_figure

CALIBRATION_BINS = 15
RESAMPLES = 1000
TTA = ('hflip',)


class EvaluationError(ValueError):
    """An evaluation that cannot be done; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Predictions:
    """What a model says about the images of one folder.

    Attributes:
        files: N paths below the split's folder, with forward slashes, in timm's order.
        labels: True class indices (N,), int64, into `label_names`.
        probabilities: Softmax outputs (N, C), float32; each row sums to 1.
        label_names: The model's C class names in the order of its outputs.
    """
    files: Sequence[str]
    labels: np.ndarray
    probabilities: np.ndarray
    label_names: Sequence[str]

    @property
    def predicted(self) -> np.ndarray:
        """Predicted class indices (N,), int64."""
        return self.probabilities.argmax(axis=1)

    @property
    def correct(self) -> np.ndarray:
        """Whether the predicted class is the true one (N,), bool."""
        return self.predicted == self.labels


def load_model(name: str, inference: bool = False) -> nn.Module:
    """Create a timm model with its trained weights.

    Args:
        name: A registered name with weights, 'local-dir:PATH' or 'hf-hub:ID'.
        inference: In eval mode and, if of this zoo, reparameterised: see `timm_lfnsb.loading.load_for_inference`.

    Raises:
        EvaluationError: When there is no such model, or no weights for it.
    """
    try:
        return loading.load_for_inference(name) if inference else loading.load_model(name)
    except Exception as error:  # registry, Hub and file formats each raise types of their own
        if 'No pretrained weights exist' in str(error):
            raise EvaluationError(
                f'{name} has no trained weights: give a model that has some, local-dir:PATH or hf-hub:ID.') from error
        raise EvaluationError(f"cannot load the model {name}: {' '.join(str(error).split())}") from error


class _Images(ImageDataset):
    """timm's folder data set, which reports an unreadable image instead of taking its neighbour for it."""

    perturb: Callable[[Image.Image], Image.Image] | None = None

    def __getitem__(self, index: int) -> torch.Tensor | str:
        path = self.filename(index, absolute=True)
        try:
            with Image.open(path) as file:
                image = file.convert(self.input_img_mode)
        except Exception as error:  # decoders raise nearly anything on broken data
            # Returned, because a data loader wraps what its workers raise in a traceback.
            return (f'cannot read the image {path} ({type(error).__name__}): repair it, or remove it and say so where '
                    'you report the figures.')
        return self.transform(self.perturb(image) if self.perturb else image)


def _collate(items: list[torch.Tensor | str]) -> torch.Tensor | str:
    tensors = []
    for item in items:
        if isinstance(item, str):
            return item
        tensors.append(item)
    return torch.stack(tensors)


def _open_split(data_dir: str | Path, split: str, label_names: Sequence[str]) -> tuple[_Images, np.ndarray]:
    data_dir = Path(data_dir)
    root = data_dir / split
    if not data_dir.is_dir():
        raise EvaluationError(f'there is no data folder {data_dir}.')
    if not root.is_dir():
        there = ', '.join(sorted(path.name for path in data_dir.iterdir() if path.is_dir())) or 'none'
        raise EvaluationError(f"{data_dir} has no split folder '{split}'; folders that are there: {there}.")
    # Every format that Pillow can open: timm's own short list would leave out the others without a word.
    extensions = {ext for ext, name in Image.registered_extensions().items() if name in Image.OPEN}
    try:
        images = _Images(root, input_key=';'.join(sorted(extensions)))
    except RuntimeError:
        raise EvaluationError(f'{root} has no images; they belong into {root / "LABEL"}.') from None
    parents = [Path(file).parent for file in images.filenames()]
    if Path() in parents:
        raise EvaluationError(f'{root} has images outside of the label folders: move them into {root / "LABEL"}.')
    try:
        indices = match_labels(sorted({parent.name for parent in parents}), label_names)
    except ValueError as error:
        raise EvaluationError(str(error)) from error
    return images, np.array([indices[parent.name] for parent in parents])


def predict_folder(
        model: str | nn.Module,
        data_dir: str | Path,
        split: str = 'test',
        tta: str | None = None,
        batch_size: int = 64,
        device: str = 'auto',
        workers: int = 2,
        progress: bool = True,
        perturb: Callable[[Image.Image], Image.Image] | None = None,
) -> Predictions:
    """Classify the images DATA_DIR/SPLIT/LABEL/FILE.

    Args:
        model: A timm model, which is moved to the device and set to eval mode, or a name for `load_model`.
        data_dir: Folder that holds the split folders.
        split: Name of the split's folder.
        tta: 'hflip' for the mean of the softmax outputs of an image and its mirror image.
        batch_size: Images at a time; a matter of speed only.
        device: A torch device, or 'auto' for CUDA where there is one, else the CPU.
        workers: Processes that read images, 0 for none.
        progress: Show a progress bar on stderr.
        perturb: What to do to each image before the preprocessing, see `timm_lfnsb.evaluate.robustness`.

    Returns:
        The predictions for every image, preprocessed as the model's pretrained config says.

    Raises:
        EvaluationError: When the model cannot be loaded or has no usable label names, a folder is missing or empty, a
            label folder has a name that the model does not know, an image cannot be read, or the model's outputs are
            not finite.
    """
    if tta is not None and tta not in TTA:
        raise EvaluationError(f"there is no test-time augmentation '{tta}': take one of {', '.join(TTA)}, or None.")
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if isinstance(model, str):
        model = load_model(model, inference=True)
    try:
        label_names = model_label_names(model)
    except ValueError as error:
        raise EvaluationError(str(error)) from None
    images, labels = _open_split(data_dir, split, label_names)
    config = resolve_model_data_config(model)
    images.input_img_mode = 'L' if config['input_size'][0] == 1 else 'RGB'
    images.transform = create_transform(**config)
    images.perturb = perturb
    try:
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise EvaluationError(f"cannot use the device '{device}': {str(error).splitlines()[0]}") from error

    loader = DataLoader(images, batch_size, num_workers=workers, collate_fn=_collate)
    outputs = []
    with torch.inference_mode(), tqdm(total=len(images), desc=split, unit='image', disable=not progress) as bar:
        for batch in loader:
            if isinstance(batch, str):
                raise EvaluationError(batch)
            batch = batch.to(device)
            probabilities = model(batch).float().softmax(dim=1)
            if tta == 'hflip':
                probabilities = (probabilities + model(batch.flip(-1)).float().softmax(dim=1)) / 2
            outputs.append(probabilities.cpu())
            bar.update(len(batch))
    probabilities = torch.cat(outputs).numpy()
    if not np.isfinite(probabilities).all():
        raise EvaluationError('the model gives outputs that are not finite: its weights are broken.')
    return Predictions([Path(file).as_posix() for file in images.filenames()], labels, probabilities, label_names)


def _wilson(successes: int, trials: int) -> list[float] | None:
    """95 % Wilson score interval of a proportion; None without trials."""
    if not trials:
        return None
    interval = binomtest(int(successes), int(trials)).proportion_ci(0.95, method='wilson')
    return [float(interval.low), float(interval.high)]


def _wilson_f1(hits: int, misses: int) -> list[float]:
    """95 % Wilson interval of F1 = 2 J / (1 + J), where J = hits / (hits + misses) is a proportion.

    The "Wilson indirect" method of Lam et al., arXiv 2309.14621; misses are false positives plus false negatives.
    """
    interval = _wilson(hits, hits + misses)
    assert interval is not None
    return [2 * bound / (1 + bound) for bound in interval]


def calibration_bins(predictions: Predictions) -> list[dict[str, Any]]:
    """Count images, accuracy and mean confidence in 15 bins (i / 15, (i + 1) / 15] of the highest probability.

    Returns:
        A dict with `low`, `high`, `count`, `accuracy` and `confidence` for each bin; the last two are None in empty
        bins.
    """
    confidence = predictions.probabilities.max(axis=1).astype(np.float64)
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    bins = np.digitize(confidence, edges[1:-1], right=True)
    table = []
    for i in range(CALIBRATION_BINS):
        inside = bins == i
        count = int(inside.sum())
        table.append({
            'low': float(edges[i]), 'high': float(edges[i + 1]), 'count': count,
            'accuracy': float(predictions.correct[inside].mean()) if count else None,
            'confidence': float(confidence[inside].mean()) if count else None,
        })
    return table


def compute_metrics(predictions: Predictions) -> dict[str, Any]:
    """Compute the figures of a classifier, as fractions between 0 and 1.

    Averages over classes run over the classes that occur in the data: `balanced_accuracy` is then scikit-learn's
    `balanced_accuracy_score`, and `macro_f1` its `f1_score(average='macro')` with these classes as `labels`. A class
    that occurs but is never predicted has precision 0.

    Intervals are 95 %: Wilson's score interval for accuracy, precision and recall; the same, through the Jaccard
    index, for F1 (arXiv 2309.14621, "Wilson indirect"); for the balanced accuracy the percentiles of 1000 bootstrap
    resamples of the images within each class, with a fixed seed, which is too narrow for classes of few images. The
    expected calibration error is that of arXiv 1706.04599, equation (3), over `calibration_bins`.

    Args:
        predictions: At least one image.

    Returns:
        A dict that JSON can hold: `count`, `accuracy`, `balanced_accuracy`, the two with `_interval`, `macro_f1`,
        `ece`, `label_names`, `absent` (names of the classes without images), `per_class` (by name: `count`,
        `precision`, `recall`, `f1`, each with `_interval`; all None for absent classes), `confusion` (rows true,
        columns predicted, both in the order of `label_names`) and `calibration`.

    Raises:
        EvaluationError: When there are no images.
    """
    total = len(predictions.labels)
    if not total:
        raise EvaluationError('there are no predictions to compute metrics of.')
    names = list(predictions.label_names)
    classes = range(len(names))
    confusion = confusion_matrix(predictions.labels, predictions.predicted, labels=classes)
    precision, recall, f1, _ = precision_recall_fscore_support(
        predictions.labels, predictions.predicted, labels=classes, zero_division=0)
    hits, counts, predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    present = counts > 0

    per_class: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(names):
        figures = {
            'precision': float(precision[i]), 'precision_interval': _wilson(hits[i], predicted[i]),
            'recall': float(recall[i]), 'recall_interval': _wilson(hits[i], counts[i]),
            'f1': float(f1[i]), 'f1_interval': _wilson_f1(hits[i], counts[i] + predicted[i] - 2 * hits[i]),
        } if present[i] else dict.fromkeys(
            ('precision', 'precision_interval', 'recall', 'recall_interval', 'f1', 'f1_interval'))
        per_class[name] = {'count': int(counts[i]), **figures}

    # Resampling a class's n images draws its number of hits from the binomial distribution of n and its recall.
    rng = np.random.default_rng(0)
    resampled = rng.binomial(counts[present], recall[present], (RESAMPLES, present.sum())) / counts[present]
    calibration = calibration_bins(predictions)
    return {
        'count': total,
        'accuracy': float(hits.sum() / total),
        'accuracy_interval': _wilson(hits.sum(), total),
        'balanced_accuracy': float(recall[present].mean()),
        'balanced_accuracy_interval': np.percentile(resampled.mean(axis=1), (2.5, 97.5)).tolist(),
        'macro_f1': float(f1[present].mean()),
        'ece': sum(
            row['count'] / total * abs(row['accuracy'] - row['confidence']) for row in calibration if row['count']),
        'label_names': names,
        'absent': [name for name, there in zip(names, present, strict=True) if not there],
        'per_class': per_class,
        'confusion': confusion.tolist(),
        'calibration': calibration,
    }


def compare_predictions(first: Predictions, second: Predictions) -> dict[str, Any]:
    """Compare two models on the same images: McNemar's exact test and the difference of the accuracies.

    The p-value is that of a fair coin for the images that only one of the models has right, two-sided; 1 without such
    images. The interval of `difference` (first minus second) is 95 %: percentiles of 1000 paired bootstrap resamples
    of the images, with a fixed seed.

    Args:
        first: Predictions of one model.
        second: Predictions of another, whose class order may differ.

    Returns:
        A dict with `count`, the numbers of images `both_right`, `only_first_right`, `only_second_right` and
        `both_wrong`, `p_value`, `difference` and `difference_interval`.

    Raises:
        EvaluationError: When the images are not the same.
    """
    if list(first.files) != list(second.files) or not len(first.files):
        raise EvaluationError('the two predictions are of different images, or of none: predict the same folder.')
    total = len(first.files)
    only_first = int((first.correct & ~second.correct).sum())
    only_second = int((~first.correct & second.correct).sum())
    discordant = only_first + only_second
    # Resampling images draws the two discordant numbers from a multinomial distribution.
    draws = np.random.default_rng(0).multinomial(
        total, np.array([only_first, only_second, total - discordant]) / total, RESAMPLES)
    differences = (draws[:, 0] - draws[:, 1]) / total
    return {
        'count': total,
        'both_right': int((first.correct & second.correct).sum()),
        'only_first_right': only_first,
        'only_second_right': only_second,
        'both_wrong': int((~first.correct & ~second.correct).sum()),
        'p_value': float(binomtest(only_first, discordant).pvalue) if discordant else 1.0,
        'difference': (only_first - only_second) / total,
        'difference_interval': np.percentile(differences, (2.5, 97.5)).tolist(),
    }


def evaluate_folder(
        model_name: str,
        data_dir: str | Path,
        out_dir: str | Path,
        split: str = 'test',
        compare: str | None = None,
        tta: str | None = None,
        batch_size: int = 64,
        device: str = 'auto',
        workers: int = 2,
        progress: bool = True,
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Evaluate a model on DATA_DIR/SPLIT and write the report into a folder.

    Writes `metrics.json`, `predictions.csv`, `confusion.png` and `reliability.png`, and `compare.json` where there is
    a model to compare with. Files of these names are replaced, each as a whole.

    Args:
        model_name: A name for `load_model`.
        data_dir: See `predict_folder`.
        out_dir: Folder for the report, made if need be.
        split: See `predict_folder`.
        compare: Name of another model to compare with on the same images.
        tta: See `predict_folder`.
        batch_size: See `predict_folder`.
        device: See `predict_folder`.
        workers: See `predict_folder`.
        progress: See `predict_folder`.

    Returns:
        The content of `metrics.json`, and of `compare.json` or None.

    Raises:
        EvaluationError: See `predict_folder`; also when `dataset.json` in the data folder is not JSON.
        OSError: When the report cannot be written.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    model = load_model(model_name, inference=True)
    other = load_model(compare, inference=True) if compare else None
    data_config = resolve_model_data_config(model)
    setting = {
        'split': split,
        'data_checksum': read_description(data_dir)['sha256'] if (Path(data_dir) / DESCRIPTION).is_file() else None,
        'tta': tta,
        'versions': {
            'timm_lfnsb': __version__, 'torch': str(torch.__version__),
            **{name: version(name) for name in ('timm', 'torchvision', 'pillow', 'numpy', 'scikit-learn', 'scipy')},
        },
    }

    options: dict[str, Any] = dict(
        split=split, tta=tta, batch_size=batch_size, device=device, workers=workers, progress=progress)
    predictions = predict_folder(model, data_dir, **options)
    comparison = None
    if other is not None:
        try:
            other_predictions = predict_folder(other, data_dir, **options)
        except EvaluationError as error:
            raise EvaluationError(f'{compare}: {error}') from error
        comparison = {
            'first': model_name, 'second': compare,
            'accuracy_first': float(predictions.correct.mean()),
            'accuracy_second': float(other_predictions.correct.mean()),
            **compare_predictions(predictions, other_predictions), **setting,
        }

    metrics = {
        'model': model_name,
        **compute_metrics(predictions),
        **setting,
        'image_size': list(data_config['input_size'][1:]),
        'preprocessing': {key: value for key, value in data_config.items() if key != 'input_size'},
    }
    _write_predictions(out_dir / 'predictions.csv', predictions)
    with replacing(out_dir / 'confusion.png') as path:
        confusion_figure(metrics['confusion'], metrics['label_names']).savefig(path, format='png')
    with replacing(out_dir / 'reliability.png') as path:
        reliability_figure(metrics['calibration'], metrics['ece']).savefig(path, format='png')
    if comparison is not None:
        write_json(out_dir / 'compare.json', comparison)
    write_json(out_dir / 'metrics.json', metrics)
    return metrics, comparison


def format_metrics(metrics: dict[str, Any], comparison: dict[str, Any] | None = None) -> str:
    """Format what `evaluate_folder` returns as a table, in percent, with 95 % intervals in brackets."""
    def percent(figures: dict[str, Any], key: str) -> str:
        text = f'{100 * figures[key]:5.1f}'
        interval = figures.get(f'{key}_interval')
        return text + (f' [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]' if interval else '')

    augmented = f", tta {metrics['tta']}" if metrics['tta'] else ''
    lines = [f"{metrics['model']} on {metrics['split']}: {metrics['count']} images{augmented}", '']
    for key, title in (('accuracy', 'accuracy'), ('balanced_accuracy', 'balanced accuracy'), ('macro_f1', 'macro F1'),
                       ('ece', 'ECE')):
        lines.append(f'{title:<18}{percent(metrics, key)}')
    width = max(len('class'), *map(len, metrics['label_names']))
    lines += ['', f"{'class':<{width}}  {'count':>6}   {'precision':<20} {'recall':<20} F1"]
    for name, figures in metrics['per_class'].items():
        cells = [f'{percent(figures, key):<20}' for key in ('precision', 'recall', 'f1')] if figures['count'] else [
            'absent from the data']
        lines.append(f"{name:<{width}}  {figures['count']:>6}   {' '.join(cells).rstrip()}")
    lines += ['', 'percent, with 95 % intervals; averages over the classes that occur']
    if comparison is not None:
        low, high = comparison['difference_interval']
        lines += [
            '',
            f"compared with {comparison['second']}: {100 * comparison['accuracy_second']:.1f} accuracy, difference "
            f"{100 * comparison['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points",
            f"only {comparison['first']} right: {comparison['only_first_right']}, only {comparison['second']} right: "
            f"{comparison['only_second_right']}, McNemar's exact test p = {comparison['p_value']:.3g}",
        ]
    return '\n'.join(lines)


def _write_predictions(path: Path, predictions: Predictions) -> None:
    names = predictions.label_names
    with replacing(path) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['file', 'label', 'prediction', *names])
        for image, label, predicted, row in zip(
                predictions.files, predictions.labels, predictions.predicted, predictions.probabilities, strict=True):
            writer.writerow([image, names[label], names[predicted], *row])
