"""Files that appear whole or not at all."""
from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, with the same ending, and rename it to `path` once everything is written."""
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}-{threading.get_ident()}{path.suffix}')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as JSON, with the folders it needs; NaN and infinity are errors."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + '\n', encoding='utf-8')


def read_json(path: Path) -> Any:
    """Read a file of JSON; ValueError where it is none."""
    return json.loads(path.read_text(encoding='utf-8'))


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, 'rb') as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
