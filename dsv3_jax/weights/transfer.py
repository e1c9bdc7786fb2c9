"""Chunks of our tree out of a released checkpoint, and released tensors out of our tree.

Both pull: a writer asks for one chunk (or one tensor), and only what that needs is read, put into shape by
`names` and, where it is FP8, dequantised or quantised by `fp8`. Nothing here keeps weights, so memory is
that of the largest tensor, whatever the size of the model.

FP8 may also pass as it is: the codes move into our layout like any other values, and their scales stay
those of the released tensor, under its name, because blocks are blocks of that tensor and not of ours
(one block of `kv_b_proj` can hold rows of a key and of a value projection).
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from dsv3_jax import config
from dsv3_jax.weights import fp8, hf_config, names, shards
from dsv3_jax.weights.names import Index, Path, Slot

BF16 = np.dtype(ml_dtypes.bfloat16)
F32 = np.dtype(np.float32)
_FLOATS = (F32, BF16, np.dtype(np.float16))
_SCALES = (F32, fp8.E8M0)
_COMPARED_ROWS = 4096
ReadChunk = Callable[[Path, Index], np.ndarray]


class Tensors(Protocol):
  """What is read from: `shards.Folder`, or the like over arrays in memory."""

  tensors: Mapping[str, Any]  # name -> something with `dtype` and `shape`

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray: ...


# ---- theirs to ours ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Findings:
  """What a checkpoint holds against what its config asks for, a line each."""

  missing: tuple[str, ...] = ()
  extra: tuple[str, ...] = ()
  misshaped: tuple[str, ...] = ()
  mistyped: tuple[str, ...] = ()

  @property
  def lines(self) -> list[str]:
    named = dataclasses.asdict(self).items()
    return [f'{kind} {line}' for kind, lines in named for line in lines]


class Released:
  """A released checkpoint, read as chunks of our tree."""

  def __init__(self, tensors: Tensors, hf: hf_config.HfModel) -> None:
    self.tensors = tensors
    self.hf = _as_stored(tensors, hf)
    self.slots = names.table(
      self.hf.model,
      family=hf.family,
      stacked_experts=names.stored_stacked(tensors.tensors),
      interleaved=hf.interleaved,
    )
    self._chunks = names.chunk_slots(self.slots)

  def findings(self) -> Findings:
    """Compares names, shapes and dtypes; reads no data."""
    stored, wanted = self.tensors.tensors, {}
    missing, misshaped, mistyped = [], [], []
    for name, (slot, *_) in names.tensor_slots(self.slots).items():
      wanted[name] = (slot.shape, _allowed(slot))
      is_fp8 = name in stored and stored[name].dtype == fp8.E4M3
      scale = names.scale_name(slot)
      if slot.quantised and (is_fp8 or scale in stored):
        wanted[name] = (slot.shape, (fp8.E4M3,))
        wanted[scale] = (names.scale_shape(slot), _SCALES)
      if name not in stored and slot.copy_of is not None:
        del wanted[name]
    for name, (shape, dtypes) in wanted.items():
      if name not in stored:
        missing.append(f'{name} {list(shape)}')
        continue
      at = stored[name]
      if tuple(at.shape) != shape:
        misshaped.append(f'{name} {list(at.shape)}: must be {list(shape)}')
      if at.dtype not in dtypes:
        right = ' or '.join(map(str, dtypes))
        mistyped.append(f'{name} {at.dtype}: must be {right}')
    extra = [f'{n} {list(stored[n].shape)}' for n in stored if n not in wanted and not _idle(n)]
    return Findings(tuple(missing), tuple(extra), tuple(misshaped), tuple(mistyped))

  def slot(self, path: Path, index: Index) -> Slot | None:
    """Where a chunk lies; None for a router bias that the family does not have."""
    return self._chunks.get((path, index))

  def read(self, path: Path, index: Index, dtype: Any = F32) -> np.ndarray:
    """One chunk in `dtype` (router biases: float32), dequantised if need be; may be a view.

    Raises ConfigError (FormatError) for scales or codes that are not finite, and for shapes that do
    not fit.
    """
    slot = self.slot(path, index)
    dtype = F32 if path[0] == 'router_bias' else np.dtype(dtype)
    if slot is None:
      return np.zeros((self.hf.model.moe.num_experts,), F32)
    x = self._part(slot.name, slot)
    if x.dtype == fp8.E4M3:
      x = self._dequantised(slot, x, self._part(names.scale_name(slot), slot), dtype)
    return slot.to_ours(x.astype(dtype, copy=False))

  def is_fp8(self, path: Path, index: Index) -> bool:
    """Whether this chunk is stored as codes."""
    slot = self.slot(path, index)
    return slot is not None and self.tensors.tensors[slot.name].dtype == fp8.E4M3

  def read_codes(self, path: Path, index: Index) -> tuple[np.ndarray, str, np.ndarray]:
    """One chunk's E4M3 codes in our layout; name and values of its tensor's scales, in theirs.

    Chunks that share a tensor give the same scales. `Export` takes both back. Scales are checked.
    """
    slot = self._chunks[path, index]
    codes, name = self._part(slot.name, slot), names.scale_name(slot)
    scale = self._part(name, slot)
    self._dequantised(slot, codes, scale, F32)
    return slot.to_ours(codes), name, scale

  def compare_copies(self) -> None:
    """Raises ConfigError where a stored copy (MTP's embedding and head) is not its original's bits.

    Our model has one of each. Reads both in full, some rows at a time.
    """
    for slot in self.slots:
      if slot.copy_of is None or slot.name not in self.tensors.tensors:
        continue
      for row in range(0, slot.shape[0], _COMPARED_ROWS):
        rows = (slice(row, min(row + _COMPARED_ROWS, slot.shape[0])),)
        copy, main = (self.tensors.read(name, rows) for name in (slot.name, slot.copy_of))
        if copy.dtype != main.dtype or copy.tobytes() != main.tobytes():
          where = f'in rows {rows[0].start} to {rows[0].stop - 1}'
          raise config.ConfigError(
            f'{slot.name}: differs from {slot.copy_of} {where}; must be the same: the model shares them'
          )

  def _part(self, name: str, slot: Slot) -> np.ndarray:
    x = self.tensors.read(name, tuple(slice(i, i + 1) for i in slot.part))
    return x.reshape(x.shape[len(slot.part) :]) if slot.part else x

  def _dequantised(
    self, slot: Slot, codes: np.ndarray, scale: np.ndarray, dtype: Any
  ) -> np.ndarray:
    try:
      return fp8.dequantise(codes, scale, dtype=dtype)
    except config.ConfigError as e:
      raise type(e)(f'{slot.name}: {e}') from None


def open_released(folder: str | pathlib.Path) -> Released:
  """A checkpoint folder: its config, and every header checked. Raises ConfigError (FormatError)."""
  return Released(shards.Folder(folder), hf_config.read(pathlib.Path(folder)))


def _as_stored(tensors: Tensors, hf: hf_config.HfModel) -> hf_config.HfModel:
  """The model with the MTP modules that are there: transformers writes none, and keeps the key."""
  asked = hf.model.mtp_depth
  depth = names.stored_mtp_depth(tensors.tensors, hf.model.num_layers)
  if not asked or depth:
    return hf
  note = f'num_nextn_predict_layers = {asked}: no MTP layer is stored; the model is read without'
  model = dataclasses.replace(hf.model, mtp_depth=0)
  return dataclasses.replace(hf, model=model, notes=(*hf.notes, note))


def _allowed(slot: Slot) -> tuple[np.dtype, ...]:
  return (F32,) if slot.f32 else _FLOATS


def _idle(name: str) -> bool:
  """Tables that old versions of transformers stored beside the weights."""
  return name.endswith('.rotary_emb.inv_freq')


# ---- ours to theirs ------------------------------------------------------------------------------


class Export:
  """Our tree, read as the tensors of a released checkpoint.

  Args:
    c: the model.
    read: gives a chunk of ours, in any float dtype, or as E4M3 codes.
    dtype: of the tensors that are neither FP8 nor always float32.
    fp8: matrices become FP8 with scales; codes stay as they are.
    ue8m0: scales that are made here are powers of two.
    read_scales: gives scales by name, where `read` gives codes.
  """

  def __init__(
    self,
    c: config.Model,
    read: ReadChunk,
    *,
    dtype: Any = BF16,
    fp8: bool = False,
    ue8m0: bool = False,
    read_scales: Callable[[str], np.ndarray] | None = None,
  ) -> None:
    self.config = hf_config.write(c, fp8=fp8, ue8m0=ue8m0, dtype=str(np.dtype(dtype)))
    self._slots = names.tensor_slots(names.table(c, family=self.config['model_type']))
    self._read, self._read_scales = read, read_scales
    self._dtype, self._fp8, self._ue8m0 = np.dtype(dtype), fp8, ue8m0
    self._scales: dict[str, np.ndarray] = {}  # made with their weights, asked for right after

  @property
  def tensors(self) -> list[tuple[str, np.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor, in the order in which reading is cheapest."""
    plan = []
    for name, (slot, *_) in self._slots.items():
      if self._fp8 and slot.quantised:
        plan.append((name, fp8.E4M3, slot.shape))
        plan.append((names.scale_name(slot), F32, names.scale_shape(slot)))
      else:
        plan.append((name, F32 if slot.f32 else self._dtype, slot.shape))
    return plan

  def read(self, name: str) -> np.ndarray:
    """One tensor of `tensors`."""
    weight = name.removesuffix(names.SCALE)
    if name != weight:
      if name not in self._scales:
        self.read(weight)
      return self._scales.pop(name)
    slot = self._slots[name][0]
    x = self._joined(self._slots[name])
    if not (self._fp8 and slot.quantised):
      if x.dtype == fp8.E4M3:
        x = fp8.dequantise(x, self._scales_of(slot), dtype=self._dtype)
      return x.astype(F32 if slot.f32 else self._dtype, copy=False)
    if x.dtype == fp8.E4M3:
      self._scales[names.scale_name(slot)] = self._scales_of(slot).astype(F32)
      return x
    x, self._scales[names.scale_name(slot)] = fp8.quantise(x, power_of_two=self._ue8m0)
    return x

  def _joined(self, slots: list[Slot]) -> np.ndarray:
    """The tensor of these slots, in the dtype that ours has."""
    whole = None
    for slot in slots:
      x = np.asarray(self._read(slot.path, slot.index))
      whole = np.empty(slot.shape, x.dtype) if whole is None else whole
      slot.put(x, whole[slot.part] if slot.part else whole)
    return whole

  def _scales_of(self, slot: Slot) -> np.ndarray:
    if self._read_scales is None:
      raise ValueError(f'{slot.name}: is FP8, and no scales are given')
    return self._read_scales(names.scale_name(slot))


# ---- whole trees, for models that fit ------------------------------------------------------------


def tree(c: config.Model, read: ReadChunk) -> dict[str, Any]:
  """{'params': .., 'router_bias': ..}, nested dicts of NumPy arrays, from chunks."""
  gathered: dict[Path, dict[Index, np.ndarray]] = {}
  for path, index, _ in names.chunks(c):
    gathered.setdefault(path, {})[index] = np.asarray(read(path, index))
  whole: dict[str, Any] = {}
  for path, parts in gathered.items():
    lead = tuple(i + 1 for i in max(parts))
    x = np.stack([parts[index] for index in sorted(parts)])
    at = whole
    for key in path[:-1]:
      at = at.setdefault(key, {})
    at[path[-1]] = x.reshape(*lead, *x.shape[1:])
  return whole


def chunk_reader(tree: Mapping[str, Any]) -> ReadChunk:
  """Reads chunks of such a tree."""

  def read(path: Path, index: Index) -> np.ndarray:
    at: Any = tree
    for key in path:
      at = at[key]
    return np.asarray(at)[index]

  return read


@dataclasses.dataclass(frozen=True)
class InMemory:
  """`Tensors` over a dict of arrays."""

  tensors: Mapping[str, np.ndarray]

  def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
    return self.tensors[name][index]


def exported(export: Export) -> Iterator[tuple[str, np.ndarray]]:
  """Every tensor of an export, one after another."""
  for name, dtype, shape in export.tensors:
    x = export.read(name)
    assert (x.dtype, x.shape) == (dtype, shape), name
    yield name, x
