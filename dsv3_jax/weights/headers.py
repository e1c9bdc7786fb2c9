"""The header of a safetensors file: parsed strictly from bytes, and written as the package writes it.

A file is 8 bytes of header length (little endian), the header, and the data:

  {"__metadata__": {"format": "pt"}, "<name>": {"dtype", "shape", "data_offsets": [begin, end]}, ...}

padded with spaces to a multiple of 8. Offsets count from the end of the header; the tensors fill the
data without a gap or an overlap (format: github.com/huggingface/safetensors).

A header comes from strangers. Whatever its bytes are, `parse` returns tensors that lie inside the file
and have the size of their shape, or raises FormatError; it is stricter than the package where that
lets a doubt pass (keys that appear twice, keys that it does not know). Types of less than a byte (F4,
F6) are refused.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dsv3_jax import config

# Longer ones are refused before they are read: JSON takes some twenty times its length in memory. The
# header of one file with all tensors of the 671B model would take 13 MB.
MAX_HEADER = 32 * 2**20

# In the order in which the package sorts the data of a file, last to first: by size, so that every
# tensor lies on a multiple of its item size.
DTYPES: dict[str, np.dtype] = {
  'BOOL': np.dtype(bool),
  'U8': np.dtype(np.uint8),
  'I8': np.dtype(np.int8),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E8M0': np.dtype(ml_dtypes.float8_e8m0fnu),
  'F8_E4M3FNUZ': np.dtype(ml_dtypes.float8_e4m3fnuz),
  'F8_E5M2FNUZ': np.dtype(ml_dtypes.float8_e5m2fnuz),
  'I16': np.dtype(np.int16),
  'U16': np.dtype(np.uint16),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I32': np.dtype(np.int32),
  'U32': np.dtype(np.uint32),
  'F32': np.dtype(np.float32),
  'C64': np.dtype(np.complex64),
  'F64': np.dtype(np.float64),
  'I64': np.dtype(np.int64),
  'U64': np.dtype(np.uint64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


class FormatError(config.ConfigError):
  """A checkpoint file that is not what it should be; the message names it and what is wrong."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where one tensor lies: `nbytes` at `offset` from the start of the file `path`, row-major."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]
  path: pathlib.Path
  offset: int
  nbytes: int


# ---- read ----------------------------------------------------------------------------------------


def header_length(first: bytes, file_bytes: int, path: pathlib.Path) -> int:
  """Length of the header, from the first 8 bytes of a file of `file_bytes`."""
  if len(first) < 8 or file_bytes < 8:
    raise FormatError(
      f'{path}: {file_bytes} bytes, too short for a safetensors file; it is truncated'
    )
  length = int.from_bytes(first[:8], 'little')
  if length > file_bytes - 8:
    raise FormatError(
      f'{path}: says that its header has {length} bytes, but only {file_bytes - 8} follow; '
      'it is truncated or no safetensors file'
    )
  if length > MAX_HEADER:
    raise FormatError(f'{path}: header of {length} bytes; at most {MAX_HEADER} are read')
  return length


def parse(header: bytes, file_bytes: int, path: pathlib.Path) -> list[Tensor]:
  """The tensors of a file of `file_bytes` in all, in the order of their data; every byte is theirs."""
  entries = parse_object(header, path, whole_numbers=True)
  metadata = entries.pop('__metadata__', {})
  if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
    raise FormatError(f'{path}: __metadata__ is {short(metadata)}; must be an object of texts')
  start = 8 + len(header)
  tensors = [_tensor(name, entry, start, path) for name, entry in entries.items()]
  tensors.sort(key=lambda t: (t.offset, t.nbytes))
  end, before = start, 'the header'
  for t in tensors:
    if t.offset != end:
      fault = 'overlaps' if t.offset < end else 'leaves a gap behind'
      raise FormatError(
        f'{path}: tensor {short(t.name)} at byte {t.offset - start} of the data {fault} {before}, '
        f'which ends at {end - start}'
      )
    end, before = t.offset + t.nbytes, short(t.name)
  if end != file_bytes:
    what = 'it is truncated' if end > file_bytes else 'the rest belongs to no tensor'
    raise FormatError(f'{path}: has {file_bytes} bytes, its header describes {end}; {what}')
  return tensors


def parse_object(text: bytes, path: pathlib.Path, *, whole_numbers: bool = False) -> dict[str, Any]:
  """A JSON object that every parser reads alike: UTF-8, no key twice, no NaN.

  Args:
    whole_numbers: refuse numbers below 0, with a fraction, or of more than 64 bits.
  """
  if whole_numbers and not text.startswith(b'{'):
    raise FormatError(f'{path}: its header is no JSON object; it begins with {short(text[:8])}')

  def number(digits: str) -> int:
    if len(digits) > 19 or digits.startswith('-'):
      raise FormatError(f'{path}: holds the number {short(digits)}; must be 0 to {10**19 - 1}')
    return int(digits)

  def refused(digits: str) -> float:
    raise FormatError(f'{path}: holds the number {short(digits)}; must be a whole one')

  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
      seen: set[str] = set()
      twice = next(key for key, _ in pairs if key in seen or seen.add(key))
      raise FormatError(f'{path}: key {short(twice)} appears twice; each may stand once')
    return found

  hooks = {'parse_int': number, 'parse_float': refused} if whole_numbers else {}
  try:
    decoded = text.decode('utf-8')
    found = json.loads(decoded, object_pairs_hook=unique, parse_constant=refused, **hooks)
    if '\\u' in decoded:  # half of a surrogate pair is no text, though json lets it through
      json.dumps(found, ensure_ascii=False).encode('utf-8')
  except FormatError:
    raise
  except (ValueError, RecursionError) as error:
    reason = 'nested too deep' if isinstance(error, RecursionError) else short(str(error))
    raise FormatError(f'{path}: cannot be read as JSON: {reason}') from None
  if not isinstance(found, dict):
    raise FormatError(f'{path}: holds a JSON {type(found).__name__}; must be an object')
  return found


def _tensor(name: str, entry: Any, start: int, path: pathlib.Path) -> Tensor:
  """One entry of the header, checked by itself; the data begins at byte `start` of the file."""
  where = f'{path}: tensor {short(name)}'
  if not isinstance(entry, dict) or entry.keys() != {'dtype', 'shape', 'data_offsets'}:
    got = sorted(entry) if isinstance(entry, dict) else entry
    raise FormatError(f'{where}: has {short(got)}; must have dtype, shape and data_offsets')
  dtype = DTYPES.get(entry['dtype']) if isinstance(entry['dtype'], str) else None
  if dtype is None:
    raise FormatError(
      f'{where}: dtype {short(entry["dtype"])} is not known; known: {", ".join(DTYPES)}'
    )
  shape, offsets = entry['shape'], entry['data_offsets']
  # `True` is an int to isinstance, and must not pass for a length.
  if not isinstance(shape, list) or any(type(n) is not int for n in shape):
    raise FormatError(f'{where}: shape {short(shape)}; must be a list of whole numbers')
  if not isinstance(offsets, list) or [type(n) for n in offsets] != [int, int]:
    raise FormatError(f'{where}: data_offsets {short(offsets)}; must be two whole numbers')
  if len(shape) > 32:
    raise FormatError(f'{where}: {len(shape)} dimensions; at most 32 are read')
  if math.prod(n for n in shape if n) * dtype.itemsize >= 2**63:
    raise FormatError(f'{where}: shape {short(shape)} is larger than any array')
  begin, end = offsets
  nbytes = math.prod(shape) * dtype.itemsize
  if end - begin != nbytes:
    raise FormatError(
      f'{where}: {entry["dtype"]} {short(tuple(shape))} takes {nbytes} bytes, its data_offsets '
      f'{begin} to {end} hold {end - begin}'
    )
  return Tensor(name, dtype, tuple(shape), path, start + begin, nbytes)


# ---- write ---------------------------------------------------------------------------------------


def sorted_for_file(
  tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]],
) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
  """In the order of the data in a file: wide types first, so that all lie aligned; then by name."""
  return sorted(tensors, key=lambda t: (-_RANK[np.dtype(t[1])], t[0]))


def render(
  tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
  """The first bytes of a file with this data in this order: length, header, padding."""
  entries: dict[str, Any] = {'__metadata__': dict(metadata)} if metadata else {}
  end = 0
  for name, dtype, shape in tensors:
    begin, end = end, end + nbytes_of(dtype, shape)
    entries[name] = {
      'dtype': NAMES[np.dtype(dtype)],
      'shape': list(shape),
      'data_offsets': [begin, end],
    }
  text = json.dumps(entries, separators=(',', ':'), ensure_ascii=False).encode('utf-8')
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text


def nbytes_of(dtype: np.dtype, shape: tuple[int, ...]) -> int:
  return math.prod(shape) * np.dtype(dtype).itemsize


def short(value: Any) -> str:
  """repr of something found in a file, which may be of any length, for one line of message."""
  text = repr(value)
  return text if len(text) <= 90 else f'{text[:60]}...{text[-20:]}'
