"""Many pictures: in folders, patterns, lists and Parquet, on any file system that pyarrow reads (extra `ray`)."""
from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import PurePath
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from fsspec.implementations.arrow import ArrowFSWrapper

from ..data.images import IMAGE_SUFFIXES, ImageError
from ..errors import UserError, one_sentence, reason

# Rows of Parquet in memory together: a picture may have megabytes.
_ROWS = 8


@dataclass(frozen=True)
class Source:
    """How to read pictures by their names, which are absolute paths or URIs; may be sent to other machines."""

    system: pafs.FileSystem
    prefix: str  # of URIs, what pyarrow's paths lack
    column: str | None = None  # of Parquet, where that has the pictures: each is then named FILE#ROW, from 0

    def read(self, names: Sequence[str]) -> Iterator[str | bytes | ImageError]:
        """Yield a local path, content, or what is wrong, for each name; rows of a file must ascend."""
        for file, group in groupby(names, lambda name: name.rpartition('#')[0] if self.column else name):
            path, count, done = file.removeprefix(self.prefix), len(part := list(group)), 0
            try:
                if self.column:
                    for content in self._rows(path, [int(name.rpartition('#')[2]) for name in part]):
                        yield content
                        done += 1
                elif isinstance(self.system, pafs.LocalFileSystem):
                    yield path
                else:
                    with self.system.open_input_stream(path) as stream:
                        yield stream.read()
            except Exception as error:  # every file system has its own
                yield from [ImageError(f'{file} cannot be read ({reason(error)}).')] * (count - done)

    def _rows(self, path: str, rows: Sequence[int]) -> Iterator[bytes | ImageError]:
        with self.system.open_input_file(path) as file:
            # Buffered: else the column comes into memory by row groups, which may be the whole file.
            parquet = pq.ParquetFile(file, buffer_size=1 << 20)
            groups = range(parquet.num_row_groups)
            starts = np.cumsum([0, *(parquet.metadata.row_group(i).num_rows for i in groups)])
            first = int(np.searchsorted(starts, rows[0], 'right')) - 1
            batches = parquet.iter_batches(_ROWS, row_groups=groups[first:], columns=[self.column])
            values = enumerate((value for batch in batches for value in batch.column(0)), int(starts[first]))
            wanted = set(rows)
            for row, value in islice(values, rows[-1] + 1 - int(starts[first])):
                if row in wanted:
                    content = value.as_py()  # `datasets` of Hugging Face has {bytes, path}
                    content = content['bytes'] if isinstance(content, dict) else content
                    yield content or ImageError('the row has no picture.')


def locate(name: str) -> tuple[pafs.FileSystem, str, str]:
    """File system, pyarrow's path there, and what that lacks of a URI, of a local path or a URI.

    Raises:
        UserError: When pyarrow does not know such URIs, or does not reach the place.
    """
    if '://' not in name:
        return pafs.LocalFileSystem(), os.path.abspath(name), ''
    with one_sentence(f'{name} cannot be reached'):
        system, path = pafs.FileSystem.from_uri(name)
    uri = urlsplit(name)
    host = uri.netloc.rpartition('@')[2] if path.startswith('/') else ''  # passwords stay out of results
    return system, path, '' if isinstance(system, pafs.LocalFileSystem) else f'{uri.scheme}://{host}'


def find_pictures(source: str, column: str = 'image') -> tuple[Source, pa.Array]:
    """The pictures of a folder and those below, a pattern, a picture, a text file of paths or Parquet, and their names.

    Args:
        source: Local, or a URI. In a folder, hidden files and those that are no pictures by their names are left out;
            one without pictures may hold Parquet. A text file has a path a line, all on one file system.
        column: Of Parquet: images as bytes, or as {bytes, path}.

    Raises:
        UserError: When there is no picture, or no such column.
    """
    with one_sentence(f'{source} cannot be read'):
        system, path, prefix = locate(source)
        kind = system.get_file_info(path).type
        if kind == pafs.FileType.NotFound:
            wild = re.search(r'[*?[]', source)
            if not wild:
                raise UserError(f'there is no {source}.')
            folder, slash, _ = source[:wild.start()].rpartition('/')
            system, path, prefix = locate(folder + slash or '.')
            found = ArrowFSWrapper(system).glob(f'{path.rstrip("/")}/{source[len(folder + slash):]}')
            files = [file for file in found if not PurePath(file).name.startswith('.')]
        elif kind == pafs.FileType.Directory:
            found = [info.path for info in system.get_file_info(pafs.FileSelector(path, recursive=True))
                     if info.is_file and not info.base_name.startswith('.')]
            files = ([file for file in found if _suffix(file) in IMAGE_SUFFIXES]
                     or [file for file in found if _suffix(file) == '.parquet'])
        elif _suffix(path) in {*IMAGE_SUFFIXES, '.parquet'}:
            files = [path]
        else:
            with system.open_input_stream(path) as stream:
                lines = [line.strip() for line in stream.read().decode().splitlines() if line.strip()]
            system, _, prefix = locate(lines[0] if lines else '.')
            files = [line.removeprefix(prefix) if prefix else locate(line)[1] for line in lines]
        parquet = all(_suffix(file) == '.parquet' for file in files)
        names = (f'{prefix}{file}#{row}' if parquet else prefix + file for file in sorted(files)
                 for row in range(_row_count(system, file, column) if parquet else 1))
        array = pa.array(names, pa.large_string()).unique()
    if not len(array):
        raise UserError(f'{source} has no pictures: give a folder, a pattern, a text file of paths, or Parquet.')
    return Source(system, prefix, column if parquet else None), array


def _suffix(name: str) -> str:
    return PurePath(name).suffix.lower()


def _row_count(system: pafs.FileSystem, path: str, column: str) -> int:
    with system.open_input_file(path) as file:
        parquet = pq.ParquetFile(file)
        fits = [field.name for field in parquet.schema_arrow if pa.types.is_binary(field.type)
                or pa.types.is_large_binary(field.type)
                or (pa.types.is_struct(field.type) and field.type.get_field_index('bytes') >= 0)]
        if column not in fits:
            raise UserError(f'{path} has no column {column} of pictures as bytes; --image-column names another: '
                            f'{", ".join(fits) or "there is none"}.')
        return parquet.metadata.num_rows
