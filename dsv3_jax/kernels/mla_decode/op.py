"""Public function of absorbed attention over pages."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import choice
from dsv3_jax.kernels.mla_decode.entries import PAGE, entry_size


def mla_decode(
  q_BLNX: jax.Array,
  pages_PMX: jax.Array,
  table_BJ: jax.Array,
  positions_BL: jax.Array,
  *,
  rank: int,
  scale: float,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Attention of absorbed queries over latent entries, one key head for all -> (out, lse).

  out [B, L, N, C] in q's dtype is sum_m p_m latent_m, lse [B, L, N] in FP32 is ln sum_m exp(scale q.k_m),
  over the entries m at or before the query's own position; with lse, parts of a context can be put
  together. A position of -1 sees nothing: zeros, and -inf.

  `q_BLNX`: per head the query moved into the latent space (`rank` numbers), then the rotated one.
  `pages_PMX`: pages of 64 entries, `entries.pack`. `table_BJ`: int32, entry m of row b lies in page
  table[b, m // 64] at m % 64; what lies behind the row's last position changes nothing, be it NaN. A
  row's bits depend on nothing but its own queries and entries, whatever else is in the batch.
  `implementation`: see `kernels.choice`; 'xla' takes memory O(B L N) and time by the longest row, the
  chips' own time by each row's length, 'reference' gathers the whole table. Not differentiable.
  """
  (B, L, _, X), rows = q_BLNX.shape, table_BJ.shape[0]
  if pages_PMX.shape[1] != PAGE:
    raise ValueError(f'pages of {pages_PMX.shape[1]} entries: must be {PAGE}')
  need = entry_size(rank, X - rank, fp8=True) if pages_PMX.dtype == jnp.uint8 else X
  if pages_PMX.shape[2] != need:
    raise ValueError(
      f'pages {pages_PMX.dtype}{list(pages_PMX.shape)}: entries must have {need} for queries of {X}'
    )
  if rows != B or positions_BL.shape != (B, L):
    raise ValueError(
      f'table {table_BJ.shape} and positions {positions_BL.shape}: must be of {B} rows of {L} queries'
    )
  arrays = q_BLNX, pages_PMX, table_BJ, positions_BL
  return choice.run('mla_decode', 'mla_decode', implementation, *arrays, rank=rank, scale=scale)
