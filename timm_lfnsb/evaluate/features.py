"""A network's features of a folder of labelled faces: how far apart its classes lie, and where in a picture."""
from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from sklearn.manifold import TSNE
from sklearn.metrics import pairwise_distances

from ..train.task import FeatureLossModule, average_features
from .predictions import Predictions, predict_folder


def predict_features(
        model: Any, data_dir: str | Path, split: str = 'test', **options: Any) -> tuple[Predictions, np.ndarray]:
    """Classify a folder's images as `predict_folder` does with a timm model, and return each one's features, too.

    Returns:
        The predictions, and float32 (N, D): `forward_features` averaged over space, which is what a feature loss sees.

    Raises:
        UserError: See `predict_folder`.
    """
    layout, forward_features, features = FeatureLossModule(model, {}), model.forward_features, []

    def keep(*args: Any, **kwargs: Any) -> torch.Tensor:
        maps = forward_features(*args, **kwargs)
        features.append(average_features(maps, layout.output_fmt, layout.num_prefix_tokens).float().cpu())
        return maps

    with mock.patch.object(model, 'forward_features', keep):
        predictions = predict_folder(model, data_dir, split, **options)
    return predictions, torch.cat(features).numpy()


def class_distances(features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How compact the classes are in features (N, D) of classes (N,), and how far apart; all classes count alike.

    Returns:
        `cosine_intra`: cosine distance of a feature to its class's mean, in [0, 2]; `cosine_inter`: of the means of two
        classes; `euclidean_intra` and `euclidean_inter`: the same with the Euclidean distance, in units of the mean
        distance of all features to their mean, because losses differ in the size of features they lead to.
    """
    features = features.astype(np.float64)
    classes, indices = np.unique(labels, return_inverse=True)
    means = np.stack([features[indices == i].mean(axis=0) for i in range(len(classes))])
    spread = pairwise_distances(features, features.mean(axis=0, keepdims=True)).mean() or 1.
    distances = {}
    for metric, unit in (('cosine', 1.), ('euclidean', spread)):
        own = pairwise_distances(features, means, metric)[np.arange(len(features)), indices]
        between = pairwise_distances(means, metric=metric)[np.triu_indices(len(classes), 1)]
        distances[f'{metric}_intra'] = float(np.mean([own[indices == i].mean() for i in range(len(classes))]) / unit)
        distances[f'{metric}_inter'] = float(between.mean() / unit)
    return distances


def project(features: np.ndarray) -> np.ndarray:
    """Places (N, 2) of features (N, D) in a picture by t-SNE, the same each time: neighbours stay near, and no more."""
    perplexity = min(30., (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, init='pca', random_state=0).fit_transform(features)
