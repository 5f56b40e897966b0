"""What a report of a bug should say of an installation; asks the machine alone, never the network."""
from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distributions, packages_distributions, version
from importlib.util import find_spec

import torch

from .errors import EXTRAS, reason
from .export.exported import import_openvino
from .util.files import file_sha256
from .util.machine import available_cores, cpu_name, git_commit
from .version import __version__
from .weights.fetch import cached_models
from .weights.names import WEIGHTS_DIR, embedded_weights, weights_info

LIBRARIES = ('timm', 'torch', 'torchvision', 'huggingface_hub', 'numpy', 'pillow', 'safetensors', 'scikit-image')
SHARED = {'cv2': 'opencv-python-headless', 'onnxruntime': 'onnxruntime', 'PIL': 'pillow'}
"""Folders that several packages bring, each over the other's files -> the package to keep."""
RUNTIMES = ('onnxruntime', 'openvino', 'executorch')
VARIABLES = (
    'TIMM_LFNSB_WEIGHTS', 'TIMM_LFNSB_HUB_ORG', 'TIMM_LFNSB_CACHE', 'TIMM_SCRIPTS', 'HF_HUB_OFFLINE', 'HF_ENDPOINT',
    'HF_HOME', 'HF_HUB_CACHE', 'OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES', 'PYTHONPATH')
"""What changes this package's ways, and holds no secret."""


def examine() -> Iterator[tuple[str, str]]:
    """Yield ten lines, each as its title and text; a part that fails says why in its line."""
    parts: tuple[tuple[str, Callable[[], str]], ...] = (
        ('timm_lfnsb', _package), ('system', _system), ('libraries', lambda: _versions(LIBRARIES)),
        ('duplicates', lambda: '; '.join(duplicates()) or 'none'), ('faces', _faces), ('runtimes', _runtimes),
        ('devices', _devices), ('Hub cache', lambda: ', '.join(cached_models()) or 'empty'), ('extras', _extras),
        ('settings', lambda: ', '.join(f'{name}={os.environ[name]}' for name in VARIABLES if name in os.environ)
         or 'none'))
    for title, text in parts:
        try:
            yield title, text()
        except Exception as error:  # whatever is broken here is what the report is for
            yield title, f'does not work: {reason(error)}'


def duplicates() -> Iterator[str]:
    """What is installed twice, and the commands that mend it."""
    owners = packages_distributions()
    for folder, keep in SHARED.items():
        names = sorted(set(owners.get(folder, ())))
        if len(names) > 1:
            yield (f'{_versions(names)} are in one folder, {folder}: pip uninstall -y {" ".join(names)}, then '
                   f'pip install {keep}')
    for name in (*LIBRARIES, *RUNTIMES, 'timm-lfnsb', *SHARED.values()):
        versions = list(dict.fromkeys(found.version for found in distributions(name=name)))
        if len(versions) > 1:
            yield (f'{name} is installed in several places ({", ".join(versions)}), the first counts: '
                   f'pip uninstall -y {name} until none is left, then pip install {name}')


def _versions(names: Iterable[str]) -> str:
    def found(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return 'missing'
    return ', '.join(f'{name} {found(name)}' for name in names)


def _package() -> str:
    commit = git_commit() or ''
    weights = [name + ('' if file_sha256(WEIGHTS_DIR / f'{name}.safetensors') == weights_info(name)['sha256']
                       else ' (damaged: install the package again)') for name in embedded_weights()]
    return f'{__version__}{commit and f" ({commit[:10]}{commit[40:]})"}, weights {", ".join(weights)}'


def _system() -> str:
    return (f'{platform.python_implementation()} {platform.python_version()}, {platform.platform()}, {cpu_name()}, '
            f'{available_cores()} cores')


def _faces() -> str:
    from .predict.faces import YuNetDetector, cv2
    YuNetDetector()
    return f'YuNet in OpenCV {cv2.__version__}'


def _runtimes() -> str:
    def state(name: str) -> str:
        if find_spec(name) is None:
            return f'no {name}'
        try:
            import_openvino() if name == 'openvino' else import_module(name)
        except Exception as error:  # a runtime that is installed wrongly raises anything
            return f'{name} does not work ({reason(error)})'
        return _versions([name])
    return ', '.join(['torch', *map(state, RUNTIMES)])


def _devices() -> str:
    cuda = [f'cuda:{i} {torch.cuda.get_device_name(i)}' for i in range(torch.cuda.device_count())]
    if not cuda and torch.version.cuda:
        cuda = [f'no GPU for CUDA {torch.version.cuda}']
    mps = ['mps'] if torch.backends.mps.is_available() else []
    return ', '.join([f'cpu ({torch.get_num_threads()} threads)', *cuda, *mps])


def _extras() -> str:
    missing: dict[str, list[str]] = {extra: [] for extra in EXTRAS.values()}
    for module, extra in EXTRAS.items():
        if find_spec(module) is None:
            missing[extra].append(module)
    def state(extra: str, modules: list[str]) -> str:
        if not modules:
            return f'{extra} complete'
        return f'{extra} lacks {", ".join(modules)} (pip install "timm-lfnsb[{extra}]")'

    texts = [state(*item) for item in missing.items()]
    return '; '.join([*texts, *([] if find_spec('pillow_heif') else ['no HEIC (pip install pillow-heif)'])])
