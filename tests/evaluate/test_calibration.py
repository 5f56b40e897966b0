"""Temperatures are fitted on one split and measured on another."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from timm_lfnsb.errors import UserError
from timm_lfnsb.evaluate import calibration
from timm_lfnsb.evaluate.metrics import compute_metrics
from timm_lfnsb.evaluate.predictions import Predictions
from timm_lfnsb.labels import EXPRESSIONS_8


def make_predictions(temperature: float, count: int = 20000) -> Predictions:
    """Labels drawn from a softmax, and the same logits at another temperature as the model's answer."""
    rng = np.random.default_rng(0)
    logits = 2 * rng.standard_normal((count, 8))
    truth = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = (truth.cumsum(axis=1) > rng.random((count, 1))).argmax(axis=1)
    given = torch.from_numpy(logits * temperature).softmax(dim=1).numpy().astype(np.float32)
    return Predictions([''] * count, labels, given, EXPRESSIONS_8)


@pytest.mark.parametrize('temperature', [0.5, 1, 3])
def test_the_temperature_of_drawn_labels_is_found(temperature):
    predictions = make_predictions(temperature)
    found = calibration.fit_temperature(predictions)
    assert found == pytest.approx(temperature, rel=0.02)
    logits = torch.from_numpy(predictions.probabilities.astype(np.float64)).log()
    labels = torch.from_numpy(predictions.labels)
    losses = [float(torch.nn.functional.cross_entropy(logits / t, labels)) for t in (found * 0.98, found, found * 1.02)]
    assert losses[1] == min(losses)  # torch's own loss agrees that it is the minimum
    scaled = calibration.scale(predictions, found)
    torch.testing.assert_close(torch.from_numpy(scaled.probabilities), (logits / found).softmax(dim=1))


def test_calibration_is_fitted_on_validation_and_measured_on_test():
    validation, test = make_predictions(3), make_predictions(2)
    measured = calibration.measure_calibration(validation, test)
    assert measured['temperature'] == pytest.approx(3, rel=0.02)
    assert measured['ece'] == pytest.approx(compute_metrics(test)['ece'])
    assert measured['ece_scaled'] > 0.03  # the test split would have wanted 2
    own = calibration.measure_calibration(test, test)
    assert own['ece_scaled'] < 0.02 < own['ece'] and own['nll_scaled'] < own['nll']


def test_probabilities_of_zero_do_not_break_the_temperature():
    def fit(labels):
        return calibration.fit_temperature(Predictions([''] * 4, np.array(labels), np.eye(8)[:4], EXPRESSIONS_8))

    # The best e = exp(log(smallest float32) / T) gives a quarter of the probability to the seven other classes.
    assert np.exp(np.log(np.finfo(np.float32).tiny) / fit([0, 1, 2, 4])) == pytest.approx(1 / 21, rel=0.01)
    for labels in ([0, 1, 2, 3], [1, 2, 3, 0]):  # all right, all wrong
        with pytest.raises(UserError, match=r'no temperature between 0\.05 and 100'):
            fit(labels)
