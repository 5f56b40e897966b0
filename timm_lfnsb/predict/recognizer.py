"""From pictures to expressions: detection, crops and the network behind one call."""
from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from os import PathLike
from typing import Any, overload

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import nn

from ..data.images import ImageError, ImageInput, read_image
from ..errors import UserError, reason
from ..export.cached import in_faster_runtime, in_onnxruntime
from ..export.exported import INPUT_KEYS, ExportedModel, is_exported
from ..labels import UNSURE, canonical_name, model_label_names
from ..models.input_config import input_config
from ..models.loading import load_model, to_device
from ..models.temperature import model_temperature
from .faces import (
    FERPLUS_TEMPLATE,
    Box,
    Detection,
    YuNetDetector,
    align_face,
    aligned_box,
    clip_box,
    crop_face,
    crop_size,
    crop_upright,
    opencv_on_one_thread,
)
from .frames import VideoInput, open_footage
from .tracking import Tracks, VideoFrame, follow

Detector = Callable[[np.ndarray], Any]
_Prepared = list[tuple[dict[str, Any], torch.Tensor]] | ImageError


@dataclass(frozen=True)
class Face:
    """One face and its expression."""

    box: Box  # x, y, width, height in pixels of the upright image
    label: str  # name of the most probable expression, or `UNSURE`
    score: float  # probability of the most probable expression
    probabilities: dict[str, float]  # of every expression by name, in the order of the model's outputs
    detection_score: float | None = None  # how sure the detector is, where it says so
    points: tuple[tuple[float, float], ...] | None = None  # eyes, nose tip, mouth corners (x, y), where it gives them
    turn: int = 0  # by how many degrees the image had to be turned counterclockwise to show the face upright

    def as_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, ready for JSON."""
        points = self.points and [list(point) for point in self.points]
        return {**asdict(self), 'box': list(self.box), 'points': points}


class ExpressionRecognizer:
    """Finds the faces of images and names their expressions.

        >>> recognize = ExpressionRecognizer()
        >>> for face in recognize('photo.jpg'):
        ...     print(face.box, face.label, face.score)

    May be shared by threads, copied, pickled, and used in spawned processes and workers of a `DataLoader` that spawns.
    A process forked after the first use hangs, as with any torch model: threads of OpenMP do not survive a fork.

    Args:
        model: A name for `load_model`; or a timm model with its weights and `label_names` in its `pretrained_cfg`,
            which is moved to the device and put into eval mode; or a file that `timm-lfnsb export` wrote.
        detector: 'yunet' for `YuNetDetector`; None for images that are faces already, each taken whole; or a function
            from a uint8 RGB array (H, W, 3) to boxes (N, 4), x, y, width, height in pixels, to five points of each
            face (N, 5, 2), with which the crop is `align_face`, to a list of `Detection`, or to None for no face.
        margin: Fraction of a detected box to add on each side before it is cut out, above -0.5 and up to 2. The boxes
            are as large as FER+'s frames, so by default none. Tilted faces are turned upright by their points.
        align: Cut faces out by their five points, which come to lie as in FER+, in place of their boxes.
        min_score, turn: For 'yunet', see `YuNetDetector`.
        batch_size: Number of faces that go through the network together.
        workers: Threads that read images and search them beside the network, 0 for none; by default one a core, at
            most four.
        calibration: Divide the logits by the temperature that comes with the weights, where there is one
            (`model_temperature`): scores come closer to how often they are right. Else scores are plain softmax.
        unsure: Call faces whose score is below this 'unsure', 0 for none.
        device: A torch device, or 'auto' for CUDA, else Apple's MPS, else the CPU. Exported files and ONNX Runtime take
            the CPU only.
        runtime: 'torch'; 'onnxruntime', for which the model is exported once into `cache_folder()`; or 'auto', the
            faster of the two on the CPU for `batch_size`, timed once a machine (`in_faster_runtime`), and PyTorch where
            anything fails. PyTorch is the default: nobody waits at the first use, no file is written, and every machine
            gives the same figures, which otherwise differ by rounding. Exported files run in their own runtime. A
            pickle has the path of the cached file, not its content.

    Raises:
        ValueError: When an argument is out of range, or the model has no label names or other than 1 or 3 channels.
        UserError: When the model cannot be loaded, there is no such device, or OpenCV cannot run the detector.
    """

    def __init__(
            self, model: str | PathLike[str] | nn.Module | ExportedModel = 'lfnsb',
            detector: str | Detector | None = 'yunet', margin: float = 0., batch_size: int = 8,
            device: str | torch.device = 'auto', align: bool = False, min_score: float = 0.7, turn: bool = True,
            workers: int | None = None, calibration: bool = True, unsure: float = 0., runtime: str = 'torch',
    ) -> None:
        if not -0.5 < margin <= 2:
            raise ValueError(f'margin must be above -0.5 and at most 2, got {margin}.')
        if (margin or align) and detector is None:
            raise ValueError('margin and align need a detector: without one the whole image is taken as the face.')
        if margin and align:
            raise ValueError('margin widens boxes, and align cuts by five points: give one of them.')
        if batch_size < 1:
            raise ValueError(f'batch_size must be at least 1, got {batch_size}.')
        if not 0 <= unsure <= 1:
            raise ValueError(f'unsure is a probability, from 0 to 1, not {unsure}.')
        if detector == 'haar':
            raise ValueError("the detector 'haar' is gone, 'yunet' finds more: leave the argument out.")
        if isinstance(detector, str) and detector != 'yunet':
            raise ValueError(f"detector must be 'yunet', None or a function, got {detector!r}.")
        if runtime not in ('torch', 'onnxruntime', 'auto'):
            raise ValueError(f"runtime must be 'torch', 'onnxruntime' or 'auto', got {runtime!r}.")
        self.detector: Detector | None = YuNetDetector(min_score, turn) if isinstance(detector, str) else detector
        self.margin, self.align, self.batch_size = margin, align, batch_size
        self.workers = min(4, os.cpu_count() or 1) if workers is None else workers
        if isinstance(model, (str, PathLike)):
            model = ExportedModel(model) if is_exported(model) else load_model(str(model), inference=True)
        self.model, self.unsure = model, unsure
        self.temperature = model_temperature(model) if calibration else None
        if runtime == 'onnxruntime' or isinstance(model, ExportedModel):
            if str(device) not in ('auto', 'cpu'):
                raise ValueError(
                    f"exported files and ONNX Runtime run on the CPU here, not on '{device}': leave the device out.")
            device = 'cpu'
        if isinstance(model, ExportedModel):
            if runtime == 'onnxruntime' and model.path.suffix != '.onnx':
                raise ValueError(f'{model.path} is no file for ONNX Runtime: leave the runtime out.')
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
            if runtime == 'onnxruntime':
                self.model = in_onnxruntime(model)
            elif runtime == 'auto' and next(model.parameters(), torch.empty(0)).device.type == 'cpu':
                self.model = in_faster_runtime(model, batch_size)
        self.input_config = config
        chans = config['input_size'][0]
        if chans not in (1, 3):
            raise ValueError(f'the model takes {chans} channels: only grey (1) and RGB (3) models see photographs.')
        self.mode = 'RGB' if chans == 3 else 'L'
        self.transform = create_transform(**config, is_training=False)

    @overload
    def __call__(self, images: ImageInput) -> list[Face]: ...

    @overload
    def __call__(self, images: list[Any] | tuple[Any, ...]) -> list[list[Face]]: ...

    def __call__(self, images: ImageInput | list[Any] | tuple[Any, ...]) -> list[Face] | list[list[Face]]:
        """Faces of what `read_image` takes, in the detector's order ('yunet': largest first), or of each of a list.

        Raises:
            ImageError: When an image cannot be read, or the detector fails or returns something else than boxes or
                points within the image.
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
        """Yield the faces of each image in order, or in its place the `ImageError` of one that cannot be used.

        `batch_size` images or faces at a time, as crops. Workers are a batch and two images each ahead: `workers=0`
        and `batch_size=1` where each result is wanted before the next image is there. While workers search,
        OpenCV uses one thread for each of them, in the whole process.
        """
        pending: list[list[dict[str, Any]] | ImageError] = []
        crops: list[torch.Tensor] = []
        for prepared in self._prepared(images):
            if isinstance(prepared, ImageError):
                pending.append(prepared)
            else:
                pending.append([found for found, _ in prepared])
                crops += [crop for _, crop in prepared]
            if max(len(pending), len(crops)) >= self.batch_size:
                yield from self._recognize(pending, crops)
                pending, crops = [], []
        yield from self._recognize(pending, crops)

    def video(
            self, source: VideoInput, fps: float | None = None, smooth: float = 0.5, patience: float = 1.,
            folder_rate: float = 25.,
    ) -> Iterator[VideoFrame]:
        """Yield the frames of a moving picture with the people in them, a frame at a time, in bounded memory.

        Every frame is searched. Where no upright face is sure, `turn` searches it three times more: real time needs
        `turn=False`.

        Args:
            source, fps, folder_rate: See `open_footage`.
            smooth, patience: See `Tracks`.

        Raises:
            ValueError: When an argument is out of range.
            UserError: When the source cannot be opened, or the extra `video` is not installed.
        """
        footage = open_footage(source, fps, folder_rate)
        recognizer = self
        if footage.live:  # each frame is wanted before the next one is there
            recognizer = copy.copy(self)
            recognizer.batch_size, recognizer.workers = 1, 0
        return follow(footage.frames, recognizer.stream, Tracks(footage.rate, smooth, patience), self.unsure)

    def _prepared(self, images: Iterable[ImageInput]) -> Iterator[_Prepared]:
        """What `_find` gives for each image in order, some ahead in a pool."""
        # A pool's threads make networks of their own: not worth it for a single image.
        if self.workers < 1 or (isinstance(images, (list, tuple)) and len(images) < 2):
            yield from (self._find(*self._read(number, source)) for number, source in enumerate(images, 1))
            return
        # Other people's detectors may keep state: they see the images in order, in this thread.
        ours = self.detector is None or isinstance(self.detector, YuNetDetector)

        def work(number: int, source: ImageInput, read: tuple[str, np.ndarray | ImageError] | None) -> Any:
            read = read or self._read(number, source)
            return self._find(*read) if ours else read

        numbered, queue = enumerate(images, 1), deque[Future[Any]]()
        ahead = self.batch_size + 2 * self.workers  # enough to do while the network has a batch
        with opencv_on_one_thread() if ours else nullcontext(), ThreadPoolExecutor(self.workers) as pool:
            try:
                while True:
                    for number, source in islice(numbered, ahead - len(queue)):
                        # All but files is read here, and copied: it may be shared, or written over for the next image.
                        here = not isinstance(source, (str, PathLike, bytes))
                        queue.append(pool.submit(work, number, source, self._read(number, source) if here else None))
                    if not queue:
                        break
                    done = queue.popleft().result()
                    yield done if ours else self._find(*done)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, number: int, source: ImageInput) -> tuple[str, np.ndarray | ImageError]:
        """What errors call an image, and the image, of which nobody else has the memory."""
        name = os.fspath(source) if isinstance(source, (str, PathLike)) else f'image {number}'
        try:
            return name, np.array(read_image(source, name))
        except ImageError as error:
            return name, error

    def _find(self, name: str, image: np.ndarray | ImageError) -> _Prepared:
        """Where each face is, in the words of `Face`, and its crop as the network's input; or what is wrong."""
        if isinstance(image, ImageError):
            return image
        try:
            found, aligned = self._detect(image)
            return [self._cut(image, detection, aligned) for detection in found]
        except Exception as error:  # a detector is anybody's
            failure = ImageError(f'{name}: {reason(error)}')
            failure.__cause__ = error
            return failure

    def _detect(self, image: np.ndarray) -> tuple[list[Detection], bool]:
        """The faces, and whether they are to be cut out by their points because the detector gave nothing else."""
        if self.detector is None:
            return [Detection((0, 0, image.shape[1], image.shape[0]))], False
        found = self.detector(image)
        if found is None or len(found) == 0 or isinstance(found[0], Detection):
            return list(() if found is None else found), False
        found = np.asarray(found, dtype=np.float64)
        if found.ndim == 2 and found.shape[1] == 4:
            return [Detection(tuple(box)) for box in found.tolist()], False
        if found.shape[1:] == (5, 2):
            return [Detection(aligned_box(points), None, points) for points in found], True
        raise ValueError(
            f'the detector must give boxes (N, 4) or five points of each face (N, 5, 2), not {found.shape}.')

    def _cut(self, image: np.ndarray, detection: Detection, aligned: bool) -> tuple[dict[str, Any], torch.Tensor]:
        box, score, points, turn = detection
        if not np.isfinite(box).all():
            raise ValueError('the detector gave coordinates that are not finite.')
        place = {'box': clip_box(box, image), 'detection_score': score, 'turn': turn,
                 'points': points if points is None else tuple((float(x), float(y)) for x, y in points)}
        if self.detector is None:
            crop = image
        elif self.align:
            if points is None:
                raise ValueError('align needs five points of each face, and the detector gave boxes.')
            size = crop_size(aligned_box(points, FERPLUS_TEMPLATE)[2])
            crop = align_face(image, points, size, FERPLUS_TEMPLATE)
        elif aligned:
            crop = align_face(image, points)
        elif points is not None:
            crop = crop_upright(image, box, points, self.margin)
        else:
            crop = np.rot90(crop_face(image, box, self.margin), turn // 90)
        return place, self.transform(Image.fromarray(crop).convert(self.mode))

    def _recognize(
            self, pending: list[list[dict[str, Any]] | ImageError], crops: list[torch.Tensor],
    ) -> list[list[Face] | ImageError]:
        """Faces in place of places; `crops` are those of all in order."""
        starts = range(0, len(crops), self.batch_size)
        scores = (row for i in starts for row in self.scores(torch.stack(crops[i:i + self.batch_size])))

        def face(place: dict[str, Any]) -> Face:
            named = dict(zip(self.label_names, next(scores), strict=True))
            label = max(named, key=named.__getitem__)
            score = named[label]
            return Face(label=label if score >= self.unsure else UNSURE, score=score, probabilities=named, **place)

        return [found if isinstance(found, ImageError) else [face(place) for place in found] for found in pending]

    @torch.inference_mode()
    def scores(self, batch: torch.Tensor) -> list[list[float]]:
        """Probabilities (N, classes) of a batch of crops, PIL images of `mode` put through `transform` and stacked."""
        if isinstance(self.model, ExportedModel):
            if batch.dtype == torch.uint8:  # files that normalise themselves take (B, H, W, C)
                batch = batch.permute(0, 2, 3, 1)
            logits = torch.from_numpy(self.model(batch.numpy()))
        else:
            like = next(self.model.parameters(), torch.empty(0))
            logits = self.model(batch.to(device=like.device, dtype=like.dtype))
        if logits.shape != (len(batch), len(self.label_names)):
            raise UserError(f'the model gives outputs {tuple(logits.shape)} for {len(batch)} face(s) and has '
                            f'{len(self.label_names)} label names: it is no classifier, or the names are wrong.')
        scores = (logits.float() / (self.temperature or 1.)).softmax(dim=1)
        if not scores.isfinite().all():
            raise UserError('the model gave scores that are not finite: its weights are damaged.')
        return scores.tolist()
