"""Multi-head Latent Attention (2.1.1), expanded as training wants it.

Keys and values come from a latent c of `kv_rank` per token, plus one rotary key of `rope_dim` shared by
all heads; those two are all that a cache keeps. Expanded, the latent is projected up to keys and values
per head. Generation absorbs both projections, from the same weights (`inference.layer`).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax import config
from dsv3_jax.kernels.attention import causal_attention
from dsv3_jax.model import rope
from dsv3_jax.model.layers import normal, ones, rms_norm
from dsv3_jax.precision import recipe


class Mla(nnx.Module):
  def __init__(self, c: config.Model, key: jax.Array) -> None:
    m, std = c.mla, c.init_std
    keys = jax.random.split(key, 7)
    qk_dim = m.nope_dim + m.rope_dim
    if m.q_rank:
      self.q_down_DQ = normal(keys[0], (c.dim, m.q_rank), std)
      self.q_norm_Q = ones(m.q_rank)
      self.q_up_QNJ = normal(
        keys[1], (m.q_rank, m.num_heads, qk_dim), std
      )  # per head: nope, then rope
    else:
      self.q_DNJ = normal(keys[1], (c.dim, m.num_heads, qk_dim), std)
    self.kv_down_DC = normal(keys[2], (c.dim, m.kv_rank), std)
    self.kv_norm_C = ones(m.kv_rank)
    self.k_rope_DR = normal(keys[3], (c.dim, m.rope_dim), std)
    self.k_up_CNH = normal(keys[4], (m.kv_rank, m.num_heads, m.nope_dim), std)
    self.v_up_CNV = normal(keys[5], (m.kv_rank, m.num_heads, m.v_dim), std)
    self.out_NVD = normal(keys[6], (m.num_heads, m.v_dim, c.dim), std)

  def __call__(self, c: config.Model, x_BLD: jax.Array) -> jax.Array:
    """Expanded causal attention over whole sequences at positions 0..L-1 -> [B, L, D]."""
    return self.output(c, self.heads(c, x_BLD))

  def heads(self, c: config.Model, x_BLD: jax.Array) -> jax.Array:
    """What every head read -> [B, L, N, V]."""
    positions_L = jnp.arange(x_BLD.shape[1], dtype=jnp.int32)
    nope_BLNH, rope_BLNR = self.queries(c, x_BLD, positions_L[None])
    latent_BLC, k_rope_BLR = self.latents(c, x_BLD, positions_L[None])
    k_nope_BLNH = recipe.linear(c.precision, latent_BLC, self.k_up_CNH[...])
    v_BLNV = recipe.linear(c.precision, latent_BLC, self.v_up_CNV[...])
    k_rope_BLNR = jnp.broadcast_to(k_rope_BLR[:, :, None], rope_BLNR.shape)
    return causal_attention(
      jnp.concatenate([nope_BLNH, rope_BLNR], axis=3),
      jnp.concatenate([k_nope_BLNH, k_rope_BLNR], axis=3),
      v_BLNV,
      scale=rope.softmax_scale(c),
      block=c.mla.block,
      stored=recipe.attention_stored(c.precision),
    )

  def output(self, c: config.Model, out_BLNV: jax.Array) -> jax.Array:
    """The heads' results, projected and added up -> [B, L, D]."""
    return recipe.linear(c.precision, out_BLNV, self.out_NVD[...], contract=2, stored='e5m6')

  def latents(
    self, c: config.Model, x_BLD: jax.Array, positions_BL: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """What a cache keeps: the normed latent [B, L, C] and the rotated shared key [B, L, R]."""
    latent_BLC = checkpoint_name(recipe.linear(c.precision, x_BLD, self.kv_down_DC[...]), 'latent')
    k_rope_BLR = checkpoint_name(recipe.linear(c.precision, x_BLD, self.k_rope_DR[...]), 'latent')
    k_rope_BLR = rope.rotate(k_rope_BLR, *rope.table(c, positions_BL))
    return rms_norm(latent_BLC, self.kv_norm_C[...], c.norm_eps), k_rope_BLR

  def queries(
    self, c: config.Model, x_BLD: jax.Array, positions_BL: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """[B, L, N, H] without position and [B, L, N, R] rotated."""
    if c.mla.q_rank:
      x_BLD = checkpoint_name(recipe.linear(c.precision, x_BLD, self.q_down_DQ[...]), 'latent')
      x_BLD = rms_norm(x_BLD, self.q_norm_Q[...], c.norm_eps)
    weight_DNJ = self.q_up_QNJ[...] if c.mla.q_rank else self.q_DNJ[...]
    # The weight is split, not its product: the gradient of a split pads and adds, dear on activations.
    nope_BLNH = recipe.linear(c.precision, x_BLD, weight_DNJ[..., : c.mla.nope_dim])
    rope_BLNR = recipe.linear(c.precision, x_BLD, weight_DNJ[..., c.mla.nope_dim :])
    cos_BLR, sin_BLR = rope.table(c, positions_BL)
    return nope_BLNH, rope.rotate(rope_BLNR, cos_BLR[:, :, None], sin_BLR[:, :, None])
