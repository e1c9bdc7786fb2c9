"""The FP8 matmul on Hopper. Ragged sizes are padded, which copies; those of the model are not ragged."""

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper, tiles, tuning
from dsv3_jax.kernels import hopper_gemm as hg


def supports(
  function: str, a_MK: jax.Array, _: jax.Array, b_NK: jax.Array, *rest: object, **options: object
) -> str | None:
  return hg.refusal(a_MK, b_NK)


def fp8_matmul(
  a_MK: jax.Array,
  a_scale_MS: jax.Array,
  b_NK: jax.Array,
  b_scale_ns: jax.Array,
  *,
  out_dtype: jnp.dtype,
) -> jax.Array:
  (M, K), N = a_MK.shape, b_NK.shape[0]
  tiling = tuning.tiling('fp8_matmul', M, N, K)
  a_MK = hopper.padded(a_MK, tiling.rows, tiles.TILE)
  b_NK = hopper.padded(b_NK, tiling.columns, tiles.TILE)
  grid = a_MK.shape[0] // tiling.rows, b_NK.shape[0] // tiling.columns

  def place(i: jax.Array) -> hg.Place:
    m, n = hg.snake(i, grid, tiling)
    row, column = m * tiling.rows, n * tiling.columns
    return hg.Place(row, column, row, column, blocks=tiles.count(K))

  out = jax.ShapeDtypeStruct((a_MK.shape[0], b_NK.shape[0]), out_dtype)
  a_scale_SM = hg.scales(a_scale_MS, tiling.rows)
  b_scale_ns = hopper.padded(b_scale_ns, tiles.count(b_NK.shape[0]), 1)
  out_MN = hg.gemm(
    a_MK, a_scale_SM, b_NK, b_scale_ns, place, grid[0] * grid[1], out, tiling, blockwise=True
  )
  return lax.slice(out_MN, (0, 0), (M, N))
