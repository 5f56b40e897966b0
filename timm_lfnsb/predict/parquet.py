"""Faces as rows of Parquet, and the folder that keeps them over interruptions (extra `ray`)."""
from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from ..data.images import ImageError
from ..errors import UserError, one_sentence
from .recognizer import Face
from .sources import locate

# Of a file's metadata: what its rows were made with.
_SETTINGS = b'timm_lfnsb'


def face_rows(found: Iterable[Sequence[Face] | ImageError], labels: Sequence[str]) -> tuple[list[int], pa.Table]:
    """The number of the picture that each row is about, and the rows: the fields of `Face.as_dict`, and `error`.

    A row a face; or one for a picture without faces, all null, or with an error, all else null.

    Args:
        found: For each picture its faces or what is wrong with it.
        labels: Names of the probabilities.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, faces in enumerate(found):
        if isinstance(faces, ImageError):
            rows.append((number, {'error': str(faces)}))
        else:
            rows += [(number, face.as_dict()) for face in faces] or [(number, {})]
    return [number for number, _ in rows], pa.Table.from_pylist([row for _, row in rows], pa.schema({
        'box': pa.list_(pa.int32()), 'label': pa.string(), 'score': pa.float32(),
        'probabilities': pa.struct([(label, pa.float32()) for label in labels]), 'detection_score': pa.float64(),
        'points': pa.list_(pa.list_(pa.float64())), 'turn': pa.int32(), 'error': pa.string()}))


class Results:
    """A folder of Parquet files with rows about pictures by their `path`; may be sent to other machines.

    It belongs to the run that opened it last: workers of earlier ones, which may outlive them, cannot write any more.

    Attributes:
        done: The names of pictures that have rows.
        problems: Sentences on files that were set aside, as they were cut off or damaged.

    Raises:
        UserError: When it cannot be written, or has results of other settings or other Parquet files.
    """

    def __init__(self, folder: str, settings: dict[str, Any]) -> None:
        self.folder, self.settings, self.run = folder, json.dumps(settings, sort_keys=True), uuid.uuid4().hex
        self.problems: list[str] = []
        with one_sentence(f'{folder} cannot be used for results'):
            self.system, self.path, _ = locate(folder)
            self.system.create_dir(self.path, recursive=True)
            with self.system.open_output_stream(f'{self.path}/_run') as stream:
                stream.write(self.run.encode())
            files = self.system.get_file_info(pafs.FileSelector(self.path))
            with ThreadPoolExecutor(16) as pool:
                parts = pool.map(self._names, [
                    info.base_name for info in files
                    if info.base_name.endswith('.parquet') and not info.base_name.startswith(('.', '_'))])
                self.done = pa.chunked_array(parts, pa.large_string())

    def _names(self, name: str) -> pa.Array:
        with self.system.open_input_file(f'{self.path}/{name}') as file:
            content = file.read()
        try:
            parquet = pq.ParquetFile(pa.BufferReader(content))
            names = parquet.read(['path']).column(0).unique() if 'path' in parquet.schema_arrow.names else None
        except (pa.ArrowInvalid, OSError):  # no footer, and no valid pages
            self.system.move(f'{self.path}/{name}', f'{self.path}/_{name}.damaged')
            self.problems.append(f'{name} in {self.folder} is damaged: it is now _{name}.damaged, and its pictures are '
                                 'done again.')
            return pa.array([], pa.large_string())
        settings = (parquet.metadata.metadata or {}).get(_SETTINGS, self.settings.encode()).decode()
        if names is None or settings != self.settings:
            raise UserError(f'{name} in {self.folder} was made by something else or with other settings ({settings}): '
                            'give another folder.')
        return names.cast(pa.large_string())

    def write(self, table: pa.Table) -> None:
        """Add rows, all or none of them; those of the same pictures in the same order are replaced.

        Raises:
            UserError: When another run has opened the folder.
        """
        digest = hashlib.sha256('\n'.join(table['path'].to_pylist()).encode()).hexdigest()[:16]
        content = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata({_SETTINGS: self.settings}), content)
        temporary = f'{self.path}/.{digest}.part'
        with self.system.open_output_stream(temporary) as stream:
            stream.write(content.getvalue())
        with self.system.open_input_stream(f'{self.path}/_run') as stream:
            current = stream.read().decode()
        if current != self.run:
            self.system.delete_file(temporary)
            raise UserError(f'another run writes to {self.folder} now: this one ends.')
        self.system.move(temporary, f'{self.path}/faces-{digest}.parquet')
