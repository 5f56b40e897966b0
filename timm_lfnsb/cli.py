"""The `timm-lfnsb` command: its subcommands are the modules of `commands`."""
from __future__ import annotations

import errno
import pkgutil
import sys
from importlib import import_module
from typing import Any

import click

from . import commands
from .errors import UserError, did_you_mean
from .version import __version__


class CommandFolder(click.Group):
    """A group whose commands are imported when they are asked for; their errors end as one sentence, exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(commands.__path__))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        return getattr(import_module(f'{commands.__name__}.{cmd_name}'), cmd_name)

    def resolve_command(
            self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in (names := self.list_commands(ctx)) and not args[0].startswith('-'):
            ctx.fail(f'No such command {args[0]!r}{did_you_mean(args[0], names)}.')
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(str(error)) from None
        except OSError as error:
            if error.errno == errno.EPIPE:  # click ends quietly where nobody reads on
                raise
            raise click.ClickException(' '.join(str(error).split())) from None


@click.command(cls=CommandFolder, context_settings=dict(help_option_names=['-h', '--help']))
@click.version_option(__version__)
def main() -> None:
    """Lightweight facial expression recognition with timm."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # a name that the terminal's encoding lacks must not end the rest
            stream.reconfigure(errors='backslashreplace')
