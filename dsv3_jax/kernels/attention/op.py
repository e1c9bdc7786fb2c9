"""Public function of causal attention, and its reference."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.attention import xla


def causal_attention(
  q_BLNJ: jax.Array,
  k_BLNJ: jax.Array,
  v_BLNV: jax.Array,
  *,
  scale: float,
  block: int = 512,
  stored: str = 'plain',
  implementation: str = 'xla',
) -> jax.Array:
  """softmax(scale * q k^T, keys not after the query) v -> [B, L, N, V] in v's dtype; softmax in FP32.

  `block`: queries and keys per block; L need not divide, the tail is padded. `stored`: how the output is
  kept for the backward, 'plain' or 'e5m6' (`kernels/e5m6`, per head); what comes out is what is kept, so
  rounded to it. `implementation`: 'xla' (O(L * block) memory, exact causal skipping of blocks) or
  'reference' (O(L^2), stores nothing).
  """
  if stored not in ('plain', 'e5m6'):
    raise ValueError(f"stored = {stored!r}: must be 'plain' or 'e5m6'")
  if implementation == 'reference':
    return _reference(q_BLNJ, k_BLNJ, v_BLNV, scale)
  if implementation != 'xla':
    raise ValueError(f"implementation = {implementation!r}: must be 'xla' or 'reference'")
  length = q_BLNJ.shape[1]
  block = min(block, length)
  pad = -length % block

  def heads_first(x_BLNH: jax.Array) -> jax.Array:
    # Padded keys come after every real query, so the causal mask already hides them.
    x_BLNH = jnp.pad(x_BLNH, ((0, 0), (0, pad), (0, 0), (0, 0)))
    return x_BLNH.transpose(0, 2, 1, 3)

  out_BNLV = xla.attention(
    heads_first(q_BLNJ), heads_first(k_BLNJ), heads_first(v_BLNV), scale, block, stored
  )
  return out_BNLV.transpose(0, 2, 1, 3)[:, :length]


def _reference(q_BLNJ: jax.Array, k_BLNJ: jax.Array, v_BLNV: jax.Array, scale: float) -> jax.Array:
  score_BNLM = (
    jnp.einsum('BLNJ,BMNJ->BNLM', q_BLNJ, k_BLNJ, preferred_element_type=jnp.float32) * scale
  )
  length = q_BLNJ.shape[1]
  causal_LM = jnp.tril(jnp.ones((length, length), bool))
  score_BNLM = jnp.where(causal_LM[None, None], score_BNLM, -jnp.inf)
  prob_BNLM = jax.nn.softmax(score_BNLM).astype(v_BLNV.dtype)
  return jnp.einsum('BNLM,BMNV->BLNV', prob_BNLM, v_BLNV)
