"""`timm-lfnsb convert`: the authors' checkpoints become timm folders with the right labels, and nothing random."""
from __future__ import annotations

import collections
import functools
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import save_file
from support import golden_networks, rule_input, rule_weights

from timm_lfnsb.checkpoints.convert import LABEL_SETS, convert
from timm_lfnsb.checkpoints.graft import graft
from timm_lfnsb.cli import main
from timm_lfnsb.errors import UserError
from timm_lfnsb.evaluate import label_order
from timm_lfnsb.evaluate.label_order import LabelOrder
from timm_lfnsb.labels import EXPRESSIONS_7, EXPRESSIONS_8

OURS = {'lfnsb_7': ('lfnsb', 'rafdb'), 'lfnsb_8': ('lfnsb', 'affectnet8'), 'ddamfn_7': ('ddamfn', 'affectnet7'),
        'lfn': ('lfn_small', None), 'mfn': ('mfn', None)}
RAFDB = ('surprise', 'fear', 'disgust', 'happiness', 'sadness', 'anger', 'neutral')


@functools.cache
def authors_weights(name: str) -> dict[str, torch.Tensor]:
    return rule_weights(golden_networks()[name]['keys'], golden_networks()[name]['salt'])


def authors_file(name: str, folder: Path, **entries: object) -> Path:
    torch.save({**authors_weights(name), **entries}, folder / 'a.pth')
    return folder / 'a.pth'


def check_golden(name: str, folder: Path) -> torch.nn.Module:
    """The folder's outputs are those of the authors' code."""
    entry = golden_networks()[name]
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.no_grad():
        output = model(rule_input(entry['salt'], entry['batch'], entry['input_size']))
    expected = torch.tensor(entry['logits'] if 'logits' in entry else entry['embedding_l2'])
    actual = output if 'logits' in entry else F.normalize(output)
    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-4
    return model


# What the authors publish

FORMS = {
    'optimizer beside': lambda w, path: torch.save({'iter': 20, 'model_state_dict': w, 'optimizer_state_dict': {
        'state': {0: {'momentum_buffer': torch.zeros(3)}}, 'param_groups': [{'lr': 0.01, 'params': [0]}]}}, path),
    'module prefix, wrapped twice': lambda w, path: torch.save({'model': {'state_dict': collections.OrderedDict(
        {f'module.{key}': v for key, v in w.items()})}, 'acc': 0.91}, path),
    'name beside, and not in order': lambda w, path: torch.save(
        {'model': 'LFNSB', 'net': {key: v.mT.contiguous().mT if v.ndim > 1 else v for key, v in w.items()}}, path),
    'double parameters': lambda w, path: torch.save(
        {key: torch.nn.Parameter(v.double()) for key, v in w.items()}, path),
    'before torch 1.6': lambda w, path: torch.save({'state_dict': w}, path, _use_new_zipfile_serialization=False),
    'safetensors': save_file,
}


@pytest.mark.parametrize('name, form', [
    *(('lfnsb_7', form) for form in FORMS), *((name, 'optimizer beside') for name in OURS if name != 'lfnsb_7')])
def test_golden_outputs_and_labels(name, form, tmp_path):
    """Also without the counters, which checkpoints from before torch 0.4.1 lack."""
    ours, labels = OURS[name]
    FORMS[form]({key: v for key, v in authors_weights(name).items() if 'num_batches' not in key}, tmp_path / 'a.pth')
    converted = convert(tmp_path / 'a.pth', ours, tmp_path / 'out', labels)
    model = check_golden(name, tmp_path / 'out')
    expected = LABEL_SETS[labels] if labels else ()
    assert converted.label_names == expected and not converted.foreign
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert tuple(config.get('label_names', ())) == tuple(model.pretrained_cfg.get('label_names') or ()) == expected
    assert config['converted_from']['file'] == 'a.pth' and len(config['converted_from']['sha256']) == 64
    assert not {'license', 'tag', 'file', 'url', 'hf_hub_id'} & set(config['pretrained_cfg'])  # it claims nothing
    assert timm.data.resolve_model_data_config(model)['crop_mode'] == 'squash'
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32, torch.int64}


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize('wrap', [lambda module: module, lambda module: {'net': torch.nn.DataParallel(module)}])
def test_whole_modules_of_classes_that_are_not_here(wrap, tmp_path, monkeypatch):
    """With all that torch's own layers keep besides their weights; tied weights, too."""
    donor = timm.create_model('mobilefacenet', num_classes=0)
    donor.stages[0][1].expand.conv.weight = donor.stages[0][2].expand.conv.weight
    donor.register_buffer('scratch', torch.zeros(3), persistent=False)
    donor.register_forward_hook(print)
    donor.history = [np.float64(0.5), torch.device('cpu')]
    with monkeypatch.context() as patch:
        patch.setattr(type(donor), '__module__', 'networks')
        patch.setitem(sys.modules, 'networks', types.SimpleNamespace(MixedFeatureNet=type(donor)))
        torch.save(wrap(donor), tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
        with pytest.raises(UserError, match='take a state dict'):
            convert(tmp_path / 'a.pth', 'mobilefacenet', tmp_path / 'never')
        torch.save(wrap(donor), tmp_path / 'a.pth')
    converted = convert(tmp_path / 'a.pth', 'mobilefacenet', tmp_path / 'out')
    foreign = set(converted.foreign.split(', '))
    assert {'torch.nn.modules.conv.Conv2d', 'builtins.print', 'networks.MixedFeatureNet'} <= foreign
    assert 'networks' not in sys.modules
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in donor.state_dict().items())


# Labels, and what does not fit

def test_label_sets_are_the_data_sets_own():
    assert LABEL_SETS == dict(
        rafdb=RAFDB, affectnet7=EXPRESSIONS_7, affectnet8=EXPRESSIONS_8,
        ferplus=('neutral', 'happiness', 'surprise', 'sadness', 'anger', 'disgust', 'fear', 'contempt'))
    help_text = ' '.join(CliRunner().invoke(main, ['convert', '--help']).output.split())
    assert all(f"{name} {', '.join(LABEL_SETS[name])}" in help_text for name in ('rafdb', 'affectnet7', 'ferplus'))


@pytest.mark.parametrize('name, model, entries, kwargs, reasons', [
    # Labels are never guessed.
    ('lfnsb_7', 'lfnsb', {}, {}, ['7 classes', 'rafdb (surprise, fear', 'affectnet7 (neutral', '--drop fc']),
    ('lfnsb_7', 'lfnsb', {}, dict(labels='affectnet8'), ['the model has 7 classes, but', 'contempt]']),
    ('lfnsb_7', 'lfnsb', {}, dict(labels='happy,happiness,c,d,e,f,g'), ['one name for each output']),
    ('mfn', 'mfn', {}, dict(labels='rafdb'), ['the model has 0 classes']),
    ('mfn', 'mfn', {}, dict(labels='auto', data_dir=Path('.')), ['no classifier, so that no output needs a name']),
    ('mfn', 'mfn', {'fc.weight': torch.zeros(9, 256), 'fc.bias': torch.zeros(9)}, {}, ['9 classes']),
    ('lfnsb_7', 'ddamfn', {}, {}, ['is of the network lfnsb, not ddamfn: give --model lfnsb.']),
    ('lfnsb_7', 'lfnsb', {}, dict(drop=['f']), ['nothing that --drop f could leave out']),
    # Dropping never leaves random weights; of many missing keys the first ones are named.
    ('lfnsb_7', 'lfnsb', {}, dict(drop=['features.5.model.3.CA.conv2']),
     ['names: stages.1.4.attn.conv_h.weight, stages.1.4.attn.conv_h.bias.']),
    ('lfnsb_7', 'lfnsb', {}, dict(drop=['features.5']), ['missing keys', '....']),
    *(('lfnsb_7', 'lfnsb', entries, dict(labels='rafdb'), [reason]) for entries, reason in (
        ({'fc.weight': torch.zeros(7, 512)}, r'fc.weight (7, 512) instead of (7, 256)'),
        ({'arcface.weight': torch.zeros(9, 256)}, 'leaves out what starts with it): arcface.weight.'),
        ({'fc.bias': torch.full((7,), torch.nan)}, 'fc.bias that are not finite'),
        ({'fc.bias': [1, 2]}, 'fc.bias, it is of the type list'),
        ({'fc.bias': torch.zeros(1).expand(7)}, 'no sound tensor in fc.bias'),
        ({'fc.bias': torch.ones(7).to_sparse()}, 'no sound tensor in fc.bias'),
        ({'epoch': 3}, 'epoch, it is of the type int: --drop epoch leaves it out'),
        ({'state_dict': {}, 'arch': 'lfnsb', 'args': None}, 'was written by train.py: use timm-lfnsb pack'))),
])
def test_labels_and_entries_that_do_not_fit(name, model, entries, kwargs, reasons, tmp_path):
    """One sentence that names the file, and nothing is left behind."""
    source = authors_file(name, tmp_path, **entries)
    with pytest.raises(UserError) as caught:
        convert(source, model, tmp_path / 'never', **kwargs)
    message = str(caught.value)
    assert message.startswith((str(source), 'the model has')) and message.endswith('.') and len(message) < 900
    assert all(reason in message for reason in reasons) and list(tmp_path.iterdir()) == [source]


# The command

def test_command_line(tmp_path):
    source = authors_file('lfnsb_7', tmp_path)
    for out, args, code, words in (
            ('rafdb', '--model lfnsb --labels rafdb', 0, 'labels: 0 surprise, 1 fear'),
            ('embedding', '--model lfnsb --drop fc', 0, 'no classifier: it ends at the embedding'),
            ('none', '--model lfnsb', 1, '--labels'), ('rafdb', '--model lfnsb --drop fc', 1, 'is there already')):
        result = CliRunner().invoke(main, ['convert', str(source), str(tmp_path / out), *args.split()])
        assert result.exit_code == code and words in result.output
        assert ('never uses them: 5 tensors' if code == 0 else 'Error: ') in result.output
    assert not (tmp_path / 'none').exists()


def test_an_order_that_was_found_is_written_and_shown(tmp_path, monkeypatch):
    source, seen = authors_file('lfnsb_7', tmp_path), []
    found = LabelOrder(RAFDB, 0.987, 0.654, 70)
    monkeypatch.setattr(label_order, 'find_label_order', lambda *args: seen.extend(args) or found)
    arguments = ['convert', str(source), str(tmp_path / 'out'), '--model', 'lfnsb', '--labels', 'auto']
    result = CliRunner().invoke(main, [*arguments, '--data-dir', str(tmp_path / 'faces')])
    assert 'labels: 0 surprise, 1 fear' in result.output and '70 images: 98.7 % of' in result.output
    assert '65.4 %' in result.output and seen[1] == tmp_path / 'faces'
    model = check_golden('lfnsb_7', tmp_path / 'out')
    assert tuple(model.pretrained_cfg['label_names']) == RAFDB
    images = rule_input(1, 2, 112)
    with torch.no_grad():  # it was the checkpoint's own network that saw the faces
        torch.testing.assert_close(seen[0].eval()(images), model(images))
    for wrong in (arguments, [*arguments[:-1], 'rafdb', '--data-dir', '.']):
        result = CliRunner().invoke(main, wrong)
        assert result.exit_code == 1 and 'give both of them, or neither' in result.output
    result = CliRunner().invoke(main, [*arguments, '--data-dir', '.', '--drop', 'fc'])
    assert 'is there already' in result.output  # before any work


def test_a_converted_backbone_starts_another_network(tmp_path):
    """The way from MFN on MS-Celeb-1M, with its classifier of persons, to DDAMFN, as its authors go it."""
    source = authors_file('mfn', tmp_path, **{'fc.weight': torch.zeros(9, 256), 'fc.bias': torch.zeros(9)})
    convert(source, 'mfn', tmp_path / 'mfn', drop=['fc'])
    check_golden('mfn', tmp_path / 'mfn')
    count, left = graft('ddamfn', f'local-dir:{tmp_path / "mfn"}', tmp_path / 'init.safetensors')
    assert count > 800 and all(key.startswith(('head.', 'fc.')) for key in left)
