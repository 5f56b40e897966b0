"""Model cards: they say what the JSON says, their front matter is valid, and their snippets run."""
from __future__ import annotations

import copy
import itertools
import json
import re

import pytest
import skimage.data
import timm
from click.testing import CliRunner
from huggingface_hub import ModelCard
from PIL import Image
from support import ROOT
from timm.models import save_for_hf

from timm_lfnsb.cli import main
from timm_lfnsb.hub import card
from timm_lfnsb.hub.push import staged
from timm_lfnsb.weights.names import embedded_weights, weights_info

NAMES = embedded_weights()
CARDS = ROOT / 'hub_cards'
INFO = weights_info('lfnsb.ferplus')


def rows_of(text: str, first_header: str) -> list[dict[str, str]]:
    """The Markdown table whose first header this is."""
    lines = itertools.dropwhile(lambda line: not re.match(rf'\| {first_header} +\|', line), text.splitlines())
    table = itertools.takewhile(lambda line: line.startswith('|'), lines)
    header, _, *rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in table]
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.fixture(scope='module')
def cards() -> dict[str, str]:
    return {name: card.render_card(weights_info(name)) for name in NAMES}


def test_the_committed_cards_are_what_the_json_says(cards):
    assert {path.stem: path.read_text() for path in CARDS.glob('*.md')} == cards, 'out of date: run timm-lfnsb card'
    for link in re.findall(r'\]\((\.\./[^)]+)\)', ''.join(cards.values())):
        assert (CARDS / link).is_file(), link


@pytest.mark.parametrize('name', NAMES)
def test_every_figure_is_the_jsons(name, cards):
    text, stored = cards[name], weights_info(name)
    test = stored['metrics']['test']
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert (data.license, data.datasets, data.model_name) == ('apache-2.0', ['ferplus'], name)
    assert {'timm', 'transformers', 'facial-expression-recognition', 'image-classification'} <= set(data.tags)
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        metric_type: pytest.approx(test[key], abs=6e-5) for key, (metric_type, _) in card.FIGURES.items()}
    rows = rows_of(text, 'class')
    assert [row['class'] for row in rows] == stored['label_names']
    for row, figures, given in zip(rows, test['per_class'].values(), zip(*test['confusion'], strict=True), strict=True):
        assert row['faces'] == f"{figures['count']:,}"
        assert row['recall'] == '{:.3f} [{:.3f}, {:.3f}]'.format(figures['recall'], *figures['recall_interval'])
        assert (row['precision'] == 'never predicted') == (sum(given) == 0)
    robust = rows_of(text, 'images')
    assert len(robust) == len(stored['robustness']['rows']) == 13
    for row, figures in zip(robust, stored['robustness']['rows'].values(), strict=True):
        assert row['images'] == figures['what'] and row['same label'] == f"{figures['agreement']:.3f}"
        assert row['difference, in points'].startswith(f"{100 * figures['difference']:+.1f} [")
    assert [row['run'] for row in rows_of(text, 'run')] == [str(i) for i, _ in enumerate(stored['runs'], 1)]
    assert all(note in text for note in [*stored['notes'], *stored.get('history', [])])
    for phrase in (
            f"{stored['prior_correction']['temperature']:.3f}", f"{stored['calibration']['ece']:.3f}",
            stored['data']['sha256'][:16], 'Disgust (20) and contempt (27): too few',
            'must not be redistributed', 'MIT licence', 'Fairness was therefore not measured',
            'An expression is not a feeling', 'Article 5(1)(f)', 'FER+ is grey', 'the plurality of the ten'):
        assert phrase in text, phrase
    assert '/tmp' not in text and 'nan' not in text.split() and 'None' not in text.replace('detector=None', '')


def test_another_input_size_and_what_was_not_measured(cards):
    assert '91.07 % on RAF-DB and 66.57 % on AffectNet-7' in cards['lfnsb.ferplus']  # the paper's of its network
    assert '91.07' not in cards['lfn_small.ferplus']
    bare = {key: value for key, value in INFO.items() if key not in (
        'robustness', 'temperature', 'prior_correction', 'notes', 'history')} | {'half_precision_changes': 3}
    text = card.render_card({**bare, 'input_size': [3, 64, 64]})
    assert '| 3x64x64, ' in text and 'enlarged to\n64x64, one crop' in text and '| 131 million |' in text
    assert '## Speed\n\nNot measured' in text  # what was measured was measured at 112
    assert '## Robustness\n\nNot measured.' in text and 'temperature' not in text and '- **Known.**' not in text


@pytest.mark.parametrize('settings, said', [
    ({}, 'No other images were used.'), (dict(model='lfnsb', pretrained=True), 'No other images were used.'),
    (dict(kd_model_name='lfnsb.ferplus_64'), 'No other images were used.'),
    (dict(kd_model_name='resnet50,mfn.ferplus'), 'Other images may be behind `resnet50`.'),
    (dict(kd_model_name='resnet50,resnet34', model='resnet18', pretrained=True),
     'Other images may be behind `resnet18` and `resnet34` and `resnet50`.'),
    (dict(model='resnet18', pretrained=True), 'Other images may be behind `resnet18`.')])
def test_other_images_are_named(settings, said):
    changed = copy.deepcopy(INFO)
    for run in changed['runs']:  # whatever taught the weights of today
        for key in ('kd_model_name', 'pretrained'):
            run['settings'].pop(key, None)
    changed['runs'][-1]['settings'].update(settings)
    assert said in card.render_card(changed)


def test_the_command_writes_them(cards, tmp_path):
    result = CliRunner().invoke(main, ['card', 'lfnsb.ferplus', '--out', str(tmp_path / 'cards')])
    assert result.stdout == f'{tmp_path}/cards/lfnsb.ferplus.md\n'
    assert (tmp_path / 'cards' / 'lfnsb.ferplus.md').read_text() == cards['lfnsb.ferplus']


def test_speed_comes_from_benchmark_reports_alone(tmp_path):
    row = {'task': 'predict', 'runtime': 'eager', 'batch': 1, 'model': 'lfnsb', 'form': 'reparameterised',
           'ms_per_image': {'median': 27.25}, 'ratio': {'median': 1.251}}
    (tmp_path / 'bench-two-cores.json').write_text(json.dumps({
        'machine': {'cpu': 'Abacus 2', 'threads': 2}, 'settings': {'peer': 'resnet18@112'},
        'models': {name: {'input_size': [3, size, size]} for name, size in (('lfnsb', 112), ('lfnsb@64', 64))},
        'results': [row, row | {'model': 'lfnsb@64'}, row | {'model': 'mfn'}, row | {'task': 'train'},
                    row | {'form': 'convolutions'}, row | {'runtime': 'onnxruntime', 'batch': 8, 'ratio': None}]}))
    rows = rows_of(card.speed_table('lfnsb.ferplus', (3, 112, 112), tmp_path), 'machine')
    assert [list(row.values()) for row in rows] == [
        ['Abacus 2, 2 threads', 'PyTorch', '1', '27.2', '1.25 x resnet18@112'],
        ['Abacus 2, 2 threads', 'ONNX Runtime', '8', '27.2', '-']]
    assert len(rows_of(card.speed_table('lfnsb.ferplus_64', (3, 64, 64), tmp_path), 'machine')) == 1


def test_the_snippets_run(cards, tmp_path, monkeypatch, capsys):
    pytest.importorskip('transformers', reason="pip install 'timm-lfnsb[test]' brings transformers")
    monkeypatch.chdir(tmp_path)
    photo = skimage.data.astronaut()
    Image.fromarray(photo).save('photo.jpg')
    Image.fromarray(photo[70:190, 165:285]).save('face.jpg')
    snippets = re.findall(r'```python\n(.*?)```', cards['lfnsb.ferplus'], re.S)
    assert len(snippets) == 3
    for snippet in snippets:
        with staged('lfnsb.ferplus', 'me/own') as folder:
            exec(snippet.replace('FOLDER', str(folder)), {})
        printed = capsys.readouterr().out
        assert any(label in printed for label in INFO['label_names']), snippet


def save_own(folder, arch='resnet18', labels=('cat', 'dog', 'horse')):
    """What `pack` leaves of a run on someone's own data."""
    model = timm.create_model(arch, num_classes=len(labels))
    model.pretrained_cfg.update(label_names=tuple(labels), num_classes=len(labels))
    save_for_hf(model, str(folder), model_config={'label_names': list(labels)}, safe_serialization=True)


def test_a_folders_card_invents_nothing(tmp_path):
    save_own(tmp_path)
    text = CliRunner().invoke(main, ['card', '--folder', str(tmp_path)]).output
    data = ModelCard(text, ignore_metadata_errors=False).data
    assert data.license is None and data.eval_results is None and data.datasets is None
    assert 'facial-expression-recognition' not in data.tags
    assert '11.18 million' in text and 'cat, dog, horse' in text and '3x224x224' in text
    for absent in ('FER+', 'expression', 'Apache', '91.07', 'Robustness', '## Figures', '`lfnsb`', 'bibtex', '95 %'):
        assert absent not in text, absent
    assert 'how well it works is not known here' in ' '.join(text.split())
    text = card.render_card_for_folder(tmp_path, repo_id='me/pets', license='mit')
    assert ModelCard(text).data.license == 'mit' and "'hf-hub:me/pets'" in text and '# pets' in text
    assert 'FOLDER' not in text


def test_a_folder_of_faces(tmp_path):
    save_own(tmp_path, 'lfnsb', INFO['label_names'])
    metrics = {**INFO['metrics']['validation'], 'split': 'holdout', 'model': 'local-dir:mine'}
    metrics['per_class'] = {**metrics['per_class'], 'contempt': dict.fromkeys(metrics['per_class']['contempt'], None)}
    metrics['per_class']['contempt']['count'] = 0  # a class that the data do not have
    (tmp_path / 'metrics.json').write_text(json.dumps(metrics))
    text = card.render_card_for_folder(tmp_path, metrics=tmp_path / 'metrics.json')
    result = ModelCard(text).data.eval_results[0]
    assert (result.metric_value, result.dataset_split) == (pytest.approx(metrics['accuracy'], abs=6e-5), 'holdout')
    assert 'not known' not in text and 'FER+' not in text and '91.07' not in text
    assert 'holdout, 3,328 faces' in text and 'Article 5(1)(f)' in text and 'bibtex' in text
    assert list(rows_of(text, 'class')[-1].values())[:5] == ['contempt', '0', '-', '-', '-']
    assert 'By group' not in text and 'nothing was measured about it' in text

    gaps = {key: {'gap': 0.125, 'gap_interval': [-0.25, 0.5], 'high': 'old', 'low': 'young'} for key in card.FIGURES}
    metrics['groups'] = {'age': {'groups': {'old': metrics.copy(), 'young': metrics.copy()}, 'largest_gap': gaps}}
    (tmp_path / 'metrics.json').write_text(json.dumps(metrics))
    text = card.render_card_for_folder(tmp_path, metrics=tmp_path / 'metrics.json')
    old, _, largest = rows_of(text, 'by')
    assert old['group'] == 'old' and old['accuracy'] == card._figure(metrics, 'accuracy') and old['faces'] == '3328'
    assert largest['accuracy'] == '0.125 [-0.250, 0.500] old - young' and 'nothing was measured about it' not in text
