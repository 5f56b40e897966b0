"""ExpressionRecognizer: from images to named expressions, with models and exported files."""
from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

from timm_lfnsb import ExpressionRecognizer
from timm_lfnsb.errors import UserError
from timm_lfnsb.labels import EXPRESSIONS_8
from timm_lfnsb.predict.faces import FIVE_POINT_TEMPLATE, align_face, aligned_box
from timm_lfnsb.predict.images import ImageError


def probabilities(model: torch.nn.Module, face: np.ndarray) -> dict[str, float]:
    """What a model says about a crop, by timm's functions alone."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        scores = model(transform(Image.fromarray(face))[None]).softmax(1)[0]
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


def test_single_image(recognize, portrait):
    [face] = recognize(portrait)
    np.testing.assert_allclose(face.box, (76, 46, 97, 97), atol=5)
    assert tuple(face.probabilities) == EXPRESSIONS_8
    assert sum(face.probabilities.values()) == pytest.approx(1)
    assert face.label == max(face.probabilities, key=face.probabilities.get) == 'happiness'  # NASA's portrait
    x, y, width, height = face.box
    assert face.probabilities == near(probabilities(recognize.model, portrait[y:y + height, x:x + width]))
    assert json.loads(json.dumps(face.as_dict())) == {
        'box': [x, y, width, height], 'label': 'happiness', 'score': face.probabilities['happiness'],
        'probabilities': face.probabilities}


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
])
def test_bad_detector(recognize, portrait, found, message):
    with pytest.raises(ValueError, match=message):
        ExpressionRecognizer(recognize.model, detector=lambda image: found)(portrait)


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
    (ValueError, dict(margin=0.1, detector=None), 'margin'), (ValueError, dict(batch_size=0), 'batch_size'),
    (ValueError, dict(detector='mtcnn'), 'mtcnn'), (UserError, dict(device='gpu'), "device 'gpu'"),
    (UserError, dict(model='lfnsb.affectnet8'), 'no trained weights'),
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
    from timm_lfnsb.export.export import export_model
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
