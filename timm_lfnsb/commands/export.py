"""`timm-lfnsb export`."""
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument('model')
@click.argument('out', type=click.Path(path_type=Path))
@click.option('--batch', default='1', show_default=True, metavar='N|dynamic', help='Images the file takes at a time.')
@click.option('--precision', default='fp32', show_default=True, type=click.Choice(['fp32', 'fp16', 'int8']),
              help='fp16: weights in half precision. int8: quantised; onnx and openvino, with --calibrate.')
@click.option('--with-preprocess', is_flag=True,
              help='Let the file take RGB images, uint8 (batch, height, width, 3), and normalise them itself.')
@click.option('--calibrate', type=click.Path(path_type=Path, file_okay=False), metavar='FOLDER',
              help='Face crops for int8: a folder, or a prepared data set, whose training split is taken.')
def export(model: str, out: Path, batch: str, **options: Any) -> None:
    """Write MODEL as the file OUT for another runtime, and compare the two.

    OUT ends in .onnx (ONNX Runtime), .xml (OpenVINO), .pt2 (torch.export) or .pte (ExecuTorch).

    MODEL is a timm name with weights, local-dir:PATH or hf-hub:ID. It is reparameterised, and its label names and input
    settings go into the file. The file is then run in its own runtime: if it disagrees with the model, there is none.

    \b
    It needs       pip install "timm-lfnsb[export]"
    for .pte files pip install "timm-lfnsb[executorch]"
    """
    if batch != 'dynamic' and not (batch.isdecimal() and int(batch) >= 1):
        raise click.UsageError(f"--batch is a number from 1 on, or 'dynamic', not {batch!r}.")
    from ..export.export import export_model
    from ..models.loading import load_model
    click.echo(export_model(
        load_model(model), out, batch=None if batch == 'dynamic' else int(batch), **options))
