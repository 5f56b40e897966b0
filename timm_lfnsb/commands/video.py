"""`timm-lfnsb video`."""
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from .predict import predict

# What `predict` takes, too; of video the score is the smoothed one.
_SHARED = ('model', 'min_score', 'calibration', 'unsure', 'workers', 'device', 'runtime')


@click.command(params=[parameter for parameter in predict.params if parameter.name in _SHARED])
@click.argument('source')
@click.option('--fps', type=click.FloatRange(min=0, min_open=True), help='Frames a second to take; all by default.')
@click.option('--json', 'as_json', is_flag=True, help='One JSON object a frame a line in place of CSV.')
@click.option('--annotate', type=click.Path(path_type=Path, dir_okay=False), metavar='OUT.mp4',
              help='Write a video with boxes, names and probabilities over time, without sound.')
@click.option('--summary', type=click.Path(path_type=Path, dir_okay=False), metavar='PICTURE.png',
              help='Draw one timeline a person.')
@click.option('--view', is_flag=True, help='Show the frames in a window; Escape ends.')
@click.option('--smooth', default=0.5, show_default=True, type=click.FloatRange(min=0), metavar='SECONDS',
              help='Time constant of the exponential mean of the probabilities; 0 for none.')
@click.option('--patience', default=1., show_default=True, type=click.FloatRange(min=0), metavar='SECONDS',
              help='How long a person may not be seen and is still the same one.')
@click.option('--folder-rate', default=25., show_default=True, type=click.FloatRange(min=0, min_open=True),
              metavar='FPS', help="Frames a second that a folder's images stand for.")
@click.option('--turn/--no-turn', default=False, show_default=True,
              help='Whether to search frames without an upright face turned, too: takes up to four times as long.')
def video(**options: Any) -> None:
    """Follow the people in a moving picture and name their expressions over time.

    SOURCE is a file, a folder of frames, or the number of a camera, the first one 0. CSV has a row for each person in
    each frame; a person keeps the number of their track, and gets a new one after staying away. Frames are searched one
    by one; probabilities are calibrated, and smoothed along the track. Ctrl-C ends: what was finished is kept. A frame
    that cannot be read is reported, the others go on, and the exit code is 1.
    """
    from ..predict.video import video_lines
    failed = False
    with closing(video_lines(**options)) as lines:
        for line, kind in lines:
            click.echo(line, err=kind != 'result')
            failed |= kind == 'problem'
    if failed:
        raise SystemExit(1)
