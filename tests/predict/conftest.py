"""A portrait, and the recognizer that most tests use."""
from __future__ import annotations

import numpy as np
import pytest
import skimage.data

from timm_lfnsb import ExpressionRecognizer


@pytest.fixture(scope='session')
def portrait() -> np.ndarray:
    """RGB (200, 240, 3) with one face, near (76, 46, 97, 97): small, so that the search is quick."""
    return np.ascontiguousarray(skimage.data.astronaut()[20:220, 100:340])


@pytest.fixture(scope='session')
def recognize() -> ExpressionRecognizer:
    return ExpressionRecognizer()


@pytest.fixture
def gradient() -> np.ndarray:
    """RGB (6, 8, 3) with another value everywhere, none of it symmetric."""
    return np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
