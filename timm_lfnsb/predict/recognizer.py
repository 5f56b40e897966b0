"""From pictures to expressions: detection, crops and the network behind one call."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from ..errors import UserError
from ..labels import canonical_name, model_label_names
from ..models.loading import load_model, to_device
from .exported import INPUT_KEYS, ExportedModel, is_exported
from .faces import Box, HaarDetector, align_face, aligned_box, clip_box, crop_face
from .images import ImageError, ImageInput, read_image

Detector = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class Face:
    """One face and its expression."""

    box: Box  # x, y, width, height in pixels of the upright image
    label: str  # name of the most probable expression
    score: float  # its probability
    probabilities: dict[str, float]  # of every expression by name, in the order of the model's outputs

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, ready for JSON."""
        return {**asdict(self), 'box': list(self.box)}


def input_config(model: nn.Module) -> dict[str, Any]:
    """timm's input settings of a model, for as many channels as it takes."""
    config = resolve_model_data_config(model)
    chans = getattr(model, 'in_chans', config['input_size'][0])
    config['input_size'] = (chans, *config['input_size'][1:])
    if chans != len(config['mean']):  # as timm's loaders do when the config still has the values of RGB weights
        config.update({key: (sum(config[key]) / len(config[key]),) * chans for key in ('mean', 'std')})
    return config


class ExpressionRecognizer:
    """Finds the faces of images and names their expressions.

        >>> recognize = ExpressionRecognizer()
        >>> for face in recognize('photo.jpg'):
        ...     print(face.box, face.label, face.score)

    Args:
        model: A name for `load_model`; or a timm model with its weights and `label_names` in its `pretrained_cfg`,
            which is moved to the device and put into eval mode; or a file that `timm-lfnsb export` wrote.
        detector: 'haar' for `HaarDetector`; None for images that are faces already, each taken whole; or a function
            from a uint8 RGB array (H, W, 3) to boxes (N, 4), x, y, width, height in pixels, or to five points of each
            face (N, 5, 2), with which the crop is `align_face`.
        margin: Fraction of a detected box to add on each side before it is cut out, above -0.5 and up to 2. FER+ was
            cut with this kind of cascade, so by default none.
        batch_size: Number of faces that go through the network together.
        device: A torch device, or 'auto' for CUDA where there is one, else the CPU. Exported files take the CPU only.

    Raises:
        ValueError: When an argument is out of range, or the model has no label names or other than 1 or 3 channels.
        UserError: When the model cannot be loaded, there is no such device, or OpenCV lacks the cascade.
    """

    def __init__(
            self, model: str | PathLike[str] | nn.Module | ExportedModel = 'lfnsb',
            detector: str | Detector | None = 'haar', margin: float = 0., batch_size: int = 32,
            device: str | torch.device = 'auto',
    ) -> None:
        if not -0.5 < margin <= 2:
            raise ValueError(f'margin must be above -0.5 and at most 2, got {margin}.')
        if margin and detector is None:
            raise ValueError('margin needs a detector: without one the whole image is taken as the face.')
        if batch_size < 1:
            raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
        if isinstance(detector, str) and detector != 'haar':
            raise ValueError(f"detector must be 'haar', None or a function, got {detector!r}.")
        self.detector: Detector | None = HaarDetector() if isinstance(detector, str) else detector
        self.margin, self.batch_size = margin, batch_size
        if isinstance(model, (str, PathLike)):
            model = ExportedModel(model) if is_exported(model) else load_model(str(model), inference=True)
        self.model = model
        if isinstance(model, ExportedModel):
            if str(device) not in ('auto', 'cpu'):
                raise ValueError(f"exported files run on the CPU here, not on '{device}': leave the device out.")
            names = model.value('label_names')
            if not isinstance(names, list) or len({canonical_name(str(name)) for name in names}) != len(names):
                raise UserError(f'{model.path} has no list of different names as label_names in its metadata.')
            self.label_names = tuple(map(str, names))
            config = {key: model.value(key) for key in INPUT_KEYS}
            config['normalize'] = model.value('input') == 'normalized'
        else:
            self.label_names = model_label_names(model)
            to_device(model, device).eval()
            config = input_config(model)
        chans = config['input_size'][0]
        if chans not in (1, 3):
            raise ValueError(f'the model takes {chans} channels: only grey (1) and RGB (3) models see photographs.')
        self._mode = 'RGB' if chans == 3 else 'L'
        self._transform = create_transform(**config, is_training=False)

    @overload
    def __call__(self, images: ImageInput) -> list[Face]: ...

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[list[Face]]: ...

    def __call__(self, images: ImageInput | list[Any] | tuple[Any, ...]) -> list[Face] | list[list[Face]]:
        """Faces of what `read_image` takes, in the detector's order ('haar': largest first), or of each of a list.

        Raises:
            ImageError: When an image cannot be read.
            ValueError: When the detector returns something else than boxes or points within the image.
        """
        if not isinstance(images, (list, tuple)):
            return self([images])[0]
        results: list[list[Face]] = []
        for faces in self.stream(images):
            if isinstance(faces, ImageError):
                raise faces
            results.append(faces)
        return results

    def stream(self, images: Iterable[ImageInput]) -> Iterator[list[Face] | ImageError]:
        """Yield the faces of each image in order, or in its place the `ImageError` of one that cannot be read.

        At most `batch_size` images are under way, as crops.
        """
        pending: list[list[Box] | ImageError] = []
        crops: list[torch.Tensor] = []
        for source in images:
            try:
                located = self._locate(read_image(source))
            except ImageError as error:
                pending.append(error)
            else:
                pending.append([box for box, _ in located])
                crops += [self._transform(Image.fromarray(crop).convert(self._mode)) for _, crop in located]
            if max(len(pending), len(crops)) >= self.batch_size:
                yield from self._recognize(pending, crops)
                pending, crops = [], []
        yield from self._recognize(pending, crops)

    def _locate(self, image: np.ndarray) -> list[tuple[Box, np.ndarray]]:
        """Box and crop of each face."""
        if self.detector is None:
            return [((0, 0, image.shape[1], image.shape[0]), image)]
        found = np.asarray(self.detector(image), dtype=np.float64)
        if found.size == 0:
            return []
        if not np.isfinite(found).all():
            raise ValueError('the detector gave coordinates that are not finite.')
        if found.ndim == 2 and found.shape[1] == 4:
            return [(clip_box(box, image), crop_face(image, box, self.margin)) for box in found]
        if found.shape[1:] == (5, 2):
            return [(clip_box(aligned_box(points), image), align_face(image, points)) for points in found]
        raise ValueError(
            f'the detector must give boxes (N, 4) or five points of each face (N, 5, 2), not {found.shape}.')

    def _recognize(
            self, pending: list[list[Box] | ImageError], crops: list[torch.Tensor],
    ) -> list[list[Face] | ImageError]:
        """Faces in place of boxes; `crops` are those of all boxes in order."""
        starts = range(0, len(crops), self.batch_size)
        scores = (row for i in starts for row in self._scores(torch.stack(crops[i:i + self.batch_size])))

        def face(box: Box) -> Face:
            named = dict(zip(self.label_names, next(scores), strict=True))
            label = max(named, key=named.__getitem__)
            return Face(box, label, named[label], named)

        return [boxes if isinstance(boxes, ImageError) else [face(box) for box in boxes] for boxes in pending]

    @torch.inference_mode()
    def _scores(self, batch: torch.Tensor) -> list[list[float]]:
        """Probabilities (N, classes) of a batch of crops."""
        if isinstance(self.model, ExportedModel):
            if batch.dtype == torch.uint8:  # files that normalise themselves take (B, H, W, C)
                batch = batch.permute(0, 2, 3, 1)
            logits = torch.from_numpy(self.model(batch.numpy()))
        else:
            like = next(self.model.parameters())
            logits = self.model(batch.to(device=like.device, dtype=like.dtype))
        if logits.shape != (len(batch), len(self.label_names)):
            raise UserError(f'the model gives outputs {tuple(logits.shape)} for {len(batch)} face(s) and has '
                            f'{len(self.label_names)} label names: it is no classifier, or the names are wrong.')
        scores = logits.float().softmax(dim=1)
        if not scores.isfinite().all():
            raise UserError('the model gave scores that are not finite: its weights are damaged.')
        return scores.tolist()
