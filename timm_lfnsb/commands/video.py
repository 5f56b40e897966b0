"""`timm-lfnsb video`."""
from contextlib import closing
from pathlib import Path
from typing import Any

import click


@click.command()
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
@click.option('--calibration/--no-calibration', default=True, show_default=True,
              help="Divide the logits by the weights' temperature, if they have one; or take plain softmax.")
@click.option('--unsure', type=click.FloatRange(0, 1), default=0., metavar='P',
              help="Say 'unsure' of people whose smoothed score is below P.")
@click.option('--model', default='lfnsb', show_default=True, metavar='NAME',
              help='A timm name with weights, local-dir:PATH, hf-hub:ID or a file that `timm-lfnsb export` wrote.')
@click.option('--min-score', default=0.7, show_default=True, type=click.FloatRange(0, 1, True, True),
              help='Score of the faintest face that the detector may report.')
@click.option('--turn/--no-turn', default=False, show_default=True,
              help='Whether to search frames without an upright face turned, too: takes up to four times as long.')
@click.option('--workers', type=click.IntRange(min=0), help='Threads that search frames; one a core by default.')
@click.option('--device', default='auto', show_default=True, help='A torch device; auto takes CUDA or MPS if there.')
@click.option('--runtime', default='torch', show_default=True, type=click.Choice(['torch', 'onnxruntime', 'auto']),
              help='onnxruntime: export the model once into a cache, and run that; auto: if it is faster here.')
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
