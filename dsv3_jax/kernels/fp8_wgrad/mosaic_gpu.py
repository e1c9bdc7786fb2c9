"""The FP8 matmul for gradients of weights on Hopper: scales per row on both sides, float32 out."""

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper, tiles, tuning
from dsv3_jax.kernels import hopper_gemm as hg


def supports(
  function: str, a_MT: jax.Array, _: jax.Array, b_NT: jax.Array, *rest: object, **options: object
) -> str | None:
  return hg.refusal(a_MT, b_NT)


def fp8_wgrad(
  a_MT: jax.Array,
  a_scale_Mt: jax.Array,
  b_NT: jax.Array,
  b_scale_Nt: jax.Array,
  *,
  accumulate: jax.Array | None,
) -> jax.Array:
  (M, T), N = a_MT.shape, b_NT.shape[0]
  tiling = tuning.tiling('fp8_wgrad', M, N, T)
  a_MT = hopper.padded(a_MT, tiling.rows, tiles.TILE)
  b_NT = hopper.padded(b_NT, tiling.columns, tiles.TILE)
  grid = a_MT.shape[0] // tiling.rows, b_NT.shape[0] // tiling.columns

  def place(i: jax.Array) -> hg.Place:
    m, n = hg.snake(i, grid, tiling)
    row, column = m * tiling.rows, n * tiling.columns
    return hg.Place(row, column, row, column, blocks=tiles.count(T))

  out = jax.ShapeDtypeStruct((a_MT.shape[0], b_NT.shape[0]), jnp.float32)
  if accumulate is not None:
    accumulate = hopper.padded(accumulate, tiling.rows, tiling.columns)
  a_scale_tM, b_scale_tN = (
    hg.scales(a_scale_Mt, tiling.rows),
    hg.scales(b_scale_Nt, tiling.columns),
  )
  out_MN = hg.gemm(
    a_MT, a_scale_tM, b_NT, b_scale_tN, place, grid[0] * grid[1], out, tiling, accumulate=accumulate
  )
  return lax.slice(out_MN, (0, 0), (M, N))
