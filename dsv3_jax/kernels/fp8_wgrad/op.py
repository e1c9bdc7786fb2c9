"""Public function of the FP8 matmul for gradients of weights."""

import jax

from dsv3_jax.kernels import checks, choice


def fp8_wgrad(
  a_MT: jax.Array,
  a_scale_Mt: jax.Array,
  b_NT: jax.Array,
  b_scale_Nt: jax.Array,
  *,
  accumulate: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """sum over blocks t of 128 tokens: (a_t . b_t) * a_scale * b_scale -> float32 [M, N], plus `accumulate`.

  Both operands have tokens last: `quantize_tiles_transposed` and `requantize_transposed` write them so.
  T need not be a multiple of 128. Not differentiable.
  """
  for name, x, scale in (('a', a_MT, a_scale_Mt), ('b', b_NT, b_scale_Nt)):
    checks.codes(name, x, 2)
    checks.tile_scale(f'{name}_scale', scale, x)
  checks.same('fp8_wgrad', a_MT.shape[1], b_NT.shape[1], 'a [M, T] and b [N, T]')
  checks.accumulator(accumulate, (a_MT.shape[0], b_NT.shape[0]))
  arrays = a_MT, a_scale_Mt, b_NT, b_scale_Nt
  return choice.run('fp8_wgrad', 'fp8_wgrad', implementation, *arrays, accumulate=accumulate)
