"""Public function of the FP8 matmul, for the forward and for gradients of inputs."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import checks, choice


def fp8_matmul(
  a_MK: jax.Array,
  a_scale_MS: jax.Array,
  b_NK: jax.Array,
  b_scale_ns: jax.Array,
  *,
  out_dtype: jnp.dtype = jnp.bfloat16,
  implementation: str | None = None,
) -> jax.Array:
  """sum over blocks s of K: (a_s . b_s in FP32) * a_scale * b_scale -> [M, N] in `out_dtype`.

  Both operands have K last, so b is the weight transposed; M, N and K need not be multiples of 128. Sums
  are exact in FP32 to its rounding: on Hopper they are promoted every 128 of K. A NaN scale makes its
  rows (of a) or columns (of b) NaN. `out_dtype`: bfloat16 or float32. Not differentiable.
  """
  checks.codes('a', a_MK, 2)
  checks.codes('b', b_NK, 2)
  checks.tile_scale('a_scale', a_scale_MS, a_MK)
  checks.block_scale('b_scale', b_scale_ns, b_NK)
  checks.same('fp8_matmul', a_MK.shape[1], b_NK.shape[1], 'a [M, K] and b [N, K]')
  checks.output(out_dtype)
  arrays = a_MK, a_scale_MS, b_NK, b_scale_ns
  return choice.run('fp8_matmul', 'fp8_matmul', implementation, *arrays, out_dtype=out_dtype)
