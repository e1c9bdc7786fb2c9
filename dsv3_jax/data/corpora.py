"""Corpora: documents by number, split into training and held-out ones.

`open_corpus` reads `data.corpus`, which is one of

- `python_stdlib`, the source of the running interpreter (`stdlib_corpus.py`),
- a folder: one document per text file, and one per line of each JSONL file (field `data.text_key`),
- the name of a prepared TFDS dataset in a random-access format (split `train`, field `data.text_key`).

Every document has an id that does not depend on its neighbours (the file's path and the line, or the
dataset's name and the index), and a hash of the id decides whether it is held out. So the split is the
same on all hosts and in all runs, a file added to a folder moves no other document, and a larger
`data.heldout` keeps what a smaller one kept.

A folder is read through once when it is opened, which suits gigabytes; prepare terabytes with TFDS.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3_jax.config import ConfigError, Data

TEXT_SUFFIXES = """
  .bib .c .cc .cfg .cpp .cs .css .cu .go .h .hpp .hs .html .ini .java .jl .js .kt .lua .m .md .ml .php .pl
  .proto .py .pyi .r .rb .rs .rst .scala .sh .sql .swift .tex .toml .ts .txt .xml .yaml .yml
"""


@dataclasses.dataclass(frozen=True)
class Corpus:
  """Documents as text. `train` and `heldout` are disjoint and picklable, and serve as Grain sources."""

  name: str
  train: Sequence[str]
  heldout: Sequence[str]  # in the order of the hashes, so that its first ones are a fair sample
  fingerprint: str  # changes with the documents, `data.text_key` and `data.heldout`
  bytes: int | None  # size of all documents; None where it is not known without reading them


def open_corpus(data: Data) -> Corpus:
  """Opens `data.corpus`; raises ConfigError, in one line, where it is missing, empty or not text."""
  path = pathlib.Path(data.corpus).expanduser()
  if data.corpus == 'python_stdlib':
    from dsv3_jax.data import stdlib_corpus  # TFDS takes its time to import; folders do without

    return _open_tfds(stdlib_corpus.prepare(cache_dir(data)), data)
  if path.is_dir():
    return _open_folder(path, data)
  if path.exists():
    raise _fault(data, 'is a file; name the folder that holds it')
  if path.is_absolute() or data.corpus.startswith(('.', '~')):
    raise _fault(data, 'no such folder')
  return _open_tfds(_prepared_tfds(data), data)


def cache_dir(data: Data) -> pathlib.Path:
  """The folder of prepared corpora and trained tokenizers, made if it is not there."""
  path = pathlib.Path(data.cache_dir or '~/.cache/dsv3_jax').expanduser()
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    right = f'cannot make the folder {path} ({error.strerror})'
    raise ConfigError(f'data.cache_dir = {data.cache_dir!r}: {right}') from None
  return path


def _fault(data: Data, right: str) -> ConfigError:
  return ConfigError(f'data.corpus = {data.corpus!r}: {right}')


# ---- the split -----------------------------------------------------------------------------------


def _split(
  name: str, base: Sequence[str], ids: np.ndarray, content: str, size: int | None, data: Data
) -> Corpus:
  """Divides `base` by `ids` (uint64, one per document); `content` identifies what it holds."""
  order = _mix(ids)
  held = order < np.uint64(int(data.heldout * 2**64))
  for kept, rest, change in ((held, 'evaluation', 'larger'), (~held, 'training', 'smaller')):
    if not kept.any():
      right = f'leaves none of {len(ids)} documents for {rest}; choose a {change} fraction'
      raise ConfigError(f'data.heldout = {data.heldout!r}: {right}')
  train = np.flatnonzero(~held)
  heldout = np.flatnonzero(held)
  heldout = heldout[np.argsort(order[heldout], kind='stable')]
  fingerprint = _digest(content, data.text_key, repr(data.heldout)).hex()
  return Corpus(name, _Documents(base, train), _Documents(base, heldout), fingerprint, size)


class _Documents(Sequence):
  """The documents of `base` at `indices`."""

  def __init__(self, base: Sequence[str], indices: np.ndarray):
    self._base, self._indices = base, indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getitem__(self, i: int) -> str:
    return self._base[int(self._indices[i])]


def _mix(ids: np.ndarray) -> np.ndarray:
  """The SplitMix64 finaliser: uint64 -> uint64, one to one, neighbours unrelated."""
  x = ids + np.uint64(0x9E3779B97F4A7C15)
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _digest(*parts: str) -> bytes:
  """Eight bytes that stand for the list of strings."""
  return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()


def _ids(name: str, count: int) -> np.ndarray:
  """Ids of the `count` documents of one file or dataset: its name's hash, plus 0, 1, 2 ..."""
  return np.frombuffer(_digest(name), '<u8') + np.arange(count, dtype=np.uint64)


# ---- a folder of text and JSONL files ------------------------------------------------------------

_WHOLE_FILE = -1


def _open_folder(root: pathlib.Path, data: Data) -> Corpus:
  paths, starts, ids, content, size = [], [], [], [], 0
  for path in _files(root):
    relative = path.relative_to(root).as_posix()
    if path.suffix.lower() == '.jsonl':
      offsets, digest = _scan_jsonl(path)
      size = None
    else:
      raw = path.read_bytes()
      _decode(raw, path)
      offsets, digest = (
        [_WHOLE_FILE] if raw else [],
        hashlib.blake2b(raw, digest_size=8).hexdigest(),
      )
      size = None if size is None else size + len(raw)
    if offsets:
      paths.append(path)
      starts.append(np.array(offsets, np.int64))
      ids.append(_ids(relative, len(offsets)))
      content += [relative, digest]
  if not paths:
    kinds = ' '.join(TEXT_SUFFIXES.split())
    raise _fault(data, f'holds no text in files that end in .jsonl {kinds}')
  base = _FolderDocuments(paths, starts, data.text_key)
  for first in np.cumsum([0] + [len(s) for s in starts])[:-1]:
    base[int(first)]  # a wrong text_key shows now, not in the middle of a run
  return _split(data.corpus, base, np.concatenate(ids), json.dumps(content), size, data)


def _files(root: pathlib.Path) -> list[pathlib.Path]:
  """Text and JSONL files below `root`, sorted by path; hidden files and folders are passed over."""
  suffixes = {'.jsonl', *TEXT_SUFFIXES.split()}
  found = []
  for folder, folders, names in os.walk(root):
    folders[:] = [name for name in folders if not name.startswith('.')]
    paths = [pathlib.Path(folder, name) for name in names if not name.startswith('.')]
    found += [path for path in paths if path.suffix.lower() in suffixes]
  return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _scan_jsonl(path: pathlib.Path) -> tuple[list[int], str]:
  """Byte offsets of the lines that are not blank, and a digest of the file."""
  offsets, offset, hasher = [], 0, hashlib.blake2b(digest_size=8)
  with path.open('rb') as file:
    for line in file:
      if not line.isspace():
        offsets.append(offset)
      offset += len(line)
      hasher.update(line)
  return offsets, hasher.hexdigest()


class _FolderDocuments(Sequence):
  """Documents of files: a whole one, or the line that starts at an offset. Holds no open file."""

  def __init__(self, paths: list[pathlib.Path], starts: list[np.ndarray], text_key: str):
    self._paths, self._text_key = paths, text_key
    self._file = np.repeat(np.arange(len(paths), dtype=np.int32), [len(s) for s in starts])
    self._start = np.concatenate(starts)

  def __len__(self) -> int:
    return len(self._start)

  def __getitem__(self, i: int) -> str:
    path, start = self._paths[self._file[i]], int(self._start[i])
    if start == _WHOLE_FILE:
      return _decode(path.read_bytes(), path)
    with path.open('rb') as file:
      file.seek(start)
      line = file.readline()
    where = f'{path}, the line at byte {start}'
    try:
      record = json.loads(_decode(line, where))
    except json.JSONDecodeError as error:
      raise ConfigError(
        f'{where}: is not JSON ({error}); .jsonl wants one object per line'
      ) from None
    if not isinstance(record, dict):
      raise ConfigError(
        f'{where}: is a JSON {type(record).__name__}; .jsonl wants one object per line'
      )
    return _text_field(record, self._text_key, where)


def _decode(raw: bytes, where: str | os.PathLike) -> str:
  try:
    return raw.decode('utf-8')
  except UnicodeDecodeError as error:
    raise ConfigError(
      f'{where}: is not UTF-8 ({error.reason} at byte {error.start}); convert or remove it'
    ) from None


def _text_field(record: dict[str, Any], key: str, where: str) -> str:
  """`record[key]` as text, or ConfigError naming the keys that exist."""
  if key not in record:
    raise ConfigError(
      f'data.text_key = {key!r}: no such field in {where}; it has {", ".join(record)}'
    )
  value = record[key]
  if isinstance(value, bytes):
    return _decode(value, where)
  if not isinstance(value, str):
    raise ConfigError(
      f'data.text_key = {key!r}: holds {type(value).__name__}, not text, in {where}'
    )
  # JSON can escape half a surrogate pair, which is no character: it becomes U+FFFD.
  return value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')


# ---- TFDS ----------------------------------------------------------------------------------------


def _prepared_tfds(data: Data) -> Any:
  """The builder of a dataset prepared in TFDS's own folders or in `data.cache_dir`."""
  from tensorflow_datasets.core import read_only_builder

  for folder in (None, cache_dir(data)):
    try:
      return read_only_builder.builder_from_files(data.corpus, data_dir=folder)
    except ValueError:  # DatasetNotFoundError, or a name that TFDS cannot parse
      continue
  wanted = "'python_stdlib', a folder, or a TFDS dataset prepared with file_format='array_record'"
  raise _fault(data, f'neither a folder nor a TFDS dataset prepared here; wants {wanted}')


def _open_tfds(builder: Any, data: Data) -> Corpus:
  info = builder.info
  if 'train' not in info.splits:
    raise _fault(data, f"has no split 'train'; it has {', '.join(info.splits) or 'none'}")
  split = info.splits['train']
  if not split.num_examples:
    raise _fault(data, "its split 'train' is empty")
  try:
    source = builder.as_data_source(split='train')
  except NotImplementedError:
    right = f"is prepared as {info.file_format.value}; prepare it with file_format='array_record'"
    raise _fault(data, right) from None
  base = _TfdsDocuments(source, data.text_key, info.full_name)
  base[0]  # a wrong text_key shows now, not in the middle of a run
  content = json.dumps([info.full_name, split.num_examples, split.num_bytes])
  # The records hold little but the text where it is all there is; elsewhere their size says nothing.
  size = split.num_bytes if data.corpus == 'python_stdlib' else None
  return _split(data.corpus, base, _ids(info.full_name, split.num_examples), content, size, data)


class _TfdsDocuments(Sequence):
  """The text of each record of a `tfds.data_source`."""

  def __init__(self, source: Sequence[dict[str, Any]], text_key: str, name: str):
    self._source, self._text_key, self._name = source, text_key, name

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, i: int) -> str:
    return _text_field(self._source[i], self._text_key, f'{self._name}, document {i}')
