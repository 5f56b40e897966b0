"""`timm-lfnsb recipe`."""
import click


@click.group()
def recipe() -> None:
    """Settings for timm's train script that come with the package: run train.py --config NAME."""


@recipe.command('list')
def list_recipes() -> None:
    """Print the names, and what each is for."""
    from ..recipes import recipe_names, recipe_summary
    names = recipe_names()
    for name in names:
        click.echo(f'{name:<{max(map(len, names))}}  {recipe_summary(name)}')


@recipe.command()
@click.argument('name')
def show(name: str) -> None:
    """Print the recipe NAME with its explanations."""
    from ..recipes import recipe_path
    click.echo(recipe_path(name).read_text(encoding='utf-8'), nl=False)


@recipe.command('path')
@click.argument('name')
def print_recipe_path(name: str) -> None:
    """Print where the file of the recipe NAME is, to copy and change it."""
    from ..recipes import recipe_path
    click.echo(recipe_path(name))
