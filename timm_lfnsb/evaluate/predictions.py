"""What a model says about a folder of labelled faces. Folder names meet the model's `label_names` by name only."""
from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.readers import create_reader
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..errors import UserError
from ..labels import canonical_name, match_labels
from .classifiers import Classifier, collate, load_classifier


@dataclass(frozen=True)
class Predictions:
    """What a model says about the N images of one folder, with C classes named in the order of its outputs."""
    files: Sequence[str]
    """Paths below the split's folder, with forward slashes, in timm's order."""
    labels: np.ndarray
    """True class indices (N,), int64, into `label_names`."""
    probabilities: np.ndarray
    """Probabilities (N, C)."""
    label_names: Sequence[str]

    @property
    def predicted(self) -> np.ndarray:
        """Predicted class indices (N,), int64."""
        return self.probabilities.argmax(axis=1)

    @property
    def correct(self) -> np.ndarray:
        """Whether the predicted class is the true one (N,), bool."""
        return self.predicted == self.labels


class _Images(Dataset):
    """Images as a classifier takes them; for one that cannot be read, a sentence that says so."""

    def __init__(self, paths: Sequence[Path], mode: str, transforms: Sequence[Callable[[Any], Any]]):
        self.paths, self.mode, self.transforms = paths, mode, transforms

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        try:
            with Image.open(self.paths[index]) as file:
                image = file.convert(self.mode)
        except Exception as error:  # decoders raise nearly anything on broken data
            # Returned, because a data loader wraps what its workers raise in a traceback.
            return f'cannot read the image {self.paths[index]} ({type(error).__name__}): repair or remove it.'
        for transform in self.transforms:
            image = transform(image)
        return image


def _collate(items: list[Any]) -> Any:
    return next((item for item in items if isinstance(item, str)), None) or collate(items)


def _mirror(batch: Any) -> Any:
    return batch.flip(-1) if isinstance(batch, torch.Tensor) else [image[:, ::-1].copy() for image in batch]


def labelled_images(data_dir: str | Path, split: str) -> list[str]:
    """Paths LABEL/FILE of the images in DATA_DIR/SPLIT, with forward slashes, in timm's order.

    Raises:
        UserError: When there are none.
    """
    root = Path(data_dir) / split
    # Every format that Pillow can open: timm's own short list would leave out the others without a word.
    extensions = sorted(ext for ext, name in Image.registered_extensions().items() if name in Image.OPEN)
    try:
        reader = create_reader('', str(root), input_key=';'.join(extensions))
    except (AssertionError, RuntimeError):  # no folder, no images
        there = ', '.join(sorted(path.name for path in Path(data_dir).glob('*') if path.is_dir())) or 'none'
        raise UserError(f'there are no images in {root / "LABEL"}; folders in {data_dir}: {there}.') from None
    return [Path(file).as_posix() for file in reader.filenames()]


def folder_name(file: str) -> str:
    """The label of one of `labelled_images`, as its folder spells it."""
    return Path(file).parent.name


def predict_folder(
        model: str | nn.Module | Classifier, data_dir: str | Path, split: str = 'test', tta: str | None = None,
        batch_size: int = 64, device: str = 'auto', workers: int = 2, progress: bool = True,
        perturb: Callable[[Image.Image], Image.Image] | None = None, classes: Collection[str] | None = None,
) -> Predictions:
    """Classify the images DATA_DIR/SPLIT/LABEL/FILE.

    Args:
        model: A classifier, or what `load_classifier` takes, on that device.
        tta: 'hflip' for the mean of the probabilities of an image and its mirror image.
        device: See `to_device`.
        workers: Processes that read images, 0 for none.
        perturb: What to do to each image before the preprocessing, see `robustness`.
        classes: Canonical names of the only classes that count, see `counted_classes`: images of others are left out,
            and so are other outputs, after which the probabilities sum to 1 again.

    Raises:
        UserError: When the model, folder, an image or the device cannot be used, or label names do not match.
    """
    if tta not in (None, 'hflip'):
        raise UserError(f"there is no test-time augmentation '{tta}': take 'hflip' or none.")
    classifier = model if isinstance(model, Classifier) else load_classifier(model, device)
    kept = [i for i, name in enumerate(classifier.label_names) if classes is None or canonical_name(name) in classes]
    names = [classifier.label_names[i] for i in kept]
    files = [file for file in labelled_images(data_dir, split)
             if classes is None or canonical_name(folder_name(file)) in classes]
    indices = match_labels(sorted(set(map(folder_name, files))), names)
    images = _Images([Path(data_dir, split, file) for file in files], classifier.mode,
                     [*([perturb] if perturb else []), classifier.transform])
    outputs = []
    with tqdm(total=len(images), desc=split, unit='image', disable=not progress) as bar:
        for batch in DataLoader(images, batch_size, num_workers=workers, collate_fn=_collate):
            if isinstance(batch, str):
                raise UserError(batch)
            views = (batch, _mirror(batch)) if tta else (batch,)
            outputs.append(np.mean([classifier.probabilities(view) for view in views], axis=0))
            bar.update(len(batch))
    probabilities = np.concatenate(outputs)
    if classes is not None:
        probabilities = probabilities[:, kept] + np.finfo(np.float32).tiny  # all may be in what is left out
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    return Predictions(files, np.array([indices[folder_name(file)] for file in files]), probabilities, names)
