"""Public function of the grouped FP8 matmul for gradients of weights."""

import jax

from dsv3_jax.kernels import checks, choice


def grouped_wgrad(
  a_MS: jax.Array,
  a_scale_Ms: jax.Array,
  b_NS: jax.Array,
  b_scale_Ns: jax.Array,
  group_sizes_E: jax.Array,
  *,
  accumulate: jax.Array | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """`fp8_wgrad` over the columns of each group -> float32 [E, M, N], plus `accumulate`.

  Columns of group e start at `aligned_starts` (`grouped_matmul`); an empty group gives zeros. Columns
  between a group's end and the next multiple of 128 count too: zeros add nothing. S: a multiple of 128.
  """
  for name, x, scale in (('a', a_MS, a_scale_Ms), ('b', b_NS, b_scale_Ns)):
    checks.codes(name, x, 2)
    checks.tile_scale(f'{name}_scale', scale, x)
  checks.same('grouped_wgrad', a_MS.shape[1], b_NS.shape[1], 'a [M, S] and b [N, S]')
  checks.aligned('S', a_MS.shape[1])
  checks.sizes('group_sizes', group_sizes_E, len(group_sizes_E))
  checks.accumulator(accumulate, (len(group_sizes_E), a_MS.shape[0], b_NS.shape[0]))
  arrays = a_MS, a_scale_Ms, b_NS, b_scale_Ns, group_sizes_E
  return choice.run(
    'grouped_wgrad', 'grouped_wgrad', implementation, *arrays, accumulate=accumulate
  )
