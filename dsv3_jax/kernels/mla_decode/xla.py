"""Paged latent attention in plain XLA: a loop over blocks of pages with a running softmax.

The loop ends behind the longest row, so one compiled shape serves every length of context, and time
follows what is there and not what would fit. A block in which a row sees nothing multiplies its sums by
one and adds zeros: the bits of a row do not change with the lengths of its neighbours.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax import compat
from dsv3_jax.kernels.mla_decode.entries import PAGE, unpack

# Pages of a block: little waste behind a short context, few rounds over a long one.
_LEAST, _MOST = 2, 8
_FAR = -1e30  # finite: exp(-inf - -inf) would be NaN


def mla_decode(
  q_BLNX: jax.Array,
  pages_PMX: jax.Array,
  table_BJ: jax.Array,
  positions_BL: jax.Array,
  *,
  rank: int,
  scale: float,
) -> tuple[jax.Array, jax.Array]:
  B, L, N, X = q_BLNX.shape
  q_BZX = q_BLNX.reshape(B, L * N, X)
  J = table_BJ.shape[1]
  pages = min(J, max(_LEAST, min(_MOST, J // 32)))
  table_BJ = jnp.pad(table_BJ, ((0, 0), (0, -table_BJ.shape[1] % pages)))
  position_BZ1 = jnp.repeat(positions_BL, N, axis=1)[..., None]
  last_B1 = jnp.max(positions_BL, axis=1, keepdims=True)
  like = (q_BLNX, pages_PMX, table_BJ, positions_BL)
  zeros = lambda size: compat.zeros_like_varying((B, L * N, size), jnp.float32, *like)

  def block(i, carry):
    out_BZX, sum_BZ1, max_BZ1 = carry
    page_Bj = lax.dynamic_slice_in_dim(table_BJ, i * pages, pages, axis=1)
    entry_Bmx = pages_PMX.at[page_Bj].get(mode='clip').reshape(B, pages * PAGE, -1)
    key_BmX = unpack(entry_Bmx, rank, q_BLNX.dtype)
    entry_m = i * (pages * PAGE) + jnp.arange(pages * PAGE, dtype=jnp.int32)
    # Zero times what stands there must be zero, whoever wrote it before.
    written_Bm1 = (entry_m[None] <= last_B1)[..., None]
    key_BmX = jnp.where(written_Bm1, key_BmX, 0)
    score_BZm = jnp.einsum('BZX,BmX->BZm', q_BZX, key_BmX, preferred_element_type=jnp.float32)
    seen_BZm = entry_m[None, None] <= position_BZ1
    score_BZm = jnp.where(seen_BZm, score_BZm * scale, _FAR)
    new_max = jnp.maximum(max_BZ1, jnp.max(score_BZm, axis=2, keepdims=True))
    shrink_BZ1 = jnp.exp(max_BZ1 - new_max)
    prob_BZm = jnp.where(seen_BZm, jnp.exp(score_BZm - new_max), 0)
    # All of an entry, though its key is not wanted: a latent cut out of it would be a copy of the block.
    part_BZX = jnp.einsum(
      'BZm,BmX->BZX',
      prob_BZm.astype(q_BLNX.dtype),
      key_BmX,
      preferred_element_type=jnp.float32,
    )
    new_sum = sum_BZ1 * shrink_BZ1 + jnp.sum(prob_BZm, axis=2, keepdims=True)
    return out_BZX * shrink_BZ1 + part_BZX, new_sum, new_max

  blocks = (jnp.max(positions_BL) + pages * PAGE) // (pages * PAGE)
  start = zeros(X), zeros(1), zeros(1) + _FAR
  out_BZX, sum_BZ1, max_BZ1 = lax.fori_loop(0, blocks, block, start)
  lse_BZ = jnp.where(sum_BZ1 > 0, max_BZ1 + jnp.log(sum_BZ1), -jnp.inf)
  out_BZC = out_BZX[..., :rank] / jnp.where(sum_BZ1 > 0, sum_BZ1, 1)
  return out_BZC.astype(q_BLNX.dtype).reshape(B, L, N, rank), lse_BZ.reshape(B, L, N)
