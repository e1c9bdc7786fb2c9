"""The FP8 matrix product of Hopper, one kernel for every form of it (3.3.2 of arXiv 2412.19437).

  out[row_o + i, col + j] = sum over blocks k of 128:  a_scale[i, k] b_scale[j, k] (a[i, k] . b[j, k])

Each product of a block is a fresh accumulator of the tensor core (4 wgmma of K = 32), which is added to
float32 registers under its scales: what the tensor core itself keeps of a sum has 14 bits or so. Two
warpgroups of 64 rows or columns each multiply, so that one promotes while the other's wgmma runs; a third
loads by TMA through a ring of `stages`. Blocks are persistent: the ring runs on from tile to tile, so
loads for the next tile overlap the end of this one.

Both operands lie with K last: tensor cores take FP8 no other way. `place` says for each tile where it
lies, and how many blocks of K it has: 0 for a tile without rows, which is written as zeros.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper, tiles

if hopper.AVAILABLE:
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu

_SHARED = 232448 - 4096  # bytes a block of Hopper may have, less barriers and what reductions use
HALF = 64  # rows of a wgmma, and columns that are written at a time


@dataclasses.dataclass(frozen=True)
class Tiling:
  """A tile of the output, as two warpgroups share it, and the depth of the ring."""

  rows: int = 128  # 128: each warpgroup has 64 rows; 64: each has half of the columns
  columns: int = 128
  stages: int = 4
  width: int = 8  # tiles of a row of tiles that are taken before the next row: what L2 holds

  def __post_init__(self) -> None:
    least = HALF * (3 - self.rows // HALF)  # of columns: 64 for each warpgroup
    if self.rows not in (HALF, 2 * HALF) or self.columns % least:
      raise ValueError(f'{self}: rows must be 64 or 128, columns a multiple of {least}')

  def fitting(self, out_bytes: int) -> int:
    """Stages of the ring that shared memory has room for, beside the output's (bytes per element)."""
    room = _SHARED - 4 * HALF**2 * out_bytes
    return min(self.stages, room // ((self.rows + self.columns) * (tiles.TILE + 4)))


class Place(NamedTuple):
  """Of one tile: rows of the operands and of the output, in elements; blocks of K, in 128s."""

  a_row: Any
  b_row: Any
  out_row: Any
  column: Any  # of the output
  scale_row: Any = 0  # where B's block-wise scales start for this matrix
  first: Any = 0
  blocks: Any = 0
  valid: Any = None  # rows of the tile that count, the rest are zeros; None: all


def gemm(
  a_MK: jax.Array,
  a_scale_kM: jax.Array,
  b_NK: jax.Array,
  b_scale: jax.Array,
  place: Callable[..., Place],
  count: int,
  out: jax.ShapeDtypeStruct,
  tiling: Tiling,
  *,
  blockwise: bool = False,
  tables: Sequence[jax.Array] = (),
  accumulate: jax.Array | None = None,
) -> jax.Array:
  """`count` tiles of `out`. `b_scale`: [K / 128, N] like that of A; `blockwise`: [N / 128, K / 128].

  `place(tile, *tables)` runs in the kernel, on references to the int32 `tables`. All sizes are multiples
  of the tile's; `accumulate`, of the shape of `out`, is added.
  """
  by_rows = tiling.rows == 2 * HALF
  own = (HALF, tiling.columns if by_rows else tiling.columns // 2)
  chunks = own[1] // HALF
  stages, T = tiling.fitting(out.dtype.itemsize), tiles.TILE

  def body(*refs: Any, a_ring, b_ring, a_scales, b_scales, staging, full, free, loaded):
    a, a_scale, b, b_scale, *rest = refs
    *places, result = rest
    added = places.pop() if accumulate is not None else None
    warpgroup = lax.axis_index('warpgroup')

    @pl.when(warpgroup == 2)
    def _load():
      plgpu.set_max_registers(40, action='decrease')

      def tile(i: jax.Array, step: jax.Array) -> jax.Array:
        at = place(i, *places)

        def load(k: jax.Array, step: jax.Array) -> jax.Array:
          slot = lax.rem(step, stages)

          @pl.when(step >= stages)
          def _():
            plgpu.barrier_wait(free.at[slot])

          k_T = pl.ds((at.first + k) * T, T)
          copy = lambda source, ring: plgpu.copy_gmem_to_smem(source, ring.at[slot], full.at[slot])
          copy(a.at[pl.ds(at.a_row, tiling.rows), k_T], a_ring)
          copy(b.at[pl.ds(at.b_row, tiling.columns), k_T], b_ring)
          copy(a_scale.at[at.first + k, pl.ds(at.a_row, tiling.rows)], a_scales)
          if not blockwise:
            copy(b_scale.at[at.first + k, pl.ds(at.b_row, tiling.columns)], b_scales)
          return step + 1

        return lax.fori_loop(0, at.blocks, load, step)

      steps = hopper.own_share(count, tile, jnp.int32(0))
      # What the last loads filled is waited for as well: a barrier must end where it began.
      last = jnp.minimum(steps, stages)
      wait = lambda i, _: plgpu.barrier_wait(free.at[lax.rem(steps - last + i, stages)])
      lax.fori_loop(0, last, wait, None)

    @pl.when(warpgroup < 2)
    def _multiply():
      plgpu.set_max_registers(232, action='increase')
      own_row = warpgroup * own[0] if by_rows else 0
      own_column = 0 if by_rows else warpgroup * own[1]

      def tile(i: jax.Array, step: jax.Array) -> jax.Array:
        at = place(i, *places)

        def multiply(k: jax.Array, carry: Any) -> Any:
          step, *sums = carry
          slot = lax.rem(step, stages)
          if blockwise:  # in flight under the product; a tile of 192 touches two rows of scales
            scale = [
              b_scale[at.scale_row + lax.div(at.column + own_column + c * HALF, T), at.first + k]
              for c in range(chunks)
            ]
          plgpu.barrier_wait(full.at[slot])
          a_s = plgpu.load(a_scales.at[slot, pl.ds(own_row, own[0])], layout=hopper.ROW)

          def product(acc: Any) -> jax.Array:
            b_T = b_ring.at[slot, pl.ds(own_column, own[1])].T
            plgpu.wgmma(acc, a_ring.at[slot, pl.ds(own_row, own[0])], b_T)
            return acc[...]

          acc = pl.run_scoped(product, plgpu.ACC(own, jnp.float32))
          for c in range(chunks):
            part = acc[:, c * HALF : (c + 1) * HALF]
            if blockwise:
              part = part * hopper.rows(a_s * scale[c], part.shape)
            else:
              b_s = plgpu.load(
                b_scales.at[slot, pl.ds(own_column + c * HALF, HALF)], layout=hopper.COLUMN
              )
              part = part * hopper.rows(a_s, part.shape) * hopper.columns(b_s, part.shape)
            sums[c] = sums[c] + part
          plgpu.barrier_arrive(free.at[slot])
          return step + 1, *sums

        zeros = [
          plgpu.layout_cast(jnp.zeros((HALF, HALF), jnp.float32), plgpu.Layout.WGMMA)
        ] * chunks
        step, *sums = lax.fori_loop(0, at.blocks, multiply, (step, *zeros))
        for c in range(chunks):
          where = (
            pl.ds(at.out_row + own_row, HALF),
            pl.ds(at.column + own_column + c * HALF, HALF),
          )
          mine = staging.at[warpgroup, c % 2]
          plgpu.wait_smem_to_gmem(1, wait_read_only=True)
          if added is not None:
            plgpu.copy_gmem_to_smem(added.at[where], mine, loaded.at[warpgroup])
            plgpu.barrier_wait(loaded.at[warpgroup])
            sums[c] = sums[c] + plgpu.load(mine, layout=plgpu.Layout.WGMMA)
          if at.valid is not None:
            row = plgpu.broadcasted_iota(jnp.int32, (HALF, HALF), 0, layout=plgpu.Layout.WGMMA)
            sums[c] = jnp.where(row + own_row < at.valid, sums[c], jnp.zeros_like(sums[c]))
          mine[...] = sums[c].astype(out.dtype)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(mine, result.at[where])
        return step

      hopper.own_share(count, tile, jnp.int32(0))
      plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  inputs = [a_MK, a_scale_kM, b_NK, b_scale, *tables]
  inputs += [] if accumulate is None else [accumulate]
  f32 = jnp.float32
  scratch = {
    'a_ring': hopper.swizzled((stages, tiling.rows, T), a_MK.dtype),
    'b_ring': hopper.swizzled((stages, tiling.columns, T), b_NK.dtype),
    'a_scales': plgpu.SMEM((stages, tiling.rows), f32),
    'b_scales': plgpu.SMEM((stages, tiling.columns), f32),
    'staging': hopper.swizzled((2, 2, HALF, HALF), out.dtype),
    'full': plgpu.Barrier(num_arrivals=3 if blockwise else 4, num_barriers=stages),
    'free': plgpu.Barrier(num_arrivals=2, num_barriers=stages),
    'loaded': plgpu.Barrier(num_barriers=2),
  }
  run = hopper.kernel(body, out, like=inputs, inside=place, scratch=scratch, warpgroups=3)
  return run(*inputs)


def snake(i: jax.Array, grid: tuple[int, int], tiling: Tiling) -> tuple[jax.Array, jax.Array]:
  """(row, column) of the i-th tile: back and forth over bands of `width` columns, which L2 then holds."""
  return plgpu.planar_snake(i, grid, 0, min(tiling.width, grid[1]))


def heuristic(rows: int, columns: int) -> Tiling:
  """Where nothing was measured: the largest tile that pads no weights, of 64 rows where there are no more."""
  if rows <= HALF and not columns % tiles.TILE:
    return Tiling(rows=HALF)
  for width in (tiles.TILE, 192, HALF):
    if not columns % width:
      return Tiling(columns=width)
  return Tiling(columns=tiles.TILE if columns > HALF else HALF)


def scales(scale_XS: jax.Array, rows: int) -> jax.Array:
  """[R, S] -> [S, R up to a multiple of `rows`]: what TMA can take a tile of."""
  return hopper.padded(scale_XS.T, rows)


def refusal(*codes: jax.Array) -> str | None:
  """Why the kernel cannot multiply these; None where it can."""
  for x in codes:
    if x.dtype != jnp.float8_e4m3fn:
      return f'codes are {x.dtype}, the kernels multiply float8_e4m3fn'
    if not x.size:
      return f'there is nothing in {x.shape}'
  return hopper.refusal()
