"""What goes wrong in a way that a user can mend."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

EXTRAS = {
    **dict.fromkeys(('sklearn', 'scipy', 'matplotlib'), 'eval'),
    **dict.fromkeys(('onnx', 'onnxruntime', 'onnxscript', 'openvino'), 'export'), 'executorch': 'executorch',
    **dict.fromkeys(('av', 'norfair'), 'video')}
"""Packages that an extra of ours brings -> its name."""


class UserError(RuntimeError):
    """An error whose message is one sentence for the user: what is wrong, and what to do.

    The command line prints it and ends with exit code 1.
    """


def reason(error: Exception) -> str:
    """What other people's error says, on one line without a full stop."""
    package = str(error.name).partition('.')[0] if isinstance(error, ModuleNotFoundError) else ''
    if package in EXTRAS:
        return f'it needs {package}: pip install "timm-lfnsb[{EXTRAS[package]}]" brings it'
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
