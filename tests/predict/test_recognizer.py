"""ExpressionRecognizer: from images to named expressions, with models and exported files."""
from __future__ import annotations

import copy
import json
import multiprocessing
import operator
import pickle
import re
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf
from torch.utils.data import DataLoader

from timm_lfnsb import ExpressionRecognizer
from timm_lfnsb.data.images import ImageError
from timm_lfnsb.errors import UserError
from timm_lfnsb.export import cached
from timm_lfnsb.export.export import export_model
from timm_lfnsb.export.exported import ExportedModel
from timm_lfnsb.labels import EXPRESSIONS_8
from timm_lfnsb.predict.faces import (
    FERPLUS_TEMPLATE,
    FIVE_POINT_TEMPLATE,
    Detection,
    align_face,
    aligned_box,
    crop_upright,
)


def probabilities(model: torch.nn.Module, face: np.ndarray) -> dict[str, float]:
    """What a model says about a crop, by timm's functions alone, with the temperature that `load_model` gives it."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        logits = model(transform(Image.fromarray(face))[None])
    scores = (logits / getattr(model, 'softmax_temperature', 1)).softmax(1)[0]
    return dict(zip(EXPRESSIONS_8, scores.tolist(), strict=True))


def near(other: dict[str, float], tolerance: float = 1e-5):
    return pytest.approx(other, abs=tolerance)


def tiny_model(**cfg) -> torch.nn.Module:
    """One of timm's test models, which is exported in no time."""
    cfg = {'label_names': EXPRESSIONS_8, 'input_size': (3, 64, 64), **cfg}
    return timm.create_model('test_resnet', num_classes=8, pretrained_cfg_overlay=cfg)


def test_a_model_by_name_is_reparameterised_and_says_the_same(tmp_path, portrait):
    torch.manual_seed(1)
    given = timm.create_model('lfnsb.affectnet8')
    torch.nn.init.normal_(given.get_classifier().weight)  # else all probabilities are alike
    save_for_hf(given, tmp_path, safe_serialization=True)
    by_name, by_model = ExpressionRecognizer(f'local-dir:{tmp_path}'), ExpressionRecognizer(given)
    kinds = [{type(module).__name__ for module in model.modules()} for model in (by_name.model, given)]
    assert 'BatchNorm2d' not in kinds[0] and 'BatchNorm2d' in kinds[1]  # nobody's own model is changed
    assert by_model.model is given
    [first], [second] = by_name(portrait), by_model(portrait)
    assert first.probabilities == near(second.probabilities)


def test_temperature_and_unsure_faces(portrait, tmp_path):
    model = tiny_model().eval()
    torch.nn.init.normal_(model.get_classifier().weight)
    plain = probabilities(model, portrait)
    [face] = ExpressionRecognizer(model, detector=None)(portrait)
    assert face.probabilities == near(plain)  # no temperature is known
    model.softmax_temperature = 2.5
    sharper = {name: p ** 0.4 for name, p in plain.items()}
    calibrated = {name: p / sum(sharper.values()) for name, p in sharper.items()}
    assert max(calibrated.values()) < max(plain.values()) - 0.01
    export_model(model, tmp_path / 'model.onnx')
    for given in (model, tmp_path / 'model.onnx'):
        [face] = ExpressionRecognizer(given, detector=None)(portrait)
        assert face.probabilities == near(calibrated, 1e-4)
        # Just below and just above.
        for unsure, label in ((face.score, face.label), (face.score + 1e-6, 'unsure')):
            [again] = ExpressionRecognizer(given, detector=None, unsure=unsure)(portrait)
            assert again.label == label and again.score == face.score == max(face.probabilities.values())
        [face] = ExpressionRecognizer(given, detector=None, calibration=False)(portrait)
        assert face.probabilities == near(plain, 1e-4)


def test_single_image(recognize, portrait):
    [face] = recognize(portrait)
    np.testing.assert_allclose(face.box, (79, 43, 90, 112), atol=4)
    assert tuple(face.probabilities) == EXPRESSIONS_8
    assert sum(face.probabilities.values()) == pytest.approx(1)
    assert face.label == max(face.probabilities, key=face.probabilities.get) == 'happiness'  # NASA's portrait
    x, y, width, height = face.box
    [detection] = recognize.detector(portrait)
    assert face.probabilities == near(probabilities(
        recognize.model, crop_upright(portrait, detection.box, detection.points)))
    assert json.loads(json.dumps(face.as_dict())) == {
        'box': [x, y, width, height], 'label': 'happiness', 'score': face.probabilities['happiness'],
        'probabilities': face.probabilities, 'detection_score': detection.score, 'turn': 0,
        'points': detection.points.tolist()}


def test_mixed_list(recognize, portrait, tmp_path):
    """One face, none, two faces, and a rotated file, of different sizes and kinds, in one call."""
    two = np.concatenate([portrait, portrait], axis=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(portrait))).save(tmp_path / 'turned.png', exif=exif)
    results = recognize([
        portrait, np.zeros((40, 70), np.uint8), Image.fromarray(two), str(tmp_path / 'turned.png'),
        portrait.astype(np.uint16) * 257, portrait / 255,
    ])
    [single] = recognize(portrait)
    assert [len(faces) for faces in results] == [1, 0, 2, 1, 1, 1]
    for i in (0, 3, 4, 5):
        assert results[i][0].box == single.box
        assert results[i][0].probabilities == near(single.probabilities)
    assert sorted(face.box[0] > 240 for face in results[2]) == [False, True]
    assert recognize([]) == [] and recognize((portrait,)) == [[single]]


def test_batches_do_not_change_results(recognize, portrait):
    """Neither for faces of many images, nor for those of one."""
    rng = np.random.default_rng(0)
    faces = [np.ascontiguousarray(portrait[i:i + 90, 50:50 + rng.integers(60, 120)]) for i in range(0, 70, 10)]
    sizes, results = [], []
    hook = recognize.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    for batch_size in (1, 3, 32):
        results.append(ExpressionRecognizer(recognize.model, detector=None, batch_size=batch_size)(faces))
    assert sizes == [1] * 7 + [3, 3, 1] + [7]
    sizes.clear()
    many = ExpressionRecognizer(
        recognize.model, detector=lambda image: [(10 * i, 0, 50, 50) for i in range(5)], batch_size=2)(portrait)
    hook.remove()
    assert sizes == [2, 2, 1]
    assert [face.box[0] for face in many] == [0, 10, 20, 30, 40]
    for other in results[1:]:
        for [a], [b] in zip(results[0], other, strict=True):
            assert a.box == b.box and a.probabilities == near(b.probabilities)


def test_what_is_cut_out(recognize, portrait):
    points, box, whole = FIVE_POINT_TEMPLATE * 0.9 + (80, 40), (80, 60, 60, 60), portrait[40:160, 50:150]
    for detector, margin, image, found, crop in (
            (None, 0, whole, (0, 0, 100, 120), whole),  # without a detector the image is the face
            (lambda image: [box], 0.25, portrait, box, portrait[45:135, 65:155]),  # the box stays the face's
            (lambda image: points[None], 0, portrait, aligned_box(points), align_face(portrait, points)),
    ):
        [face] = ExpressionRecognizer(recognize.model, detector=detector, margin=margin)(image)
        np.testing.assert_allclose(face.box, found, atol=0.51)
        assert face.probabilities == near(probabilities(recognize.model, crop))
    for nothing in ((), np.zeros((0, 4)), np.zeros((0, 5, 2))):
        assert ExpressionRecognizer(recognize.model, detector=lambda image, found=nothing: found)(portrait) == []


@pytest.mark.parametrize('found, message', [
    (np.zeros((2, 3)), 'boxes'), (np.ones((2, 4, 2)), 'boxes'), ([(np.nan, 0, 5, 5)], 'finite'),
    ([(600, 0, 5, 5)], 'outside'), (np.ones((1, 5, 2)), 'five_points'), (np.ones(4), 'boxes'),
    ([(1, 2, 3, 4), (1, 2)], 'inhomogeneous'), ([(-1e6, -1e6, 2e6, 2e6)], 'larger than the image'), (7, 'len'),
])
def test_bad_detector(recognize, portrait, found, message):
    """One bad answer is an error in its place, and the others come out."""
    answers = iter([[(70, 40, 90, 90)], found, None])
    results = ExpressionRecognizer(recognize.model, detector=lambda image: next(answers)).stream([portrait] * 3)
    [_], bad, none = results
    assert isinstance(bad, ImageError) and re.match(f'image 2: .*{message}', str(bad)) and none == []
    with pytest.raises(ImageError, match=message):
        ExpressionRecognizer(recognize.model, detector=lambda image: found)(portrait)


def test_points_turns_and_alignment(recognize, portrait):
    """What a `Detection` says is what is cut out."""
    points, box = FERPLUS_TEMPLATE * 0.9 + (70, 30), (80, 60, 60, 60)
    face = Detection(box, 0.9, points, 90)

    def found(detection, **settings):
        return ExpressionRecognizer(recognize.model, lambda image: [detection], **settings)(portrait)[0]

    crop = crop_upright(portrait, box, points)
    assert found(face).probabilities == near(probabilities(recognize.model, crop))
    crop = np.rot90(portrait[60:120, 80:140])
    assert found(Detection(box, turn=90)).probabilities == near(probabilities(recognize.model, crop))
    assert (found(face).turn, found(face).detection_score) == (90, 0.9)
    crop = align_face(portrait, points, round(112 * 0.9), FERPLUS_TEMPLATE)
    assert found(face, align=True).probabilities == near(probabilities(recognize.model, crop))
    with pytest.raises(ImageError, match='align needs five points'):
        found(Detection(box), align=True)


def test_threads_and_copies_give_the_serial_result(recognize, portrait):
    """Eight threads at once, a pickled and a copied recognizer, and images read ahead."""
    scene = np.concatenate([portrait, portrait[::2, ::2].repeat(2, 0).repeat(2, 1), portrait[:, ::-1]], axis=1)
    images = [np.ascontiguousarray(scene[:, :width]) for width in range(240, 720, 20)]
    serial = [recognize(image) for image in images]
    assert {len(faces) for faces in serial} == {1, 2, 3}
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(recognize, images)) == serial
    for other in (pickle.loads(pickle.dumps(recognize)), copy.deepcopy(recognize)):
        assert other(images[-1]) == serial[-1]
    for workers in (0, 3):
        recognize.workers = workers
        for faces, expected in zip(recognize.stream(iter(images)), serial, strict=True):
            assert [face.box for face in faces] == [face.box for face in expected]


@pytest.mark.parametrize('suffix', ['.onnx', '.xml', '.pt2'])
def test_exported_files_in_threads_and_copies(suffix, tmp_path):
    pytest.importorskip({'.xml': 'openvino'}.get(suffix, 'onnxruntime'), reason="pip install 'timm-lfnsb[export]'")
    file, rng = tmp_path / f'm{suffix}', np.random.default_rng(0)
    export_model(tiny_model(), file, batch=None)
    recognize = ExpressionRecognizer(file, detector=None)
    images = list(rng.integers(0, 256, (40, 80, 80, 3), np.uint8))
    serial = [recognize(image)[0].probabilities for image in images]
    for other in (recognize, pickle.loads(pickle.dumps(recognize)), copy.deepcopy(recognize)):
        with ThreadPoolExecutor(8) as pool:
            for [face], expected in zip(pool.map(other, images), serial, strict=True):
                assert face.probabilities == near(expected)


@pytest.mark.slow
def test_spawned_processes(recognize, portrait, tmp_path):
    """A pool, and workers of a DataLoader, to which the recognizers travel: one with a model, one with a file."""
    pytest.importorskip('onnxruntime', reason="pip install 'timm-lfnsb[export]'")
    export_model(tiny_model(), tmp_path / 'm.onnx')
    both = [recognize, ExpressionRecognizer(tmp_path / 'm.onnx')]
    call, expected = operator.methodcaller('__call__', portrait), [other(portrait) for other in both]
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        pooled = pool.map(call, both)
    loaded = list(DataLoader(
        both, batch_size=None, collate_fn=call, num_workers=2, multiprocessing_context='spawn'))  # type: ignore[arg-type]
    for results in (pooled, loaded):
        for [face], [other] in zip(results, expected, strict=True):
            assert face.box == other.box and face.probabilities == near(other.probabilities)


def test_reading_ahead_is_bounded(gradient):
    pulled = ahead = 0

    def images():
        nonlocal pulled
        for _ in range(60):
            pulled += 1
            yield gradient

    recognize = ExpressionRecognizer(tiny_model(), detector=None, batch_size=4, workers=3)
    for done, faces in enumerate(recognize.stream(images()), 1):
        assert len(faces) == 1
        ahead = max(ahead, pulled - done)
    assert done == pulled == 60 and ahead < 2 * 3 + 2 * 4  # two images a worker, one batch ahead and one at the network


def test_opencv_has_its_threads_back(portrait):
    """One for each worker that searches, of two streams at once; the last that ends gives the others back. People's own
    detectors, which no worker runs, keep theirs."""
    before, seen = cv2.getNumThreads(), []
    cv2.setNumThreads(3)
    try:
        own = ExpressionRecognizer(tiny_model(), lambda image: seen.append(cv2.getNumThreads()), workers=2)
        assert list(own.stream(iter([portrait] * 3))) == [[], [], []] and seen == [3, 3, 3]
        recognize = ExpressionRecognizer(tiny_model(), batch_size=1, workers=2)
        first, second = (recognize.stream(iter([portrait] * 9)) for _ in range(2))
        next(first), next(second)
        assert cv2.getNumThreads() == 1
        list(first)
        assert cv2.getNumThreads() == 1
        second.close()
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_buffers_may_be_used_again(recognize, portrait):
    """A camera's frame that is written over while later ones are read ahead."""
    frame = np.empty_like(portrait)

    def frames():
        for flip in (False, True, False):
            frame[:] = portrait[:, ::-1] if flip else portrait
            yield frame

    left, right, again = (faces[0].box[0] for faces in ExpressionRecognizer(recognize.model).stream(frames()))
    assert left == again != right


def test_unreadable_image(recognize, portrait, tmp_path):
    with pytest.raises(ImageError, match='no such file'):
        recognize([portrait, tmp_path / 'missing.jpg'])
    [good], bad, [also_good] = recognize.stream(iter([portrait, tmp_path / 'missing.jpg', portrait]))
    assert isinstance(bad, ImageError) and good.probabilities == near(also_good.probabilities)


def test_one_channel_model(portrait):
    model = timm.create_model('lfnsb.affectnet8', in_chans=1)
    grey, inputs = np.asarray(Image.fromarray(portrait).convert('L')), []
    model.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for config in ({}, dict(input_size=(1, 112, 112), mean=(0.5,), std=(0.25,))):
        model.pretrained_cfg = dict(model.pretrained_cfg, **config)
        recognize = ExpressionRecognizer(model, detector=None)
        assert recognize(portrait) == recognize(grey)
    recognize(np.full((9, 9, 3), 255, np.uint8))
    assert {tensor.shape for tensor in inputs} == {(1, 1, 112, 112)} and (inputs[-1] == 2).all()


def test_models_that_cannot_be_used(portrait):
    model, names = tiny_model(), EXPRESSIONS_8
    model.pretrained_cfg = dict(model.pretrained_cfg, label_names={str(i): name for i, name in enumerate(names)})
    assert ExpressionRecognizer(model, detector=None).label_names == names  # timm's other spelling
    for wrong, message in ((None, 'no label_names'), (names[:7], '8 classes'), (names[:7] + names[:1], '8 classes')):
        model.pretrained_cfg = dict(model.pretrained_cfg, label_names=wrong)
        with pytest.raises(ValueError, match=message):
            ExpressionRecognizer(model)
    broken = tiny_model()
    torch.nn.init.constant_(broken.get_classifier().weight, float('nan'))
    with pytest.raises(UserError, match='not finite'):
        ExpressionRecognizer(broken, detector=None)(portrait)


@pytest.mark.parametrize('error, arguments, message', [
    (ValueError, dict(margin=-0.5), 'margin'), (ValueError, dict(margin=float('nan')), 'margin'),
    (ValueError, dict(margin=0.1, detector=None), 'margin'), (ValueError, dict(align=True, detector=None), 'align'),
    (ValueError, dict(align=True, margin=0.1), 'one of them'), (ValueError, dict(detector='haar'), 'yunet'),
    (ValueError, dict(min_score=0), 'min_score'), (ValueError, dict(batch_size=0), 'batch_size'),
    (ValueError, dict(detector='mtcnn'), 'mtcnn'), (UserError, dict(device='gpu'), "device 'gpu'"),
    (UserError, dict(model='lfnsb.affectnet8'), 'no trained weights'), (ValueError, dict(runtime='onnx'), 'runtime'),
    (ValueError, dict(runtime='onnxruntime', device='cuda'), 'on the CPU'),
])
def test_arguments_that_cannot_be(recognize, error, arguments, message):
    with pytest.raises(error, match=message):
        ExpressionRecognizer(**{'model': recognize.model, **arguments})


# Exported files

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """A model, and its files: for three faces at a time, and with the normalisation inside."""
    for name in ('onnx', 'onnxruntime'):
        pytest.importorskip(name, reason="pip install 'timm-lfnsb[export]' to test exported files")
    torch.manual_seed(1)
    folder, model = tmp_path_factory.mktemp('exported'), tiny_model(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    export_model(model, folder / 'three.onnx', batch=3)
    export_model(model, folder / 'uint8.onnx', with_preprocess=True)
    return folder, model


@pytest.mark.parametrize('name', ['three.onnx', 'uint8.onnx'])
def test_exported_file_gives_the_same_faces(exported, portrait, name):
    """Also for more faces than the file takes at a time, and images without any."""
    folder, model = exported
    two = np.concatenate([portrait, portrait[::2, ::2].repeat(2, 0).repeat(2, 1)], axis=1)
    images = [portrait, np.zeros((40, 70), np.uint8), two, two]
    expected, recognize = ExpressionRecognizer(model)(images), ExpressionRecognizer(folder / name)
    assert [len(faces) for faces in expected] == [1, 0, 2, 2]
    assert recognize.label_names == EXPRESSIONS_8
    for faces, others in zip(recognize(images), expected, strict=True):
        for face, other in zip(faces, others, strict=True):
            assert (face.box, face.label) == (other.box, other.label)
            assert face.probabilities == near(other.probabilities, 1e-4)


@pytest.mark.parametrize('faster', ['torch', 'onnxruntime'])
def test_runtimes(exported, portrait, tmp_path, monkeypatch, faster):
    """Forced or chosen, ONNX Runtime says what PyTorch says, with the model's own temperature and names."""
    monkeypatch.setenv('TIMM_LFNSB_CACHE', str(tmp_path))
    times = {'torch': 2., 'onnxruntime': 2., faster: 1.}
    monkeypatch.setattr(cached, 'measure', lambda model, network, batch_size: times)
    model = copy.deepcopy(exported[1])
    model.softmax_temperature = 1.7
    [expected] = ExpressionRecognizer(model)(portrait)
    assert not list(tmp_path.iterdir())
    for runtime in ('onnxruntime', 'auto'):
        recognize = ExpressionRecognizer(model, runtime=runtime)
        assert isinstance(recognize.model, ExportedModel) == ('onnxruntime' in (runtime, faster))
        for other in (recognize, pickle.loads(pickle.dumps(recognize)), copy.deepcopy(recognize)):
            with ThreadPoolExecutor(4) as pool:
                for [face] in pool.map(other, [portrait] * 8):
                    assert face.probabilities == near(expected.probabilities, 1e-4)
    whole = ExpressionRecognizer(model, detector=None, runtime='onnxruntime', calibration=False)
    assert whole(portrait)[0].probabilities == near(probabilities(exported[1].eval(), portrait), 1e-4)


def test_exported_files_that_cannot_be_used(exported, portrait, tmp_path):
    import onnx
    network = onnx.load(exported[0] / 'three.onnx')
    metadata = {entry.key: entry.value for entry in network.metadata_props}

    def file(**changes) -> str:
        changed = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
        del network.metadata_props[:]
        onnx.helper.set_model_props(network, changed)
        onnx.save(network, tmp_path / 'model.onnx')
        return str(tmp_path / 'model.onnx')

    assert ExpressionRecognizer(file(), detector=None)(portrait)
    for changes, message in (
            (dict(label_names=None), 'no label_names in its metadata'),
            (dict(input_size=None), 'no input_size in its metadata'),
            (dict(label_names='neutral'), 'no list of different names'),
            (dict(label_names=json.dumps(['joy', 'joy'])), 'no list of different names'),
    ):
        with pytest.raises(RuntimeError, match=message):
            ExpressionRecognizer(file(**changes))
    seven = ExpressionRecognizer(file(label_names=json.dumps(EXPRESSIONS_8[:7])), detector=None)
    with pytest.raises(UserError, match='7 label names'):
        seven(portrait)
    with pytest.raises(ValueError, match='run on the CPU'):
        ExpressionRecognizer(file(), device='cuda')
    assert ExpressionRecognizer(file(), detector=None, runtime='onnxruntime')(portrait)
    export_model(exported[1], tmp_path / 'model.pt2')
    with pytest.raises(ValueError, match='no file for ONNX Runtime'):
        ExpressionRecognizer(tmp_path / 'model.pt2', runtime='onnxruntime')
