"""Pictures by the million on Ray Data: a step for pipelines of one's own, and what `timm-lfnsb score` runs."""
from __future__ import annotations

import logging
import math
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm import tqdm

from ..data.images import ImageError, ImageInput
from ..errors import UserError, one_sentence, reason
from ..export.exported import is_exported
from ..util.machine import available_cores
from .recognizer import ExpressionRecognizer, Face
from .run import Kind

with one_sentence('Ray Data cannot be used'):
    import pyarrow as pa
    import pyarrow.compute as pc
    import ray
    from ray.data import ActorPoolStrategy, DataContext
    from ray.data.block import BlockAccessor

    from .parquet import Results, face_rows
    from .sources import Source, find_pictures

# Pictures of one file of results at most: they are done again when their worker dies.
_BLOCK = 500


class RecognizeBatch:
    """A step from pictures to one row a face, for `map_batches`; each worker loads the model once.

        >>> pictures = ray.data.read_binary_files('s3://bucket/photos', include_paths=True)
        >>> faces = pictures.map_batches(
        ...     RecognizeBatch, fn_constructor_args=('bytes',), batch_size=64, compute=ActorPoolStrategy(size=3))

    A row has the fields of `face_rows` and the other columns of its picture. Workers that take all cores wait for ever
    for pictures: leave one to the reading.

    Args:
        column: The pictures: paths, encoded bytes, {bytes, path} as Hugging Face's `datasets` has them, or arrays.
        settings: `ExpressionRecognizer`'s; by default without threads of its own, as Ray counts a core a worker.
    """

    def __init__(self, column: str = 'image', **settings: Any) -> None:
        self.column, self.recognizer = column, ExpressionRecognizer(**{'workers': 0, **settings})

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        """The rows of a batch, columns by name as Ray gives it by default; ValueError where columns lack or clash."""
        if self.column not in batch:
            raise ValueError(f'there is no column {self.column} of pictures among {", ".join(batch)}.')
        images: Iterator[Any] = (
            image.get('bytes') or image.get('path') if isinstance(image, Mapping) else image
            for image in batch[self.column])
        numbers, faces = face_rows(_stream(self.recognizer, images), self.recognizer.label_names)
        others = {name: values[numbers] for name, values in batch.items() if name != self.column}
        if clash := others.keys() & set(faces.column_names):
            raise ValueError(f'rename or drop the columns that faces have, too: {", ".join(sorted(clash))}.')
        table = BlockAccessor.batch_to_arrow_block(others) if others else faces.select([])
        for name in faces.column_names:
            table = table.append_column(name, faces[name])
        return table


def score(
        source: str, out: str, address: str | None = None, workers: int | None = None, gpus: float = 0.,
        image_column: str = 'image', model: str = 'lfnsb', batch_size: int = 8, **settings: Any,
) -> Iterator[tuple[str, Kind]]:
    """Write the faces of pictures to a folder of Parquet and yield what is to be said, each line with what it is.

    Called again it goes on with the pictures that have no rows. A Ray that runs in this process already is used.

    Args:
        source, image_column: See `find_pictures`.
        out: A local folder or a URI, see `Results`.
        address: Of a Ray cluster, 'auto' for that of this machine; None starts Ray here for this call.
        workers: Processes with a model and a core each; by default as many as Ray has room for.
        gpus: Share of a GPU for each worker, such as 0.25; 0 for the CPU.
        model, batch_size, settings: `ExpressionRecognizer`'s, but for `workers` and `device`.

    Raises:
        UserError: When an argument is wrong, or Ray, the model, the pictures or the folder cannot be used.
    """
    try:  # here first: what is wrong is said once, and the workers get the model as it is here
        recognizer = ExpressionRecognizer(
            os.path.abspath(model) if is_exported(model) else model, batch_size=batch_size, device='cpu', **settings)
    except ValueError as error:
        raise UserError(str(error)) from error
    pictures, names = find_pictures(source, image_column)
    results = Results(out, {'model': model, **settings})
    yield from ((problem, 'hint') for problem in results.problems)
    left = names.filter(pc.invert(pc.is_in(names, results.done)))
    before, counts, start = len(names) - len(left), Counter[str](), time.perf_counter()
    del results.done  # not for the workers
    if not len(left):
        yield f'All {before} pictures have their rows in {out}.', 'result'
        return
    settings.update(model=recognizer.model, batch_size=batch_size, device='cuda' if gpus else 'cpu',
                    workers=1 if gpus else 0)
    with _connected(address, workers), tqdm(total=len(left), unit='picture', leave=False, disable=None) as bar:
        workers = _room(workers, gpus)
        size = min(_BLOCK, math.ceil(len(left) / (4 * workers)))
        blocks = [pa.table({'path': left[i:i + size].cast(pa.string())}) for i in range(0, len(left), size)]
        try:
            for row in ray.data.from_arrow(blocks).map_batches(
                    _Score, fn_constructor_args=(pictures, results, settings), batch_size=None, batch_format='pyarrow',
                    num_cpus=1, num_gpus=gpus or None, compute=ActorPoolStrategy(size=workers)).iter_rows():
                if failure := row.pop('failure'):
                    raise UserError(failure)
                counts.update(row)
                bar.update(row['pictures'])
        except ray.exceptions.RayError as error:
            raise UserError(f'Ray gave up: {str(error).strip().splitlines()[-1]}') from error
        except KeyboardInterrupt:
            yield f'Interrupted after {counts["pictures"]} of {len(left)} pictures: call it again to go on.', 'problem'
            return
    seconds = time.perf_counter() - start
    yield (f'{counts["pictures"]} pictures and {counts["faces"]} faces; {counts["without"]} pictures without a face, '
           f'{counts["errors"]} with an error; {before} were done before. {workers} worker(s) took {seconds:.1f} s, '
           f'{counts["pictures"] / seconds:.1f} pictures a second.'), 'result'


class _Score:
    """The step of `score`: names in, results written, and counts out, or the reason to end the run."""

    def __init__(self, pictures: Source, results: Results, settings: dict[str, Any]) -> None:
        self.pictures, self.results, self.recognizer = pictures, results, ExpressionRecognizer(**settings)

    def __call__(self, batch: pa.Table) -> pa.Table:
        failure, found = '', []
        try:
            found = list(_stream(self.recognizer, self.pictures.read(batch['path'].to_pylist())))
            numbers, faces = face_rows(found, self.recognizer.label_names)
            self.results.write(faces.add_column(0, 'path', batch['path'].take(numbers)))
        except Exception as error:  # a damaged model, a full disk: nothing that Ray's next try would mend
            failure = reason(error)
        faces_of = [-1 if isinstance(faces, ImageError) else len(faces) for faces in found]
        return pa.Table.from_pylist([{
            'failure': failure, 'pictures': len(found), 'faces': sum(faces_of) + faces_of.count(-1),
            'without': faces_of.count(0), 'errors': faces_of.count(-1)}])


def _stream(
        recognizer: ExpressionRecognizer, images: Iterable[ImageInput | ImageError],
) -> Iterator[list[Face] | ImageError]:
    """`recognizer.stream`, with errors passed through, and without names in them: those have a column."""
    known: deque[tuple[str, ImageError | None]] = deque()

    def readable() -> Iterator[ImageInput]:
        for number, image in enumerate(images, 1):
            error = image if isinstance(image, ImageError) else None
            known.append((image if isinstance(image, str) else f'image {number}', error))
            yield b'' if isinstance(image, ImageError) else image

    for faces in recognizer.stream(readable()):
        name, error = known.popleft()
        yield error or (ImageError(str(faces).removeprefix(f'{name}: ')) if isinstance(faces, ImageError) else faces)


@contextmanager
def _connected(address: str | None, workers: int | None) -> Iterator[None]:
    """A quiet Ray: that of this process, else at the address, else one for the time being."""
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger('ray.data').setLevel(logging.ERROR)
    if ray.is_initialized():
        yield
        return
    # No statistics to Ray's makers, no alarms about its own ways, and workers that are as nice as `predict`.
    for name, value in {'USAGE_STATS_ENABLED': '0', 'BACKEND_LOG_LEVEL': 'fatal', 'worker_niceness': '0'}.items():
        os.environ.setdefault(f'RAY_{name}', value)
    own: dict[str, Any] = {} if address else {  # only names, counts and the model go through the object store
        'num_cpus': workers or available_cores(), 'include_dashboard': False, 'object_store_memory': 1 << 29}
    with one_sentence(f'Ray cannot be reached at {address}' if address else 'Ray does not start'):
        ray.init(address or 'local', log_to_driver=False, logging_level=logging.ERROR, **own)
    try:
        yield
    finally:
        ray.shutdown()


def _room(workers: int | None, gpus: float) -> int:
    """As many workers as Ray has cores and GPUs for, at most `workers`."""
    have = ray.cluster_resources()
    cores, cards = have.get('CPU', 0), have.get('GPU', 0)
    room = int(min(cores, cards / gpus + 1e-6) if gpus else cores)
    if room < 1:
        raise UserError(f'Ray has {cores:g} cores and {cards:g} GPUs, too few for a worker with 1 and {gpus:g}.')
    return min(room, workers or room)
