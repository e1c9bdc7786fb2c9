"""Every entry of a row's table gathered, one softmax over all of them."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.mla_decode.entries import PAGE, unpack


def mla_decode(
  q_BLNX: jax.Array,
  pages_PMX: jax.Array,
  table_BJ: jax.Array,
  positions_BL: jax.Array,
  *,
  rank: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  B, J = table_BJ.shape
  entry_BMY = pages_PMX.at[table_BJ].get(mode='clip').reshape(B, J * PAGE, -1)
  entry_M = jnp.arange(J * PAGE, dtype=jnp.int32)
  written_BM = entry_M[None] <= jnp.max(positions_BL, axis=1, keepdims=True)
  key_BMX = jnp.where(written_BM[..., None], unpack(entry_BMY, rank, q_BLNX.dtype), 0)
  score_BLNM = jnp.einsum('BLNX,BMX->BLNM', q_BLNX, key_BMX, preferred_element_type=jnp.float32)
  seen_BLM = entry_M[None, None] <= positions_BL[:, :, None]
  score_BLNM = jnp.where(seen_BLM[:, :, None], score_BLNM * scale, -jnp.inf)
  lse_BLN = jax.nn.logsumexp(score_BLNM, axis=3)
  prob_BLNM = jnp.where(seen_BLM[:, :, None], jnp.exp(score_BLNM - lse_BLN[..., None]), 0)
  latent_BMC = key_BMX[..., :rank]
  return jnp.einsum('BLNM,BMC->BLNC', prob_BLNM.astype(q_BLNX.dtype), latent_BMC), lse_BLN
