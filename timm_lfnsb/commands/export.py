"""`timm-lfnsb export`."""
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument('model')
@click.argument('out', type=click.Path(path_type=Path))
@click.option('--format', type=click.Choice(['web']), help='Write no file but a folder OUT with a page for browsers.')
@click.option('--runtime-dir', type=click.Path(path_type=Path, file_okay=False), metavar='FOLDER',
              help='--format web: the npm package onnxruntime-web, so that the page needs nothing from elsewhere.')
@click.option('--batch', default='1', show_default=True, metavar='N|dynamic', help='Images the file takes at a time.')
@click.option('--precision', default='fp32', show_default=True, type=click.Choice(['fp32', 'fp16', 'int8']),
              help='fp16: weights in half precision. int8: quantised; onnx and openvino, with --calibrate.')
@click.option('--with-preprocess', is_flag=True,
              help='Let the file take RGB images, uint8 (batch, height, width, 3), and normalise them itself.')
@click.option('--calibrate', type=click.Path(path_type=Path, file_okay=False), metavar='FOLDER',
              help='Face crops for int8: a folder, or a prepared data set, whose training split is taken.')
def export(model: str, out: Path, format: str | None, runtime_dir: Path | None, batch: str, **options: Any) -> None:
    """Write MODEL as the file OUT for another runtime, and compare the two.

    OUT ends in .onnx (ONNX Runtime), .xml (OpenVINO), .pt2 (torch.export) or .pte (ExecuTorch).

    MODEL is a timm name with weights, local-dir:PATH or hf-hub:ID. It is reparameterised, and its label names and input
    settings go into the file. The file is then run in its own runtime: if it disagrees with the model, there is none.

    With --format web, OUT is a new folder for any static host: a page that finds faces in photographs and in the
    camera's picture and names their expressions, inside the browser. Try it by

    \b
    python -m http.server --directory OUT    and open http://localhost:8000

    Its visitors' browsers take ONNX Runtime Web from a public CDN, unless --runtime-dir names the npm package, as
    `npm pack onnxruntime-web` fetches it (unpack it first).

    \b
    It needs       pip install "timm-lfnsb[export]"
    for .pte files pip install "timm-lfnsb[executorch]"
    """
    if batch != 'dynamic' and not (batch.isdecimal() and int(batch) >= 1):
        raise click.UsageError(f"--batch is a number from 1 on, or 'dynamic', not {batch!r}.")
    if format is None and runtime_dir is not None:
        raise click.UsageError('--runtime-dir is for --format web.')
    if format == 'web' and (batch != '1' or options['with_preprocess']):
        raise click.UsageError('--format web takes no --batch and no --with-preprocess: the page prepares each face.')
    from ..export.export import export_model
    from ..models.loading import load_model
    from ..web.export import export_web
    network = load_model(model)
    if format == 'web':
        del options['with_preprocess']
        click.echo(export_web(network, out, runtime_dir, **options))
    else:
        click.echo(export_model(network, out, batch=None if batch == 'dynamic' else int(batch), **options))
