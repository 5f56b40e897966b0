"""ExpressionRecognizer: from images to named expressions."""
from __future__ import annotations

import json

import numpy as np
import pytest
import skimage.data
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

from timm_lfnsb import ExpressionRecognizer
from timm_lfnsb.labels import EXPRESSIONS_8
from timm_lfnsb.predict.annotate import annotation_paths, draw_faces
from timm_lfnsb.predict.faces import FIVE_POINT_TEMPLATE, ImageError, align_face, aligned_box
from timm_lfnsb.predict.recognizer import Face


@pytest.fixture(scope='module', autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory):
    """A folder of random weights as timm writes it."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp('model')
    model = timm.create_model('lfnsb.affectnet8')
    torch.nn.init.normal_(model.get_classifier().weight)  # else all probabilities are alike
    save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.fixture(scope='module')
def recognize(model_dir):
    return ExpressionRecognizer(f'local-dir:{model_dir}')


@pytest.fixture(scope='module')
def astronaut() -> np.ndarray:
    return skimage.data.astronaut()


def probabilities(model: torch.nn.Module, face: np.ndarray) -> dict[str, float]:
    """What a model says about a crop, by timm's functions alone."""
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        scores = model(transform(Image.fromarray(face))[None]).softmax(1)[0]
    return dict(zip(EXPRESSIONS_8, scores.tolist(), strict=True))


def test_default_model_labels_the_nasa_portrait(astronaut):
    faces = ExpressionRecognizer()(astronaut)
    assert [face.label for face in faces] == ['happiness']


def norms(model: torch.nn.Module) -> int:
    return sum('BatchNorm' in type(module).__name__ for module in model.modules())


def test_a_model_by_name_is_reparameterised_and_says_the_same(model_dir, astronaut):
    given = timm.create_model(f'local-dir:{model_dir}', pretrained=True)
    by_name, by_model = ExpressionRecognizer(f'local-dir:{model_dir}'), ExpressionRecognizer(given)
    assert norms(by_name.model) == 0
    assert by_model.model is given and norms(given) > 100  # nobody's own model is changed
    [first], [second] = by_name(astronaut), by_model(astronaut)
    assert first.probabilities == pytest.approx(second.probabilities, abs=1e-5)


def test_single_image(recognize, astronaut):
    faces = recognize(astronaut)
    assert len(faces) == 1
    face = faces[0]
    assert isinstance(face, Face)
    assert face.box == (177, 67, 93, 93) and all(type(value) is int for value in face.box)
    assert tuple(face.probabilities) == EXPRESSIONS_8
    assert sum(face.probabilities.values()) == pytest.approx(1)
    assert face.label == max(face.probabilities, key=face.probabilities.get)
    assert face.score == face.probabilities[face.label]
    x, y, width, height = face.box
    assert face.probabilities == pytest.approx(
        probabilities(recognize.model, astronaut[y:y + height, x:x + width]), abs=1e-5)
    assert json.loads(json.dumps(face.as_dict())) == {
        'box': [177, 67, 93, 93], 'label': face.label, 'score': face.score, 'probabilities': face.probabilities}


def test_margin(model_dir, recognize, astronaut):
    [face] = ExpressionRecognizer(f'local-dir:{model_dir}', margin=0.5)(astronaut)
    x, y, side, _ = face.box
    assert face.box == recognize(astronaut)[0].box  # the box is the face's, whatever the crop
    expected = probabilities(recognize.model, astronaut[y - 46:y - 46 + 2 * side, x - 46:x - 46 + 2 * side])
    assert face.probabilities == pytest.approx(expected, abs=1e-5)


def test_mixed_list(recognize, astronaut, tmp_path):
    """One face, none, two faces, and a rotated file, of different sizes and kinds, in one call."""
    two = np.concatenate([astronaut, astronaut], axis=1)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(astronaut))).save(tmp_path / 'turned.png', exif=exif)
    images = [
        astronaut, np.zeros((40, 70), np.uint8), Image.fromarray(two), str(tmp_path / 'turned.png'),
        astronaut.astype(np.uint16) * 257, astronaut / 255,
    ]
    results = recognize(images)
    [single] = recognize(astronaut)
    assert [len(faces) for faces in results] == [1, 0, 2, 1, 1, 1]
    for i in (0, 3, 4, 5):
        assert results[i][0].box == single.box
        assert results[i][0].probabilities == pytest.approx(single.probabilities, abs=1e-5)
    left, right = results[2]
    assert left.box[0] < 512 <= right.box[0]
    assert recognize([]) == []
    assert recognize((astronaut,)) == [[single]]


def test_batches_do_not_change_results(recognize, astronaut):
    rng = np.random.default_rng(0)
    faces = [np.ascontiguousarray(astronaut[i:i + 90, 150:150 + rng.integers(60, 120)]) for i in range(0, 70, 10)]
    sizes = []
    hook = recognize.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    results = []
    for batch_size in (1, 3, 32):
        results.append(ExpressionRecognizer(recognize.model, detector=None, batch_size=batch_size)(faces))
    hook.remove()
    assert sizes == [1] * 7 + [3, 3, 1] + [7]
    for other in results[1:]:
        for [a], [b] in zip(results[0], other, strict=True):
            assert a.box == b.box and a.probabilities == pytest.approx(b.probabilities, abs=1e-5)


def test_many_faces_in_one_image_are_split_into_batches(recognize, astronaut):
    def detector(image):
        return [(10 * i, 0, 50, 50) for i in range(5)]

    sizes = []
    hook = recognize.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    faces = ExpressionRecognizer(recognize.model, detector=detector, batch_size=2)(astronaut)
    hook.remove()
    assert sizes == [2, 2, 1]
    assert [face.box[0] for face in faces] == [0, 10, 20, 30, 40]


def test_without_detector_the_image_is_the_face(recognize, astronaut):
    whole = ExpressionRecognizer(recognize.model, detector=None)
    crop = astronaut[60:180, 150:250]
    [face] = whole(crop)
    assert face.box == (0, 0, 100, 120)
    assert face.probabilities == pytest.approx(probabilities(recognize.model, crop), abs=1e-5)


def test_five_points(recognize, astronaut):
    points = FIVE_POINT_TEMPLATE * 0.9 + (180, 60)
    [face] = ExpressionRecognizer(recognize.model, detector=lambda image: points[None])(astronaut)
    assert face.probabilities == pytest.approx(
        probabilities(recognize.model, align_face(astronaut, points)), abs=1e-5)
    np.testing.assert_allclose(face.box, aligned_box(points), atol=0.51)


@pytest.mark.parametrize('found, message', [
    (np.zeros((2, 3)), 'boxes'), (np.ones((2, 4, 2)), 'boxes'), ([(np.nan, 0, 5, 5)], 'finite'),
    ([(600, 0, 5, 5)], 'outside'), (np.ones((1, 5, 2)), 'five_points'), (np.ones(4), 'boxes'),
])
def test_bad_detector(recognize, astronaut, found, message):
    with pytest.raises(ValueError, match=message):
        ExpressionRecognizer(recognize.model, detector=lambda image: found)(astronaut)


@pytest.mark.parametrize('nothing', [(), [], np.zeros((0, 4)), np.zeros((0, 5, 2))])
def test_detector_without_faces(recognize, astronaut, nothing):
    assert ExpressionRecognizer(recognize.model, detector=lambda image: nothing)(astronaut) == []


def test_unreadable_image(recognize, astronaut, tmp_path):
    with pytest.raises(ImageError, match='no such file'):
        recognize([astronaut, tmp_path / 'missing.jpg'])
    good, bad, also_good = recognize.stream(iter([astronaut, tmp_path / 'missing.jpg', astronaut]))
    assert isinstance(bad, ImageError)
    assert len(good) == 1 and good == also_good


def test_one_channel_model(astronaut):
    model = timm.create_model('lfnsb.affectnet8', in_chans=1)
    grey = np.asarray(Image.fromarray(astronaut).convert('L'))
    for config in ({}, dict(input_size=(1, 112, 112), mean=(0.5,), std=(0.25,))):
        model.pretrained_cfg = dict(model.pretrained_cfg, **config)
        recognize = ExpressionRecognizer(model, detector=None)
        assert recognize._to_input(astronaut).shape == (1, 112, 112)
        assert recognize(astronaut) == recognize(grey)
    assert recognize._to_input(np.full((9, 9, 3), 255, np.uint8)) == pytest.approx(torch.full((1, 112, 112), 2.))


def test_models_without_usable_labels():
    model = timm.create_model('lfnsb.affectnet8')
    names = model.pretrained_cfg['label_names']
    model.pretrained_cfg = dict(model.pretrained_cfg, label_names={str(i): name for i, name in enumerate(names)})
    assert ExpressionRecognizer(model, detector=None).label_names == names  # timm's other spelling
    for wrong, message in ((None, 'no label_names'), (names[:7], '8 classes'), (names[:7] + names[:1], '8 classes')):
        model.pretrained_cfg = dict(model.pretrained_cfg, label_names=wrong)
        with pytest.raises(ValueError, match=message):
            ExpressionRecognizer(model)
    with pytest.raises(ValueError, match='3 classes'):
        ExpressionRecognizer(timm.create_model('lfnsb.affectnet8', num_classes=3))
    with pytest.raises(ValueError, match='no label_names'):
        ExpressionRecognizer(torch.nn.Linear(2, 2))


def test_model_without_weights():
    with pytest.raises(RuntimeError, match='no trained weights'):
        ExpressionRecognizer('lfnsb.affectnet8')


@pytest.mark.parametrize('arguments, message', [
    (dict(margin=-0.5), 'margin'), (dict(margin=float('nan')), 'margin'), (dict(margin=0.1, detector=None), 'margin'),
    (dict(batch_size=0), 'batch_size'), (dict(detector='mtcnn'), 'mtcnn'), (dict(device='gpu'), "device 'gpu'"),
])
def test_arguments_out_of_range(recognize, arguments, message):
    with pytest.raises(ValueError, match=message):
        ExpressionRecognizer(recognize.model, **arguments)


def test_broken_weights(astronaut):
    model = timm.create_model('lfnsb.affectnet8')
    torch.nn.init.constant_(model.get_classifier().weight, float('nan'))
    with pytest.raises(RuntimeError, match='not finite'):
        ExpressionRecognizer(model, detector=None)(astronaut)


# Exported files

@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    """The default model as files: for one face, for a batch of three, and with the normalisation inside."""
    pytest.importorskip('onnx', reason="pip install 'timm-lfnsb[export]' to test exported files")
    pytest.importorskip('onnxruntime', reason="pip install 'timm-lfnsb[export]' to test exported files")
    from timm_lfnsb.export.export import export_model
    folder = tmp_path_factory.mktemp('exported')
    model = timm.create_model('lfnsb', pretrained=True)
    export_model(model, folder / 'one.onnx')
    export_model(model, folder / 'three.onnx', batch=3)
    export_model(model, folder / 'uint8.onnx', with_preprocess=True)
    return folder


@pytest.mark.parametrize('name', ['one', 'three', 'uint8'])
def test_exported_file_gives_the_same_faces(exported, astronaut, name):
    """Also for more faces than the file takes at a time, and images without any."""
    two = np.concatenate([astronaut, astronaut], axis=1)
    images = [astronaut, np.zeros((40, 70), np.uint8), two, two]
    expected = ExpressionRecognizer()(images)
    assert [len(faces) for faces in expected] == [1, 0, 2, 2] and expected[0][0].label == 'happiness'
    for file in (str(exported / f'{name}.onnx'), exported / f'{name}.onnx'):
        recognize = ExpressionRecognizer(file)
        assert recognize.label_names == EXPRESSIONS_8
        for faces, others in zip(recognize(images), expected, strict=True):
            assert [face.box for face in faces] == [face.box for face in others]
            for face, other in zip(faces, others, strict=True):
                assert face.label == other.label
                assert face.probabilities == pytest.approx(other.probabilities, abs=1e-4)


def test_predict_command_takes_an_exported_file(exported, tmp_path):
    from click.testing import CliRunner

    from timm_lfnsb.cli import main
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / 'a.png')
    results = []
    for model in ('lfnsb', exported / 'one.onnx'):
        result = CliRunner().invoke(main, ['predict', str(tmp_path / 'a.png'), '--json', '--model', str(model)])
        assert result.exit_code == 0, result.output
        results.append(json.loads(result.stdout)['faces'][0])
    assert results[0]['box'] == results[1]['box'] and results[0]['label'] == results[1]['label']
    assert results[0]['probabilities'] == pytest.approx(results[1]['probabilities'], abs=1e-4)
    for args, message in (
            (['--model', 'missing.onnx'], 'there is no file missing.onnx'),
            (['--model', str(exported / 'one.onnx'), '--device', 'cuda'], 'run on the CPU'),
    ):
        result = CliRunner().invoke(main, ['predict', str(tmp_path / 'a.png'), *args])
        assert result.exit_code == 1 and message in result.output
        assert result.output.startswith('Error: ') and result.output.count('\n') == 1


def test_exported_files_that_cannot_be_used(exported, astronaut, tmp_path, monkeypatch):
    import sys

    import onnx
    network = onnx.load(exported / 'one.onnx')
    metadata = {entry.key: entry.value for entry in network.metadata_props}

    def file(**changes) -> str:
        changed = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
        del network.metadata_props[:]
        onnx.helper.set_model_props(network, changed)
        onnx.save(network, tmp_path / 'model.onnx')
        return str(tmp_path / 'model.onnx')

    assert ExpressionRecognizer(file(), detector=None)(astronaut)
    for changes, message in (
            (dict(label_names=None), 'no label_names in its metadata'),
            (dict(input_size=None), 'no input_size in its metadata'),
            (dict(label_names='neutral'), 'no list of different names'),
            (dict(label_names=json.dumps(['joy', 'joy'])), 'no list of different names'),
    ):
        with pytest.raises(RuntimeError, match=message):
            ExpressionRecognizer(file(**changes))
    seven = ExpressionRecognizer(file(label_names=json.dumps(EXPRESSIONS_8[:7])), detector=None)
    with pytest.raises(RuntimeError, match='7 label names'):
        seven(astronaut)
    with pytest.raises(ValueError, match='run on the CPU'):
        ExpressionRecognizer(file(), device='cuda')
    monkeypatch.setitem(sys.modules, 'onnxruntime', None)
    with pytest.raises(RuntimeError, match=r"needs onnxruntime: pip install 'timm-lfnsb\[export\]' brings it"):
        ExpressionRecognizer(file())


# Annotated pictures

def _face(box, names=EXPRESSIONS_8) -> Face:
    return Face(box, names[1], 0.72, {name: 0.72 if name == names[1] else 0.04 for name in names})


@pytest.mark.parametrize('size, box', [
    ((48, 48), (0, 0, 48, 48)), ((512, 512), (177, 67, 93, 93)), ((2000, 60), (1950, 5, 50, 50)),
    ((1, 1), (0, 0, 1, 1)), ((400, 500), (200, 0, 200, 200)),
])
def test_annotation_leaves_the_face_alone(size, box):
    """The inside of the box is untouched, and neither label nor panel is cut off at the borders."""
    picture = Image.new('RGB', size, (12, 200, 90))
    drawn = draw_faces(picture, [_face(box)])
    zoom = -(-480 // max(size))
    x, y, width, height = (zoom * value for value in box)
    band = draw_faces(picture, []).height - zoom * size[1]  # above the picture
    inside = drawn.crop((x + 5, y + band + 5, x + width - 5, y + band + height - 5))
    assert inside.getcolors() == [(inside.width * inside.height, (12, 200, 90))]
    rim = np.concatenate([np.asarray(drawn)[:, -1], np.asarray(drawn)[-1, zoom * size[0]:], np.asarray(drawn)[0, -9:]])
    assert (rim == 255).all()


def test_annotation_without_faces():
    assert draw_faces(Image.new('RGB', (500, 500)), []).width == 500


def test_annotation_of_a_crowd_and_of_long_names():
    picture = Image.new('RGB', (1200, 900), 'gray')
    crowd = [_face((100 * (i % 12), 100 * (i // 12), 60, 60)) for i in range(40)]
    assert draw_faces(picture, crowd).width < 3 * picture.width
    long = _face((0, 0, 50, 50), ('neutral', 'an expression with quite a long name indeed'))
    assert (np.asarray(draw_faces(picture, [long]))[:, -1] == 255).all()


def test_annotation_paths_are_unique(tmp_path):
    def named(*paths):
        return [(tmp_path / 'in' / path, (tmp_path / 'in' / path).relative_to(tmp_path / 'in')) for path in paths]

    out = tmp_path / 'out'
    images = named('a.jpg', 'a.png', 'sub/a.jpg', 'A.tif', 'a-2.jpg') + named('a.jpg')
    targets = annotation_paths(images, out)
    assert [target.relative_to(out).as_posix() for target in targets] == [
        'a.png', 'a-2.png', 'sub/a.png', 'A-3.png', 'a-2-2.png', 'a-4.png']
    # never an input, even if the folder is the same
    assert annotation_paths(named('a.jpg', 'a.png'), tmp_path / 'in') == [
        tmp_path / 'in' / 'a-2.png', tmp_path / 'in' / 'a-3.png']
