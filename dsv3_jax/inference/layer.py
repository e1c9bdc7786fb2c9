"""One block of the model over the paged latent cache, on one device, from weights as `served` lays them out.

Attention is absorbed (2.1.1): the key projection moves into the query and the value projection behind the
softmax, so that every head reads the same latent, 576 values a token for V3. For prompts a head then
multiplies 1,088 numbers for each pair of tokens where the expanded form has 320 in V3; but that one would
project the whole past up again for every chunk, dearer as long as a chunk has less than about 170 tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax import config
from dsv3_jax.inference.cache import Cache
from dsv3_jax.inference.served import Attention, Layers
from dsv3_jax.kernels.mla_decode import mla_decode
from dsv3_jax.model import dual, rope
from dsv3_jax.model.layers import Ffn, rms_norm
from dsv3_jax.model.moe import Moe, Routing, Slots
from dsv3_jax.precision import recipe

_EXPERTS = 'fastest'  # of `kernels.expert_ffn`, for few rows too


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Queries:
  """Rows in front of a layer's attention."""

  x_BLD: jax.Array  # the residual
  first_BLX: jax.Array  # what queries are made of
  positions_BL: jax.Array
  valid_BL: jax.Array
  table_BJ: jax.Array

  def halves(self) -> tuple['Queries', 'Queries']:
    half = len(self.x_BLD) // 2
    return jax.tree.map(lambda x: x[:half], self), jax.tree.map(lambda x: x[half:], self)


def store(
  c: config.Model,
  layer: Layers,
  y: jax.Array,
  table_BJ: jax.Array,
  x_BLD: jax.Array,
  positions_BL: jax.Array,
  valid_BL: jax.Array,
  cache: Cache,
) -> tuple[Queries, Cache]:
  """Writes the tokens' entries to layer y of the cache, before anybody reads it: so it stays in place."""
  attn, m = layer.attn, c.mla
  normed_BLD = rms_norm(x_BLD, layer.attn_norm_D, c.norm_eps)
  down_BLX = recipe.linear(c.precision, normed_BLD, attn.down_DX)
  first = down_BLX.shape[2] - m.kv_rank - m.rope_dim
  first_BLX, latent_BLC, k_rope_BLR = jnp.split(down_BLX, [first, first + m.kv_rank], axis=2)
  latent_BLC = rms_norm(latent_BLC, attn.kv_norm_C, c.norm_eps)
  k_rope_BLR = rope.rotate(k_rope_BLR, *rope.table(c, positions_BL))
  cache = cache.store(y, table_BJ, positions_BL, valid_BL, latent_BLC, k_rope_BLR)
  return Queries(x_BLD, first_BLX, positions_BL, valid_BL, table_BJ), cache


@dataclasses.dataclass(frozen=True)
class CachedBlock:
  """Layer y over a cache that has its tokens' entries already, in the steps that `model.dual` puts in order."""

  layer: Layers
  y: jax.Array
  cache: Cache

  @property
  def ffn(self) -> Ffn | Moe:
    return self.layer.ffn

  @property
  def ffn_norm_D(self) -> jax.Array:
    return self.layer.ffn_norm_D

  def attend(self, c: config.Model, queries: Queries) -> jax.Array:
    """First half: x + attn(norm(x)) -> [B, L, D]."""
    return self.add_attention(c, queries, self.heads(c, queries))

  def heads(self, c: config.Model, queries: Queries) -> jax.Array:
    """What every head read -> [B, L, N, V].

    Entries after a query's position are hidden, so a table may be longer than what it holds.
    """
    attn, positions_BL = self.layer.attn, queries.positions_BL
    nope_BLNH, rope_BLNR = _queries(c, attn, queries.first_BLX)
    cos_BLR, sin_BLR = rope.table(c, positions_BL)
    rope_BLNR = rope.rotate(rope_BLNR, cos_BLR[:, :, None], sin_BLR[:, :, None])
    dtype = nope_BLNH.dtype
    query_BLNC = jnp.einsum('BLNH,NHC->BLNC', nope_BLNH, attn.k_up_NHC.astype(dtype))
    out_BLNC, _ = mla_decode(
      jnp.concatenate([query_BLNC, rope_BLNR], axis=3),
      *self.cache.layer(self.y, queries.table_BJ),
      jnp.where(queries.valid_BL, positions_BL, -1),  # sees nothing
      rank=c.mla.kv_rank,
      scale=rope.softmax_scale(c),
    )
    return jnp.einsum('BLNC,NCV->BLNV', out_BLNC, attn.v_up_NCV.astype(dtype))

  def add_attention(self, c: config.Model, queries: Queries, out_BLNV: jax.Array) -> jax.Array:
    out_BLX = out_BLNV.reshape(*out_BLNV.shape[:2], -1)
    return queries.x_BLD + recipe.linear(c.precision, out_BLX, self.layer.attn.out_XD)

  def feed_forward(
    self, c: config.Model, x_BLD: jax.Array, valid_BL: jax.Array, slots: Slots | None
  ) -> tuple[jax.Array, Routing | None]:
    """Second half, x + ffn(norm(x)); `slots`: where the experts lie, if not in order."""
    normed_BLD = rms_norm(x_BLD, self.ffn_norm_D, c.norm_eps)
    if isinstance(self.ffn, Ffn):
      return x_BLD + self.ffn(c, normed_BLD), None
    y_BLD, routing = self.ffn(c, normed_BLD, valid_BL, slots, implementation=_EXPERTS)
    return x_BLD + y_BLD, routing


def _queries(c: config.Model, attn: Attention, first_BLX: jax.Array) -> tuple[jax.Array, jax.Array]:
  """[B, L, N, H] and [B, L, N, R], not rotated yet."""
  m = c.mla
  if attn.q_up_QX is not None:
    first_BLX = rms_norm(first_BLX, attn.q_norm_Q, c.norm_eps)
    first_BLX = recipe.linear(c.precision, first_BLX, attn.q_up_QX)
  query_BLNJ = first_BLX.reshape(*first_BLX.shape[:2], m.num_heads, -1)
  return query_BLNJ[..., : m.nope_dim], query_BLNJ[..., m.nope_dim :]


def run(
  c: config.Model,
  dual_batch: bool,
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

  `dual_batch`: rows go through layers of experts as two halves out of step. Last come the loads of the
  experts, [Y, E]; None where there are none.
  """

  def body(carry: tuple[jax.Array, Cache], layer: tuple[jax.Array, Layers, Slots | None]):
    x_BLD, cache = carry
    y, layer, slots = layer
    queries, cache = store(c, layer, y, table_BJ, x_BLD, positions_BL, valid_BL, cache)
    block = CachedBlock(layer, y, cache)
    if dual_batch and isinstance(block.ffn, Moe):
      parts = queries.halves()
      valids = tuple(part.valid_BL for part in parts)
      parts, routing = dual.run(c, block, parts, valids, slots, implementation=_EXPERTS)
      x_BLD = jnp.concatenate(parts)
    else:
      x_BLD = block.attend(c, queries)
      x_BLD, routing = block.feed_forward(c, x_BLD, valid_BL, slots)
    return (x_BLD, cache), routing and routing.counts_E

  y_Y = first + jnp.arange(layers.count, dtype=jnp.int32)
  carry, load_YE = lax.scan(body, (x_BLD, cache), (y_Y, layers, slots_Y))
  return *carry, load_YE
