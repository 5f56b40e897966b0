"""What goes wrong in a way that a user can mend."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from textwrap import shorten

EXTRAS = {
    **dict.fromkeys(('sklearn', 'scipy', 'matplotlib'), 'eval'),
    **dict.fromkeys(('onnx', 'onnxruntime', 'onnxscript', 'openvino'), 'export'), 'executorch': 'executorch',
    **dict.fromkeys(('av', 'norfair'), 'video'), **dict.fromkeys(('pyarrow', 'ray'), 'ray'),
    'pytorch_metric_learning': 'losses'}
"""Packages that an extra of ours brings -> its name."""


class UserError(RuntimeError):
    """An error whose message is one sentence for the user: what is wrong, and what to do.

    The command line prints it and ends with exit code 1.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' (did you mean A or B?)' with the known names nearest to a wrong one, to go behind it; '' where none is near."""
    spelled = {other.lower(): other for other in known}
    near = [spelled[key] for key in get_close_matches(name.lower(), spelled, n=2, cutoff=0.7)]
    return f" (did you mean {' or '.join(near)}?)" if near else ''


def reason(error: Exception) -> str:
    """What other people's error says, on one line without a full stop."""
    package = str(error.name).partition('.')[0] if isinstance(error, ModuleNotFoundError) else ''
    if package in EXTRAS:
        return f'it needs {package}: pip install "timm-lfnsb[{EXTRAS[package]}]" brings it'
    if package:
        return f'it needs {package}: pip install {package} mostly brings it'
    return shorten(str(error), 300, placeholder=' ...').rstrip('.') or type(error).__name__


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Turn whatever other people's code raises into a UserError: `what` fails, and why."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # registries, exporters, runtimes and file formats each have their own
        raise UserError(f'{what}: {reason(error)}.') from error
