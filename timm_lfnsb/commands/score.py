"""`timm-lfnsb score`."""
from typing import Any

import click

from .predict import predict

# What `predict` takes, too.
_SHARED = ('model', 'detector', 'min_score', 'turn', 'margin', 'align', 'calibration', 'unsure', 'batch_size')


@click.command(params=[parameter for parameter in predict.params if parameter.name in _SHARED])
@click.argument('source')
@click.argument('out')
@click.option('--address', metavar='ADDRESS',
              help='Of a Ray cluster, auto for that of this machine; by default Ray is started here for this run.')
@click.option('--workers', type=click.IntRange(min=1),
              help='Processes with a model and a core each; by default as many as there is room for.')
@click.option('--gpus', default=0., metavar='SHARE', type=click.FloatRange(min=0),
              help='GPUs a worker: 0.25 puts four on each. By default none.')
@click.option('--image-column', default='image', show_default=True, metavar='NAME',
              help='Column of Parquet with pictures as bytes, or {bytes, path}.')
def score(detector: str, **options: Any) -> None:
    """Name the expressions in very many pictures, on this machine or a Ray cluster, into Parquet.

    SOURCE is a folder, a pattern in quotes ('photos/**/*.jpg'), a text file with a path a line, or Parquet with a
    column of pictures, each of which is then named FILE#ROW: local, or a URI that pyarrow reads (s3://bucket/photos).

    OUT is a folder of Parquet files, local or a URI: one row a face with the picture's path and the fields of `predict
    --json`; one row for a picture without faces (the rest is null) or that cannot be used (`error` says why).

    The same command goes on where it stopped: a picture has all of its rows or none, and is not done twice. OUT belongs
    to the run that was started last; any other ends. On a cluster every machine needs timm-lfnsb, and reaches SOURCE
    and OUT by the same names. For pipelines in Python see timm_lfnsb.predict.ray.RecognizeBatch.
    """
    from ..predict.ray import score as run
    failed = False
    for line, kind in run(detector=None if detector == 'none' else detector, **options):
        click.echo(line, err=kind != 'result')
        failed |= kind == 'problem'
    if failed:
        raise SystemExit(1)
