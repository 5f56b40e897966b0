"""`timm-lfnsb pack`."""
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument('run', type=click.Path(path_type=Path))
@click.argument('out_dir', type=click.Path(path_type=Path))
@click.option('--labels', help='Label names in the order of training, comma separated; only where the run is silent.')
@click.option('--ema/--no-ema', default=True, help='Take the moving average of the weights, if the run kept one.')
@click.option('--half', is_flag=True, help='Store kernels and matrices as float16.')
@click.option('--calibrate', type=click.Path(path_type=Path, file_okay=False), metavar='DATA_DIR',
              help='Fit the temperature of the probabilities on DATA_DIR/validation and store it in config.json.')
def pack(run: Path, out_dir: Path, labels: str | None, **options: Any) -> None:
    """Turn RUN (a run folder or a checkpoint of train.py) into a timm folder OUT_DIR for 'local-dir:OUT_DIR'."""
    from ..checkpoints.pack import pack as pack_run
    names = [name.strip() for name in labels.split(',')] if labels else None
    packed = pack_run(run, out_dir, names, **options)
    click.echo(f"{out_dir}: {packed['model']}{' (EMA)' if packed['ema'] else ''} from {packed['checkpoint']}, "
               f"epoch {packed['epoch']}, labels {', '.join(packed['label_names'])}"
               + (f", temperature {packed['temperature']:.3f}" if packed['temperature'] else ''))
