"""The model's weights laid out for generation: what each step reads, as its matmuls take it.

Generation has no gradient and small matmuls, each of which reads its matrix once. So whatever a step would do
to a weight before multiplying is done when the model is loaded:

  - what a token is first projected by, queries, latent and rotary key, is one matrix;
  - the projections that absorbed attention moves have their heads in front, as batched matmuls want them;
  - stacks of no more than `model.unroll` layers are cut into layers, so that no matrix has to be cut out of
    its stack first. XLA:CPU does that by copying it: a step read and wrote all weights once more.

Longer stacks stay whole and are scanned, for compile time.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange

from dsv3_jax import config
from dsv3_jax.model.layers import Ffn
from dsv3_jax.model.mla import Mla
from dsv3_jax.model.moe import Moe
from dsv3_jax.model.transformer import Block, Transformer, join
from dsv3_jax.precision import recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attention:
  """MLA, to be absorbed; leaves of a stack have its layers in front."""

  down_DX: jax.Array  # query latent, or queries where they are not compressed | latent | rotary key
  q_norm_Q: jax.Array | None
  q_up_QX: jax.Array | None  # to all heads: nope, then rope of each
  kv_norm_C: jax.Array
  k_up_NHC: jax.Array
  v_up_NCV: jax.Array
  out_XD: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layers:
  """A stack of blocks of one kind, of one or more."""

  attn_norm_D: jax.Array
  attn: Attention
  ffn_norm_D: jax.Array
  ffn: Ffn | Moe

  @property
  def count(self) -> int:
    return len(self.attn_norm_D)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drafter:
  """The first MTP module (2.2)."""

  embed_norm_D: jax.Array
  hidden_norm_D: jax.Array
  proj_XD: jax.Array
  layers: Layers  # one
  out_norm_D: jax.Array

  def join(self, c: config.Model, hidden_BLD: jax.Array, embed_BLD: jax.Array) -> jax.Array:
    """h' of eq. 21."""
    return join(c, hidden_BLD, embed_BLD, self.embed_norm_D, self.hidden_norm_D, self.proj_XD)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Served:
  embed_VD: jax.Array
  dense: list[Layers]
  moe: list[Layers]
  final_norm_D: jax.Array
  head_DV: jax.Array
  drafter: Drafter | None

  def embed(self, c: config.Model, tokens_BL: jax.Array) -> jax.Array:
    """Rows of the embedding in the compute dtype -> [B, L, D]."""
    return self.embed_VD[tokens_BL].astype(recipe.compute_dtype(c.precision))


def lay_out(c: config.Model, model: Transformer) -> Served:
  """The same weights, in the same dtypes."""
  return Served(
    model.embed_VD[...],
    _stacks(c, model.dense_layers) if c.num_dense_layers else [],
    _stacks(c, model.moe_layers),
    model.final_norm_D[...],
    model.head_DV[...],
    _drafter(model) if c.mtp_depth else None,
  )


def _stacks(c: config.Model, block: Block) -> list[Layers]:
  layers = _layers(block)
  if layers.count > c.unroll:
    return [layers]
  return [jax.tree.map(lambda x, y=y: x[y : y + 1], layers) for y in range(layers.count)]


def _drafter(model: Transformer) -> Drafter:
  module = jax.tree.map(lambda x: x[0], model.mtp)
  return Drafter(
    module.embed_norm_D[...],
    module.hidden_norm_D[...],
    module.proj_XD[...],
    _layers(jax.tree.map(lambda x: x[:1], model.mtp.block)),
    module.out_norm_D[...],
  )


def _layers(block: Block) -> Layers:
  return Layers(block.attn_norm_D[...], _attention(block.attn), block.ffn_norm_D[...], block.ffn)


def _attention(m: Mla) -> Attention:
  compressed = hasattr(m, 'q_down_DQ')
  flat = lambda w: rearrange(w[...], 'Y D N J -> Y D (N J)')
  first = m.q_down_DQ[...] if compressed else flat(m.q_DNJ)
  return Attention(
    jnp.concatenate([first, m.kv_down_DC[...], m.k_rope_DR[...]], axis=2),
    m.q_norm_Q[...] if compressed else None,
    flat(m.q_up_QNJ) if compressed else None,
    m.kv_norm_C[...],
    rearrange(m.k_up_CNH[...], 'Y C N H -> Y N H C'),
    rearrange(m.v_up_CNV[...], 'Y C N V -> Y N C V'),
    rearrange(m.out_NVD[...], 'Y N V D -> Y (N V) D'),
  )
