"""The latent cache (2.1.1): per layer and token the normed latent and the rotated shared key, no more.

`kv_rank + rope_dim` values a token and layer: 70,272 bytes a token for V3's 61 layers in BF16. One
pair of buffers holds all layers of the main model, dense ones first, and is updated in place: programs
donate it, and inside them a scan over layers carries it. Its size is fixed when it is made; entries at
positions not yet written hold nothing of meaning and are hidden by the attention, not by a length.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv3_jax import config
from dsv3_jax.mesh import TOKENS
from dsv3_jax.precision import recipe

SPEC = P(None, TOKENS)  # of both buffers: sequences lie with the device that decodes them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Entry m of a sequence holds position m; both in the compute dtype."""

  latent_YBMC: jax.Array
  k_rope_YBMR: jax.Array

  @property
  def bytes_per_token(self) -> int:
    """Of one token of one sequence, over all layers; arrays or ShapeDtypeStructs."""
    buffers = (self.latent_YBMC, self.k_rope_YBMR)
    return sum(x.shape[0] * x.shape[3] * x.dtype.itemsize for x in buffers)

  def layer(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Latents [B, M, C] and keys [B, M, R] of layer y."""
    return tuple(
      lax.dynamic_index_in_dim(x, y, keepdims=False) for x in (self.latent_YBMC, self.k_rope_YBMR)
    )

  def store_prompt(self, y: jax.Array, latent_BLC: jax.Array, k_rope_BLR: jax.Array) -> 'Cache':
    """Writes layer y at positions 0..L-1 of every sequence."""

    def put(x_YBMX: jax.Array, new_BLX: jax.Array) -> jax.Array:
      return lax.dynamic_update_slice(x_YBMX, new_BLX[None], (y, 0, 0, 0))

    return Cache(put(self.latent_YBMC, latent_BLC), put(self.k_rope_YBMR, k_rope_BLR))

  def store(
    self, y: jax.Array, positions_BL: jax.Array, latent_BLC: jax.Array, k_rope_BLR: jax.Array
  ) -> 'Cache':
    """Writes layer y at each sequence's own positions; what lies beyond the end is dropped."""
    row_B1 = jnp.arange(positions_BL.shape[0], dtype=jnp.int32)[:, None]

    def put(x_YBMX: jax.Array, new_BLX: jax.Array) -> jax.Array:
      return x_YBMX.at[y, row_B1, positions_BL].set(new_BLX, mode='drop', unique_indices=True)

    return Cache(put(self.latent_YBMC, latent_BLC), put(self.k_rope_YBMR, k_rope_BLR))


def empty(c: config.Model, sequences: int, capacity: int) -> Cache:
  """Zeros for `sequences` of at most `capacity` tokens."""
  dtype = recipe.compute_dtype(c.precision)
  shape = (c.num_layers, sequences, capacity)
  return Cache(
    jnp.zeros((*shape, c.mla.kv_rank), dtype), jnp.zeros((*shape, c.mla.rope_dim), dtype)
  )
