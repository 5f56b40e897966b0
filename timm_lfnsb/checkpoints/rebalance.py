"""Make a trained classifier find rare classes and be as sure as it is right: no prior in its bias, a temperature."""
from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..data.prepare import read_description
from ..errors import UserError
from ..labels import match_labels
from ..models.temperature import TEMPERATURE_KEY
from .pack import check_new

if TYPE_CHECKING:
    from ..evaluate.predictions import Predictions

STRENGTHS = np.arange(41) / 20
"""Values of tau that are tried: 0 changes nothing, 1 takes the prior out whole."""


def rebalance(folder: Path, out_dir: Path, data_dir: Path, cost: float = 0.03) -> dict[str, Any]:
    """Write a timm folder whose classifier gives (logits - tau log(prior)) / T, with all other tensors as they were.

    The first step is the post-hoc logit adjustment of Menon et al. 2021 (arXiv 2007.07314, section 4.1). The prior is
    each class's share of the training split. T is the temperature that `fit_temperature` finds on the validation split
    for the adjusted logits. Both stand in the classifier, so timm, transformers and exported files agree on them.

    Args:
        folder: A timm folder, see `pack`, whose classifier is one linear layer with a bias.
        out_dir: Folder to write; must not hold anything yet.
        data_dir: Folder made by `prepare`, with a validation split, where `choose_strength` finds tau.
        cost: Accuracy on the validation split that it may cost, a fraction.

    Returns:
        What config.json holds as `prior_correction`, see `choose_strength`, and T in it as `temperature`.

    Raises:
        UserError: When the folder, its classifier or the data cannot be used, it was rebalanced before, or no
            temperature fits the validation split.
    """
    from ..evaluate.calibration import fit_temperature, scale  # which needs the extra, as the next
    from ..evaluate.predictions import predict_folder
    check_new(out_dir)
    splits = read_description(data_dir)['splits']
    if 'train' not in splits:
        raise UserError(f'{data_dir} has no training split, so the prior of its labels is not known.')
    counts = splits['train']['counts']
    predictions = predict_folder(f'local-dir:{folder}', data_dir, split='validation')
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    if 'prior_correction' in config:
        raise UserError(f'{folder} was rebalanced before: start from the folder that was not.')
    state = load_file(folder / 'model.safetensors')
    classifier = config.get('pretrained_cfg', {}).get('classifier')
    weight, bias = state.get(f'{classifier}.weight'), state.get(f'{classifier}.bias')
    if weight is None or bias is None or bias.shape != (len(predictions.label_names),):
        raise UserError(f'the classifier of {folder} has no bias for each class: it cannot be rebalanced.')

    class_counts = np.zeros(len(bias))
    for name, index in match_labels(counts, predictions.label_names).items():
        class_counts[index] = counts[name]
    if not class_counts.all():
        raise UserError(f'the training split of {data_dir} has a class without images: its prior is not known.')
    log_prior = np.log(class_counts / class_counts.sum())
    correction = choose_strength(predictions, log_prior, cost)
    offset = correction['tau'] * log_prior
    temperature = correction['temperature'] = fit_temperature(scale(predictions, offset=offset))
    # In float32: another rounding of half precision would move a label here and there.
    state[f'{classifier}.weight'] = weight.float() / temperature
    state[f'{classifier}.bias'] = (bias.float() - torch.from_numpy(offset).float()) / temperature
    config[TEMPERATURE_KEY] = 1.  # no other is left to apply, and the outputs are known to be calibrated
    config['prior_correction'] = correction
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out_dir.parent, prefix=f'.{out_dir.name}.') as temporary:
        target = Path(temporary) / out_dir.name
        target.mkdir()
        save_file(state, target / 'model.safetensors', metadata={'format': 'pt'})
        os.chmod(target / 'model.safetensors', 0o644)  # safetensors writes it for the owner alone
        (target / 'config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')
        os.replace(target, out_dir)
    return correction


def choose_strength(predictions: Predictions, log_prior: np.ndarray, cost: float = 0.03) -> dict[str, Any]:
    """Find the strength with the best balanced accuracy among those that cost at most `cost` of the accuracy.

    Args:
        log_prior: Logarithm of each class's share (C,), in the order of the predictions' classes.

    Returns:
        `tau`; `accuracy` and `balanced_accuracy` of these predictions, each as [without, with] the correction.
    """
    from ..evaluate.calibration import scale
    classes = np.unique(predictions.labels)
    accuracy, balanced = [], []
    for tau in STRENGTHS:
        correct = scale(predictions, offset=tau * log_prior).correct
        accuracy.append(float(correct.mean()))
        balanced.append(float(np.mean([correct[predictions.labels == label].mean() for label in classes])))
    allowed = np.array(accuracy) >= accuracy[0] - cost
    best = int(np.where(allowed, balanced, 0).argmax())
    return {'tau': float(STRENGTHS[best]), 'split': 'validation', 'cost': cost,
            'accuracy': [accuracy[0], accuracy[best]], 'balanced_accuracy': [balanced[0], balanced[best]]}
