"""`timm-lfnsb run`."""
from __future__ import annotations

import click


@click.command(context_settings=dict(ignore_unknown_options=True, allow_interspersed_args=False))
@click.argument('script')
@click.argument('args', nargs=-1, type=click.UNPROCESSED)
def run(script: str, args: tuple[str, ...]) -> None:
    """Run one of timm's scripts with this zoo registered.

    SCRIPT is a path, or a name such as train.py in the folder that TIMM_SCRIPTS names (a clone of timm). All further
    arguments are the script's own; train.py also takes --cosine-harmony and friends, see `run train.py --help`.
    """
    from ..errors import LaunchError
    from ..train.launch import run_script
    try:
        run_script(script, args)
    except LaunchError as error:
        raise click.ClickException(str(error)) from None
