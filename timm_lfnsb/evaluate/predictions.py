"""What a model says about a folder of labelled faces. Folder names meet the model's `label_names` by name only."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, create_transform, resolve_model_data_config
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..errors import UserError
from ..labels import match_labels, model_label_names
from ..models.loading import load_model, to_device


@dataclass(frozen=True)
class Predictions:
    """What a model says about the N images of one folder, with C classes named in the order of its outputs."""
    files: Sequence[str]
    """Paths below the split's folder, with forward slashes, in timm's order."""
    labels: np.ndarray
    """True class indices (N,), int64, into `label_names`."""
    probabilities: np.ndarray
    """Softmax outputs (N, C), float32."""
    label_names: Sequence[str]

    @property
    def predicted(self) -> np.ndarray:
        """Predicted class indices (N,), int64."""
        return self.probabilities.argmax(axis=1)

    @property
    def correct(self) -> np.ndarray:
        """Whether the predicted class is the true one (N,), bool."""
        return self.predicted == self.labels


class _Images(ImageDataset):
    """timm's folder data set, which reports an unreadable image instead of taking its neighbour for it."""

    def __getitem__(self, index: int) -> torch.Tensor | str:
        path = self.filename(index, absolute=True)
        try:
            with Image.open(path) as file:
                image = file.convert(self.input_img_mode)
        except Exception as error:  # decoders raise nearly anything on broken data
            # Returned, because a data loader wraps what its workers raise in a traceback.
            return f'cannot read the image {path} ({type(error).__name__}): repair or remove it.'
        return self.transform(image)


def _collate(items: list[Any]) -> torch.Tensor | str:
    return next((item for item in items if isinstance(item, str)), None) or torch.stack(items)


def predict_folder(
        model: str | nn.Module, data_dir: str | Path, split: str = 'test', tta: str | None = None, batch_size: int = 64,
        device: str = 'auto', workers: int = 2, progress: bool = True,
        perturb: Callable[[Image.Image], Image.Image] | None = None,
        match: Callable[[list[str], Sequence[str]], dict[str, int]] = match_labels,
) -> Predictions:
    """Classify the images DATA_DIR/SPLIT/LABEL/FILE.

    Args:
        model: A timm model, which is moved to the device and set to eval mode, or a name for `load_model`.
        tta: 'hflip' for the mean of the softmax outputs of an image and its mirror image.
        device: See `to_device`.
        workers: Processes that read images, 0 for none.
        perturb: What to do to each image before the preprocessing, see `robustness`.
        match: From folder names and `label_names` to the index that stands for each folder in `labels`.

    Raises:
        UserError: When the model, folder, an image or the device cannot be used, or label names do not match.
    """
    if tta not in (None, 'hflip'):
        raise UserError(f"there is no test-time augmentation '{tta}': take 'hflip' or none.")
    if isinstance(model, str):
        model = load_model(model, inference=True)
    to_device(model, device).eval()
    label_names = model_label_names(model)
    root = Path(data_dir) / split
    config = resolve_model_data_config(model)
    transform = create_transform(**config)
    if perturb:
        transform.transforms.insert(0, perturb)
    # Every format that Pillow can open: timm's own short list would leave out the others without a word.
    extensions = sorted(ext for ext, name in Image.registered_extensions().items() if name in Image.OPEN)
    try:
        images = _Images(root, input_key=';'.join(extensions), transform=transform,
                         input_img_mode='L' if config['input_size'][0] == 1 else 'RGB')
    except (AssertionError, RuntimeError):  # no folder, no images
        there = ', '.join(sorted(path.name for path in Path(data_dir).glob('*') if path.is_dir())) or 'none'
        raise UserError(f'there are no images in {root / "LABEL"}; folders in {data_dir}: {there}.') from None
    files = [Path(file) for file in images.filenames()]
    indices = match(sorted({file.parent.name for file in files}), label_names)
    place = next(model.parameters(), torch.empty(0)).device
    outputs = []
    with torch.inference_mode(), tqdm(total=len(images), desc=split, unit='image', disable=not progress) as bar:
        for batch in DataLoader(images, batch_size, num_workers=workers, collate_fn=_collate):
            if isinstance(batch, str):
                raise UserError(batch)
            views = (batch, batch.flip(-1)) if tta else (batch,)
            outputs.append(torch.stack([model(view.to(place)).float().softmax(dim=1) for view in views]).mean(0).cpu())
            bar.update(len(batch))
    probabilities = torch.cat(outputs).numpy()
    if not np.isfinite(probabilities).all():
        raise UserError('the model gives outputs that are not finite: its weights are broken.')
    labels = np.array([indices[file.parent.name] for file in files])
    return Predictions([file.as_posix() for file in files], labels, probabilities, label_names)
