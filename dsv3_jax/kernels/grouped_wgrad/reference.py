"""Every group over all columns, those of others made zero."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import tiles
from dsv3_jax.kernels.fp8_wgrad.reference import fp8_wgrad
from dsv3_jax.kernels.grouped_matmul.op import aligned_starts


def grouped_wgrad(
  a_MS: jax.Array,
  a_scale_Ms: jax.Array,
  b_NS: jax.Array,
  b_scale_Ns: jax.Array,
  group_sizes_E: jax.Array,
  *,
  accumulate: jax.Array | None,
) -> jax.Array:
  start_E = aligned_starts(group_sizes_E) // tiles.TILE
  end_E = start_E + -(-group_sizes_E // tiles.TILE)
  block_s = jnp.arange(a_scale_Ms.shape[1], dtype=jnp.int32)
  parts = []
  for e in range(len(group_sizes_E)):
    mine_s = (block_s >= start_E[e]) & (block_s < end_E[e])
    mine_S = jnp.repeat(mine_s, tiles.TILE)
    mask = lambda x, mine: jnp.where(mine[None], x, jnp.zeros((), x.dtype))
    masked = [mask(x, m) for x, m in zip((a_MS, a_scale_Ms), (mine_S, mine_s), strict=True)]
    masked += [mask(x, m) for x, m in zip((b_NS, b_scale_Ns), (mine_S, mine_s), strict=True)]
    parts.append(fp8_wgrad(*masked, accumulate=None))
  out_EMN = jnp.stack(parts)
  return out_EMN if accumulate is None else accumulate + out_EMN
