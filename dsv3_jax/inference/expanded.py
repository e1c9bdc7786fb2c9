"""What decoding from a latent cache is measured against: keys and values of every head, kept as they are.

num_heads * (nope_dim + rope_dim + v_dim) values a token and layer, in one run of memory per head, with
nothing but what one sequence length needs: no pages, no batching, no drafts. The weights and all other
layers are the model's.
"""

import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax.model import rope
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.transformer import Block, Transformer
from dsv3_jax.precision import recipe

KeysValues = list[tuple[jax.Array, jax.Array]]  # of each layer: [B, N, M, J], [B, N, M, V]


def empty(c: config.Model, rows: int, length: int) -> KeysValues:
  m, dtype = c.mla, recipe.compute_dtype(c.precision)
  zeros = lambda size: jnp.zeros((rows, m.num_heads, length, size), dtype)
  return [(zeros(m.nope_dim + m.rope_dim), zeros(m.v_dim)) for _ in range(c.num_layers)]


def bytes_per_token(c: config.Model) -> int:
  m = c.mla
  values = c.num_layers * m.num_heads * (m.nope_dim + m.rope_dim + m.v_dim)
  return values * recipe.compute_dtype(c.precision).itemsize


def layers(c: config.Model, model: Transformer) -> list[Block]:
  """The blocks one by one: in a scan the caches of all layers would be one array, and be copied."""
  stacks = [(model.dense_layers, c.num_dense_layers)] if c.num_dense_layers else []
  stacks.append((model.moe_layers, c.num_layers - c.num_dense_layers))
  return [jax.tree.map(lambda x, i=i: x[i], stack) for stack, n in stacks for i in range(n)]


def step(
  c: config.Model,
  model: Transformer,
  blocks: list[Block],
  tokens_B1: jax.Array,
  position_B1: jax.Array,
  cache: KeysValues,
) -> tuple[jax.Array, KeysValues]:
  """Logits [B, V] behind one more token of each sequence, all at the same position, and the cache."""
  x_BLD = model.embed(c, tokens_B1)
  valid_B1 = jnp.ones(tokens_B1.shape, bool)
  grown = []
  for block, (key_BNMJ, value_BNMV) in zip(blocks, cache, strict=True):
    normed_BLD = rms_norm(x_BLD, block.attn_norm_D[...], c.norm_eps)
    attn, at = block.attn, position_B1[0, 0]
    latent_BLC, rope_BLR = attn.latents(c, normed_BLD, position_B1)
    nope_BNLH = jnp.einsum('BLC,CNH->BNLH', latent_BLC, attn.k_up_CNH[...])
    shared_BNLR = jnp.broadcast_to(rope_BLR[:, None], (*nope_BNLH.shape[:3], rope_BLR.shape[2]))
    new_BNLJ = jnp.concatenate([nope_BNLH, shared_BNLR], axis=3)
    new_BNLV = jnp.einsum('BLC,CNV->BNLV', latent_BLC, attn.v_up_CNV[...])
    key_BNMJ = jax.lax.dynamic_update_slice_in_dim(key_BNMJ, new_BNLJ, at, axis=2)
    value_BNMV = jax.lax.dynamic_update_slice_in_dim(value_BNMV, new_BNLV, at, axis=2)
    query_BLNJ = jnp.concatenate(attn.queries(c, normed_BLD, position_B1), axis=3)
    score_BNLM = jnp.einsum('BLNJ,BNMJ->BNLM', query_BLNJ, key_BNMJ)
    score_BNLM = score_BNLM.astype(jnp.float32) * rope.softmax_scale(c)
    seen_M = jnp.arange(key_BNMJ.shape[2], dtype=jnp.int32) <= at
    score_BNLM = jnp.where(seen_M[None, None, None], score_BNLM, -jnp.inf)
    prob_BNLM = jax.nn.softmax(score_BNLM).astype(x_BLD.dtype)
    out_BLNV = jnp.einsum('BNLM,BNMV->BLNV', prob_BNLM, value_BNMV)
    x_BLD, _ = block.feed_forward(c, x_BLD + attn.output(c, out_BLNV), valid_B1)
    grown.append((key_BNMJ, value_BNMV))
  hidden_BD = rms_norm(x_BLD[:, 0], model.final_norm_D[...], c.norm_eps)
  return jnp.einsum('BD,DV->BV', hidden_BD, model.head_DV[...].astype(hidden_BD.dtype)), grown
