"""A loop over experts, and in it over blocks of rows: only as many run as there are rows.

Each expert's weight is dequantised once. Large blocks first, small ones for the rest. Not used:
`lax.ragged_dot`, which runs at a few percent of a plain dot on CPU and copies the rows for every expert
on GPUs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax import compat
from dsv3_jax.kernels import tiles
from dsv3_jax.kernels.grouped_matmul.op import aligned_starts
from dsv3_jax.kernels.quantize.xla import dequantize_blocks, dequantize_tiles

_LARGE = 4 * tiles.TILE
Dot = Callable[[jax.Array, jax.Array], jax.Array]  # float32 [X, K], [Y, K] -> [X, Y]
plain_dot: Dot = functools.partial(jnp.einsum, 'XK,YK->XY')


def grouped_matmul(
  a_SK: jax.Array,
  a_scale_SS: jax.Array,
  b_ENK: jax.Array,
  b_scale_Ens: jax.Array,
  group_sizes_E: jax.Array,
  *,
  out_dtype: jnp.dtype,
  dot: Dot = plain_dot,
) -> jax.Array:
  """`dot`: for models of other arithmetic."""
  S, (E, N, _) = a_SK.shape[0], b_ENK.shape
  arrays = a_SK, a_scale_SS, b_ENK, b_scale_Ens, group_sizes_E
  start_E = aligned_starts(group_sizes_E)

  def expert(e: jax.Array, out_SN: jax.Array) -> jax.Array:
    b_NK = _weight(b_ENK, b_scale_Ens, e)

    def block(out_SN: jax.Array, slot: jax.Array, rows: int) -> jax.Array:
      cut = lambda x: lax.dynamic_slice_in_dim(x, slot, rows)
      a_bK = dequantize_tiles(tiles.moved(cut, a_SK), cut(a_scale_SS), jnp.float32)
      out_bN = dot(a_bK, b_NK).astype(out_dtype)
      return lax.dynamic_update_slice_in_dim(out_SN, out_bN, slot, 0)

    return walk(S, start_E[e], group_sizes_E[e], block, out_SN)

  return lax.fori_loop(0, E, expert, compat.zeros_like_varying((S, N), out_dtype, *arrays))


def masked_matmul(
  a_EMK: jax.Array,
  a_scale_EMS: jax.Array,
  b_ENK: jax.Array,
  b_scale_Ens: jax.Array,
  sizes_E: jax.Array,
  *,
  out_dtype: jnp.dtype,
) -> jax.Array:
  E, M, _ = a_EMK.shape
  missing = ((0, 0), (0, -M % tiles.TILE), (0, 0))
  a_EMK, a_scale_EMS = (jnp.pad(x, missing) for x in (a_EMK, a_scale_EMS))
  padded = a_EMK.shape[1]
  arrays = a_EMK, a_scale_EMS, b_ENK, b_scale_Ens, sizes_E
  shape = E, padded, b_ENK.shape[1]

  def expert(e: jax.Array, out_EMN: jax.Array) -> jax.Array:
    b_NK = _weight(b_ENK, b_scale_Ens, e)
    rows_MK, scale_MS = tiles.moved(lambda x: at(x, e), a_EMK), at(a_scale_EMS, e)

    def block(out_EMN: jax.Array, slot: jax.Array, rows: int) -> jax.Array:
      cut = lambda x: lax.dynamic_slice_in_dim(x, slot, rows)
      a_bK = dequantize_tiles(tiles.moved(cut, rows_MK), cut(scale_MS), jnp.float32)
      mine_b = slot + jnp.arange(rows, dtype=jnp.int32) < sizes_E[e]
      out_bN = jnp.where(mine_b[:, None], jnp.einsum('bK,NK->bN', a_bK, b_NK), 0)
      return lax.dynamic_update_slice(out_EMN, out_bN.astype(out_dtype)[None], (e, slot, 0))

    return walk(padded, jnp.int32(0), sizes_E[e], block, out_EMN)

  out_EMN = lax.fori_loop(0, E, expert, compat.zeros_like_varying(shape, out_dtype, *arrays))
  return out_EMN[:, :M]


def walk(
  slots: int,
  start: jax.Array,
  size: jax.Array,
  block: Callable[[Any, jax.Array, int], Any],
  carry: Any,
) -> Any:
  """carry = block(carry, slot, rows) over `size` rows from `start`; slots are multiples of 128."""

  def times(count: jax.Array, first: jax.Array, rows: int, carry: Any) -> Any:
    # XLA would see one block of all slots, and take it out of a loop of no rounds.
    if rows == slots:
      return lax.cond(count > 0, lambda x: block(x, first, rows), lambda x: x, carry)
    return lax.fori_loop(0, count, lambda i, x: block(x, first + i * rows, rows), carry)

  large = size // _LARGE if slots >= _LARGE else jnp.zeros_like(size)
  if slots >= _LARGE:
    carry = times(large, start, _LARGE, carry)
  rest = size - large * _LARGE
  count = (rest + (tiles.TILE - 1)) // tiles.TILE
  return times(count, start + large * _LARGE, tiles.TILE, carry)


def at(x_EXY: jax.Array, e: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(x_EXY, e, keepdims=False)


def _weight(b_ENK: jax.Array, b_scale_Ens: jax.Array, e: jax.Array) -> jax.Array:
  codes_NK = tiles.moved(lambda x: at(x, e), b_ENK)
  return dequantize_blocks(codes_NK, at(b_scale_Ens, e), jnp.float32)
