"""Weights on disk in our own layout: one folder, written in any order, loaded onto any mesh.

  weights/plan.json                        what will lie here and where it came from; written first
  weights/params.moe_layers.ffn.gate_EDF/  one Zarr 3 array per leaf: raw little-endian, CRC-32C
  weights/scales/                          scales of blocks, where leaves are FP8: `weights.scales`
  weights/manifest.json                    written last; without it the folder holds nothing

A chunk is one matrix: of one layer, and for routed experts of one expert, so that each lies in a file of
its own that is renamed into place when it is whole. A writer that was killed goes on where it stopped:
a chunk that is there is never written again. Loading reads only what a device holds, chunk by chunk, and
casts each by itself, so that the host never holds a leaf.

Not compressed: weights give back a quarter at best, at a tenth of a disk's speed.
"""

import collections
import contextlib
import dataclasses
import fcntl
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
import tensorstore as ts

from dsv3_jax import mesh
from dsv3_jax.config import ConfigError
from dsv3_jax.weights import sealed

PLAN, MANIFEST = 'plan.json', 'manifest.json'
_FORMAT = 'dsv3_jax weights 1'
_EXPERTS = ('gate_EDF', 'up_EDF', 'down_EFD')
_CRC_BYTES = 4
_IN_FLIGHT = 2  # chunks being written while the next one is made
DTYPES = {
  'fp32': np.dtype(np.float32),
  'bf16': np.dtype(ml_dtypes.bfloat16),
  'fp8': np.dtype(ml_dtypes.float8_e4m3fn),
}
_NAMED = {str(dtype): dtype for dtype in DTYPES.values()}

Path = tuple[str, ...]
Index = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array: ('params', 'moe_layers', 'ffn', 'gate_EDF') of a tree {'params', 'router_bias'}."""

  path: Path
  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def name(self) -> str:
    return '.'.join(self.path)

  @property
  def lead(self) -> int:
    """Leading dimensions that walk matrices: layers, and experts where each has its own."""
    last = self.path[-1]
    return len(self.shape) - len(last.rpartition('_')[2]) + (last in _EXPERTS)

  @property
  def chunk(self) -> tuple[int, ...]:
    return (1,) * self.lead + self.shape[self.lead :]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def chunks(self, index: Index = ()) -> Iterator[tuple[int, ...]]:
    """Leading indices of every chunk that `index` touches."""
    full = (*index, *[slice(None)] * (len(self.shape) - len(index)))
    spans = [
      range(i, i + 1) if isinstance(i, int) else range(*i.indices(size))
      for i, size in zip(full[: self.lead], self.shape, strict=False)
    ]
    return itertools.product(*spans)


def leaves(tree: Any, dtype: Any = None) -> list[Leaf]:
  """The leaves of a nested dict of arrays or ShapeDtypeStructs, in their own dtype or in another."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return [Leaf(mesh.path_names(p), np.dtype(dtype or x.dtype), tuple(x.shape)) for p, x in flat]


# ---- writing -------------------------------------------------------------------------------------


def create(
  folder: str | os.PathLike[str],
  leaves: Sequence[Leaf],
  source: str,
  about: Mapping[str, str] | None = None,
) -> 'Writer':
  """A writer into a new folder, or into one that a writer of the same leaves and source left unfinished.

  `source` is what tells one origin from another: a digest of the files that are converted. `about` is
  kept for readers.

  Raises:
    ConfigError: the folder holds something else, or cannot be written.
  """
  return Writer(pathlib.Path(folder), leaves, source, about or {})


class Writer(contextlib.AbstractContextManager):
  """Writes chunks in any order; `finish` makes the folder whole. Keeps other writers out until closed."""

  def __init__(
    self, folder: pathlib.Path, leaves: Sequence[Leaf], source: str, about: Mapping[str, str]
  ) -> None:
    self.folder = folder
    self._leaves = {leaf.path: leaf for leaf in leaves}
    self._arrays: dict[Path, ts.TensorStore] = {}
    self._plan = _plan(leaves, source) | {'about': dict(about)}
    self._pending: collections.deque[Any] = collections.deque()
    try:
      folder.mkdir(parents=True, exist_ok=True)
      self._lock = _locked(folder)
    except OSError as error:
      raise ConfigError(f'{folder}: cannot be written: {error.strerror}') from None
    try:
      self.whole = self._begin()  # nothing is left to do
    except OSError as error:
      self.close()
      raise ConfigError(f'{folder}: cannot be written: {error.strerror}') from None
    except ConfigError:
      self.close()
      raise

  def __exit__(self, *exception: object) -> None:
    self.close()

  def close(self) -> None:
    """Lets another writer go on; what is being written ends first, well or not."""
    while self._pending:
      with contextlib.suppress(Exception):
        self._pending.popleft().result()
    if self._lock is not None:
      os.close(self._lock)
      self._lock = None

  def _begin(self) -> bool:
    """Whether the folder is whole; raises where it is someone else's, otherwise leaves the plan there."""
    for name in (PLAN, MANIFEST):
      sealed.partial(self.folder / name).unlink(missing_ok=True)  # of a writer that was killed
    whole = is_whole(self.folder)
    before = _read(self.folder / (MANIFEST if whole else PLAN))
    if before is not None and before != self._plan:
      what = 'weights' if whole else 'an unfinished conversion'
      raise ConfigError(
        f'{self.folder}: holds {what} of another source or dtype; use another folder, or remove this one'
      )
    if before is None and any(self.folder.iterdir()):
      raise ConfigError(f'{self.folder}: holds other files; wants a folder of its own')
    if whole:
      (self.folder / PLAN).unlink(missing_ok=True)
    elif before is None:
      sealed.write(self.folder / PLAN, self._plan)
    return whole

  def done(self, path: Path, index: Index) -> bool:
    """Whether every chunk of this slice is on disk."""
    leaf = self._leaves[path]
    return self.whole or all(_is_there(self.folder, leaf, at) for at in leaf.chunks(index))

  def write(self, path: Path, index: Index, array: np.ndarray) -> None:
    """Writes whole chunks; the array must not change until `finish`. Returns while they are written.

    Raises:
      ConfigError: a chunk, this one or one before it, could not be written (disk full, ...).
      ValueError: shape or dtype are not those of the slice.
    """
    leaf = self._leaves[path]
    if array.dtype != leaf.dtype:
      raise ValueError(f'{leaf.name}: wants {leaf.dtype}, not {array.dtype}')
    target = self._array(path)[index]
    if tuple(target.shape) != array.shape:
      raise ValueError(f'{leaf.name}{list(index)}: wants shape {target.shape}, not {array.shape}')
    self._wait(_IN_FLIGHT - 1)
    self._pending.append(target.write(array, can_reference_source_data_indefinitely=True))

  def finish(self) -> None:
    """Waits for the last chunk, checks that none is missing, and writes the manifest."""
    self._wait(0)
    for leaf in self._leaves.values():
      missing = next((at for at in leaf.chunks() if not self.done(leaf.path, at)), None)
      if missing is not None:
        raise ValueError(f'{self.folder}: {leaf.name}{list(missing)} was never written')
    if not self.whole:
      for file in self.folder.rglob('*'):
        _sync(file)  # so that no failure of power leaves a manifest without its weights
      sealed.write(self.folder / MANIFEST, self._plan)
      (self.folder / PLAN).unlink(missing_ok=True)
    self.whole = True
    self.close()

  def _wait(self, most: int) -> None:
    while len(self._pending) > most:
      try:
        self._pending.popleft().result()
      except Exception as error:  # TensorStore raises ValueError for nearly everything
        raise ConfigError(f'{self.folder}: cannot be written: {_short(error)}') from None

  def _array(self, path: Path) -> ts.TensorStore:
    if path not in self._arrays:
      self._arrays[path] = _open(self.folder, self._leaves[path], create=True)
    return self._arrays[path]


# ---- reading -------------------------------------------------------------------------------------


def is_whole(folder: str | os.PathLike[str]) -> bool:
  return pathlib.Path(folder, MANIFEST).is_file()


def open(folder: str | os.PathLike[str]) -> 'Store':
  """The weights of a folder that is whole.

  Raises:
    ConfigError: there are none, or its manifest is damaged.
  """
  folder = pathlib.Path(folder)
  if not is_whole(folder):
    why = 'a conversion that was not finished' if (folder / PLAN).exists() else 'no weights'
    raise ConfigError(f'{folder}: holds {why}')
  body = _read(folder / MANIFEST)
  found = [
    Leaf(tuple(name.split('.')), _NAMED[dtype], tuple(shape))
    for name, (dtype, shape) in body['leaves'].items()
  ]
  return Store(folder, {leaf.path: leaf for leaf in found}, body['source'], body['about'])


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
  folder: pathlib.Path
  leaves: dict[Path, Leaf]
  source: str
  about: dict[str, str]
  _arrays: dict[Path, ts.TensorStore] = dataclasses.field(default_factory=dict, init=False)

  @property
  def nbytes(self) -> int:
    return sum(leaf.nbytes for leaf in self.leaves.values())

  @property
  def fp8(self) -> bool:
    """Whether some leaves are codes, of no use without their scales."""
    return any(leaf.dtype == DTYPES['fp8'] for leaf in self.leaves.values())

  def missing(self) -> list[str]:
    """Chunks that are gone or cut short, a line each; reads none."""
    return [
      f'{leaf.name}{list(at)}'
      for leaf in self.leaves.values()
      for at in leaf.chunks()
      if not _is_there(self.folder, leaf, at)
    ]

  def read(self, path: Path, index: Index = ()) -> np.ndarray:
    """A slice as it is stored; raises ConfigError for a chunk that is damaged or gone."""
    try:
      return self._array(path)[index].read().result()
    except Exception as error:  # TensorStore raises ValueError for nearly everything
      name = '.'.join(path)
      raise ConfigError(
        f'{self.folder / name}: cannot be read: {_short(error)}; import it again'
      ) from None

  def load(self, abstract: Any, read: Any = None) -> Any:
    """Arrays on devices, of the shapes, dtypes and shardings of a tree of ShapeDtypeStructs.

    Args:
      abstract: {'params': ..., 'router_bias': ...} or a part of it.
      read: what to read chunks with, (path, index) -> array; `self.read` unless given.

    Raises:
      ConfigError: a leaf is not stored, has another shape, or a chunk is damaged.
    """
    read = read or self.read
    wanted = {leaf.path: leaf for leaf in leaves(abstract)}
    faults = [
      f'{leaf.name}: {_shape(self.leaves.get(path))} stored, {_shape(leaf)} wanted'
      for path, leaf in wanted.items()
      if _shape(self.leaves.get(path)) != _shape(leaf)
    ]
    if faults:
      raise ConfigError('\n'.join(f'{self.folder}: {fault}' for fault in faults))

    def one(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> jax.Array:
      leaf = wanted[mesh.path_names(path)]
      part = lambda index: gather(leaf, index, read)
      array = jax.make_array_from_callback(x.shape, x.sharding, part)
      return array.block_until_ready()  # before the host takes memory for the next one

    return jax.tree_util.tree_map_with_path(one, abstract)

  def _array(self, path: Path) -> ts.TensorStore:
    if path not in self._arrays:
      self._arrays[path] = _open(self.folder, self.leaves[path], create=False)
    return self._arrays[path]


def gather(leaf: Leaf, index: Index, read: Any) -> np.ndarray:
  """A slice in the leaf's dtype, read and cast matrix by matrix."""
  index = (*index, *[slice(None)] * (len(leaf.shape) - len(index)))
  spans = [range(*i.indices(size)) for i, size in zip(index, leaf.shape, strict=True)]
  out = np.empty([len(span) for span in spans], leaf.dtype)
  for at in itertools.product(*(range(len(span)) for span in spans[: leaf.lead])):
    where = tuple(span[i] for span, i in zip(spans, at, strict=False))
    out[at] = read(leaf.path, where + index[leaf.lead :])
  return out


# ---- files ---------------------------------------------------------------------------------------


@functools.cache
def _context() -> ts.Context:
  """No cache of chunks, few threads: what is converted is read once, and memory is what is short."""
  return ts.Context(
    {
      'cache_pool': {'total_bytes_limit': 0},
      'file_io_concurrency': {'limit': 4},
      'data_copy_concurrency': {'limit': 2},
      'file_io_sync': False,  # `Writer.finish` does it once, for all
    }
  )


def _open(folder: pathlib.Path, leaf: Leaf, *, create: bool) -> ts.TensorStore:
  ends = {} if leaf.dtype.itemsize == 1 else {'configuration': {'endian': 'little'}}
  spec = {
    'driver': 'zarr3',
    'kvstore': {'driver': 'file', 'path': f'{folder.resolve() / leaf.name}/'},
    'metadata': {
      'shape': leaf.shape,
      'data_type': str(leaf.dtype),
      'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': leaf.chunk}},
      'chunk_key_encoding': {'name': 'default', 'configuration': {'separator': '.'}},
      'codecs': [{'name': 'bytes', **ends}, {'name': 'crc32c'}],
      'fill_value': 0,
    },
    'store_data_equal_to_fill_value': True,  # a chunk of zeros is a chunk, and one that is gone is a fault
    'fill_missing_data_reads': False,
  }
  return ts.open(spec, context=_context(), open=True, create=create).result()


def _is_there(folder: pathlib.Path, leaf: Leaf, at: tuple[int, ...]) -> bool:
  """Whether a chunk has its name, which only whole ones get, and its size."""
  try:
    size = _chunk(folder, leaf, at).stat().st_size
  except FileNotFoundError:
    return False
  return size == math.prod(leaf.chunk) * leaf.dtype.itemsize + _CRC_BYTES


def _sync(path: pathlib.Path) -> None:
  file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
  try:
    os.fsync(file)
  finally:
    os.close(file)


def _locked(folder: pathlib.Path) -> int:
  """A descriptor that keeps other writers out until it is closed or the process ends."""
  lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(lock)
    raise ConfigError(f'{folder}: another process is writing to it') from None
  return lock


def _chunk(folder: pathlib.Path, leaf: Leaf, at: tuple[int, ...]) -> pathlib.Path:
  rest = [0] * (len(leaf.shape) - len(at))
  return folder / leaf.name / '.'.join(['c', *map(str, [*at, *rest])])


def _plan(leaves: Sequence[Leaf], source: str) -> dict[str, Any]:
  stored = {leaf.name: [str(leaf.dtype), list(leaf.shape)] for leaf in leaves}
  return {'format': _FORMAT, 'source': source, 'leaves': stored}


def _shape(leaf: Leaf | None) -> str:
  return 'nothing' if leaf is None else str(list(leaf.shape))


def _read(path: pathlib.Path) -> dict[str, Any] | None:
  """The plan or the manifest; None where there is none."""
  body = sealed.read(path)
  if body is not None and body.get('format') != _FORMAT:
    raise ConfigError(f'{path}: is of another version; remove the folder and import again')
  return body


def _short(error: BaseException) -> str:
  """The first clause of TensorStore's text, which goes on with pages of specification."""
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0].split(' [')[0][:200]
