"""Face recognition networks of others as networks of timm: a start for a teacher that has seen millions of faces."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from ..data.images import read_image
from ..data.subsets import list_images
from ..errors import UserError
from ..util.files import file_sha256
from . import dlib_face, hse_face
from .pack import check_new, write_folder

SOURCES: dict[str, Any] = dict(dlib_face=dlib_face, hse_face=hse_face)
"""Name for `convert --model` -> the module that reads the file."""
FACES = 512  # whose statistics the batch norms take


def convert_face_network(name: str, source: Path, out_dir: Path, data_dir: Path) -> tuple[str, int]:
    """Write a timm folder, for train.py's `--model local-dir:OUT_DIR --pretrained`, that ends at features.

    The files have fixed scales and shifts where the networks had batch norms. They become batch norms again, whose
    statistics are those of faces: the function stays, and in training their normalisation has something to normalise.

    Args:
        name: One of `SOURCES`.
        source: The file, which is told by its SHA-256.
        out_dir: Folder to write; must not hold anything yet.
        data_dir: Faces: a folder of images, or a prepared data set, of which the training split is taken.

    Returns:
        The name of timm's network, and the number of faces taken: `FACES` at most, spread over the folder.

    Raises:
        UserError: When the file is another one, or there are no faces that can be read; nothing is written.
    """
    check_new(out_dir)
    reader = SOURCES[name]
    if not source.is_file() or file_sha256(source) != reader.SHA256:
        raise UserError(f'{source} is not {reader.FILE} with the SHA-256 {reader.SHA256[:12]}...: {reader.FETCH}.')
    paths = list_images(data_dir, 'train' if (data_dir / 'train').is_dir() else None)
    paths = paths[::-(-len(paths) // FACES)]
    network = reader.read_network(source.read_bytes())
    transform: Any = create_transform(**resolve_model_data_config(network), is_training=False)
    faces = torch.stack([transform(Image.fromarray(read_image(data_dir / path))) for path in paths])
    take_statistics(network.eval(), faces)
    write_folder(
        network, out_dir, (), reader.MODEL_ARGS, converted_from=dict(file=source.name, sha256=reader.SHA256))
    return network.pretrained_cfg['architecture'], len(paths)


@torch.no_grad()
def take_statistics(network: nn.Module, images: torch.Tensor) -> None:
    """Give each batch norm the mean and variance of what it gets for these images, with its function as it was."""
    def before(norm: Any, inputs: tuple[torch.Tensor]) -> None:
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias += scale * (mean - norm.running_mean)
        norm.weight.copy_(scale * (variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)

    handles = [
        module.register_forward_pre_hook(before) for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    network(images)
    for handle in handles:
        handle.remove()
