"""The latent cache (2.1.1): per layer and token the normed latent and the rotated shared key, no more.

`kv_rank + rope_dim` values a token and layer: 70,272 bytes a token for V3's 61 layers in BF16, 40,016 in
FP8. One buffer holds all layers, dense ones first, in pages of 64 tokens that any sequence may own
(`pages.Pool` says which does), and is updated in place: programs donate it, and inside them a scan over
layers carries it. Entries not yet written hold nothing of meaning and are hidden by the attention.

Drafting adds one layer for the MTP module, behind the model's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config
from dsv3_jax.kernels.mla_decode import PAGE, entry_size, pack
from dsv3_jax.mesh import TOKENS
from dsv3_jax.precision import recipe

SPEC = P(None, TOKENS)  # pages lie with the device that decodes their sequence


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  entries_YPMX: jax.Array  # compute dtype, or uint8 for FP8

  @property
  def bytes_per_token(self) -> int:
    """Of one token, over all layers; an array or a ShapeDtypeStruct."""
    x = self.entries_YPMX
    return x.shape[0] * x.shape[3] * x.dtype.itemsize

  def layer(self, y: jax.Array, table_BJ: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All pages of all layers, and the table that finds layer y among them: nothing is copied."""
    Y, pages, *entry = self.entries_YPMX.shape
    return self.entries_YPMX.reshape(Y * pages, *entry), table_BJ + y * pages

  def store(
    self,
    y: jax.Array,
    table_BJ: jax.Array,
    positions_BL: jax.Array,
    valid_BL: jax.Array,
    latent_BLC: jax.Array,
    k_rope_BLR: jax.Array,
  ) -> 'Cache':
    """Writes layer y at each sequence's own positions, where valid."""
    x = self.entries_YPMX
    page_BL = jnp.take_along_axis(table_BJ, positions_BL // PAGE, axis=1, mode='clip')
    page_BL = jnp.where(valid_BL, page_BL, x.shape[1])  # beyond the last one: dropped
    entry_BLX = pack(latent_BLC, k_rope_BLR, x.dtype)
    return Cache(x.at[y, page_BL, positions_BL % PAGE].set(entry_BLX, mode='drop'))


def format_on(device_mesh: jax.sharding.Mesh) -> Format:
  """Where a cache lies, and on TPUs how: values of an entry side by side.

  576 values fill 4.5 tiles of columns, so that TPU's arguments would have pages for columns, and every step would
  begin with a copy of the cache as attention reads it.
  """
  on_tpu = device_mesh.devices.flat[0].platform == 'tpu'
  return Format(Layout((0, 1, 2, 3)) if on_tpu else None, NamedSharding(device_mesh, SPEC))


def empty(c: config.Model, layers: int, pages: int, *, fp8: bool = False) -> Cache:
  """Zeros for `pages` pages."""
  dtype = jnp.dtype(jnp.uint8) if fp8 else recipe.compute_dtype(c.precision)
  size = entry_size(c.mla.kv_rank, c.mla.rope_dim, fp8=fp8)
  return Cache(jnp.zeros((layers, pages, PAGE, size), dtype))
