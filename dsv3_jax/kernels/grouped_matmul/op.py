"""Public functions of the grouped FP8 matmul."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import checks, choice, tiles


def aligned_starts(group_sizes_E: jax.Array) -> jax.Array:
  """Where each group's rows start, int32 [E]: one after another, each at a multiple of 128."""
  blocks_E = (group_sizes_E + (tiles.TILE - 1)) // tiles.TILE
  return ((jnp.cumsum(blocks_E) - blocks_E) * tiles.TILE).astype(jnp.int32)


def aligned_slots(rows: int, groups: int) -> int:
  """Rows that serve any split of `rows` over `groups` groups."""
  blocks = min(groups, rows) + max(0, rows - groups) // tiles.TILE
  return max(1, blocks) * tiles.TILE


def grouped_matmul(
  a_SK: jax.Array,
  a_scale_SS: jax.Array,
  b_ENK: jax.Array,
  b_scale_Ens: jax.Array,
  group_sizes_E: jax.Array,
  *,
  out_dtype: jnp.dtype = jnp.bfloat16,
  implementation: str | None = None,
) -> jax.Array:
  """Rows of group e by weight e, as `fp8_matmul` -> [S, N].

  Group e has `group_sizes_E[e]` (int32) rows from `aligned_starts` on; groups may be empty. Rows between
  a group's end and the next multiple of 128 are computed with it: zeros give zeros. Rows behind the last
  group's blocks give zeros whatever they hold. S: a multiple of 128, `aligned_slots` serves any sizes.
  """
  checks.codes('a', a_SK, 2)
  checks.codes('b', b_ENK, 3)
  checks.tile_scale('a_scale', a_scale_SS, a_SK)
  checks.block_scale('b_scale', b_scale_Ens, b_ENK)
  checks.same('grouped_matmul', a_SK.shape[1], b_ENK.shape[2], 'a [S, K] and b [E, N, K]')
  checks.aligned('S', a_SK.shape[0])
  checks.sizes('group_sizes', group_sizes_E, b_ENK.shape[0])
  checks.output(out_dtype)
  arrays = a_SK, a_scale_SS, b_ENK, b_scale_Ens, group_sizes_E
  return choice.run(
    'grouped_matmul', 'grouped_matmul', implementation, *arrays, out_dtype=out_dtype
  )


def masked_matmul(
  a_EMK: jax.Array,
  a_scale_EMS: jax.Array,
  b_ENK: jax.Array,
  b_scale_Ens: jax.Array,
  sizes_E: jax.Array,
  *,
  out_dtype: jnp.dtype = jnp.bfloat16,
  implementation: str | None = None,
) -> jax.Array:
  """The first `sizes_E[e]` of expert e's M rows by weight e -> [E, M, N]; zeros for the other rows."""
  checks.codes('a', a_EMK, 3)
  checks.codes('b', b_ENK, 3)
  checks.tile_scale('a_scale', a_scale_EMS, a_EMK)
  checks.block_scale('b_scale', b_scale_Ens, b_ENK)
  checks.same('masked_matmul', a_EMK.shape[0], b_ENK.shape[0], 'a [E, M, K] and b [E, N, K]')
  checks.same('masked_matmul', a_EMK.shape[2], b_ENK.shape[2], 'a [E, M, K] and b [E, N, K]')
  checks.sizes('sizes', sizes_E, b_ENK.shape[0])
  checks.output(out_dtype)
  arrays = a_EMK, a_scale_EMS, b_ENK, b_scale_Ens, sizes_E
  return choice.run('grouped_matmul', 'masked_matmul', implementation, *arrays, out_dtype=out_dtype)
