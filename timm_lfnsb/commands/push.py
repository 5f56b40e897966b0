"""`timm-lfnsb push`."""
from pathlib import Path
from typing import Any

import click


@click.command()
@click.argument('source')
@click.option('--repo-id', metavar='ORG/NAME', help='Repository on the Hub; embedded weights have one of their own.')
@click.option('--private', is_flag=True, help='Make the repository a private one.')
@click.option('--create-pr', is_flag=True, help='Open a pull request instead of committing to main.')
@click.option('--metrics', type=click.Path(path_type=Path), metavar='FILE',
              help='metrics.json of timm-lfnsb evaluate, for the card of a folder without README.md.')
@click.option('--license', metavar='ID', help='Licence of the weights, such as apache-2.0, for the same.')
@click.option('--dry-run', is_flag=True, help='Show every file and the card; contact nobody.')
def push(source: str, dry_run: bool, **options: Any) -> None:
    """Publish SOURCE, a timm folder or the name of embedded weights, on the Hugging Face Hub.

    Safetensors only, in one commit. A folder without README.md gets a card that says what is known of it. Log in with
    `hf auth login`, or set HF_TOKEN.
    """
    from ..hub.push import push
    result = push(source, dry_run=dry_run, **options)
    width = max(len(name) for name, _, _ in result.files)
    click.echo(f"{'would publish' if dry_run else 'published'} {result.repo_id}")
    for name, size, sha256 in result.files:
        click.echo(f'{name.ljust(width)}  {size:>12,} bytes  sha256 {sha256}')
    click.echo(f'\n{result.card}' if dry_run else result.url)
