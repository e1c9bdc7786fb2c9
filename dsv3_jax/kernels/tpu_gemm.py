"""Block-scaled FP8 products on TPU: dense, of groups of rows, and of groups of columns.

Both operands have the contracted axis last. Per 128 of it, one dot in FP32 on the matrix unit, times a
scale per row of a, times a scale per row of b: blocks of 128x128 come spread over their rows, 3 % of the
bytes of the weight, so that one kernel serves 1x128 by 128x128 and 1x128 by 1x128. E4M3 goes to the matrix
unit as it is where that takes it (tpu7x); elsewhere it is cast in VMEM to bfloat16, which is exact.

Scales are read as [steps, chunks, tiles, rows]: the contracted axis is split into steps of the grid, a
step into chunks, a chunk into at most 8 tiles of 128 that are unrolled. A last axis of rows is dense in
memory, where one of tiles would be filled up to 128. An axis that does not split evenly is padded with
zeros, which copies the codes once: none of V3's shapes but the 2112 of its latent projections.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels import choice, tiles, tpu

_ROWS, _COLUMNS = 512, 1024  # of a block of the output
_STEP = 1024  # of the contracted axis, where a step's weights are not kept for the next rows
_WHOLE = 8192  # the same where they are
_UNROLLED = 8  # tiles


def dense(
  a_MK: jax.Array,
  a_scale_MS: jax.Array,
  b_NK: jax.Array,
  b_scale_NS: jax.Array,
  out_dtype: jnp.dtype,
  accumulate_MN: jax.Array | None = None,
  *,
  inside: Callable[..., Any],
) -> jax.Array:
  """[M, N]; `accumulate_MN`, in FP32, is added and overwritten in place where the caller lets go of it."""
  (M, K), N = a_MK.shape, b_NK.shape[0]
  split = _split(K, _STEP)
  rows, columns = _block(M, _ROWS), _block(N, _COLUMNS)
  steps, *inner = split
  step = tiles.TILE * inner[0] * inner[1]
  in_specs = [
    pl.BlockSpec((rows, step), lambda m, n, k: (m, k)),
    pl.BlockSpec((columns, step), lambda m, n, k: (n, k)),
    pl.BlockSpec((None, *inner, rows), lambda m, n, k: (k, 0, 0, m)),
    pl.BlockSpec((None, *inner, columns), lambda m, n, k: (k, 0, 0, n)),
  ]
  operands = _codes(a_MK, split), _codes(b_NK, split), _scale(a_scale_MS, split)
  operands = [*operands, _scale(b_scale_NS, split)]
  out_spec = pl.BlockSpec((rows, columns), lambda m, n, k: (m, n))
  if accumulate_MN is not None:
    operands.append(accumulate_MN)
    in_specs.append(out_spec)
  return tpu.call(
    _dense_kernel,
    (pl.cdiv(M, rows), pl.cdiv(N, columns), steps),
    operands,
    in_specs,
    [((M, N), out_dtype)],
    [out_spec],
    flops=2 * M * N * K,
    order='ppa',
    inside=inside,
    scratch=[pltpu.VMEM((rows, columns), jnp.float32)],
    aliases=None if accumulate_MN is None else {4: 0},
  )[0]


def _dense_kernel(a_ref, b_ref, a_scale_ref, b_scale_ref, *refs):
  *before, out_ref, sum_ref = refs
  k = pl.program_id(2)

  @pl.when(k == 0)
  def _():
    sum_ref[...] = before[0][...] if before else jnp.zeros_like(sum_ref)

  _multiply(a_ref, b_ref, a_scale_ref, b_scale_ref, sum_ref)

  @pl.when(k == pl.num_programs(2) - 1)
  def _():
    out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def rows_by_weights(
  a_SK: jax.Array,
  a_scale_SS: jax.Array,
  b_ENK: jax.Array,
  b_scale_ENS: jax.Array,
  expert_s: jax.Array,
  rows_s: jax.Array,
  out_dtype: jnp.dtype,
  *,
  inside: Callable[..., Any],
) -> jax.Array:
  """Block s of 128 rows by weight `expert_s[s]` -> [S, N]; rows from `rows_s[s]` on give zeros.

  Blocks of one expert follow one another: its weight then stays in VMEM. A block without rows reads
  nothing: its operands are those of the block before it.
  """
  (S, K), N = a_SK.shape, b_ENK.shape[1]
  split = _split(K, _WHOLE)
  columns = _block(N, _COLUMNS)
  steps, *inner = split
  step = tiles.TILE * inner[0] * inner[1]
  index_s = jnp.arange(len(rows_s), dtype=jnp.int32)
  read_s = lax.cummax(jnp.where(rows_s > 0, index_s, 0))
  operands = [expert_s[read_s], read_s, rows_s]
  operands += [_codes(a_SK, split), _codes(b_ENK, split)]
  operands += [_scale(a_scale_SS, split), _scale(b_scale_ENS, split)]
  return tpu.call(
    _grouped_kernel,
    (pl.cdiv(N, columns), len(rows_s), steps),
    operands,
    [
      pl.BlockSpec((tiles.TILE, step), lambda n, s, k, expert, read, rows: (read[s], k)),
      pl.BlockSpec((None, columns, step), lambda n, s, k, expert, read, rows: (expert[s], n, k)),
      pl.BlockSpec(
        (None, *inner, tiles.TILE), lambda n, s, k, expert, read, rows: (k, 0, 0, read[s])
      ),
      pl.BlockSpec(
        (None, None, *inner, columns), lambda n, s, k, expert, read, rows: (expert[s], k, 0, 0, n)
      ),
    ],
    [((S, N), out_dtype)],
    [pl.BlockSpec((tiles.TILE, columns), lambda n, s, k, expert, read, rows: (s, n))],
    flops=2 * S * N * K,
    order='paa',
    inside=inside,
    prefetch=3,
    scratch=[pltpu.VMEM((tiles.TILE, columns), jnp.float32)],
  )[0]


def _grouped_kernel(
  expert_ref, read_ref, rows_ref, a_ref, b_ref, a_scale_ref, b_scale_ref, out_ref, sum_ref
):
  rows, k = rows_ref[pl.program_id(1)], pl.program_id(2)

  @pl.when(k == 0)
  def _():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  @pl.when(rows > 0)
  def _():
    _multiply(a_ref, b_ref, a_scale_ref, b_scale_ref, sum_ref)

  @pl.when(k == pl.num_programs(2) - 1)
  def _():
    row = lax.broadcasted_iota(jnp.int32, sum_ref.shape, 0)
    out_ref[...] = jnp.where(row < rows, sum_ref[...], 0).astype(out_ref.dtype)


def columns_by_columns(
  a_MS: jax.Array,
  a_scale_Ms: jax.Array,
  b_NS: jax.Array,
  b_scale_Ns: jax.Array,
  blocks_E: jax.Array,
  accumulate_EMN: jax.Array | None,
  *,
  inside: Callable[..., Any],
) -> jax.Array:
  """Each group's columns, `blocks_E` blocks of 128 one after another -> float32 [E, M, N].

  Step by step over all groups, an empty one taking a step of its own, for its zeros; sums stay in VMEM
  while steps are of one group.
  """
  (M, S), N, E = a_MS.shape, b_NS.shape[0], len(blocks_E)
  rows, columns = _block(M, 2 * _ROWS), _block(N, _COLUMNS)
  split = S // tiles.TILE, 1, 1
  steps_E = jnp.maximum(blocks_E, 1)
  step_S = jnp.arange(split[0] + E, dtype=jnp.int32)
  expert_S = jnp.sum(jnp.cumsum(steps_E)[None] <= step_S[:, None], axis=1, dtype=jnp.int32)
  expert_S = jnp.minimum(expert_S, E - 1)  # steps behind the last group count as its own, idle
  place_S = step_S - (jnp.cumsum(steps_E) - steps_E)[expert_S]
  active_S = place_S < blocks_E[expert_S]
  block_S = jnp.where(active_S, (jnp.cumsum(blocks_E) - blocks_E)[expert_S] + place_S, 0)
  block_S = lax.cummax(block_S)
  place_S = jnp.where(active_S, place_S, jnp.where(place_S == 0, -1, -2))
  spec = lambda size, axis: pl.BlockSpec(
    (size, tiles.TILE), lambda m, n, s, expert, block, place: ((m, n)[axis], block[s])
  )
  scale_spec = lambda size, axis: pl.BlockSpec(
    (None, 1, 1, size), lambda m, n, s, expert, block, place: (block[s], 0, 0, (m, n)[axis])
  )
  out_spec = pl.BlockSpec(
    (None, rows, columns), lambda m, n, s, expert, block, place: (expert[s], m, n)
  )
  in_specs = [spec(rows, 0), spec(columns, 1), scale_spec(rows, 0), scale_spec(columns, 1)]
  operands = [expert_S, block_S, place_S.astype(jnp.int32), a_MS, b_NS]
  operands += [_scale(a_scale_Ms, split), _scale(b_scale_Ns, split)]
  if accumulate_EMN is not None:
    operands.append(accumulate_EMN)
    in_specs.append(out_spec)
  return tpu.call(
    _columns_kernel,
    (pl.cdiv(M, rows), pl.cdiv(N, columns), len(step_S)),
    operands,
    in_specs,
    [((E, M, N), jnp.float32)],
    [out_spec],
    flops=2 * M * N * S,
    order='ppa',
    inside=inside,
    prefetch=3,
    aliases=None if accumulate_EMN is None else {7: 0},
  )[0]


def _columns_kernel(
  expert_ref, block_ref, place_ref, a_ref, b_ref, a_scale_ref, b_scale_ref, *refs
):
  *before, out_ref = refs
  place = place_ref[pl.program_id(2)]  # in its group; -1 for the step of an empty one, -2 idle

  @pl.when((place == 0) | (place == -1))
  def _():
    out_ref[...] = before[0][...] if before else jnp.zeros_like(out_ref)

  @pl.when(place >= 0)
  def _():
    _multiply(a_ref, b_ref, a_scale_ref, b_scale_ref, out_ref)


def _multiply(a_ref, b_ref, a_scale_ref, b_scale_ref, sum_ref):
  """sum += over tiles t of 128: (a_t . b_t) * a_scale_t * b_scale_t, in FP32."""
  chunks, count, _ = a_scale_ref.shape

  def chunk(c: jax.Array, _: None) -> None:
    a_scale, b_scale = a_scale_ref[c].T, b_scale_ref[c]  # [rows, count], [count, columns]
    total = jnp.zeros(sum_ref.shape, jnp.float32)
    for t in range(count):
      start = (c * count + t) * tiles.TILE
      at = pl.ds(start if isinstance(start, int) else pl.multiple_of(start, tiles.TILE), tiles.TILE)
      part = _dot(a_ref[:, at], b_ref[:, at])
      total += part * a_scale[:, t : t + 1] * b_scale[t : t + 1]
    sum_ref[...] += total

  if chunks == 1:
    chunk(0, None)
  else:
    lax.fori_loop(0, chunks, chunk, None)


def _dot(a_mH: jax.Array, b_nH: jax.Array) -> jax.Array:
  if not _native(a_mH.dtype, b_nH.dtype):
    a_mH, b_nH = a_mH.astype(jnp.bfloat16), b_nH.astype(jnp.bfloat16)
  contract = (((1,), (1,)), ((), ()))
  return lax.dot_general(a_mH, b_nH, contract, preferred_element_type=jnp.float32)


def _native(a: jnp.dtype, b: jnp.dtype) -> bool:
  """Whether the matrix unit takes these codes; the interpreter is given what most chips are."""
  return choice.platform() == 'tpu' and a == b and pltpu.get_tpu_info().is_matmul_supported(a, b)


@functools.cache
def _split(dim: int, most: int) -> tuple[int, int, int]:
  """(steps, chunks, tiles) of the contracted axis, as even as can be: 2112 at 1024 -> 3 steps of 6."""
  count = tiles.count(dim)
  steps = pl.cdiv(count * tiles.TILE, most)
  each = pl.cdiv(count, steps)
  chunks = pl.cdiv(each, _UNROLLED)
  return steps, chunks, pl.cdiv(each, chunks)


def _block(dim: int, most: int) -> int:
  return min(most, tpu.round_up(dim, tiles.TILE))


def _codes(x_XK: jax.Array, split: tuple[int, int, int]) -> jax.Array:
  missing = split[0] * split[1] * split[2] * tiles.TILE - x_XK.shape[-1]
  return jnp.pad(x_XK, [(0, 0)] * (x_XK.ndim - 1) + [(0, missing)]) if missing else x_XK


def _scale(scale_XMS: jax.Array, split: tuple[int, int, int]) -> jax.Array:
  """[.., M, S] -> [.., steps, chunks, tiles, M]."""
  steps, chunks, count = split
  missing = steps * chunks * count - scale_XMS.shape[-1]
  scale_XMS = jnp.pad(scale_XMS, [(0, 0)] * (scale_XMS.ndim - 1) + [(0, missing)])
  return rearrange(scale_XMS, '... M (k c t) -> ... k c t M', k=steps, c=chunks)
