"""What the outputs of a classifier mean, found out from labelled images."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..errors import UserError
from ..labels import canonical_name
from .calibration import log_probabilities
from .predictions import folder_name, labelled_images, predict_folder

MIN_IMAGES, RESAMPLES, MIN_SHARE = 10, 1000, 0.95  # images a class, bootstrap samples, and how many of them must agree


class LabelOrder(NamedTuple):
    """Names for the outputs of a model, and what speaks for them."""

    label_names: tuple[str, ...]  # in the order of the outputs
    share: float  # of the bootstrap samples that give the same order
    accuracy: float  # mean over the classes of the share of their images that are named right
    images: int  # how many


def find_label_order(model: Any, data_dir: Path, **options: Any) -> LabelOrder:
    """Find the order of a model's outputs from labelled images DATA_DIR/LABEL/FILE or DATA_DIR/SPLIT/LABEL/FILE.

    Splits are taken in the order validation, test, train, the first that is there. The images must be of the model's
    classes, all and no others: which class a model does not know cannot be told from its outputs. See `assign`.

    Args:
        model: A timm model; the `label_names` of its `pretrained_cfg` are replaced by the classes, sorted.
        options: As for `predict_folder`.

    Raises:
        UserError: When there are not as many classes as outputs, a class has fewer than `MIN_IMAGES` images, or fewer
            than `MIN_SHARE` of the bootstrap samples agree.
    """
    split = next((name for name in ('validation', 'test', 'train') if (data_dir / name).is_dir()), '')
    counts = Counter(map(folder_name, labelled_images(data_dir, split)))
    classes, outputs = sorted(map(canonical_name, counts)), model.num_classes
    few = [f'{name} ({count})' for name, count in sorted(counts.items()) if count < MIN_IMAGES]
    if len(set(classes)) < len(classes):
        raise UserError(f"two of the folders [{', '.join(sorted(counts))}] mean the same expression: merge them.")
    if len(classes) != outputs:
        todo = 'add images of the others' if len(classes) < outputs else 'leave out the folders that it does not know'
        raise UserError(f"{data_dir} has images of {len(classes)} classes ({', '.join(classes)}) and the checkpoint "
                        f'has {outputs} outputs: {todo}, or give --labels with all names.')
    if few:
        raise UserError(f"{data_dir} has too few images of {', '.join(few)}: give at least {MIN_IMAGES} of each class.")
    model.pretrained_cfg['label_names'] = tuple(classes)  # any order: it is found now
    predictions = predict_folder(model, data_dir, split, **options)
    scores = log_probabilities(predictions)
    groups = [scores[predictions.labels == i] for i in range(len(classes))]
    order = assign(np.array([group.mean(axis=0) for group in groups]))
    rng = np.random.default_rng(0)
    # Resampling a class's n images draws how often each is taken from the multinomial distribution.
    samples = np.stack([rng.multinomial(len(group), np.full(len(group), 1 / len(group)), RESAMPLES) @ group / len(group)
                        for group in groups], axis=1)
    share = float(np.mean([np.array_equal(assign(sample), order) for sample in samples]))
    named = tuple(classes[i] for i in order)
    if share < MIN_SHARE:
        raise UserError(
            f'the order of the outputs cannot be told from these {len(scores)} images: the best is '
            f"{','.join(named)}, but only {100 * share:.0f} % of {RESAMPLES} bootstrap samples give it, and "
            f'{100 * MIN_SHARE:.0f} % are needed; give more images of each class, or --labels with all names.')
    accuracy = np.mean([np.mean(groups[i].argmax(axis=1) == output) for output, i in enumerate(order)])
    return LabelOrder(named, share, float(accuracy), len(scores))


def assign(confusion: np.ndarray) -> Sequence[int]:
    """The class (C,) of each output with which the labels are most likely, no class twice.

    Args:
        confusion: For each class the mean log probabilities of its images (C, C). Logarithms, because outputs that are
            never the highest, as of rare classes, tell their class from others by them; in counts they would tie.
    """
    rows, columns = linear_sum_assignment(confusion, maximize=True)
    return rows[np.argsort(columns)]
