"""Public function of absorbed attention over pages, and its reference."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.mla_decode import xla
from dsv3_jax.kernels.mla_decode.entries import PAGE, unpack


def mla_decode(
  q_BLNX: jax.Array,
  pages_PMX: jax.Array,
  table_BJ: jax.Array,
  positions_BL: jax.Array,
  *,
  rank: int,
  scale: float,
  implementation: str = 'xla',
) -> tuple[jax.Array, jax.Array]:
  """Attention of absorbed queries over latent entries, one key head for all -> (out, lse).

  out [B, L, N, C] in q's dtype is sum_m p_m latent_m, lse [B, L, N] in FP32 is ln sum_m exp(scale q.k_m),
  over the entries m at or before the query's own position; with lse, parts of a context can be put
  together. A position of -1 sees nothing: zeros, and -inf.

  `q_BLNX`: per head the query moved into the latent space (`rank` numbers), then the rotated one.
  `pages_PMX`: pages of 64 entries, `entries.pack`. `table_BJ`: int32, entry m of row b lies in page
  table[b, m // 64] at m % 64; what lies behind the row's last position
  changes nothing, be it NaN. A row's bits depend on
  nothing but its own queries and entries, whatever else is in the batch. `implementation`: 'xla' (memory
  O(B L N), time by the longest row) or 'reference' (gathers the whole table). Not differentiable.
  """
  if pages_PMX.shape[1] != PAGE:
    raise ValueError(f'pages of {pages_PMX.shape[1]} entries: must be {PAGE}')
  if implementation == 'reference':
    return _reference(q_BLNX, pages_PMX, table_BJ, positions_BL, rank, scale)
  if implementation != 'xla':
    raise ValueError(f"implementation = {implementation!r}: must be 'xla' or 'reference'")
  return xla.attention(q_BLNX, pages_PMX, table_BJ, positions_BL, rank, scale)


def _reference(q_BLNX, pages_PMX, table_BJ, positions_BL, rank, scale):
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
