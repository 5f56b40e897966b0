"""The recognizer that most tests use."""
from __future__ import annotations

import pytest

from timm_lfnsb import ExpressionRecognizer


@pytest.fixture(scope='session')
def recognize() -> ExpressionRecognizer:
    return ExpressionRecognizer()
