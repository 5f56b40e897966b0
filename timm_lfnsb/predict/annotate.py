"""Pictures with the recognised faces drawn in: boxes, and a panel of probability bars beside the picture."""
from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ..util.files import replacing
from .faces import ImageInput, read_image

if TYPE_CHECKING:
    from .recognizer import Face

# Okabe and Ito's palette, which the color-blind can tell apart, darkened where white text has to be read on it.
COLORS = ('#0072b2', '#b84a00', '#00785a', '#a3528a', '#7a6a00', '#2a7fae', '#444444')
MIN_SIDE = 480  # smaller pictures are enlarged for drawing
MIN_FONT = 14
MAX_COLUMNS = 2


def draw_faces(image: ImageInput, faces: Sequence[Face]) -> Image.Image:
    """Draw boxes around faces, and their probabilities as bars in a panel to the right of the picture.

    Nothing is drawn over the faces but the outline of their boxes: labels stand above the box. Pictures under 480
    pixels are enlarged by a whole number.

    Args:
        image: Whatever `read_image` takes.
        faces: What `ExpressionRecognizer` returned for it.

    Returns:
        RGB picture, wider than the image by the panel.

    Raises:
        ImageError: When the image cannot be read.
    """
    picture = Image.fromarray(read_image(image))
    zoom = math.ceil(MIN_SIDE / max(picture.size))
    if zoom > 1:
        picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.BICUBIC)

    # Readable at the size of the screen; smaller where many faces would make the panel too wide.
    rows = 2 + max((len(face.probabilities) for face in faces), default=0)
    font_size = max(MIN_FONT, min(picture.size) // 36)
    while font_size > MIN_FONT and _columns(len(faces), rows, font_size, picture.height) > MAX_COLUMNS:
        font_size -= 1
    font = ImageFont.load_default(size=font_size)
    line = _line(font_size)
    columns = _columns(len(faces), rows, font_size, picture.height)
    blocks = math.ceil(len(faces) / columns) if faces else 0

    titles = [f'{number}  {face.label}' for number, face in enumerate(faces, 1)]
    names = [name for face in faces for name in face.probabilities]
    name_width = max((_width(font, name) for name in names), default=0)
    title_width = max((_width(font, title) for title in titles), default=0)
    bar_width, value_width, gap = 6 * font_size, _width(font, '0.00'), font_size // 2
    column_width = max(name_width + bar_width + value_width + 2 * gap, title_width + 2 * gap) + 2 * gap

    # A band above the picture keeps the label of a box at the upper border out of the face.
    canvas = Image.new('RGB', (
        picture.width + (columns * column_width if faces else 0),
        line + max(picture.height, blocks * rows * line),
    ), 'white')
    canvas.paste(picture, (0, line))
    draw = ImageDraw.Draw(canvas)
    thick = max(2, font_size // 8)
    for i, (face, title) in enumerate(zip(faces, titles, strict=True)):
        color = COLORS[i % len(COLORS)]
        x, y, width, height = (value * zoom for value in face.box)
        y += line
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline='white', width=thick + 2)
        draw.rectangle((x + 1, y + 1, x + width - 2, y + height - 2), outline=color, width=thick)
        tag = title if _width(font, title) + gap <= max(width, 6 * font_size) else str(i + 1)
        tag_width = _width(font, tag) + gap
        tag_x = max(0, min(x, picture.width - tag_width))
        draw.rectangle((tag_x, y - line, tag_x + tag_width - 1, y - 1), fill=color)
        draw.text((tag_x + gap // 2, y - line / 2), tag, font=font, fill='white', anchor='lm')

        left = picture.width + (i // blocks) * column_width + gap
        top = line + (i % blocks) * rows * line
        draw.rectangle((left, top, left + column_width - 2 * gap, top + line - 1), fill=color)
        draw.text((left + gap, top + line / 2), title, font=font, fill='white', anchor='lm')
        for row, (name, value) in enumerate(face.probabilities.items(), 1):
            middle = top + (row + 0.5) * line
            bar = left + name_width + gap
            draw.text((left, middle), name, font=font, fill='black', anchor='lm')
            draw.rectangle((bar, middle - line * 0.3, bar + bar_width, middle + line * 0.3), fill='#e8e8e8')
            if round(value * bar_width) > 0:
                draw.rectangle((bar, middle - line * 0.3, bar + value * bar_width, middle + line * 0.3), fill=color)
            draw.text((bar + bar_width + gap, middle), f'{value:.2f}', font=font, fill='black', anchor='lm')
    return canvas


def annotation_paths(images: Sequence[tuple[Path, Path]], folder: Path) -> list[Path]:
    """Choose the file each annotated picture is written to: a PNG of the image's name, numbered where it is taken.

    Args:
        images: Path and relative path of each image, from `find_images`.
        folder: Where the pictures go; subfolders are kept.

    Returns:
        As many different paths, none of which is one of the images.
    """
    def key(path: Path) -> str:
        return str(path.resolve()).lower()  # many file systems do not tell cases apart

    taken = {key(path) for path, _ in images}
    targets = []
    for _, relative in images:
        target = folder / relative.with_suffix('.png')
        number = 2
        while key(target) in taken:
            target = folder / relative.with_name(f'{relative.stem}-{number}.png')
            number += 1
        taken.add(key(target))
        targets.append(target)
    return targets


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG that appears under its name only when it is complete.

    Raises:
        OSError: When it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        picture.save(temporary, 'PNG')


def _line(font_size: int) -> int:
    return round(1.4 * font_size)


def _columns(faces: int, rows: int, font_size: int, height: int) -> int:
    """Columns of the panel, each as many blocks of `rows` lines as fit beside the picture, but at least one."""
    blocks = max(1, height // (rows * _line(font_size)))
    return max(1, math.ceil(faces / blocks))


def _width(font: ImageFont.FreeTypeFont | ImageFont.ImageFont, text: str) -> int:
    return math.ceil(font.getlength(text))
