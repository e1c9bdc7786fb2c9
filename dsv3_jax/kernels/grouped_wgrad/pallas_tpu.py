"""On TPU: `kernels/tpu_gemm.py`, step by step over the blocks of 128 columns of all groups."""

import jax

from dsv3_jax.kernels import tiles, tpu, tpu_gemm

supports = tpu.supports


def grouped_wgrad(
  a_MS: jax.Array,
  a_scale_Ms: jax.Array,
  b_NS: jax.Array,
  b_scale_Ns: jax.Array,
  group_sizes_E: jax.Array,
  *,
  accumulate: jax.Array | None,
) -> jax.Array:
  blocks_E = (group_sizes_E + (tiles.TILE - 1)) // tiles.TILE
  arrays = a_MS, a_scale_Ms, b_NS, b_scale_Ns
  return tpu_gemm.columns_by_columns(*arrays, blocks_E, accumulate, inside=grouped_wgrad)
