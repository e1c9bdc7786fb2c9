"""The grouped FP8 matmuls on Hopper: all groups in one kernel, tiles without rows skipped."""

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper, tiles, tuning
from dsv3_jax.kernels import hopper_gemm as hg


def supports(
  function: str, a: jax.Array, _: jax.Array, b_ENK: jax.Array, *rest: object, **options: object
) -> str | None:
  return hg.refusal(a, b_ENK)


def grouped_matmul(
  a_SK: jax.Array,
  a_scale_SS: jax.Array,
  b_ENK: jax.Array,
  b_scale_Ens: jax.Array,
  group_sizes_E: jax.Array,
  *,
  out_dtype: jnp.dtype,
) -> jax.Array:
  (S, K), N = a_SK.shape, b_ENK.shape[1]
  tiling = tuning.tiling('grouped_matmul', S, N, K)
  per_block = tiles.TILE // tiling.rows
  a_SK = hopper.padded(a_SK, tiling.rows, tiles.TILE)
  b_ENK, b_scale_Ens = _padded(b_ENK, b_scale_Ens, tiling)
  grid = S // tiling.rows, b_ENK.shape[1] // tiling.columns

  def place(i: jax.Array, expert_s: jax.Array) -> hg.Place:
    m, n = hg.snake(i, grid, tiling)
    e = expert_s[lax.div(m, per_block)]
    row, column = m * tiling.rows, n * tiling.columns
    return hg.Place(
      a_row=row,
      b_row=jnp.maximum(e, 0) * b_ENK.shape[1] + column,
      out_row=row,
      column=column,
      scale_row=jnp.maximum(e, 0) * b_scale_Ens.shape[1],
      blocks=jnp.where(e < 0, 0, tiles.count(K)),
    )

  out_SN = hg.gemm(
    a_SK,
    hg.scales(a_scale_SS, tiling.rows),
    b_ENK.reshape(-1, b_ENK.shape[2]),
    b_scale_Ens.reshape(-1, b_scale_Ens.shape[2]),
    place,
    grid[0] * grid[1],
    jax.ShapeDtypeStruct((S, b_ENK.shape[1]), out_dtype),
    tiling,
    blockwise=True,
    tables=[_experts(group_sizes_E, S // tiles.TILE)],
  )
  return lax.slice(out_SN, (0, 0), (S, N))


def masked_matmul(
  a_EMK: jax.Array,
  a_scale_EMS: jax.Array,
  b_ENK: jax.Array,
  b_scale_Ens: jax.Array,
  sizes_E: jax.Array,
  *,
  out_dtype: jnp.dtype,
) -> jax.Array:
  (E, M, K), N = a_EMK.shape, b_ENK.shape[1]
  tiling = tuning.tiling('masked_matmul', M, N, K)
  a_EMK = hopper.padded(a_EMK, tiling.rows, tiles.TILE)
  a_scale_EMS = hopper.padded(a_scale_EMS, tiling.rows, 1)
  b_ENK, b_scale_Ens = _padded(b_ENK, b_scale_Ens, tiling)
  each = a_EMK.shape[1]
  grid = each // tiling.rows, b_ENK.shape[1] // tiling.columns
  per_expert = grid[0] * grid[1]

  def place(i: jax.Array, sizes_E: jax.Array) -> hg.Place:
    e = lax.div(i, per_expert)
    m, n = hg.snake(lax.rem(i, per_expert), grid, tiling)
    row, column = e * each + m * tiling.rows, n * tiling.columns
    valid = sizes_E[e] - m * tiling.rows
    return hg.Place(
      a_row=row,
      b_row=e * b_ENK.shape[1] + column,
      out_row=row,
      column=column,
      scale_row=e * b_scale_Ens.shape[1],
      blocks=jnp.where(valid > 0, tiles.count(K), 0),
      valid=valid,
    )

  out_SN = hg.gemm(
    a_EMK.reshape(E * each, -1),
    hg.scales(a_scale_EMS.reshape(E * each, -1), 1),
    b_ENK.reshape(-1, b_ENK.shape[2]),
    b_scale_Ens.reshape(-1, b_scale_Ens.shape[2]),
    place,
    E * per_expert,
    jax.ShapeDtypeStruct((E * each, b_ENK.shape[1]), out_dtype),
    tiling,
    blockwise=True,
    tables=[sizes_E],
  )
  return out_SN.reshape(E, each, -1)[:, :M, :N]


def _padded(
  b_ENK: jax.Array, scale_Ens: jax.Array, tiling: hg.Tiling
) -> tuple[jax.Array, jax.Array]:
  b_ENK = hopper.padded(b_ENK, tiling.columns, tiles.TILE)
  return b_ENK, hopper.padded(scale_Ens, tiles.count(b_ENK.shape[1]), 1)


def _experts(group_sizes_E: jax.Array, blocks: int) -> jax.Array:
  """The group of each 128 rows, int32; -1 behind the last."""
  end_E = jnp.cumsum((group_sizes_E + (tiles.TILE - 1)) // tiles.TILE)
  block_s = jnp.arange(blocks, dtype=jnp.int32)
  before_sE = end_E[None, :] <= block_s[:, None]
  expert_s = jnp.sum(before_sE, axis=1, dtype=jnp.int32)
  return jnp.where(expert_s < len(group_sizes_E), expert_s, -1)
