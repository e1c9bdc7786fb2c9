"""On TPU: `kernels/tpu_gemm.py`, with the scales of blocks spread over their rows of the weight."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import tiles, tpu, tpu_gemm

supports = tpu.supports


def fp8_matmul(
  a_MK: jax.Array,
  a_scale_MS: jax.Array,
  b_NK: jax.Array,
  b_scale_ns: jax.Array,
  *,
  out_dtype: jnp.dtype,
) -> jax.Array:
  b_scale_NS = jnp.repeat(b_scale_ns, tiles.TILE, axis=0)[: len(b_NK)]
  return tpu_gemm.dense(a_MK, a_scale_MS, b_NK, b_scale_NS, out_dtype, inside=fp8_matmul)
