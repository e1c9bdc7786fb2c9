"""Folders of safetensors files: read strictly, tensor by tensor, and written so that a kill costs little.

`Folder` reads what Hugging Face calls a sharded checkpoint: one `model.safetensors`, or
`model.safetensors.index.json` and the shards that it names. `Writer` writes one, shard by shard, with
transformers' file names:

  model-00001-of-00163.safetensors ... model.safetensors.index.json        or model.safetensors alone

Nothing is mapped into memory: mapped pages count as resident, and a shard of 4 GB would too. Bytes go by
`preadv` from the file into the array that is returned, and from the array of one tensor to the file.
Pickles (pytorch_model.bin, .pt, .pth) are never opened: reading one runs what it says.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from dsv3_jax.weights import files, headers
from dsv3_jax.weights.headers import FormatError, Tensor, short

SINGLE = 'model.safetensors'
INDEX = 'model.safetensors.index.json'
RECORD = 'dsv3_export.json'
_MAX_INDEX = 64 * 2**20  # bytes; that of the 671B model has 9 MB
_PICKLES = ('.bin', '.pt', '.pth', '.ckpt', '.pkl')

Spec = tuple[str, np.dtype, tuple[int, ...]]

# ---- read ----------------------------------------------------------------------------------------


class Folder:
  """The tensors of a checkpoint folder. Making one reads and checks all headers, and no data.

  Attributes:
    tensors: name -> Tensor, of all shards.
    total_bytes: of the data.
    largest_shard_bytes: size of the largest file.
    files: names of the files with tensors, sorted.

  Raises:
    FormatError: anything that is not a whole checkpoint: a file that is missing, truncated or
      malformed, an index that disagrees with the shards, a tensor in two shards, only pickles.
  """

  def __init__(self, folder: str | os.PathLike[str]):
    self.folder = pathlib.Path(folder)
    if not self.folder.is_dir():
      raise FormatError(f'{self.folder}: no such folder; name one with {SINGLE} or {INDEX}')
    index = self._read_index()
    self.files = sorted(set(index.values())) if index is not None else [SINGLE]
    self.tensors: dict[str, Tensor] = {}
    self.largest_shard_bytes = 0
    for file in self.files:
      path = self.folder / file
      found, file_bytes = read_headers(path)
      self.largest_shard_bytes = max(self.largest_shard_bytes, file_bytes)
      for t in found:
        if t.name in self.tensors:
          raise FormatError(
            f'tensor {short(t.name)} stands in {self.tensors[t.name].path} and in {path}; '
            'each may stand once'
          )
        if index is not None and index.get(t.name) != file:
          there = f'in {short(index[t.name])}' if t.name in index else 'nowhere'
          raise FormatError(f'{path}: holds tensor {short(t.name)}, which {INDEX} places {there}')
        self.tensors[t.name] = t
    for name, file in (index or {}).items():
      if name not in self.tensors:
        raise FormatError(
          f'{self.folder / file}: lacks tensor {short(name)}, placed there by {INDEX}'
        )
    self.total_bytes = sum(t.nbytes for t in self.tensors.values())

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    """A tensor, or the part of it at `index`; of that part alone bytes are read.

    Args:
      index: slices without a step, inside the shape, for the leading dimensions.

    Raises:
      KeyError: no such tensor.
      IndexError: `index` reaches outside the tensor.
      FormatError: the file has become shorter, or holds no booleans where it says so.
    """
    t = self.tensors[name]
    bounds = _bounds(t, index)
    out = np.empty([stop - start for start, stop in bounds], t.dtype)
    if out.size:
      with files.opened(t.path) as file:
        for start, run in _runs(t, bounds, out):
          files.read_into(file, run, start, t.path)
    if t.dtype == np.bool_ and (out.view(np.uint8) > 1).any():
      raise FormatError(
        f'{t.path}: tensor {short(name)} is BOOL, and holds bytes other than 0 and 1'
      )
    return out

  def _read_index(self) -> dict[str, str] | None:
    """{tensor: file} as the index has it, with file names checked; None for a single file."""
    path = self.folder / INDEX
    single, indexed = os.path.lexists(self.folder / SINGLE), os.path.lexists(path)
    if single and indexed:
      raise FormatError(f'{self.folder}: holds both {SINGLE} and {INDEX}; take one of them away')
    if single:
      return None
    if not indexed:
      self._say_what_is_missing()
    with files.opened(path) as file:
      if (size := os.fstat(file).st_size) > _MAX_INDEX:
        raise FormatError(f'{path}: {size} bytes; at most {_MAX_INDEX} are read')
      text = files.read_bytes(file, size, 0, path)
    index = headers.parse_object(text, path).get('weight_map')
    if not isinstance(index, dict) or not index:
      raise FormatError(
        f'{path}: weight_map is {short(index)}; must say which file has each tensor'
      )
    for name, file in index.items():
      # A plain name cannot lead out of the folder. It may be a link, as all are in the Hub's cache.
      plain = isinstance(file, str) and not set(file) & set('/\\:\0') and not file.startswith('.')
      if not plain or not file.endswith('.safetensors'):
        raise FormatError(
          f'{path}: tensor {short(name)} in {short(file)}; must be the plain name of a .safetensors '
          'file in the folder'
        )
    return index

  def _say_what_is_missing(self) -> None:
    names = sorted(path.name for path in self.folder.iterdir())
    pickles = [name for name in names if name.endswith(_PICKLES)]
    shards = [name for name in names if name.endswith('.safetensors')]
    if shards:
      why = f'holds {shards[0]} but no {INDEX}: it is not whole, or not written to its end'
    elif pickles:
      why = f'holds {pickles[0]}, a pickle, which is never read; save it as safetensors first'
    else:
      why = f'holds no {SINGLE} and no {INDEX}'
    raise FormatError(f'{self.folder}: {why}')


def read_headers(path: pathlib.Path) -> tuple[list[Tensor], int]:
  """The tensors of one file, checked against its size, and that size in bytes."""
  with files.opened(path) as file:
    file_bytes = os.fstat(file).st_size
    length = headers.header_length(os.pread(file, 8, 0), file_bytes, path)
    header = files.read_bytes(file, length, 8, path)
  return headers.parse(header, file_bytes, path), file_bytes


def _bounds(t: Tensor, index: tuple[slice, ...]) -> list[tuple[int, int]]:
  """(start, stop) of every dimension. Reaching outside is a fault here, not clipped as NumPy does."""
  if len(index) > len(t.shape):
    raise IndexError(f'{t.name} {t.shape}: {len(index)} slices for {len(t.shape)} dimensions')
  bounds = []
  for n, s in itertools.zip_longest(t.shape, index, fillvalue=slice(None)):
    start, stop = s.start or 0, n if s.stop is None else s.stop
    if s.step not in (None, 1) or not 0 <= start <= stop <= n:
      raise IndexError(f'{t.name} {t.shape}: cannot read {s} of a dimension of {n}')
    bounds.append((start, stop))
  return bounds


def _runs(
  t: Tensor, bounds: list[tuple[int, int]], out: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
  """(offset in the file, part of `out`) of each stretch that lies in one piece in both."""
  cut = [i for i, (n, bound) in enumerate(zip(t.shape, bounds, strict=True)) if bound != (0, n)]
  inner = cut[-1] if cut else 0  # what lies behind the last dimension that is cut is whole
  strides = [t.dtype.itemsize * math.prod(t.shape[i + 1 :]) for i in range(len(t.shape))]
  for at in np.ndindex(out.shape[:inner]):
    first = (*at, *(0 for _ in strides[inner:]))
    steps = zip(first, bounds, strides, strict=True)
    yield t.offset + sum((i + start) * stride for i, (start, _), stride in steps), out[*at, ...]


# ---- write ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shard:
  """One file that is to be written: its tensors in the order of their data."""

  file: str
  tensors: tuple[Spec, ...]
  done: bool  # present and whole, from an earlier run with the same plan and source

  @property
  def names(self) -> list[str]:
    return [name for name, _, _ in self.tensors]

  @property
  def nbytes(self) -> int:
    return sum(headers.nbytes_of(dtype, shape) for _, dtype, shape in self.tensors)


class Writer:
  """Writes a checkpoint folder shard by shard; killed anywhere and run again, it goes on.

  A shard gets its name when all its bytes are on the disk, the index is written last, and a folder
  without it is not taken for a checkpoint by `Folder` or by transformers. A record of plan and source
  (`dsv3_export.json`, left there) tells a later run that these shards are its own.

  Args:
    folder: is made; may exist if it holds no checkpoint, or one begun by an equal Writer.
    tensors: (name, dtype, shape) in the order in which they fill the shards.
    shard_bytes: of data in one shard at most; a larger tensor has a shard of its own.
    metadata: of each shard; transformers asks for {'format': 'pt'}.
    source: what the tensors are read from, so that a run from elsewhere does not go on with this one.

  Raises:
    FormatError: nothing to write, a name twice, a dtype without a name, too little room on the disk,
      or a folder that holds something else. Nothing is written then.
  """

  def __init__(
    self,
    folder: str | os.PathLike[str],
    tensors: Sequence[Spec],
    shard_bytes: int,
    metadata: Mapping[str, str],
    source: str = '',
  ):
    self.folder = pathlib.Path(folder)
    self._metadata = dict(metadata)
    specs = [(name, np.dtype(dtype), tuple(shape)) for name, dtype, shape in tensors]
    _require_writable(specs, shard_bytes)
    plan = _split(specs, shard_bytes)
    described = [[s.file, [(name, str(d), shape) for name, d, shape in s.tensors]] for s in plan]
    digest = hashlib.sha256(json.dumps([described, self._metadata]).encode()).hexdigest()
    self._record = {'source': source, 'plan': digest}
    mine = self._is_mine()
    self._plan = [self._with_done(shard) if mine else shard for shard in plan]
    self._require_room()
    self._begin()

  def shards(self) -> list[Shard]:
    """All shards in order; those with `done` need no `write_shard`."""
    return list(self._plan)

  def write_shard(self, shard: Shard, read: Callable[[str], np.ndarray]) -> None:
    """Writes one shard with the arrays that `read` returns, asked for one by one in file order.

    Raises:
      FormatError: an array of another dtype or shape than planned, or a disk that does not take it.
    """
    path = self.folder / shard.file
    # Two processes at once write the same bytes under two names, and the later rename changes nothing.
    partial = self.folder / f'{shard.file}.{os.getpid()}.partial'
    try:
      with files.created(partial) as file:
        files.write(file, headers.render(shard.tensors, self._metadata), path)
        for name, dtype, shape in shard.tensors:
          x = read(name)
          if (x.dtype, x.shape) != (dtype, shape):
            raise FormatError(f'{name}: read {x.dtype} {x.shape}, to be written {dtype} {shape}')
          files.write(file, x, path)
          del x  # before the next one is read
      files.rename(partial, path)
    finally:
      partial.unlink(missing_ok=True)

  def finish(self) -> None:
    """Writes the index, which makes the folder a checkpoint; one that is there already is left alone.

    Raises:
      FormatError: a shard is missing.
    """
    for shard in self._plan:
      if not self._with_done(shard).done:
        raise FormatError(f'{self.folder / shard.file}: is not written yet; finish comes last')
    if self._plan[0].file != SINGLE and not (self.folder / INDEX).exists():
      total = sum(shard.nbytes for shard in self._plan)
      where = {name: shard.file for shard in self._plan for name in shard.names}
      index = {'metadata': {'total_size': total}, 'weight_map': dict(sorted(where.items()))}
      files.write_json(self.folder / INDEX, index)

  def _is_mine(self) -> bool:
    """Whether the folder is of an earlier run of this very plan; raises if it is of anything else."""
    if self.folder.exists() and not self.folder.is_dir():
      raise FormatError(f'{self.folder}: is no folder; name one to write to')
    names = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
    if RECORD in names:
      try:
        found = json.loads((self.folder / RECORD).read_bytes())
      except ValueError:
        found = None
      if found == self._record:
        return True
      what = 'was begun with other tensors, sizes or source'
    else:
      there = [n for n in sorted(names) if n == INDEX or n.endswith('.safetensors')]
      if not there:
        return False
      what = f'holds {there[0]} already'
    raise FormatError(f'{self.folder}: {what}; name an empty folder, or delete this one')

  def _with_done(self, shard: Shard) -> Shard:
    """`shard`, done if its file has the planned size and header: names are given to whole files."""
    head = headers.render(shard.tensors, self._metadata)
    try:
      with open(self.folder / shard.file, 'rb') as file:
        same = file.read(len(head)) == head
        same = same and os.fstat(file.fileno()).st_size == len(head) + shard.nbytes
    except OSError:
      same = False
    return dataclasses.replace(shard, done=same)

  def _require_room(self) -> None:
    needed = sum(shard.nbytes for shard in self._plan if not shard.done)
    existing = next(
      p for p in (self.folder.absolute(), *self.folder.absolute().parents) if p.exists()
    )
    free = shutil.disk_usage(existing).free + sum(p.stat().st_size for p in self._leftovers())
    if needed > free:
      raise FormatError(
        f'{self.folder}: needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f}'
      )

  def _begin(self) -> None:
    """Makes the folder and the record, and removes what a killed run left of its last shard."""
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      for path in self._leftovers():
        path.unlink(missing_ok=True)
    except OSError as error:
      raise FormatError(f'{self.folder}: cannot be written: {error.strerror}') from None
    files.write_json(self.folder / RECORD, self._record)

  def _leftovers(self) -> list[pathlib.Path]:
    return list(self.folder.glob('model*.partial'))


def _require_writable(specs: list[Spec], shard_bytes: int) -> None:
  if not specs:
    raise FormatError('no tensors to write; a checkpoint has at least one')
  if shard_bytes < 1:
    raise FormatError(f'shards of {shard_bytes} bytes; must be at least 1')
  seen = {'__metadata__'}
  for name, dtype, _ in specs:
    if name in seen:
      raise FormatError(f'tensor {short(name)}: the name is taken; each needs one of its own')
    if dtype not in headers.NAMES:
      raise FormatError(f'tensor {short(name)}: safetensors has no name for {dtype}')
    seen.add(name)


def _split(specs: list[Spec], shard_bytes: int) -> list[Shard]:
  """Fills shard after shard, as huggingface_hub's split_state_dict_into_shards_factory does."""
  groups: list[list[Spec]] = [[]]
  used = 0
  for spec in specs:
    nbytes = headers.nbytes_of(*spec[1:])
    if groups[-1] and used + nbytes > shard_bytes:
      groups.append([])
      used = 0
    groups[-1].append(spec)
    used += nbytes
  names = [f'model-{i + 1:05d}-of-{len(groups):05d}.safetensors' for i in range(len(groups))]
  names = names if len(names) > 1 else [SINGLE]
  ordered = [tuple(headers.sorted_for_file(group)) for group in groups]
  return [Shard(name, group, False) for name, group in zip(names, ordered, strict=True)]
