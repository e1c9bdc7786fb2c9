"""Gradients of the experts' weights on Hopper: one kernel, each tile over its own group's tokens."""

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper, tiles, tuning
from dsv3_jax.kernels import hopper_gemm as hg


def supports(
  function: str, a_MS: jax.Array, _: jax.Array, b_NS: jax.Array, *rest: object, **options: object
) -> str | None:
  return hg.refusal(a_MS, b_NS)


def grouped_wgrad(
  a_MS: jax.Array,
  a_scale_Ms: jax.Array,
  b_NS: jax.Array,
  b_scale_Ns: jax.Array,
  group_sizes_E: jax.Array,
  *,
  accumulate: jax.Array | None,
) -> jax.Array:
  (M, S), N, E = a_MS.shape, b_NS.shape[0], len(group_sizes_E)
  tiling = tuning.tiling('grouped_wgrad', M, N, S)
  a_MS = hopper.padded(a_MS, tiling.rows, tiles.TILE)
  b_NS = hopper.padded(b_NS, tiling.columns, tiles.TILE)
  each = a_MS.shape[0]
  grid = each // tiling.rows, b_NS.shape[0] // tiling.columns
  per_expert = grid[0] * grid[1]

  def place(i: jax.Array, first_E: jax.Array, blocks_E: jax.Array) -> hg.Place:
    e = lax.div(i, per_expert)
    m, n = hg.snake(lax.rem(i, per_expert), grid, tiling)
    row, column = m * tiling.rows, n * tiling.columns
    return hg.Place(row, column, e * each + row, column, first=first_E[e], blocks=blocks_E[e])

  if accumulate is not None:
    accumulate = hopper.padded(accumulate, tiling.rows, tiling.columns).reshape(E * each, -1)
  blocks_E = (group_sizes_E + (tiles.TILE - 1)) // tiles.TILE
  out_EMN = hg.gemm(
    a_MS,
    hg.scales(a_scale_Ms, tiling.rows),
    b_NS,
    hg.scales(b_scale_Ns, tiling.columns),
    place,
    E * per_expert,
    jax.ShapeDtypeStruct((E * each, b_NS.shape[0]), jnp.float32),
    tiling,
    tables=[jnp.cumsum(blocks_E) - blocks_E, blocks_E],
    accumulate=accumulate,
  ).reshape(E, each, -1)
  return lax.slice(out_EMN, (0, 0, 0), (E, M, N))
