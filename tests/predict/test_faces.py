"""Finding, cropping and aligning faces."""
from __future__ import annotations

import cv2
import numpy as np
import pytest
from skimage.transform import SimilarityTransform

from timm_lfnsb import align_face
from timm_lfnsb.errors import UserError
from timm_lfnsb.predict import faces
from timm_lfnsb.predict.faces import (
    FIVE_POINT_TEMPLATE,
    YuNetDetector,
    align_matrix,
    aligned_box,
    clip_box,
    crop_face,
    crop_upright,
)
from timm_lfnsb.util.files import file_sha256


def test_faces_of_any_size_largest_first(portrait):
    detector = YuNetDetector()
    for scale in (0.25, 0.5, 1, 5, 20):  # 0.25: a face of 28 pixels; 20: beyond the size that is searched
        [face] = detector(cv2.resize(portrait, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
        np.testing.assert_allclose(np.array(face.box) / scale, (79, 43, 90, 112), atol=8)
        assert 0.8 < face.score < 1 and face.turn == 0
        points = [(104, 81), (145, 82), (123, 105), (103, 124), (140, 122)]
        np.testing.assert_allclose(face.points / scale, points, atol=6)
    image = np.zeros((200, 400, 3), np.uint8)
    image[:133, :160], image[:, 160:] = cv2.resize(portrait, (160, 133), interpolation=cv2.INTER_AREA), portrait
    first, second = detector(image)
    assert first.box[2] > second.box[2] and first.box[0] > 160 > second.box[0] + second.box[2]
    [filling] = detector(cv2.resize(portrait[40:160, 75:175], (2000, 2400)))  # nothing but the face
    assert filling.box[3] > 1800


def test_small_faces_in_a_large_picture(portrait):
    """At 1024 pixels such faces are 21 high, and about every third is found."""
    picture = np.full((1400, 2800, 3), 96, np.uint8)
    head = cv2.resize(portrait[20:180, 55:195], None, fx=0.52, fy=0.52, interpolation=cv2.INTER_AREA)
    places = {(400 * column + 90 + 7 * row, 330 * row + 80) for column in range(7) for row in range(4)}
    for x, y in places:
        picture[y:y + len(head), x:x + head.shape[1]] = head
    found = YuNetDetector()(picture)
    assert len(found) == 28 and all(face.turn == 0 and face.score > 0.8 for face in found)
    corners = sorted((round(face.box[0] - 12), round(face.box[1] - 12)) for face in found)
    np.testing.assert_allclose(corners, sorted(places), atol=8)


def test_a_picture_gives_the_same_after_pictures_of_other_sizes(portrait):
    detector, sizes = YuNetDetector(), [(224, 224), (1500, 1200), (60, 60), (600, 800), (224, 224), (1500, 1200)]
    for size in sizes:
        picture = cv2.resize(portrait, size, interpolation=cv2.INTER_AREA)
        found, expected = detector(picture), YuNetDetector()(picture)
        assert [face.box for face in found] == [face.box for face in expected] and found
        np.testing.assert_array_equal([face.points for face in found], [face.points for face in expected])
    # Each pass has a network, which keeps its memory as long as pictures have one size.
    assert [detector._network(number).getInputSize() for number in (0, 1)] == [(320, 256), (1024, 819)]


def test_nothing_to_find():
    rng = np.random.default_rng(0)
    for size in ((1, 1), (1, 3000), (3000, 2), (32, 320), (10, 1024), (200, 300)):
        for image in (np.full((*size, 3), 128, np.uint8), rng.integers(0, 255, (*size, 3), dtype=np.uint8)):
            assert YuNetDetector()(image) == []


@pytest.mark.parametrize('turn', [90, 180, 270])
def test_turned_pictures(portrait, turn):
    image = np.ascontiguousarray(np.rot90(portrait, -turn // 90))
    [face], [upright] = YuNetDetector()(image), YuNetDetector()(portrait)
    assert face.turn == turn and all(other.turn == 0 for other in YuNetDetector(turn=False)(image))
    expected = crop_upright(portrait, upright.box, upright.points)
    np.testing.assert_allclose(crop_upright(image, face.box, face.points), expected, atol=4)
    assert sorted(face.box[2:]) == pytest.approx(sorted(upright.box[2:]), abs=0.1)


def test_upright_crops(portrait):
    [upright] = YuNetDetector()(portrait)
    smooth = cv2.GaussianBlur(portrait, (0, 0), 3)
    expected = crop_upright(smooth, upright.box, upright.points)
    # She holds her head nearly upright.
    assert np.abs(expected.astype(int) - crop_face(smooth, upright.box)).mean() < 12
    x, y, width, height = upright.box
    matrix = cv2.getRotationMatrix2D((x + width / 2 - 0.5, y + height / 2 - 0.5), 20, 1)
    tilted = cv2.warpAffine(smooth, matrix, smooth.shape[1::-1], borderMode=cv2.BORDER_REPLICATE)
    points = upright.points @ matrix[:, :2].T + matrix[:, 2]
    crop = crop_upright(tilted, upright.box, points)
    assert np.abs(crop.astype(int) - expected)[20:-20, 20:-20].max() < 12


def test_network_file(monkeypatch, tmp_path):
    digest = '8f2383e4dd3cfbb4553ea8718107fc0423210dc964f9f4280604804ed2552fa4'
    assert file_sha256(faces.YUNET) == digest
    assert 'Permission is hereby granted' in faces.YUNET.with_suffix('.LICENSE.txt').read_text()
    monkeypatch.setattr(faces, 'YUNET', tmp_path / 'yunet.onnx')
    for content in (faces.YUNET.name.encode(), b''):
        faces.YUNET.write_bytes(content)
        with pytest.raises(UserError, match='force-reinstall'):
            YuNetDetector()
    for score in (0, 1, float('nan')):
        with pytest.raises(ValueError, match='min_score'):
            YuNetDetector(score)


def test_crop(gradient):
    for box, margin, expected in (
            ((2, 1, 4, 4), 0, gradient[1:5, 2:6]), ((3, 2, 2, 2), 0.5, gradient[1:5, 2:6]),
            ((2, 1, 4, 4), -0.25, gradient[2:4, 3:5]), ((3, 1, 2, 4), 0, gradient[1:5, 2:6]),  # widened to a square
    ):
        np.testing.assert_array_equal(crop_face(gradient, box, margin), expected)
    assert crop_face(gradient, (2, 1, 1, 1), margin=-0.49).shape == (1, 1, 3)
    crop = crop_face(gradient, (-2, -1, 4, 4))  # beyond the border, which is repeated
    np.testing.assert_array_equal(crop[1:, 2:], gradient[:3, :2])
    assert (crop[0] == crop[1]).all() and (crop[:, :2] == crop[:, 2:3]).all()


def test_clip_box(gradient):
    assert clip_box((-3.4, 1.6, 20, 2), gradient) == (0, 2, 8, 2)
    for outside in ((9, 0, 4, 4), (0, 0, 0, 3), (-5, 0, 5, 5), (2, 2, -1, 3)):
        with pytest.raises(ValueError, match='outside the image'):
            clip_box(outside, gradient)


@pytest.mark.parametrize('seed, size', [(0, 112), (1, 112), (2, 96), (3, 224)])
def test_matrix_is_the_least_squares_similarity(seed, size):
    rng = np.random.default_rng(seed)
    transform = SimilarityTransform(
        scale=rng.uniform(0.1, 8), rotation=rng.uniform(-3, 3), translation=rng.uniform(-500, 500, 2))
    points = transform(FIVE_POINT_TEMPLATE)
    points += rng.normal(0, 0.05 * np.ptp(points), points.shape)
    matrix = align_matrix(points, size)
    # The four parameters of u = a x - b y + c, v = b x + a y + d from their linear system.
    rows = [(x, -y, 1, 0) for x, y in points] + [(y, x, 0, 1) for x, y in points]
    a, b, c, d = np.linalg.lstsq(np.array(rows), FIVE_POINT_TEMPLATE.T.ravel() * size / 112, rcond=None)[0]
    np.testing.assert_allclose(matrix, [(a, -b, c), (b, a, d)], rtol=1e-8, atol=1e-8)
    assert np.linalg.det(matrix[:, :2]) > 0  # never a reflection


def test_exact_points_meet_the_template():
    transform = SimilarityTransform(scale=3, rotation=0.4, translation=(50, 20))
    matrix = align_matrix(transform(FIVE_POINT_TEMPLATE))
    np.testing.assert_allclose(matrix, transform.inverse.params[:2], atol=1e-9)
    x, y, width, height = aligned_box(transform(FIVE_POINT_TEMPLATE))
    np.testing.assert_allclose((x + width / 2, y + height / 2), transform([(56, 56)])[0])
    assert width == height == pytest.approx(3 * 112)


def test_align_face_pixels():
    """A smooth picture sampled through a known transform gives its values at the transformed pixels."""
    y, x = np.mgrid[:300, :400]
    image = np.stack([x * 0.6, y * 0.8, (x + y) * 0.3], axis=2).astype(np.float32) / 255
    transform = SimilarityTransform(scale=1.5, rotation=0.2, translation=(120, 40))
    crop = align_face(image, transform(FIVE_POINT_TEMPLATE))
    assert crop.shape == (112, 112, 3) and crop.dtype == np.uint8
    v, u = np.mgrid[:112, :112]
    points = transform(np.stack([u.ravel(), v.ravel()], axis=1))
    expected = np.stack([points[:, 0] * 0.6, points[:, 1] * 0.8, points.sum(axis=1) * 0.3], axis=1)
    assert np.abs(crop.reshape(-1, 3) - expected).max() < 1.5
    assert align_face(image, transform(FIVE_POINT_TEMPLATE), size=64).shape == (64, 64, 3)
    assert (align_face(np.full((50, 50), 77, np.uint8), FIVE_POINT_TEMPLATE - 60) == 77).all()  # beyond the border


@pytest.mark.parametrize('points', [
    np.zeros((4, 2)), np.zeros((5, 3)), np.zeros(10), np.full((5, 2), np.nan), np.full((5, 2), np.inf),
    np.full((5, 2), 30.), FIVE_POINT_TEMPLATE * 1e-6,
])
def test_unusable_points(points):
    with pytest.raises(ValueError, match='five_points'):
        align_face(np.zeros((100, 100, 3), np.uint8), points)
    with pytest.raises(ValueError, match='size'):
        align_matrix(FIVE_POINT_TEMPLATE, 0)
