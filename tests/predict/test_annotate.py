"""Annotated pictures and their names."""
from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from timm_lfnsb.labels import EXPRESSIONS_8
from timm_lfnsb.predict.annotate import annotation_paths, draw_faces
from timm_lfnsb.predict.recognizer import Face


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


def test_no_face_a_crowd_and_long_names():
    picture = Image.new('RGB', (1200, 900), 'gray')
    assert draw_faces(picture, []).width == 1200
    crowd = [_face((100 * (i % 12), 100 * (i // 12), 60, 60)) for i in range(40)]
    assert draw_faces(picture, crowd).width < 3 * picture.width
    long = _face((0, 0, 50, 50), ('neutral', 'an expression with quite a long name indeed'))
    assert (np.asarray(draw_faces(picture, [long]))[:, -1] == 255).all()


def test_annotation_paths_are_unique(tmp_path):
    def named(*paths):
        return [(tmp_path / 'in' / path, (tmp_path / 'in' / path).relative_to(tmp_path / 'in')) for path in paths]

    out = tmp_path / 'out'
    images = named('a.jpg', 'a.png', 'sub/a.jpg', 'A.tif', 'a-2.jpg') + named('a.jpg')
    assert [target.relative_to(out).as_posix() for target in annotation_paths(images, out)] == [
        'a.png', 'a-2.png', 'sub/a.png', 'A-3.png', 'a-2-2.png', 'a-4.png']
    # never an input, even if the folder is the same
    assert annotation_paths(named('a.jpg', 'a.png'), tmp_path / 'in') == [
        tmp_path / 'in' / 'a-2.png', tmp_path / 'in' / 'a-3.png']
