"""Models of every kind give the same predictions, and what is no model is refused in one sentence."""
from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from timm_lfnsb.errors import UserError
from timm_lfnsb.evaluate.classifiers import counted_classes, load_classifier, measure_latency
from timm_lfnsb.evaluate.predictions import predict_folder
from timm_lfnsb.hub.push import staged
from timm_lfnsb.labels import LabelError

NAMES = ('sad', 'happiness', 'neutral', 'Angry', 'contempt')
FAST = dict(split='validation', workers=0, progress=False, device='cpu')


@pytest.fixture(scope='module')
def tiny():
    """One of timm's test models, which is exported in no time; random, but not of one opinion."""
    torch.manual_seed(1)
    model = timm.create_model('test_resnet', num_classes=5, pretrained_cfg_overlay={
        'label_names': NAMES, 'input_size': (3, 64, 64), 'mean': (0.4, 0.5, 0.6), 'crop_pct': 0.9}).eval()
    torch.nn.init.normal_(model.get_classifier().weight, std=5)
    return model


def assert_same(first, second, tolerance=1e-5):
    assert first.files == second.files and list(first.label_names) == list(second.label_names)
    assert (first.labels == second.labels).all()
    np.testing.assert_allclose(first.probabilities, second.probabilities, atol=tolerance)


@pytest.mark.parametrize('suffix, uint8', [('.onnx', False), ('.onnx', True), ('.xml', False), ('.pt2', False)])
def test_exported_files_say_what_their_model_says(tiny, face_folder, tmp_path, suffix, uint8):
    for name in ('onnx', {'.xml': 'openvino'}.get(suffix, 'onnxruntime')):
        pytest.importorskip(name, reason="pip install 'timm-lfnsb[export]' to test exported files")
    from timm_lfnsb.export.export import export_model
    export_model(tiny, tmp_path / f'tiny{suffix}', with_preprocess=uint8)
    expected = predict_folder(tiny, face_folder, **FAST)
    assert np.ptp(expected.probabilities, axis=0).max() > 0.1
    assert_same(predict_folder(str(tmp_path / f'tiny{suffix}'), face_folder, batch_size=7, **FAST), expected, 1e-4)
    flipped = predict_folder(str(tmp_path / f'tiny{suffix}'), face_folder, tta='hflip', **FAST)
    assert_same(flipped, predict_folder(tiny, face_folder, tta='hflip', **FAST), 1e-4)


def test_a_pipeline_of_transformers_says_what_its_model_says(tiny, face_folder, tmp_path):
    pytest.importorskip('transformers', reason="pip install 'timm-lfnsb[test]' brings transformers")
    save_for_hf(tiny, tmp_path, model_config={'label_names': list(NAMES)}, safe_serialization=True)
    (tmp_path / 'README.md').write_text('---\nlicense: mit\n---\n')
    with staged(str(tmp_path), 'me/own') as folder:
        predictions = predict_folder(f'transformers:{folder}', face_folder, batch_size=5, **FAST)
        assert_same(predictions, predict_folder(tiny, face_folder, **FAST), 1e-4)
        (Path(folder) / 'model.safetensors').unlink()
        torch.save(tiny.state_dict(), Path(folder) / 'pytorch_model.bin')  # a pickle
        with pytest.raises(UserError, match=r'^cannot load the model transformers:.*safetensors'):
            load_classifier(f'transformers:{folder}', 'cpu')


def test_a_missing_transformers_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(UserError, match='pip install transformers brings it'):
        load_classifier('transformers:ORG/NAME')


@pytest.mark.parametrize('workers', [0, 1])
def test_a_function_gets_pictures_and_is_matched_by_name(face_folder, peers, workers):
    predictions = predict_folder('peers:right', face_folder, batch_size=5, **{**FAST, 'workers': workers})
    assert predictions.correct.all() and len(predictions.files) == 24
    mirrored = predict_folder('peers:left', face_folder, tta='hflip', **FAST).probabilities[:, 0]
    means = [np.asarray(Image.open(face_folder / 'validation' / file)).mean() / 255 for file in predictions.files]
    np.testing.assert_allclose(mirrored, means, atol=1e-5)  # of the left halves of a picture and its mirror image


@pytest.mark.parametrize('name, message', [
    ('no_such_module:f', 'there is no module no_such_module here'),
    ('quits:f', r'the module quits ends Python \(3\)'), ('needs:f', 'it needs no_such_module'),
    ('peers:no_such', "cannot load the model peers:no_such: .*no attribute 'no_such'"),
    ('peers:nameless', 'in its attribute label_names'), ('peers:threads', 'must be a function'),
    ('peers:twice', r'two outputs of one meaning .*\[anger, Angry\]'),
    ('peers:short', r'outputs \(24, 1\) that are no probabilities: 24 image\(s\) and 4 label names'),
    ('peers:negative', 'no probabilities'), ('peers:infinite', 'no probabilities'),
    ('peers:failing', '^peers:failing does not run: division by zero'),
    ('peers:foreign', r'the model knows \[LABEL_0, LABEL_1\]'), ('missing.onnx', 'there is no file missing.onnx'),
])
def test_what_is_no_model_is_refused(face_folder, peers, name, message):
    with pytest.raises(UserError, match=message):
        predict_folder(name, face_folder, **FAST)


def test_classes_that_one_side_lacks(face_folder, peers):
    more, fewer = map(load_classifier, ('peers:more', 'peers:fewer'))
    names = ['anger', 'happiness', 'neutral', 'sadness']
    assert counted_classes([more], names, common=False) == set(names)
    with pytest.raises(LabelError, match=r"^peers:fewer does not fit: unknown .*'anger'.*with --common-classes"):
        counted_classes([more, fewer], names, common=False)
    classes = counted_classes([more, fewer], names, common=True)
    assert classes == {'happiness', 'neutral', 'sadness'}
    with pytest.raises(LabelError, match=r'fewer than two classes in common.*peers:fewer has \[happy, Neutral, sad\]'):
        counted_classes([more, fewer], ['fear', 'Angry'], common=True)

    whole = predict_folder(more, face_folder, **FAST)
    part = predict_folder(more, face_folder, classes=classes, **FAST)
    kept = [i for i, file in enumerate(whole.files) if not file.startswith('anger')]
    assert list(part.files) == [whole.files[i] for i in kept] and part.label_names == ['happy', 'Neutral', 'sad']
    expected = whole.probabilities[kept][:, 1:4]
    np.testing.assert_allclose(part.probabilities, expected / expected.sum(axis=1, keepdims=True), rtol=1e-5)


def test_times_are_those_of_one_thread(peers, face_folder):
    torch.set_num_threads(2)
    try:
        image = Image.open(face_folder / 'validation' / 'anger' / 'anger0.png')
        latency = measure_latency(['peers:right', 'peers:moody'], image, seconds=0.01, rounds=3)
        assert sys.modules['peers'].threads == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert latency['ratio'][0]['median'] == 1
    assert all(0 < row['q1'] <= row['median'] <= row['q3'] for row in latency['ms'] + latency['ratio'])
