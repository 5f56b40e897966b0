"""`timm-lfnsb doctor`."""
import click


@click.command()
def doctor() -> None:
    """Print what a report of a bug should say, in ten lines.

    Versions, packages that are in each other's way, runtimes, devices, what is cached from the Hub and which extras are
    missing. Nobody on the network is asked.
    """
    from ..doctor import examine
    for title, text in examine():
        click.echo(f'{title:<11} {" ".join(text.split())}')
