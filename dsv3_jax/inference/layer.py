"""One block of the model over the paged latent cache, on one device, from weights as `served` lays them out.

Attention is absorbed (2.1.1): the key projection moves into the query and the value projection behind the
softmax, so that every head reads the same latent, 576 values a token for V3. For prompts a head then
multiplies 1,088 numbers for each pair of tokens where the expanded form has 320 in V3; but that one would
project the whole past up again for every chunk, dearer as long as a chunk has less than about 170 tokens.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax import config
from dsv3_jax.inference.cache import Cache
from dsv3_jax.inference.served import Attention, Layers
from dsv3_jax.kernels.mla_decode import mla_decode
from dsv3_jax.model import rope
from dsv3_jax.model.layers import Ffn, rms_norm
from dsv3_jax.model.moe import Routing, Slots
from dsv3_jax.precision import recipe


def attend(
  c: config.Model,
  layer: Layers,
  y: jax.Array,
  table_BJ: jax.Array,
  x_BLD: jax.Array,
  positions_BL: jax.Array,
  valid_BL: jax.Array,
  cache: Cache,
) -> tuple[jax.Array, Cache]:
  """First half, x + attn(norm(x)); the tokens' own entries are written to layer y of the cache first.

  Entries after a query's position are hidden, so a table may be longer than what it holds.
  """
  attn, m = layer.attn, c.mla
  normed_BLD = rms_norm(x_BLD, layer.attn_norm_D, c.norm_eps)
  down_BLX = recipe.linear(c.precision, normed_BLD, attn.down_DX)
  first = down_BLX.shape[2] - m.kv_rank - m.rope_dim
  first_BLX, latent_BLC, k_rope_BLR = jnp.split(down_BLX, [first, first + m.kv_rank], axis=2)
  cos_BLR, sin_BLR = rope.table(c, positions_BL)
  latent_BLC = rms_norm(latent_BLC, attn.kv_norm_C, c.norm_eps)
  k_rope_BLR = rope.rotate(k_rope_BLR, cos_BLR, sin_BLR)
  cache = cache.store(y, table_BJ, positions_BL, valid_BL, latent_BLC, k_rope_BLR)
  nope_BLNH, rope_BLNR = _queries(c, attn, first_BLX)
  rope_BLNR = rope.rotate(rope_BLNR, cos_BLR[:, :, None], sin_BLR[:, :, None])
  query_BLNC = jnp.einsum('BLNH,NHC->BLNC', nope_BLNH, attn.k_up_NHC.astype(x_BLD.dtype))
  out_BLNC, _ = mla_decode(
    jnp.concatenate([query_BLNC, rope_BLNR], axis=3),
    *cache.layer(y, table_BJ),
    jnp.where(valid_BL, positions_BL, -1),  # sees nothing
    rank=m.kv_rank,
    scale=rope.softmax_scale(c),
  )
  out_BLNV = jnp.einsum('BLNC,NCV->BLNV', out_BLNC, attn.v_up_NCV.astype(x_BLD.dtype))
  out_BLX = out_BLNV.reshape(*x_BLD.shape[:2], -1)
  return x_BLD + recipe.linear(c.precision, out_BLX, attn.out_XD), cache


def _queries(c: config.Model, attn: Attention, first_BLX: jax.Array) -> tuple[jax.Array, jax.Array]:
  """[B, L, N, H] and [B, L, N, R], not rotated yet."""
  m = c.mla
  if attn.q_up_QX is not None:
    first_BLX = rms_norm(first_BLX, attn.q_norm_Q, c.norm_eps)
    first_BLX = recipe.linear(c.precision, first_BLX, attn.q_up_QX)
  query_BLNJ = first_BLX.reshape(*first_BLX.shape[:2], m.num_heads, -1)
  return query_BLNJ[..., : m.nope_dim], query_BLNJ[..., m.nope_dim :]


def feed_forward(
  c: config.Model, layer: Layers, x_BLD: jax.Array, valid_BL: jax.Array, slots: Slots | None
) -> tuple[jax.Array, Routing | None]:
  """Second half, x + ffn(norm(x)); `slots`: where the experts lie, if not in order."""
  normed_BLD = rms_norm(x_BLD, layer.ffn_norm_D, c.norm_eps)
  if isinstance(layer.ffn, Ffn):
    return x_BLD + layer.ffn(c, normed_BLD), None
  y_BLD, routing = layer.ffn(c, normed_BLD, valid_BL, slots, implementation='fastest')
  return x_BLD + y_BLD, routing


def run(
  c: config.Model,
  table_BJ: jax.Array,
  layers: Layers,
  slots_Y: Slots | None,
  first: int,
  x_BLD: jax.Array,
  positions_BL: jax.Array,
  valid_BL: jax.Array,
  cache: Cache,
) -> tuple[jax.Array, Cache, jax.Array | None]:
  """A stack of blocks, of which the first is layer `first` of the cache; without a final norm.

  Last come the loads of the experts, [Y, E]; None where there are none.
  """

  def body(carry: tuple[jax.Array, Cache], layer: tuple[jax.Array, Layers, Slots | None]):
    x_BLD, cache = carry
    y, layer, slots = layer
    x_BLD, cache = attend(c, layer, y, table_BJ, x_BLD, positions_BL, valid_BL, cache)
    x_BLD, routing = feed_forward(c, layer, x_BLD, valid_BL, slots)
    return (x_BLD, cache), routing and routing.counts_E

  y_Y = first + jnp.arange(layers.count, dtype=jnp.int32)
  carry, load_YE = lax.scan(body, (x_BLD, cache), (y_Y, layers, slots_Y))
  return *carry, load_YE
