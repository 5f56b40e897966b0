"""Temperature of a classifier: one number that makes its probabilities as sure as it is right."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from ..errors import UserError
from .metrics import compute_metrics
from .predictions import Predictions

TEMPERATURES = (0.05, 100.)


def log_probabilities(
        predictions: Predictions, temperature: float = 1., offset: np.ndarray | float = 0.) -> np.ndarray:
    """Log probabilities (N, C), float64, of the logits minus an offset (C,), divided by a temperature."""
    # float32 probabilities of very sure models reach 0.
    smallest = np.finfo(np.float32).tiny
    logits = np.log(np.maximum(predictions.probabilities.astype(np.float64), smallest)) - offset
    return log_softmax(logits / temperature, axis=1)


def scale(predictions: Predictions, temperature: float = 1., offset: np.ndarray | float = 0.) -> Predictions:
    """Predictions as they would be with the logits, and so log p as well, minus an offset, divided by a temperature."""
    return replace(predictions, probabilities=np.exp(log_probabilities(predictions, temperature, offset)))


def negative_log_likelihood(predictions: Predictions, temperature: float = 1.) -> float:
    """Mean of -log p of the true class, in nats, with the logits divided by a temperature."""
    chosen = log_probabilities(predictions, temperature)[np.arange(len(predictions.labels)), predictions.labels]
    return float(-chosen.mean())


def fit_temperature(predictions: Predictions) -> float:
    """The temperature with the least negative log-likelihood (Guo et al., arXiv 1706.04599, section 4.2).

    Raises:
        UserError: When there is none in `TEMPERATURES`: the model is right about all, or as good as guessing.
    """
    low, high = TEMPERATURES
    result = minimize_scalar(  # in 1 / T the likelihood has one minimum only
        lambda x: negative_log_likelihood(predictions, 1 / x), bounds=(1 / high, 1 / low), options={'xatol': 1e-5})
    temperature = 1 / float(result.x)
    if predictions.correct.all() or not low * 1.01 < temperature < high / 1.01:
        raise UserError(f'no temperature between {low:g} and {high:g} fits these {len(predictions.labels)} '
                        'predictions: take more data, or look whether the labels are right.')
    return temperature


def measure_calibration(validation: Predictions, test: Predictions) -> dict[str, Any]:
    """Fit the temperature on one split, and measure `ece` and `nll` of another without and with it (`_scaled`)."""
    temperature = fit_temperature(validation)
    measured: dict[str, Any] = {'temperature': temperature, 'fitted_on': 'validation', 'measured_on': 'test'}
    for end, predictions in (('', test), ('_scaled', scale(test, temperature))):
        measured[f'ece{end}'] = compute_metrics(predictions)['ece']
        measured[f'nll{end}'] = negative_log_likelihood(predictions)
    return measured
