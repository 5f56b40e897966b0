"""From pictures to expressions: detection, crops and the network behind one call."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any, overload

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from ..labels import canonical_name, model_label_names
from ..models import networks as networks  # registers the models
from ..models.loading import load_for_inference
from .exported import ExportedModel, RuntimeFileError, is_exported
from .faces import Box, HaarDetector, ImageError, ImageInput, align_face, aligned_box, clip_box, crop_face, read_image

Detector = Callable[[np.ndarray], Any]

MARGIN = 0.
"""Default margin around a detected box: none.

FER2013 (and so FER+) was cut with this kind of cascade: over 1000 FER+ training faces, enlarged and with their border
repeated around them, `HaarDetector` found 724, the median box 0.97 of the frame wide and centered to within 1 % of it.
"""


@dataclass(frozen=True)
class Face:
    """One face and its expression.

    Attributes:
        box: x, y, width, height in pixels of the upright image.
        label: Name of the most probable expression.
        score: Its probability.
        probabilities: Probability of every expression by name, in the order of the model's outputs.
    """

    box: Box
    label: str
    score: float
    probabilities: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, ready for JSON."""
        return {
            'box': list(self.box), 'label': self.label, 'score': self.score, 'probabilities': dict(self.probabilities),
        }


class ExpressionRecognizer:
    """Finds the faces of images and names their expressions.

        >>> recognize = ExpressionRecognizer()
        >>> for face in recognize('photo.jpg'):
        ...     print(face.box, face.label, face.score)

    Args:
        model: What `timm.create_model` takes: a name ('lfnsb', 'lfnsb.ferplus'), 'local-dir:FOLDER' or
            'hf-hub:ORG/NAME'; networks of this zoo are then reparameterised. Or a timm model with its weights, which
            is only moved to the device and put into eval mode. Either's `pretrained_cfg` must carry `label_names`. Or
            a file that `timm-lfnsb export` wrote ('model.onnx'), which runs in its own runtime on the CPU, with labels
            and preprocessing as its metadata say.
        detector: 'haar' for OpenCV's frontal face cascade (see `HaarDetector`); None for images that are faces
            already, each taken whole; or a function from a uint8 RGB array (H, W, 3) to boxes (N, 4), x, y, width,
            height in pixels, or to five points of each face (N, 5, 2), with which the crop is `align_face`.
        margin: Fraction of a detected box to add on each side before it is cut out, above -0.5 and up to 2; see
            `crop_face`. It has no meaning for whole images and five points.
        batch_size: Number of faces that go through the network together.
        device: A torch device, or 'auto' for CUDA where there is one, else the CPU. Exported files take the CPU only.

    Raises:
        ValueError: When the model has no (or not its number of) label names, or takes neither 1 nor 3 channels; when
            an argument is out of range or there is no such device.
        RuntimeError: From timm, when the model is unknown or has no weights; when OpenCV lacks the cascade; as
            `HubError`, see `timm_lfnsb.hub.load_model`, for models from the Hub; as `RuntimeFileError` for an exported
            file that is damaged, lacks metadata or whose runtime is not installed.
    """

    def __init__(
            self,
            model: str | PathLike[str] | nn.Module | ExportedModel = 'lfnsb',
            detector: str | Detector | None = 'haar',
            margin: float = MARGIN,
            batch_size: int = 32,
            device: str | torch.device = 'auto',
    ):
        if not -0.5 < margin <= 2:
            raise ValueError(f'margin must be above -0.5 and at most 2, got {margin}.')
        if margin and detector is None:
            raise ValueError('margin needs a detector: without one the whole image is taken as the face.')
        if batch_size < 1:
            raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
        if isinstance(detector, str) and detector != 'haar':
            raise ValueError(f"detector must be 'haar', None or a function, got {detector!r}.")
        self.detector: Detector | None = HaarDetector() if isinstance(detector, str) else detector
        self.margin = margin
        self.batch_size = batch_size

        if isinstance(model, (str, PathLike)):
            model = ExportedModel(model) if is_exported(model) else load_for_inference(str(model))
        self.model: nn.Module | ExportedModel
        if isinstance(model, ExportedModel):
            if str(device) not in ('auto', 'cpu'):
                raise ValueError(f"exported files run on the CPU here, not on '{device}': leave the device out.")
            self.model = model
            self.label_names = _exported_label_names(model)
            self.in_chans, self._transform = _exported_preprocessing(model)
            return
        self.label_names = model_label_names(model)
        if device == 'auto':
            device = 'cuda' if torch.cuda.is_available() else 'cpu'
        try:
            self.model = model.to(device).eval()
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"cannot use the device '{device}': {str(error).splitlines()[0]}") from error
        self.in_chans, self._transform = _preprocessing(model)

    @overload
    def __call__(self, images: ImageInput) -> list[Face]: ...

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[list[Face]]: ...

    def __call__(self, images: ImageInput | list[Any] | tuple[Any, ...]) -> list[Face] | list[list[Face]]:
        """Name the expressions of one image, or of a list of images.

        Args:
            images: A path, PIL image or array as `read_image` takes them, or a list of these.

        Returns:
            The faces of the image, in the detector's order ('haar': largest first); for a list of images a list of
            those. An image without a face gives an empty list.

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
        """Yield the faces of each image in order, or the `ImageError` of one that cannot be read in its place.

        For more images than fit into memory: at most `batch_size` images are under way, as crops.
        """
        pending: list[list[Box] | ImageError] = []
        crops: list[torch.Tensor] = []
        for source in images:
            try:
                image = read_image(source)
            except ImageError as error:
                pending.append(error)
            else:
                located = self._locate(image)
                pending.append([box for box, _ in located])
                crops += [self._to_input(crop) for _, crop in located]
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

    def _to_input(self, crop: np.ndarray) -> torch.Tensor:
        return self._transform(Image.fromarray(crop).convert('RGB' if self.in_chans == 3 else 'L'))

    @torch.inference_mode()
    def _recognize(
            self,
            pending: list[list[Box] | ImageError],
            crops: list[torch.Tensor],
    ) -> list[list[Face] | ImageError]:
        faces = iter(self._classify(crops))
        return [
            boxes if isinstance(boxes, ImageError) else [self._face(box, next(faces)) for box in boxes]
            for boxes in pending
        ]

    def _classify(self, crops: list[torch.Tensor]) -> list[list[float]]:
        """Probabilities (N, classes) of crops."""
        probabilities: list[list[float]] = []
        for start in range(0, len(crops), self.batch_size):
            scores = self._logits(torch.stack(crops[start:start + self.batch_size])).float().softmax(dim=1)
            if not scores.isfinite().all():
                raise RuntimeError('the model gave scores that are not finite: its weights are damaged.')
            probabilities += scores.tolist()
        return probabilities

    def _logits(self, batch: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.model, ExportedModel):
            like = next(self.model.parameters())
            return self.model(batch.to(device=like.device, dtype=like.dtype))
        logits = torch.from_numpy(self.model(batch.numpy()))
        if logits.shape != (len(batch), len(self.label_names)):
            raise RuntimeFileError(
                f'{self.model.path} gives outputs {tuple(logits.shape)} for {len(batch)} faces and '
                f'{len(self.label_names)} label names: it is no classifier, or its metadata is wrong.')
        return logits

    def _face(self, box: Box, scores: list[float]) -> Face:
        probabilities = dict(zip(self.label_names, scores, strict=True))
        label = max(probabilities, key=probabilities.__getitem__)
        return Face(box, label, probabilities[label], probabilities)


def _preprocessing(model: nn.Module) -> tuple[int, Callable[[Image.Image], torch.Tensor]]:
    """Number of image channels, and timm's own eval transform for the model."""
    config = resolve_model_data_config(model)
    in_chans = getattr(model, 'in_chans', config['input_size'][0])
    if in_chans not in (1, 3):
        raise ValueError(f'the model takes {in_chans} channels: only grey (1) and RGB (3) models see photographs.')
    if in_chans == 1:  # as timm's loaders do when the config still has the values of RGB weights
        for key in ('mean', 'std'):
            config[key] = (sum(config[key]) / len(config[key]),)
    return in_chans, create_transform(**config, is_training=False)


def _exported_preprocessing(model: ExportedModel) -> tuple[int, Callable[[Image.Image], torch.Tensor]]:
    """The same for an exported file, by its metadata; where it normalises itself, uint8 (H, W, C) come out."""
    keys = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
    config = {key: model.value(key) for key in keys}
    in_chans, normalized = config['input_size'][0], model.value('input') == 'normalized'
    if in_chans not in (1, 3):
        raise ValueError(f'{model.path} takes {in_chans} channels: only grey (1) and RGB (3) models see photographs.')
    transform = create_transform(**config, is_training=False, normalize=normalized)
    return in_chans, transform if normalized else lambda image: transform(image).permute(1, 2, 0).contiguous()


def _exported_label_names(model: ExportedModel) -> tuple[str, ...]:
    names = model.value('label_names')
    if not isinstance(names, list) or len({canonical_name(str(name)) for name in names}) != len(names):
        raise RuntimeFileError(f'{model.path} has no list of different names as label_names in its metadata.')
    return tuple(str(name) for name in names)
