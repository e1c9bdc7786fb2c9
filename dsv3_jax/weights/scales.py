"""FP8 weights in our layout: codes in the leaves, the scales of their blocks beside them.

Blocks of 128x128 lie in released tensors, not in ours: a block of `kv_b_proj` may hold keys and values of
two heads. So scales keep their released names and shapes, in a checkpoint folder of their own, and codes
go back to the released layout to be multiplied.

  weights/scales/model.safetensors    model.layers.3.mlp.experts.0.up_proj.weight_scale_inv, ...
"""

import functools
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.weights import fp8, names, shards
from dsv3_jax.weights.names import Slot
from dsv3_jax.weights.store import Index, Path, Store

FOLDER = 'scales'


def write(
  folder: str | pathlib.Path, source: shards.Folder, slots: Sequence[Slot], origin: str
) -> None:
  """Copies the scales of all slots that are kept as FP8 into a store's folder, bit by bit.

  What is there already stays. `origin` is the store's `source`.
  """
  scaled = dict.fromkeys(names.scale_name(slot) for slot in slots if slot.quantised)
  stored = [(name, source.tensors[name].dtype, source.tensors[name].shape) for name in scaled]
  size = sum(source.tensors[name].nbytes for name in scaled)
  to = pathlib.Path(folder, FOLDER)
  writer = shards.Writer(to, stored, max(size, 1), {'format': 'pt'}, origin)
  for shard in writer.shards():
    if not shard.done:
      writer.write_shard(shard, source.read)
  writer.finish()


def open_scales(store: Store) -> shards.Folder:
  """The scales beside a store's codes."""
  try:
    return shards.Folder(store.folder / FOLDER)
  except ConfigError as error:
    raise ConfigError(f'{error}; import the weights again') from None


def reader(store: Store, c: config.Model) -> Callable[[Path, Index], np.ndarray]:
  """(path, index) -> values of a store that holds codes: FP32 where they are codes, else as stored."""
  scales = open_scales(store)
  family = 'deepseek_v3' if c.moe.scoring == 'sigmoid' else 'deepseek_v2'
  slots = names.chunk_slots(names.table(c, family=family))

  @functools.lru_cache(maxsize=1)  # parts of one matrix are asked for one after the other
  def values(path: Path, at: Index) -> np.ndarray:
    slot = slots[path, at]
    codes = slot.to_hf(store.read(path, at))
    return slot.to_ours(fp8.dequantise(codes, scales.read(names.scale_name(slot))))

  def read(path: Path, index: Index) -> np.ndarray:
    leaf = store.leaves[path]
    if leaf.dtype != fp8.E4M3:
      return store.read(path, index)
    return values(path, index[: leaf.lead])[index[leaf.lead :]]

  return read
