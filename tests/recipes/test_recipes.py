"""Recipes: YAML files whose every key train.py knows, with class maps in canonical order, and the command for them."""
from __future__ import annotations

import re

import pytest
import timm
import yaml
from click.testing import CliRunner

from timm_lfnsb.cli import main
from timm_lfnsb.labels import EXPRESSIONS_7, EXPRESSIONS_8
from timm_lfnsb.recipes import class_map_path, recipe_names, recipe_path, recipe_summary
from timm_lfnsb.train.launch import extend_train_script, load_module

LABELS = {'rafdb': EXPRESSIONS_7, 'affectnet7': EXPRESSIONS_7, 'affectnet8': EXPRESSIONS_8, 'ferplus': EXPRESSIONS_8}


def load(name: str) -> dict:
    return yaml.safe_load(recipe_path(name).read_text(encoding='utf-8'))


def test_class_maps_are_the_canonical_order():
    maps = {path.name.split('.')[0] for path in recipe_path('rafdb').parent.glob('*.classes.txt')}
    assert maps == set(LABELS)
    for name, labels in LABELS.items():
        assert tuple(class_map_path(name).read_text(encoding='utf-8').splitlines()) == labels
    assert class_map_path('nonsense') is None and set(LABELS) <= set(recipe_names())


@pytest.mark.parametrize('name', recipe_names())
def test_recipe_fits_its_model_and_class_map(name):
    recipe = load(name)
    assert timm.is_model(recipe['model']) or recipe['model'] == 'local-dir:FACES'  # of convert
    assert len(class_map_path(recipe['class_map']).read_text(encoding='utf-8').split()) == recipe['num_classes']
    # A warm-up that steps once an epoch spends the first epoch at warmup_lr.
    assert recipe['warmup_epochs'] == 0 or recipe['sched_on_updates']
    assert recipe.get('val_split', 'validation') == ('test' if name == 'rafdb' else 'validation')
    assert 1 < len(recipe_summary(name)) < 119 and not recipe_summary(name).startswith('#')
    for line in recipe_path(name).read_text(encoding='utf-8').splitlines() if name in LABELS else ():
        assert len(line) <= 120 and (not line.strip() or re.search(r'#\s+\S', line)), f'{line!r} is not explained'


@pytest.mark.parametrize('name', recipe_names())
def test_every_key_is_an_option_of_train_py(name, timm_scripts):
    """Of the real parser with our options added, and every value passes its type and choices."""
    module = load_module(timm_scripts / 'train.py')
    extend_train_script(module)
    actions = {action.dest: action for action in module.parser._actions}
    recipe = load(name)
    assert set(recipe) <= set(actions)
    for key, value in recipe.items():
        action = actions[key]
        for item in value if isinstance(value, list) else [value]:
            assert action.type is None or action.type(item) == item, key
            assert action.choices is None or item in action.choices, key
        assert isinstance(value, list) == (action.nargs in ('+', '*')), key
        assert isinstance(value, bool) == isinstance(action.const, bool), key


def test_recipe_commands():
    def output(*args: str, exit_code: int = 0) -> str:
        result = CliRunner().invoke(main, ['recipe', *args])
        assert result.exit_code == exit_code
        return result.output

    assert [line.split()[0] for line in output('list').splitlines()] == recipe_names()
    assert 'RAF-DB as in the paper' in output('list')
    assert output('path', 'rafdb').strip() == str(recipe_path('rafdb'))
    assert output('show', 'affectnet8') == recipe_path('affectnet8').read_text(encoding='utf-8')
    for command in ('show', 'path'):
        unknown = output(command, 'imagenet', exit_code=1)
        assert unknown == f"Error: no recipe 'imagenet'; there are {', '.join(recipe_names())}.\n"
