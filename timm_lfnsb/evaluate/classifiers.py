"""Classifiers of every kind behind one call: timm models, exported files, transformers pipelines, functions.

A function, named MODULE:FUNCTION, is how anything else is measured. Its module is found as `python -m` finds one, in
the working directory first. It gets a list of uint8 RGB arrays (H, W, 3), as large as the images are, and returns
probabilities (N, C); its attribute `label_names` names the C. `evaluate.peers` has examples.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from PIL import Image
from threadpoolctl import threadpool_limits
from torch import nn

from ..errors import UserError, one_sentence
from ..export.exported import ExportedModel, is_exported
from ..labels import LabelError, canonical_name, match_labels
from ..models.loading import to_device
from ..models.temperature import model_temperature
from ..predict.recognizer import ExpressionRecognizer
from ..util.timing import interleave, quartiles

TIMM_PREFIXES = ('hf-hub', 'hf_hub', 'local-dir')


@dataclass(frozen=True)
class Classifier:
    """What predictions need of a model, of whatever kind."""
    name: str
    label_names: Sequence[str]  # in the order of the outputs
    scores: Callable[[Any], Any]  # probabilities (N, C) of transformed images, see `collate`; of models plain softmax
    transform: Callable[[Image.Image], Any] = np.array
    mode: str = 'RGB'  # Pillow's, of the images that `transform` takes
    input_config: dict[str, Any] = field(default_factory=dict)  # timm's input settings, where the model has them
    temperature: float | None = None  # see `model_temperature`

    def probabilities(self, batch: Any) -> np.ndarray:
        """Float32 probabilities (N, C) of a batch of `collate`; UserError where the model fails or gives others."""
        with one_sentence(f'{self.name} does not run'):
            rows = np.asarray(self.scores(batch), np.float32)
        if not (rows.shape == (len(batch), len(self.label_names)) and np.isfinite(rows).all() and rows.min() >= 0
                and np.abs(rows.sum(axis=1) - 1).max() < 0.01):
            raise UserError(
                f'{self.name} gives outputs {rows.shape} that are no probabilities: {len(batch)} image(s) and '
                f'{len(self.label_names)} label names need rows of finite numbers, at least 0, that sum to 1.')
        return rows


def collate(items: list[Any]) -> Any:
    """A batch of transformed images: stacked if they are tensors, else a list."""
    return torch.stack(items) if isinstance(items[0], torch.Tensor) else items


def load_classifier(model: str | nn.Module, device: str = 'auto', threads: int | None = None) -> Classifier:
    """Load a classifier by name.

    Args:
        model: A file of `timm-lfnsb export`, 'transformers:NAME_OR_FOLDER' for what transformers' image-classification
            pipeline loads, 'MODULE:FUNCTION' (see the module), or a name for `load_model`; or a timm model, which is
            moved to the device and set to eval mode.
        device: See `to_device`. Exported files run on the CPU alone, functions where they like.
        threads: Threads of an exported file's runtime.

    Raises:
        UserError: When there is no such model, or its outputs have no different names.
    """
    name = model if isinstance(model, str) else type(model).__name__
    prefix, colon, rest = name.partition(':')
    if isinstance(model, str) and colon and prefix.lower() not in TIMM_PREFIXES and not is_exported(name):
        load = partial(_pipeline, device=device) if prefix == 'transformers' else _function
        with one_sentence(f'cannot load the model {name}'):
            names, scores = load(rest if prefix == 'transformers' else name)
        if len(set(map(canonical_name, names))) != len(names):
            raise LabelError(f"{name} has two outputs of one meaning among its labels [{', '.join(names)}].")
        return Classifier(name, names, scores)
    with one_sentence(f'cannot use the model {name}'):
        network = ExpressionRecognizer(
            ExportedModel(name, threads) if is_exported(name) else model, detector=None, device=device,
            calibration=False)
    return Classifier(
        name, network.label_names, network.scores, network.transform, network.mode, network.input_config,
        model_temperature(network.model))


def _pipeline(source: str, device: str) -> tuple[Sequence[str], Callable[[Any], Any]]:
    try:
        from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
    except ImportError:
        raise UserError(f'transformers:{source} needs transformers: pip install transformers brings it.') from None
    # Not by its name: the pipeline would keep to itself why a model cannot be loaded. Other weights are pickles.
    network: Any = to_device(AutoModelForImageClassification.from_pretrained(
        source, use_safetensors=True, trust_remote_code=False), device)
    classify: Any = pipeline('image-classification', network, device=network.device,
                             image_processor=AutoImageProcessor.from_pretrained(source, trust_remote_code=False))
    names = [label for _, label in sorted(network.config.id2label.items())]

    def scores(images: list[np.ndarray]) -> list[list[float]]:
        answers = classify([Image.fromarray(image) for image in images], top_k=len(names), batch_size=len(images),
                           function_to_apply='softmax')
        named = [{entry['label']: entry['score'] for entry in answer} for answer in answers]
        return [[answer[label] for label in names] for answer in named]

    return names, scores


def _function(name: str) -> tuple[Sequence[str], Callable[[Any], Any]]:
    module, _, attribute = name.partition(':')
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = attrgetter(attribute)(import_module(module))
    except SystemExit as error:
        raise UserError(f'the module {module} ends Python ({error}) when it is imported.') from None
    except ModuleNotFoundError as error:
        if error.name != module.partition('.')[0]:
            raise
        raise UserError(f'there is no module {module} here or installed; a folder of timm is named local-dir:PATH, a '
                        'repository hf-hub:ORG/NAME.') from None
    names = getattr(function, 'label_names', ())
    if not callable(function) or not names:
        raise UserError(f'{name} must be a function from RGB arrays to probabilities, with the names of its outputs in '
                        'its attribute label_names.')
    return tuple(map(str, names)), function


def counted_classes(classifiers: Sequence[Classifier], names: Collection[str], common: bool) -> set[str]:
    """Canonical names of the classes that count: all of the data's or, if `common`, those that all models have too.

    Raises:
        LabelError: When a model lacks one of the data's classes or, if `common`, there are fewer than two.
    """
    classes = set(map(canonical_name, names))
    for classifier in classifiers:
        if common:
            classes &= set(map(canonical_name, classifier.label_names))
            continue
        try:
            match_labels(sorted(names), classifier.label_names)
        except LabelError as error:
            raise LabelError(f'{classifier.name} does not fit: {str(error)[:-1]}, or leave out the classes that one '
                             'side lacks with --common-classes.') from None
    if common and len(classes) < 2:
        raise LabelError(f"the data [{', '.join(sorted(names))}] and the models have fewer than two classes in common: "
                         + '; '.join(f"{one.name} has [{', '.join(one.label_names)}]" for one in classifiers) + '.')
    return classes


def measure_latency(names: Sequence[str], image: Image.Image, seconds: float = 2., rounds: int = 10) -> dict[str, Any]:
    """Time models in turns on one decoded image: preprocessing and network, batch 1, one thread of the CPU.

    That is one thread of torch, of an exported file's runtime, and of what threadpoolctl knows (BLAS, OpenMP); a
    function with other threads must limit them itself.

    Returns:
        For each of the names, in a list, 'ms' and 'ratio' to the first model, taken round by round: median, q1 and q3.
    """
    with threadpool_limits(1):
        calls = [partial(_classify, load_classifier(name, 'cpu', threads=1), image) for name in names]
        times = interleave(calls, seconds, rounds)
    return {'ms': [quartiles(1000 * row) for row in times], 'ratio': [quartiles(row / times[0]) for row in times]}


def _classify(classifier: Classifier, image: Image.Image) -> np.ndarray:
    return classifier.probabilities(collate([classifier.transform(image.convert(classifier.mode))]))
