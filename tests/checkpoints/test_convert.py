"""`timm-lfnsb convert`: the authors' checkpoints become timm folders with the right labels, and nothing random."""
from __future__ import annotations

import collections
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

from timm_lfnsb.checkpoints.convert import LABEL_SETS, convert, find_tensors
from timm_lfnsb.checkpoints.graft import graft
from timm_lfnsb.checkpoints.pickles import load
from timm_lfnsb.cli import main
from timm_lfnsb.errors import UserError
from timm_lfnsb.labels import EXPRESSIONS_7, EXPRESSIONS_8

OUR_NAMES = {'lfnsb_7': 'lfnsb', 'lfnsb_8': 'lfnsb', 'lfn': 'lfn_small', 'mfn': 'mfn', 'ddamfn_7': 'ddamfn'}
LABELS = {'lfnsb_7': 'rafdb', 'lfnsb_8': 'affectnet8', 'ddamfn_7': 'affectnet7'}
RAFDB = ('surprise', 'fear', 'disgust', 'happiness', 'sadness', 'anger', 'neutral')


def authors_weights(name: str) -> dict[str, torch.Tensor]:
    entry = golden_networks()[name]
    return rule_weights(entry['keys'], entry['salt'])


def as_module(weights: dict[str, torch.Tensor], monkeypatch) -> torch.nn.Module:
    """A tree of modules, of a class that a file can name, with the given state dict."""
    code = types.ModuleType('networks')
    code.Block = type('Block', (torch.nn.Module,), {'__module__': code.__name__})
    monkeypatch.setitem(sys.modules, 'networks', code)
    root = code.Block()
    for key, value in weights.items():
        *path, name = key.split('.')
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, code.Block())
            module = module._modules[part]
        if 'running' in name or 'num_batches' in name:
            module.register_buffer(name, value)
        else:
            module.register_parameter(name, torch.nn.Parameter(value))
    root.register_buffer('scratch', torch.zeros(3), persistent=False)
    root.register_parameter('no_bias', None)
    root.device, root.history = torch.device('cpu'), [np.float64(0.5), {'lr': 1e-3}]
    assert set(root.state_dict()) == set(weights)
    return root


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


def fails(source: Path, model: str = 'lfnsb', **kwargs) -> str:
    """The message of a conversion that must fail and leave nothing behind: one sentence that names the file."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(UserError) as caught:
        convert(source, model, source.parent / 'never', **kwargs)
    assert sorted(source.parent.iterdir()) == before
    message = str(caught.value)
    assert message.startswith(str(source)) and message.endswith('.') and '\n' not in message and len(message) < 2500
    return message


def run(*args: object):
    return CliRunner().invoke(main, ['convert', *map(str, args)])


# What the authors publish

@pytest.mark.parametrize('name', OUR_NAMES)
def test_golden_outputs_and_labels(name, tmp_path):
    torch.save({'iter': 20, 'model_state_dict': authors_weights(name), 'optimizer_state_dict': {
        'state': {0: {'momentum_buffer': torch.zeros(3)}}, 'param_groups': [{'lr': 0.01, 'params': [0]}]},
    }, tmp_path / 'rafdb_epoch20.pth')
    converted = convert(tmp_path / 'rafdb_epoch20.pth', OUR_NAMES[name], tmp_path / 'out', LABELS.get(name))
    model = check_golden(name, tmp_path / 'out')
    expected = {'rafdb': RAFDB, 'affectnet7': EXPRESSIONS_7, 'affectnet8': EXPRESSIONS_8, None: ()}[LABELS.get(name)]
    assert converted.label_names == expected and converted.kind == 'state dict' and not converted.foreign
    assert model.num_classes == len(expected)
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert tuple(config.get('label_names', ())) == expected
    assert tuple(model.pretrained_cfg.get('label_names') or ()) == expected
    assert config['converted_from']['file'] == 'rafdb_epoch20.pth' and len(config['converted_from']['sha256']) == 64
    assert not {'license', 'tag', 'file', 'url', 'hf_hub_id'} & set(config['pretrained_cfg'])
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == ['config.json', 'model.safetensors']
    data = timm.data.resolve_model_data_config(model)
    assert data['input_size'] == (3, 112, 112) and data['crop_mode'] == 'squash' and data['crop_pct'] == 1.0


WRAPS = {
    'plain': lambda w: w,
    'ordered': collections.OrderedDict,
    'state_dict': lambda w: {'state_dict': w, 'epoch': 3},
    'module prefix': lambda w: {'state_dict': {f'module.{key}': value for key, value in w.items()}},
    'twice': lambda w: {'model': {'state_dict': w}, 'acc': np.float32(0.91)},
    'name beside': lambda w: {'model': 'LFNSB', 'net': w},
    'whole optimizer beside': lambda w: {'net': w, 'optimizer': torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])},
    'parameters': lambda w: {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in w.items()},
}


@pytest.mark.parametrize('wrap', WRAPS)
def test_wrapped_state_dicts(wrap, tmp_path):
    weights = authors_weights('lfnsb_7')
    torch.save(WRAPS[wrap](weights), tmp_path / 'authors.pth')
    tensors, kind = find_tensors(load(tmp_path / 'authors.pth')[0])
    assert kind == 'state dict' and list(tensors) == list(weights)
    assert all(torch.equal(tensors[key], value) for key, value in weights.items())


def one_block(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views of one block of numbers, as fused optimizers leave them."""
    block = torch.cat([value.flatten() for value in weights.values()])
    parts = block.split([value.numel() for value in weights.values()])
    return {key: part.view(value.shape) for (key, value), part in zip(weights.items(), parts, strict=True)}


@pytest.mark.parametrize('store', [
    lambda w, path: torch.save({key: value.double() for key, value in w.items()}, path),
    lambda w, path: torch.save(one_block(w), path),
    lambda w, path: torch.save({k: v.transpose(0, 1).contiguous().transpose(0, 1) if v.ndim == 4 else v
                                for k, v in w.items()}, path),
    lambda w, path: torch.save({'state_dict': w}, path, _use_new_zipfile_serialization=False),
    save_file,
], ids=['double', 'one block', 'transposed in memory', 'before torch 1.6', 'safetensors'])
def test_other_forms_and_no_counters(store, tmp_path):
    store({key: value for key, value in authors_weights('lfnsb_7').items() if 'num_batches' not in key}, tmp_path / 'a')
    convert(tmp_path / 'a', 'lfnsb', tmp_path / 'out', 'rafdb')
    model = check_golden('lfnsb_7', tmp_path / 'out')
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert all(value == 0 for key, value in model.state_dict().items() if 'num_batches' in key)


@pytest.mark.parametrize('name, wrap', [
    ('mfn', lambda module: module), ('ddamfn_7', lambda module: {'epoch': 3, 'net': torch.nn.DataParallel(module)})])
def test_whole_modules_of_classes_that_are_not_here(name, wrap, tmp_path, monkeypatch):
    torch.save(wrap(as_module(authors_weights(name), monkeypatch)), tmp_path / 'whole.pth')
    monkeypatch.delitem(sys.modules, 'networks')
    converted = convert(tmp_path / 'whole.pth', OUR_NAMES[name], tmp_path / 'out', LABELS.get(name))
    check_golden(name, tmp_path / 'out')
    assert converted.kind == 'whole module' and converted.unused
    assert 'networks.Block' in converted.foreign and 'networks' not in sys.modules


def test_whole_module_of_real_layers(tmp_path):
    """With all that torch's own layers keep besides their weights; tied weights, too."""
    donor = timm.create_model('mobilefacenet', num_classes=0).eval()
    donor.stages[0][1].expand.conv.weight = donor.stages[0][2].expand.conv.weight
    donor.register_forward_hook(print)
    torch.save(donor, tmp_path / 'a.pth')
    converted = convert(tmp_path / 'a.pth', 'mobilefacenet', tmp_path / 'out')
    assert {'torch.nn.modules.conv.Conv2d', 'builtins.print'} <= set(converted.foreign)
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in donor.state_dict().items())


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_whole_modules_before_torch_1_6_are_refused(tmp_path, monkeypatch):
    module = as_module(authors_weights('mfn'), monkeypatch)
    torch.save(module, tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    assert 'take a state dict' in fails(tmp_path / 'a.pth', 'mfn')


def test_our_own_keys(tmp_path):
    donor = timm.create_model('lfnsb.ferplus', pretrained=True)
    torch.save(donor.state_dict(), tmp_path / 'ours.pth')
    convert(tmp_path / 'ours.pth', 'lfnsb', tmp_path / 'out', EXPRESSIONS_8)
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in donor.state_dict().items())


# Labels, and what does not fit

def test_label_sets_are_the_data_sets_own():
    assert LABEL_SETS['rafdb'] == RAFDB
    assert LABEL_SETS['affectnet7'] == EXPRESSIONS_7 and LABEL_SETS['affectnet8'] == EXPRESSIONS_8
    assert LABEL_SETS['ferplus'] == (
        'neutral', 'happiness', 'surprise', 'sadness', 'anger', 'disgust', 'fear', 'contempt')
    help_text = ' '.join(run('--help').output.split())
    for name in ('rafdb', 'affectnet7', 'ferplus'):
        assert f"{name} {', '.join(LABEL_SETS[name])}" in help_text


@pytest.fixture(scope='module')
def lfnsb_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('lfnsb') / 'lfnsb.pth'
    torch.save(authors_weights('lfnsb_7'), path)
    return path


@pytest.fixture(scope='module')
def mfn_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('mfn') / 'mfn.pth'
    torch.save(authors_weights('mfn'), path)
    return path


def test_labels_are_never_guessed(lfnsb_file, mfn_file, tmp_path):
    message = fails(lfnsb_file)
    assert '7 classes' in message and 'rafdb (surprise, fear' in message and 'affectnet7 (neutral' in message
    assert 'affectnet8' not in message and '--drop fc' in message
    assert '7 classes, but --labels gives 8 names' in fails(lfnsb_file, labels='affectnet8')
    assert 'gives 1 names [raf]: give all of them' in fails(lfnsb_file, labels='raf')
    assert 'two mean the same' in fails(lfnsb_file, labels='happy,happiness,c,d,e,f,g')
    assert 'one is empty' in fails(lfnsb_file, labels='a,,c,d,e,f,g')
    assert 'no classifier' in fails(mfn_file, 'mfn', labels='rafdb')
    assert convert(lfnsb_file, 'lfnsb', tmp_path / 'out', 'g, f, e, d, c, b, a').label_names == tuple('gfedcba')


def test_other_heads_are_named_and_dropped_when_asked_for(tmp_path):
    weights = {**authors_weights('mfn'), 'fc.weight': torch.zeros(85742, 256), 'fc.bias': torch.zeros(85742)}
    torch.save({**weights, 'arcface.weight': torch.zeros(9, 256)}, tmp_path / 'a.pth')
    message = fails(tmp_path / 'a.pth', 'mfn', drop=['arcface'])
    assert '85742 classes' in message and '--drop fc' in message
    assert 'leaves out what starts with it): arcface.weight.' in fails(tmp_path / 'a.pth', 'mfn', drop=['fc'])
    assert 'nothing that --drop arc could' in fails(tmp_path / 'a.pth', 'mfn', drop=['arc'])
    converted = convert(tmp_path / 'a.pth', 'mfn', tmp_path / 'out', drop=['fc', 'arcface'])
    assert converted.dropped == ('fc.weight', 'fc.bias', 'arcface.weight')
    check_golden('mfn', tmp_path / 'out')


def test_dropping_never_leaves_random_weights(lfnsb_file):
    message = fails(lfnsb_file, drop=['sb'])
    assert 'missing keys' in message and 'head.conv.bias' in message and 'head.reduce.bn.weight' in message
    message = fails(lfnsb_file, drop=['features.5.model.3.CA.conv2'])  # few missing keys are all named
    assert 'stages.1.4.attn.conv_h.weight, stages.1.4.attn.conv_h.bias' in message and 'unexpected' not in message
    message = fails(lfnsb_file, drop=['features.5'])  # of many the first ones and their number
    assert ' more' in message and message.count('stages.1.') == 20


def test_another_network_is_named(lfnsb_file, mfn_file):
    assert fails(lfnsb_file, 'ddamfn').endswith('is of the network lfnsb, not ddamfn: give --model lfnsb.')
    assert 'give --model mfn' in fails(mfn_file, 'lfn_small')
    with pytest.raises(UserError, match=r'no model resnet18.*lfn_small'):
        convert(mfn_file, 'resnet18', mfn_file.parent / 'out')


@pytest.mark.parametrize('key, value, reason', [
    ('fc.weight', torch.zeros(7, 512), r'fc.weight (7, 512) instead of (7, 256)'),
    ('features.0.conv.weight', torch.zeros(64, 3, 3, 3), 'mean the same: features.0.c.weight and features.0.conv.weight'),
    ('fc.bias', torch.full((7,), torch.nan), 'fc.bias that are not finite'),
    ('fc.weight', torch.zeros(7, 256, dtype=torch.int8), 'int8 in fc.weight'),
    ('fc.weight', [1, 2], 'fc.weight, it is of the type list'),
    ('fc.weight', torch.zeros(7, 1).expand(7, 256), 'no sound tensor in fc.weight'),
    ('fc.weight', torch.zeros(7, 256, device='meta'), 'no sound tensor in fc.weight'),
    ('fc.weight', torch.ones(7, 256).to_sparse(), 'no sound tensor in fc.weight'),
    ('epoch', 3, 'epoch, it is of the type int: --drop epoch leaves it out'),
    (3, torch.zeros(1), 'holds no weights'),
])
def test_entries_that_do_not_fit(key, value, reason, tmp_path):
    torch.save({**authors_weights('lfnsb_7'), key: value}, tmp_path / 'a.pth')
    assert reason in fails(tmp_path / 'a.pth', labels='rafdb')


@pytest.mark.parametrize('content, reason', [
    ({'state_dict': {}, 'arch': 'lfnsb', 'args': None}, 'timm-lfnsb pack'),
    (torch.zeros(3), 'holds no weights: it is of the type Tensor'),
    ({'epoch': 3, 'optimizer': {}}, 'holds no weights, only epoch, optimizer'),
    ({}, 'holds no weights'),
])
def test_files_without_a_network(content, reason, tmp_path):
    torch.save(content, tmp_path / 'a.pth')
    assert reason in fails(tmp_path / 'a.pth')


def test_an_existing_folder_is_not_touched(lfnsb_file, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine.txt').write_text('x')
    with pytest.raises(UserError, match='is there already'):
        convert(lfnsb_file, 'lfnsb', tmp_path / 'out', 'rafdb')
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['mine.txt']


# The command

def test_command_line(lfnsb_file, mfn_file, tmp_path):
    result = run(lfnsb_file, '--model', 'lfnsb', tmp_path / 'out', '--labels', 'rafdb')
    assert result.exit_code == 0, result.output
    assert 'labels: 0 surprise, 1 fear' in result.output and 'never uses them: 5 tensors' in result.output
    assert 'Warning' not in result.output and 'neither imported' not in result.output
    result = run(mfn_file, tmp_path / 'mfn', '--model', 'mfn')
    assert result.exit_code == 0 and 'ends at the embedding' in result.output
    result = run(lfnsb_file, tmp_path / 'three', '--model', 'lfnsb', '--drop', 'fc')
    assert result.exit_code == 0 and 'dropped: fc.weight, fc.bias' in result.output
    result = run(lfnsb_file, '--model', 'lfnsb', tmp_path / 'two')
    assert result.exit_code == 1 and result.output.startswith('Error: ') and '--labels' in result.output
    assert not (tmp_path / 'two').exists()


@pytest.mark.parametrize('labels, warned', [('rafdb', True), ('affectnet7', False), ('a,b,c,d,e,f,g', False)])
def test_rafdbs_order_with_ddamfn_is_warned_of(labels, warned, tmp_path):
    torch.save(authors_weights('ddamfn_7'), tmp_path / 'a.pth')
    result = run(tmp_path / 'a.pth', '--model', 'ddamfn', tmp_path / 'out', '--labels', labels)
    assert result.exit_code == 0 and ('--labels affectnet7' in result.output) == warned


def test_a_converted_backbone_starts_another_network(mfn_file, tmp_path):
    """The way from MFN on MS-Celeb-1M to DDAMFN, as its authors go it."""
    convert(mfn_file, 'mfn', tmp_path / 'mfn')
    count, left = graft('ddamfn', f'local-dir:{tmp_path / "mfn"}', tmp_path / 'init.safetensors')
    assert count > 800 and all(key.startswith(('head.', 'fc.')) for key in left)
