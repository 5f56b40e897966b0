"""Pictures with the recognised faces drawn in: boxes, and a panel of probability bars beside the picture."""
from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from ..data.images import ImageInput, read_image

if TYPE_CHECKING:
    from .recognizer import Face

# Okabe and Ito's palette, which the color-blind can tell apart, darkened where white text has to be read on it.
COLORS = ('#0072b2', '#b84a00', '#00785a', '#a3528a', '#7a6a00', '#2a7fae', '#444444')
MIN_SIDE = 480  # smaller pictures are enlarged for drawing
MIN_FONT = 14


def draw_faces(image: ImageInput, faces: Sequence[Face]) -> Image.Image:
    """Draw boxes around the faces of what `read_image` takes, and their probabilities as bars in a panel beside it.

    Labels stand above the boxes. Pictures under 480 pixels are enlarged by a whole number.
    """
    picture = Image.fromarray(read_image(image))
    zoom = math.ceil(MIN_SIDE / max(picture.size))
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.BICUBIC)

    # Readable at the size of the screen; smaller where many faces would make the panel too wide.
    font_size = max(MIN_FONT, min(picture.size) // max(36, 6 * len(faces)))
    font = ImageFont.load_default(size=font_size)
    line = round(1.4 * font_size)
    rows = 2 + max((len(face.probabilities) for face in faces), default=0)
    per_column = max(1, picture.height // (rows * line))
    columns = math.ceil(len(faces) / per_column)

    def width_of(*texts: str) -> int:
        return max((math.ceil(font.getlength(text)) for text in texts), default=0)

    titles = [f'{number}  {face.label}' for number, face in enumerate(faces, 1)]
    name_width, bar_width, gap = width_of(*(faces[0].probabilities if faces else ())), 6 * font_size, font_size // 2
    block_width = max(name_width + bar_width + width_of('0.00') + 2 * gap, width_of(*titles) + 2 * gap)

    # A band above the picture keeps the label of a box at the upper border out of the face.
    height = max(picture.height, min(len(faces), per_column) * rows * line)
    canvas = Image.new('RGB', (picture.width + columns * (block_width + 2 * gap), line + height), 'white')
    canvas.paste(picture, (0, line))
    draw = ImageDraw.Draw(canvas)

    def bar(left: float, top: float, width: float, height: float, color: str, text: str = '', indent: int = 0) -> None:
        """A filled rectangle with white text in it."""
        draw.rectangle((left, top, left + width - 1, top + height - 1), fill=color)
        draw.text((left + indent, top + height / 2), text, font=font, fill='white', anchor='lm')

    thick = max(2, font_size // 8)
    for i, (face, title) in enumerate(zip(faces, titles, strict=True)):
        color = COLORS[i % len(COLORS)]
        x, y, width, height = (value * zoom for value in face.box)
        y += line
        draw.rectangle((x, y, x + width - 1, y + height - 1), outline='white', width=thick + 2)
        draw.rectangle((x + 1, y + 1, x + width - 2, y + height - 2), outline=color, width=thick)
        tag = title if width_of(title) + gap <= max(width, 6 * font_size) else str(i + 1)
        tag_width = width_of(tag) + gap
        bar(max(0, min(x, picture.width - tag_width)), y - line, tag_width, line, color, tag, gap // 2)

        left = picture.width + (i // per_column) * (block_width + 2 * gap) + gap
        top = line + (i % per_column) * rows * line
        bar(left, top, block_width, line, color, title, gap)
        for row, (name, value) in enumerate(face.probabilities.items(), 1):
            middle = top + (row + 0.5) * line
            bars = left + name_width + gap
            draw.text((left, middle), name, font=font, fill='black', anchor='lm')
            bar(bars, middle - line * 0.3, bar_width + 1, line * 0.6 + 1, '#e8e8e8')
            if round(value * bar_width) > 0:
                bar(bars, middle - line * 0.3, value * bar_width + 1, line * 0.6 + 1, color)
            draw.text((bars + bar_width + gap, middle), f'{value:.2f}', font=font, fill='black', anchor='lm')
    return canvas


def annotation_paths(images: Sequence[tuple[Path, Path]], folder: Path) -> list[Path]:
    """Choose a PNG below `folder` for each image of `find_images`, numbered where the name is taken or an image."""
    def key(path: Path) -> str:
        return os.path.realpath(path).lower()  # many file systems do not tell cases apart

    taken, targets = {key(path) for path, _ in images}, []
    for _, relative in images:
        target, number = folder / relative.with_suffix('.png'), 2
        while key(target) in taken:
            target, number = target.with_name(f'{relative.stem}-{number}.png'), number + 1
        taken.add(key(target))
        targets.append(target)
    return targets
