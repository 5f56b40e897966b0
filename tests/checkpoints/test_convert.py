"""`timm-lfnsb convert`: the authors' checkpoints become timm folders, and nothing that a file holds is ever run."""
from __future__ import annotations

import collections
import io
import json
import pickle
import random
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors.torch import save_file
from support import golden_networks, rule_input, rule_weights

from timm_lfnsb.checkpoints import pickles as unpickle
from timm_lfnsb.checkpoints.convert import LABEL_SETS, MAX_DEPTH, ConvertError, convert, count_classes, find_tensors
from timm_lfnsb.checkpoints.pickles import CheckpointError, LazyTensor, StandIn, load
from timm_lfnsb.cli import main
from timm_lfnsb.labels import EXPRESSIONS_7, EXPRESSIONS_8

# Legacy files keep the source code of modules, which the classes made up here have not.
pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")

OUR_NAMES = {'lfnsb_7': 'lfnsb', 'lfnsb_8': 'lfnsb', 'lfn': 'lfn_small', 'mfn': 'mfn', 'ddamfn_7': 'ddamfn'}
LABELS = {'lfnsb_7': 'rafdb', 'lfnsb_8': 'affectnet8', 'ddamfn_7': 'affectnet7'}
RAFDB = ('surprise', 'fear', 'disgust', 'happiness', 'sadness', 'anger', 'neutral')


def authors_weights(name: str) -> dict[str, torch.Tensor]:
    entry = golden_networks()[name]
    return rule_weights(entry['keys'], entry['salt'])


@pytest.fixture
def authors_classes():
    """Modules whose classes exist while a file is written, and no longer when it is read."""
    package, code = types.ModuleType('networks'), types.ModuleType('networks.MixedFeatureNet')
    for name in ('MixedFeatureNet', 'Mix_Depth_Wise', 'Block'):
        setattr(code, name, type(name, (torch.nn.Module,), {
            '__module__': code.__name__, '__setstate__': lambda self, state: pytest.fail('a __setstate__ was called')}))
    sys.modules.update({'networks': package, 'networks.MixedFeatureNet': code})
    yield code
    for name in ('networks', 'networks.MixedFeatureNet'):
        sys.modules.pop(name, None)


def forget_authors_classes() -> None:
    for name in ('networks', 'networks.MixedFeatureNet'):
        del sys.modules[name]


def as_module(weights: dict[str, torch.Tensor], code: types.ModuleType) -> torch.nn.Module:
    """A tree of modules, of the authors' classes, with the given state dict."""
    root = code.MixedFeatureNet()
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
    with pytest.raises(ConvertError) as caught:
        convert(source, model, source.parent / 'never', **kwargs)
    assert sorted(source.parent.iterdir()) == before
    message = str(caught.value)
    assert message.startswith((str(source), '--labels')) and message.endswith('.')
    assert '\n' not in message and len(message) < 2500
    return message


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
    'parameters': lambda w: {key: torch.nn.Parameter(value) if value.is_floating_point() else value
                             for key, value in w.items()},
    'name beside': lambda w: {'model': 'LFNSB', 'net': w},
    'transposed in memory': lambda w: {
        key: value.transpose(0, 1).contiguous().transpose(0, 1) if value.ndim == 4 else value
        for key, value in w.items()},
}


@pytest.mark.parametrize('wrap', WRAPS)
def test_wrapped_state_dicts(wrap, tmp_path):
    weights = authors_weights('lfnsb_7')
    torch.save(WRAPS[wrap](weights), tmp_path / 'authors.pth')
    tensors, kind = find_tensors(load(tmp_path / 'authors.pth').value)
    assert kind == 'state dict' and list(tensors) == list(weights)
    assert all(torch.equal(tensors[key].read(), value) for key, value in weights.items())


def test_other_precision_and_no_counters(tmp_path):
    weights = {key: value.double() for key, value in authors_weights('lfnsb_7').items() if 'num_batches' not in key}
    torch.save(weights, tmp_path / 'authors.pth')
    convert(tmp_path / 'authors.pth', 'lfnsb', tmp_path / 'out', 'rafdb')
    model = check_golden('lfnsb_7', tmp_path / 'out')
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert all(value == 0 for key, value in model.state_dict().items() if 'num_batches' in key)


def test_one_storage_for_all(tmp_path):
    """Tensors that are views of one block of numbers, as fused optimizers leave them."""
    weights = {key: value for key, value in authors_weights('lfnsb_7').items() if 'num_batches' not in key}
    block = torch.cat([value.flatten() for value in weights.values()])
    start, views = 0, {}
    for key, value in weights.items():
        views[key] = block[start:start + value.numel()].view(value.shape)
        start += value.numel()
    torch.save(views, tmp_path / 'authors.pth')
    convert(tmp_path / 'authors.pth', 'lfnsb', tmp_path / 'out', 'rafdb')
    check_golden('lfnsb_7', tmp_path / 'out')


def test_safetensors(tmp_path):
    save_file(authors_weights('lfnsb_7'), tmp_path / 'authors.safetensors')
    convert(tmp_path / 'authors.safetensors', 'lfnsb', tmp_path / 'out', 'rafdb')
    check_golden('lfnsb_7', tmp_path / 'out')
    content = (tmp_path / 'authors.safetensors').read_bytes()
    (tmp_path / 'cut.safetensors').write_bytes(content[:-100])
    assert 'damaged safetensors' in fails(tmp_path / 'cut.safetensors')


@pytest.mark.parametrize('zip_format', [True, False], ids=['zip', 'legacy'])
@pytest.mark.parametrize('protocol', [2, 4])
def test_whole_module_of_classes_that_are_not_here(zip_format, protocol, authors_classes, tmp_path):
    module = as_module(authors_weights('mfn'), authors_classes)
    torch.save(module, tmp_path / 'MFN_msceleb.pth', _use_new_zipfile_serialization=zip_format,
               pickle_protocol=protocol)
    forget_authors_classes()
    with pytest.raises((AttributeError, ModuleNotFoundError)):
        torch.load(tmp_path / 'MFN_msceleb.pth', weights_only=False)
    converted = convert(tmp_path / 'MFN_msceleb.pth', 'mfn', tmp_path / 'out')
    check_golden('mfn', tmp_path / 'out')
    assert converted.kind == 'whole module' and len(converted.unused) > 100 and not converted.label_names
    assert 'networks.MixedFeatureNet.MixedFeatureNet' in converted.foreign
    assert 'networks' not in sys.modules


@pytest.mark.parametrize('zip_format', [True, False], ids=['zip', 'legacy'])
def test_parallel_module_inside_a_checkpoint(zip_format, authors_classes, tmp_path):
    module = torch.nn.DataParallel(as_module(authors_weights('ddamfn_7'), authors_classes))
    torch.save({'epoch': 3, 'net': module}, tmp_path / 'a.pth', _use_new_zipfile_serialization=zip_format)
    forget_authors_classes()
    convert(tmp_path / 'a.pth', 'ddamfn', tmp_path / 'out', 'affectnet7')
    check_golden('ddamfn_7', tmp_path / 'out')


@pytest.mark.parametrize('zip_format', [True, False], ids=['zip', 'legacy'])
def test_whole_module_of_real_layers(zip_format, tmp_path):
    """With all that torch's own layers keep besides their weights; tied weights, too."""
    donor = timm.create_model('mobilefacenet', num_classes=0).eval()
    donor.stages[0][1].expand.conv.weight = donor.stages[0][2].expand.conv.weight
    donor.register_forward_hook(print)
    torch.save(donor, tmp_path / 'a.pth', _use_new_zipfile_serialization=zip_format)
    converted = convert(tmp_path / 'a.pth', 'mobilefacenet', tmp_path / 'out')
    assert 'torch.nn.modules.conv.Conv2d' in converted.foreign
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in donor.state_dict().items())


def test_legacy_state_dict(tmp_path):
    torch.save({'state_dict': authors_weights('lfnsb_7')}, tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    convert(tmp_path / 'a.pth', 'lfnsb', tmp_path / 'out', 'rafdb')
    check_golden('lfnsb_7', tmp_path / 'out')


def test_every_type_and_layout_reads_as_torch_does(tmp_path):
    base = torch.arange(24.).reshape(4, 6)
    tensors = {str(dtype): base.to(dtype) for dtype in set(unpickle._STORAGE_DTYPES.values())}
    tensors |= {'view': base[1:3, ::2], 'transposed': base.t(), 'scalar': torch.tensor(3.), 'empty': torch.empty(0, 3),
                'parameter': torch.nn.Parameter(base), 'expanded': torch.zeros(3)[:1].expand(2)}
    for zip_format in (True, False):
        torch.save(tensors, tmp_path / 'a.pth', _use_new_zipfile_serialization=zip_format)
        read = load(tmp_path / 'a.pth').value
        assert list(read) == list(tensors)
        for key, expected in tensors.items():
            actual = read[key].read()
            assert actual.dtype == expected.dtype and torch.equal(actual, expected), key


def test_our_own_keys(tmp_path):
    donor = timm.create_model('lfnsb.ferplus', pretrained=True).eval()
    torch.save(donor.state_dict(), tmp_path / 'ours.pth')
    convert(tmp_path / 'ours.pth', 'lfnsb', tmp_path / 'out', EXPRESSIONS_8)
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True).eval()
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        assert torch.equal(loaded(images), donor(images))


# Labels, and what does not fit

def test_label_sets_are_the_data_sets_own():
    from timm_lfnsb.data.prepare import RAFDB_LABELS
    assert LABEL_SETS['rafdb'] == RAFDB == tuple(RAFDB_LABELS[i] for i in range(1, 8))
    assert LABEL_SETS['affectnet7'] == EXPRESSIONS_7 and LABEL_SETS['affectnet8'] == EXPRESSIONS_8
    assert LABEL_SETS['ferplus'] == (
        'neutral', 'happiness', 'surprise', 'sadness', 'anger', 'disgust', 'fear', 'contempt')
    help_text = ' '.join(CliRunner().invoke(main, ['convert', '--help']).output.split())
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


def test_labels_are_never_guessed(lfnsb_file, mfn_file):
    message = fails(lfnsb_file)
    assert '7 classes' in message and 'rafdb (surprise, fear' in message and 'affectnet7 (neutral' in message
    assert 'affectnet8' not in message and '--drop fc' in message
    assert '7 classes, but --labels gives 8 names' in fails(lfnsb_file, labels='affectnet8')
    assert 'no list of names' in fails(lfnsb_file, labels='raf')
    assert 'two that mean the same' in fails(lfnsb_file, labels='happy,happiness,c,d,e,f,g')
    assert 'empty name' in fails(lfnsb_file, labels='a,,c,d,e,f,g')
    assert 'no classifier' in fails(mfn_file, 'mfn', labels='rafdb')


def test_labels_by_hand(lfnsb_file, tmp_path):
    assert convert(lfnsb_file, 'lfnsb', tmp_path / 'out', 'g, f, e, d, c, b, a').label_names == tuple('gfedcba')


def test_classifier_of_a_face_recogniser_is_dropped_when_asked_for(tmp_path):
    weights = {**authors_weights('mfn'), 'fc.weight': torch.zeros(85742, 256), 'fc.bias': torch.zeros(85742)}
    torch.save(weights, tmp_path / 'a.pth')
    message = fails(tmp_path / 'a.pth', 'mfn')
    assert '85742 classes' in message and '--drop fc' in message
    assert convert(tmp_path / 'a.pth', 'mfn', tmp_path / 'out', drop=['fc']).dropped == ('fc.weight', 'fc.bias')
    check_golden('mfn', tmp_path / 'out')


def test_unknown_head_is_named_and_can_be_dropped(tmp_path):
    torch.save({**authors_weights('mfn'), 'arcface.weight': torch.zeros(9, 256)}, tmp_path / 'a.pth')
    assert 'unexpected keys: arcface.weight (' in fails(tmp_path / 'a.pth', 'mfn')
    assert 'nothing that --drop arc could' in fails(tmp_path / 'a.pth', 'mfn', drop=['arc'])
    convert(tmp_path / 'a.pth', 'mfn', tmp_path / 'out', drop=['arcface'])
    check_golden('mfn', tmp_path / 'out')


def test_dropping_never_leaves_random_weights(lfnsb_file):
    message = fails(lfnsb_file, drop=['sb'])
    assert 'missing keys' in message and 'head.conv.bias' in message and 'head.reduce.bn.weight' in message


def test_few_missing_keys_are_all_named(tmp_path):
    weights = authors_weights('lfnsb_7')
    gone = [key for key in weights if 'features.5.model.3.CA.conv2' in key]
    torch.save({key: value for key, value in weights.items() if key not in gone}, tmp_path / 'a.pth')
    message = fails(tmp_path / 'a.pth')
    assert len(gone) == 2 and 'stages.1.4.attn.conv_h.weight, stages.1.4.attn.conv_h.bias' in message
    assert 'unexpected' not in message and 'more' not in message


def test_of_many_missing_keys_the_first_and_their_number(lfnsb_file):
    message = fails(lfnsb_file, drop=['features.5'])
    assert ' more' in message and message.count('stages.1.') == 20


def test_another_network_is_named(lfnsb_file, mfn_file):
    message = fails(lfnsb_file, 'ddamfn')
    assert message.endswith('is of the network lfnsb, not ddamfn: give --model lfnsb.')
    assert 'give --model mfn' in fails(mfn_file, 'lfn_small')
    with pytest.raises(ConvertError, match=r'no model resnet18.*lfn_small'):
        convert(mfn_file, 'resnet18', mfn_file.parent / 'out')


def test_other_shapes_are_named(tmp_path):
    weights = authors_weights('mfn')
    weights['linear.weight'] = torch.zeros(512, 512)
    torch.save(weights, tmp_path / 'a.pth')
    assert 'linear.weight (512, 512) instead of (256, 512)' in fails(tmp_path / 'a.pth', 'mfn')


def test_two_names_for_one_tensor(tmp_path):
    weights = authors_weights('mfn')
    weights['features.0.conv.weight'] = weights['conv1.conv.weight']
    torch.save(weights, tmp_path / 'a.pth')
    assert 'mean the same: conv1.conv.weight and features.0.conv.weight' in fails(tmp_path / 'a.pth', 'mfn')


@pytest.mark.parametrize('change, reason', [
    (lambda w: w['fc.weight'].__setitem__((0, 0), float('nan')), r'fc.weight that are not finite'),
    (lambda w: w.__setitem__('fc.weight', torch.zeros(7, 256, dtype=torch.int8)), 'int8 in fc.weight'),
    (lambda w: w.__setitem__('fc.weight', [1, 2]), 'fc.weight is of the type list and not a tensor'),
    (lambda w: w.__setitem__('epoch', 3), 'epoch is of the type int and not a tensor; --drop epoch'),
    (lambda w: w.__setitem__(3, torch.zeros(1)), 'the key 3 among its weights'),
])
def test_entries_that_are_no_weights(change, reason, tmp_path):
    weights = authors_weights('lfnsb_7')
    change(weights)
    torch.save(weights, tmp_path / 'a.pth')
    assert reason in fails(tmp_path / 'a.pth', labels='rafdb')


def test_checkpoints_of_train_py_go_to_pack(lfnsb_file, tmp_path):
    torch.save({'state_dict': {}, 'arch': 'lfnsb', 'args': None}, tmp_path / 'last.pth.tar')
    assert 'timm-lfnsb pack' in fails(tmp_path / 'last.pth.tar')


def test_an_existing_folder_is_not_touched(lfnsb_file, tmp_path):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'mine.txt').write_text('x')
    with pytest.raises(ConvertError, match='is there already'):
        convert(lfnsb_file, 'lfnsb', tmp_path / 'out', 'rafdb')
    assert [path.name for path in (tmp_path / 'out').iterdir()] == ['mine.txt']


# Files that mean harm

class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


class Marker:
    """A file that exists as soon as something of a pickle is run."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def payloads(self) -> dict[str, object]:
        import builtins
        import functools
        import operator
        import os
        touch = f'touch {self.path}'
        code = f'open({str(self.path)!r}, "w")'
        return {
            'os.system': Call(os.system, touch),
            'eval': Call(builtins.eval, code),
            'exec': Call(builtins.exec, code),
            'open': Call(open, str(self.path), 'w'),
            'getattr': Call(getattr, Call(__import__, 'os'), 'system'),
            'chain': Call(functools.reduce, Call(operator.methodcaller, '__call__'), [Call(eval, code)]),
            'partial': Call(functools.partial(eval, code)),
            'attrgetter': Call(operator.attrgetter, 'system'),
        }


def assembled(*parts: bytes | str | tuple) -> bytes:
    """A pickle by hand: bytes as they are, text as a short string."""
    out = b'\x80\x04'
    for part in parts:
        out += part if isinstance(part, bytes) else b'\x8c' + bytes([len(part)]) + part.encode()
    return out + b'.'


CONTAINERS = ['raw pickle', 'legacy', 'zip']


def write(path: Path, data_pickle: bytes, container: str) -> None:
    """Put a pickle where torch.load would run it."""
    if container == 'raw pickle':
        path.write_bytes(data_pickle)
    elif container == 'legacy':
        head = [pickle.dumps(value, 2) for value in (
            unpickle.LEGACY_MAGIC, 1001, {'protocol_version': 1001, 'little_endian': True, 'type_sizes': {}})]
        path.write_bytes(b''.join(head) + data_pickle + pickle.dumps([], 2))
    else:
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('archive/data.pkl', data_pickle)
            archive.writestr('archive/version', '3\n')


@pytest.mark.parametrize('container', CONTAINERS)
@pytest.mark.parametrize('name', Marker(Path('x')).payloads)
def test_calls_in_a_pickle_are_not_made(name, container, tmp_path):
    marker = tmp_path / 'marker'
    payload = Marker(marker).payloads[name]
    for protocol in (0, 2, 4, 5):
        data = pickle.dumps(payload, protocol)
        write(tmp_path / 'evil.pth', data, container)
        message = fails(tmp_path / 'evil.pth')
        assert 'nothing of it was run' in message and not marker.exists()
        assert f'.{getattr(payload.call[0], "__name__", "partial")} ' in message
    # The payload is real: an ordinary unpickler runs it.
    if name in ('os.system', 'eval', 'exec', 'open', 'partial'):
        pickle.loads(data)
        assert marker.exists()


@pytest.mark.parametrize('place', ['weight', 'beside', 'key', 'class', 'storage'])
def test_calls_hidden_in_a_checkpoint(place, tmp_path):
    """Beside sound weights the file converts, nothing run; as a weight it is refused by name."""
    import os
    weights: dict = authors_weights('lfnsb_7')
    evil = Call(os.system, f'touch {tmp_path / "marker"}')
    content: dict = {'model_state_dict': weights}
    if place == 'weight':
        weights['fc.bias'] = evil
    elif place == 'beside':
        content['optimizer'] = {'state': [evil]}
    elif place == 'key':
        content[evil] = 1
    elif place == 'class':
        content['args'] = Call(type, 'X', (Call(eval, 'object'),), {})
    else:
        weights['fc.bias'] = Call(torch._utils._rebuild_tensor_v2, evil, 0, (7,), (1,), False, {})
    torch.save(content, tmp_path / 'a.pth')
    if place in ('weight', 'storage'):
        assert {'weight': 'system would have made (nothing of it was run) and not a tensor',
                'storage': 'a tensor without data'}[place] in fails(tmp_path / 'a.pth', labels='rafdb')
    else:
        converted = convert(tmp_path / 'a.pth', 'lfnsb', tmp_path / 'out', 'rafdb')
        assert any(name.endswith(('.system', '.type')) for name in converted.foreign)
        check_golden('lfnsb_7', tmp_path / 'out')
    assert not (tmp_path / 'marker').exists()


def by_hand(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Pickles that no pickler writes, and a part of the message they must get."""
    command = f'touch {marker}'
    run = b'posix\nsystem\n'
    builder = ('torch._utils', '_rebuild_tensor_v2', b'\x93')
    return {
        'GLOBAL': (assembled(b'c' + run, command, b'\x85R'), 'posix.system'),
        'INST': (assembled(b'(', command, b'i' + run), 'posix.system'),
        'OBJ': (assembled(b'(c' + run, command, b'o'), 'posix.system'),
        'NEWOBJ': (assembled(b'c' + run, command, b'\x85\x81'), 'posix.system'),
        'NEWOBJ_EX': (assembled(b'c' + run, command, b'\x85}\x92'), 'posix.system'),
        'name alone': (assembled(b'c' + run), 'the name posix.system'),
        'EXT1': (assembled(b'\x82\x01'), 'instruction EXT1'),
        'EXT4': (assembled(b'\x84\x01\0\0\0'), 'instruction EXT4'),
        'out-of-band buffer': (assembled(b'\x97'), 'instruction NEXT_BUFFER'),
        'PERSID': (assembled(b'P' + run), 'PERSID'),
        'dotted name': (assembled('collections', 'OrderedDict.fromkeys', b'\x93', b')R'),
                        'collections.OrderedDict.fromkeys'),
        'globals of a builder': (assembled('torch._utils', '_rebuild_tensor_v2.__globals__', b'\x93)R'),
                                 '_rebuild_tensor_v2.__globals__'),
        'call of a result': (assembled(b'c' + run, command, b'\x85R)R'), 'posix.system'),
        'call of a string': (assembled('text', b')R'), 'neither a class nor a function'),
        'arguments that are none': (assembled(b'c' + run, b'K\x01R'), 'neither a class nor a function'),
        # state for a builder, its class, or an OrderedDict must change nothing here
        'state of a builder': (assembled(*builder, b'N}', '__defaults__', 'x', b's\x86b'), '_rebuild_tensor_v2'),
        'state of a dictionary': (assembled(
            'collections', 'OrderedDict', b'\x93)R}', '__class__', b'c' + run, b'sb'), 'of the type dict'),
        'setstate': (assembled(b'cnowhere\nThing\n)\x81}', '__setstate__', b'c' + run, b'sb', command, b'b'),
                     'nowhere.Thing'),
        'reduce in a state': (assembled(b'cnowhere\nThing\n)\x81}', '__reduce__', b'c' + run, b'sb'), 'nowhere.Thing'),
        'entries of a number': (assembled(b'K\x01', 'a', 'b', b's'), 'takes none'),
        'wrong arguments of a builder': (assembled(*builder, b')R'), 'damaged'),
        'name of an object': (assembled(b'K\x01K\x02\x93'), 'no text'),
        'mark missing': (assembled(b't'), 'damaged'),
        'stack empty': (assembled(b'0'), 'damaged'),
        'memo empty': (assembled(b'h\x07'), 'damaged'),
        'terminal codes': (assembled(b'c\x1b[31mx\nred\x07\n)R'), '?[31mx.red?'),
    }


@pytest.mark.parametrize('container', CONTAINERS)
@pytest.mark.parametrize('name', by_hand(Path('x')))
def test_pickles_by_hand(name, container, tmp_path):
    data, reason = by_hand(tmp_path / 'marker')[name]
    write(tmp_path / 'evil.pth', data, container)
    before = dict(vars(torch._utils._rebuild_tensor_v2)), torch._utils._rebuild_tensor_v2.__defaults__
    assert reason in fails(tmp_path / 'evil.pth')
    assert not (tmp_path / 'marker').exists()
    assert (dict(vars(torch._utils._rebuild_tensor_v2)), torch._utils._rebuild_tensor_v2.__defaults__) == before


def test_a_name_is_never_imported(tmp_path):
    (tmp_path / 'trap_module.py').write_text(f'open({str(tmp_path / "marker")!r}, "w")')
    sys.path.insert(0, str(tmp_path))
    try:
        write(tmp_path / 'evil.pth', assembled(b'ctrap_module\nThing\n)\x81'), 'zip')
        with pytest.raises(ConvertError, match=r'trap_module\.Thing'):
            convert(tmp_path / 'evil.pth', 'lfnsb', tmp_path / 'out')
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / 'marker').exists() and 'trap_module' not in sys.modules


# Bombs

def tensor_pickle(key='0', kind='FloatStorage', count=6, offset=0, shape=(2, 3), stride=(3, 1)) -> bytes:
    """{'w': tensor} as torch.save writes it, with whatever numbers."""
    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return ('storage', getattr(torch, kind, None), key, 'cpu', count) if obj is marker else None
    marker = Call(int)
    stream = io.BytesIO()
    Pickler(stream, 2).dump(
        {'w': Call(torch._utils._rebuild_tensor_v2, marker, offset, shape, stride, False, collections.OrderedDict())})
    return stream.getvalue()


def write_tensor(path: Path, data: bytes = bytes(24), name: str = '0', **numbers) -> None:
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('archive/data.pkl', tensor_pickle(**numbers))
        archive.writestr('archive/version', '3\n')
        archive.writestr(f'archive/data/{name}', data)


@pytest.mark.parametrize('numbers, reason', [
    (dict(shape=(2, 4), stride=(4, 1)), 'reaches beyond its 6 numbers'),
    (dict(shape=(2, 3), stride=(1000, 1)), 'reaches beyond'),
    (dict(offset=1), 'reaches beyond'),
    (dict(offset=2**62), 'reaches beyond'),
    (dict(offset=2**64), 'impossible shape'),
    (dict(offset=-1), 'impossible shape'),
    (dict(shape=(-1, 3)), 'impossible shape'),
    (dict(stride=(-3, 1)), 'impossible shape'),
    (dict(stride=(3,)), 'impossible shape'),
    (dict(shape=(10**6, 10**6), stride=(0, 0)), 'reaches beyond'),
    (dict(shape=(2**62, 4), stride=(0, 0)), 'reaches beyond'),
    (dict(shape=(1,) * 1000, stride=(1,) * 1000), 'impossible shape'),
    (dict(shape=(2., 3), stride=(3, 1)), 'impossible shape'),
    (dict(shape='23', stride='31'), 'impossible shape'),
    (dict(count=10**15), '0 should be 4000000000000000 bytes'),
    (dict(count=7), '0 should be 28 bytes'),
    (dict(count=-6), 'reference to data'),
    (dict(count='6'), 'reference to data'),
    (dict(kind='DoubleStorage'), '0 should be 48 bytes'),
    (dict(kind='Tensor'), 'data of the type torch.Tensor'),
    (dict(kind='nothing'), 'reference to data'),
    (dict(key='../../../../etc/passwd'), 'etc/passwd should be 24 bytes'),
    (dict(key='../data.pkl'), 'data.pkl should be 24 bytes'),
    (dict(key=0), 'reference to data'),
])
def test_tensors_that_lie_about_their_data(numbers, reason, tmp_path):
    write_tensor(tmp_path / 'evil.pth', **numbers)
    assert reason in fails(tmp_path / 'evil.pth')


def test_the_tensor_of_those_tests_reads_when_it_is_honest(tmp_path):
    write_tensor(tmp_path / 'good.pth', struct.pack('<6f', *range(6)))
    expected = torch.arange(6.).reshape(2, 3)
    assert torch.equal(load(tmp_path / 'good.pth').value['w'].read(), expected)
    assert torch.equal(torch.load(tmp_path / 'good.pth', weights_only=True)['w'], expected)


def test_zip_bomb(tmp_path):
    with zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', tensor_pickle(count=25_000_000))
        archive.writestr('archive/data/0', bytes(100_000_000))
    assert (tmp_path / 'bomb.pth').stat().st_size < 200_000
    message = fails(tmp_path / 'bomb.pth')
    assert 'compressed record' in message and 'zip bomb' in message


def test_zip_bomb_of_records_on_top_of_each_other(tmp_path):
    """One megabyte of data that a thousand entries of the directory point to."""
    with zipfile.ZipFile(tmp_path / 'bomb.pth', 'w') as archive:
        archive.writestr('archive/data.pkl', tensor_pickle())
        archive.writestr('archive/data/0', bytes(1_000_000))
        for i in range(1000):
            info = zipfile.ZipInfo(f'archive/data/{i + 1}')
            original = archive.getinfo('archive/data/0')
            info.header_offset, info.CRC = original.header_offset, original.CRC
            info.file_size = info.compress_size = original.file_size
            archive.filelist.append(info)
            archive.NameToInfo[info.filename] = info
    assert (tmp_path / 'bomb.pth').stat().st_size < 1_200_000
    assert 'on top of each other' in fails(tmp_path / 'bomb.pth')


def test_zip_with_a_size_that_is_not_true(tmp_path):
    write_tensor(tmp_path / 'a.pth', bytes(1000), count=250, shape=(250,), stride=(1,))
    content = (tmp_path / 'a.pth').read_bytes()
    # 1000 bytes, stored: once in the local header, twice in the directory
    assert content.count(struct.pack('<II', 1000, 1000)) == 2
    (tmp_path / 'a.pth').write_bytes(content.replace(struct.pack('<II', 1000, 1000), struct.pack('<II', 2**31, 2**31)))
    assert 'on top of each other' in fails(tmp_path / 'a.pth')


def test_records_twice(tmp_path):
    with pytest.warns(UserWarning, match='Duplicate'), zipfile.ZipFile(tmp_path / 'a.pth', 'w') as archive:
        archive.writestr('archive/data.pkl', pickle.dumps({}))
        archive.writestr('archive/data.pkl', tensor_pickle())
    assert 'records twice' in fails(tmp_path / 'a.pth')


@pytest.mark.parametrize('depth', [100, 100_000])
@pytest.mark.parametrize('kind', ['lists', 'tuples', 'dictionaries', 'objects', 'calls'])
def test_deep_nesting(kind, depth, tmp_path):
    data = {
        'lists': b']' * depth + b'a' * (depth - 1),
        'tuples': b')' + b'\x85' * depth,
        'dictionaries': b'}\x8c\x05model' * depth + b'}' + b's' * depth,
        'objects': b'cnowhere\nThing\n\x94' + b'h\x00)\x81}\x8c\x05model' * depth + b'N' + b'sb' * depth,
        'calls': b'cnowhere\nThing\n\x94' + b'h\x00' * depth + b')R' + b'\x85R' * (depth - 1),
    }[kind]
    write(tmp_path / 'deep.pth', b'\x80\x04' + data + b'.', 'zip')
    assert 'holds no weights' in fails(tmp_path / 'deep.pth')


def test_deep_tuple_as_a_key_is_not_hashed(tmp_path):
    """Hashing one recurses in C without a limit: with an ordinary unpickler the process dies."""
    write(tmp_path / 'deep.pth', b'\x80\x04}' + b')' + b'\x85' * 300_000 + b'Ns.', 'zip')
    assert 'holds no weights' in fails(tmp_path / 'deep.pth')


@pytest.mark.parametrize('depth', [100, 10_000])
def test_deep_modules(depth, tmp_path):
    open_module = b'h\x00)\x81}(\x8c\x0b_parameters}\x8c\x08_buffers}\x8c\x08_modules}\x8c\x01m'
    close_module = b'su' + b'b'
    data = b'cnowhere\nThing\n\x940' + open_module * depth + b'N' + close_module * depth
    write(tmp_path / 'deep.pth', b'\x80\x04' + data + b'.', 'zip')
    assert f'nested more than {MAX_DEPTH} deep' in fails(tmp_path / 'deep.pth')


def test_a_few_modules_that_pose_as_endlessly_many(tmp_path):
    """Each has the next one twice: 2 ** 60 places."""
    module = StandIn('nowhere.Thing', dict(_parameters={}, _buffers={}, _modules={}))
    for _ in range(60):
        module = StandIn('nowhere.Thing', dict(_parameters={}, _buffers={}, _modules={'a': module, 'b': module}))
    with pytest.raises(ConvertError, match='more than 20000'):
        find_tensors(module)
    module.state['_modules']['a'] = module
    with pytest.raises(ConvertError, match=r'more than (20000|64)'):
        find_tensors(module)


def test_absurd_names_of_modules(tmp_path):
    long = 'x' * 1_000_000
    module = StandIn('nowhere.Thing', dict(_parameters={long: None}, _buffers={}, _modules={}))
    with pytest.raises(ConvertError, match='no sound _parameters'):
        find_tensors(module)
    for _ in range(30):
        module = StandIn('nowhere.Thing', dict(_parameters={}, _buffers={}, _modules={'x' * 100: module}))
    with pytest.raises(ConvertError, match='nested'):
        find_tensors(module)
    torch.save({long: torch.zeros(1)}, tmp_path / 'a.pth')
    assert 'no name of any' in fails(tmp_path / 'a.pth')


def test_absurd_number_of_classes(tmp_path):
    """A tensor without numbers may have any shape."""
    write_tensor(tmp_path / 'a.pth', shape=(2**62, 0), stride=(1, 1))
    tensor = load(tmp_path / 'a.pth').value['w']
    assert tensor.shape == (2**62, 0) and count_classes({'fc.weight': tensor}) == 0


def test_billion_laughs(tmp_path):
    """Lists of lists of the same list, and a tuple of tuples as a key, whose hash would take 2 ** 200 steps."""
    tuples = b')\x940' + b''.join(b'h' + bytes([i]) + b'h' + bytes([i]) + b'\x86\x940' for i in range(200))
    write(tmp_path / 'laughs.pth', b'\x80\x04' + tuples + b'}h\xc8Ns.', 'zip')
    assert 'holds no weights' in fails(tmp_path / 'laughs.pth')
    write(tmp_path / 'laughs.pth', b'\x80\x04' + tuples + b'h\xc8.', 'zip')
    assert 'holds no weights: it is of the type tuple' in fails(tmp_path / 'laughs.pth')


@pytest.mark.parametrize('data', [
    b'\x8b\xff\xff\xff\x7f', b'\x8d' + b'\xff' * 7 + b'\x7f', b'\x8e' + b'\xff' * 7 + b'\x7f',
    b'\x96' + b'\xff' * 7 + b'\x7f', b'B\xff\xff\xff\xff', b'X\xff\xff\xff\xff', b'T\xff\xff\xff\x7f',
    b'I' + b'9' * 100_000 + b'\n', b'L' + b'9' * 100_000 + b'L\n',
], ids=['LONG4', 'BINUNICODE8', 'BINBYTES8', 'BYTEARRAY8', 'BINBYTES', 'BINUNICODE', 'BINSTRING', 'INT', 'LONG'])
def test_lengths_beyond_the_file_are_not_allocated(data, tmp_path):
    import tracemalloc
    write(tmp_path / 'a.pth', b'\x80\x04' + data + b'.', 'zip')
    tracemalloc.start()
    try:
        assert 'damaged' in fails(tmp_path / 'a.pth')
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_memo_and_frame_numbers_are_only_numbers(tmp_path):
    data = b'\x80\x04\x95' + b'\xff' * 8 + b'}r\xff\xff\xff\xff.'
    write(tmp_path / 'a.pth', data, 'zip')
    assert 'holds no weights' in fails(tmp_path / 'a.pth')


def test_endless_pickle(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickle, 'MAX_INSTRUCTIONS', 1000)
    write(tmp_path / 'a.pth', b'\x80\x04' + b'N0' * 1000 + b'N.', 'zip')
    assert 'more than 1000 instructions' in fails(tmp_path / 'a.pth')


def test_limits_leave_room_for_the_largest_network(tmp_path):
    import pickletools
    torch.save(timm.create_model('ddamfn'), tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.pth') as archive:
        count = sum(1 for _ in pickletools.genops(archive.read('a/data.pkl')))
    assert 10_000 < count < unpickle.MAX_INSTRUCTIONS / 5


def test_too_large_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(unpickle, 'MAX_FILE', 1 << 20)
    with (tmp_path / 'a.pth').open('wb') as file:
        file.truncate((1 << 20) + 1)
    assert 'larger than 1 MiB' in fails(tmp_path / 'a.pth')


# Damage

@pytest.mark.parametrize('zip_format', [True, False], ids=['zip', 'legacy'])
def test_truncated_files(zip_format, tmp_path):
    torch.save(authors_weights('lfnsb_7'), tmp_path / 'a.pth', _use_new_zipfile_serialization=zip_format)
    content = (tmp_path / 'a.pth').read_bytes()
    for size in (1, 3, 9, 40, 3000, len(content) // 2, len(content) - 1):
        (tmp_path / 'cut.pth').write_bytes(content[:size])
        message = fails(tmp_path / 'cut.pth', labels='rafdb')
        assert 'damaged' in message or 'truncated' in message


@pytest.mark.parametrize('zip_format', [True, False], ids=['zip', 'legacy'])
def test_altered_numbers_in_a_zip_are_noticed(zip_format, tmp_path):
    """Its records have checksums; the legacy format has none, so there a plausible number goes unnoticed."""
    torch.save({'w': torch.ones(1000)}, tmp_path / 'a.pth', _use_new_zipfile_serialization=zip_format)
    content = (tmp_path / 'a.pth').read_bytes()
    at = content.index(struct.pack('<f', 1.) * 10)
    (tmp_path / 'a.pth').write_bytes(content[:at] + b'\x01' + content[at + 1:])
    tensor = load(tmp_path / 'a.pth').value['w']
    assert isinstance(tensor, LazyTensor)
    if zip_format:
        with pytest.raises(CheckpointError, match='is damaged'):
            tensor.read()
    else:
        assert tensor.read().tolist()[1:] == [1.] * 999


def test_not_a_checkpoint_at_all(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(50):
        (tmp_path / 'a.pth').write_bytes(rng.bytes(int(rng.integers(0, 3000))))
        assert 'is no checkpoint' in fails(tmp_path / 'a.pth')
    (tmp_path / 'a.pth').write_bytes(b'')
    assert 'is no checkpoint' in fails(tmp_path / 'a.pth')
    (tmp_path / 'a.pth').write_text('<!DOCTYPE html><title>Quota exceeded</title>')
    assert 'is no checkpoint' in fails(tmp_path / 'a.pth')
    with zipfile.ZipFile(tmp_path / 'a.pth', 'w') as archive:
        archive.writestr('readme.txt', 'hello')
    assert 'no data.pkl' in fails(tmp_path / 'a.pth')
    assert 'does not exist' in fails(tmp_path / 'nothing.pth')
    assert 'is no file' in fails(tmp_path)
    torch.save(torch.zeros(3), tmp_path / 'a.pth')
    assert 'holds no weights: it is a tensor' in fails(tmp_path / 'a.pth')
    torch.save({'epoch': 3, 'optimizer': {}}, tmp_path / 'a.pth')
    assert 'holds no weights, only epoch, optimizer' in fails(tmp_path / 'a.pth')


def test_torchscript_is_code(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / 'a.pth')
    assert 'TorchScript' in fails(tmp_path / 'a.pth')


@pytest.mark.parametrize('zip_format', [True, False], ids=['zip', 'legacy'])
def test_any_altered_byte_is_survived(zip_format, authors_classes, tmp_path):
    """Hundreds of damaged variants of a whole module: read, or refused with a reason; never another exception."""
    module = authors_classes.MixedFeatureNet()
    module.add_module('conv', torch.nn.Conv2d(2, 3, 1))
    module.add_module('bn', torch.nn.BatchNorm2d(3))
    torch.save(module, tmp_path / 'a.pth', _use_new_zipfile_serialization=zip_format)
    forget_authors_classes()
    content = (tmp_path / 'a.pth').read_bytes()
    if zip_format:
        with zipfile.ZipFile(tmp_path / 'a.pth') as archive:
            data = archive.read('a/data.pkl')
    else:
        data = content
    rng = random.Random(0)
    outcomes = collections.Counter()
    for _ in range(500):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 5))):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            if zip_format:  # its checksums would catch nearly all
                unpickle._run(
                    io.BytesIO(damaged), lambda reference: unpickle.Storage(torch.float32, 100, bytes), set())
            else:
                unpickle._load(bytes(damaged), set())
        except CheckpointError:
            outcomes['refused'] += 1
        else:
            outcomes['read'] += 1
    assert outcomes['refused'] > 50 and outcomes['read'] > 10


# The command

def test_command_line(lfnsb_file, mfn_file, tmp_path):
    result = CliRunner().invoke(main, [
        'convert', str(lfnsb_file), '--model', 'lfnsb', str(tmp_path / 'out'), '--labels', 'rafdb'])
    assert result.exit_code == 0, result.output
    assert 'labels: 0 surprise, 1 fear' in result.output and 'never uses them: 5 tensors' in result.output
    assert 'Warning' not in result.output
    result = CliRunner().invoke(main, ['convert', str(mfn_file), str(tmp_path / 'mfn'), '--model', 'mfn'])
    assert result.exit_code == 0 and 'ends at the embedding' in result.output
    result = CliRunner().invoke(main, [
        'convert', str(lfnsb_file), str(tmp_path / 'three'), '--model', 'lfnsb', '--drop', 'fc'])
    assert result.exit_code == 0 and 'dropped: fc.weight, fc.bias' in result.output
    assert timm.create_model(f'local-dir:{tmp_path / "three"}', pretrained=True)(torch.zeros(1, 3, 112, 112)).shape == (
        1, 256)
    result = CliRunner().invoke(main, ['convert', str(lfnsb_file), '--model', 'lfnsb', str(tmp_path / 'two')])
    assert result.exit_code == 1 and result.output.startswith('Error: ') and '--labels' in result.output
    assert not (tmp_path / 'two').exists()


def test_command_line_names_what_it_did_not_run(tmp_path):
    import os
    torch.save({'state_dict': authors_weights('lfnsb_7'), 'extra': Call(os.getcwd)}, tmp_path / 'a.pth')
    result = CliRunner().invoke(main, [
        'convert', str(tmp_path / 'a.pth'), '--model', 'lfnsb', str(tmp_path / 'out'), '--labels', 'rafdb'])
    assert result.exit_code == 0 and f'neither imported nor run: {os.getcwd.__module__}.getcwd' in result.output


@pytest.mark.parametrize('labels, warned', [('rafdb', True), ('affectnet7', False), ('a,b,c,d,e,f,g', False)])
def test_rafdbs_order_with_ddamfn_is_warned_of(labels, warned, tmp_path):
    torch.save(authors_weights('ddamfn_7'), tmp_path / 'a.pth')
    result = CliRunner().invoke(main, [
        'convert', str(tmp_path / 'a.pth'), '--model', 'ddamfn', str(tmp_path / 'out'), '--labels', labels])
    assert result.exit_code == 0
    assert ('--labels affectnet7' in result.output) == warned


def test_a_converted_backbone_starts_another_network(mfn_file, tmp_path):
    """The way from MFN on MS-Celeb-1M to DDAMFN, as its authors go it."""
    pytest.importorskip('sklearn', reason="graft needs pip install 'timm-lfnsb[eval]'")
    from timm_lfnsb.checkpoints.graft import graft
    convert(mfn_file, 'mfn', tmp_path / 'mfn')
    count, left = graft('ddamfn', f'local-dir:{tmp_path / "mfn"}', tmp_path / 'init.safetensors')
    assert count > 800 and all(key.startswith(('head.', 'fc.')) for key in left)
