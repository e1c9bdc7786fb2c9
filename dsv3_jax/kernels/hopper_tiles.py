"""Element-wise work on Hopper, one block of 128 threads for each tile of 64x128: what quantisers share.

Limited by memory: TMA loads and stores, one read and one write of everything, blocks so many and small that
those that compute hide those that wait. A matrix may be transposed on its way to registers. One number per
row of a tile (a scale) is written with a column of tiles side by side, [S, M], as products take them; the
public order is a transpose, which XLA drops between the two.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper, tiles

if hopper.AVAILABLE:
  import jax.experimental.pallas as pl
  import jax.experimental.pallas.mosaic_gpu as plgpu

ROWS, TILE = 64, tiles.TILE


@dataclasses.dataclass(frozen=True)
class View:
  """What the block (row, column) of the grid takes of an array: a tile of a shape, from where."""

  shape: tuple[int, ...]
  start: Callable[[Any, Any], tuple[Any, ...]]  # (row, column) -> in elements, or an index of a row
  minor: int | None = None  # columns that a slice in shared memory may take, see `hopper.swizzled`

  def of(self, array: Any, row: Any, column: Any) -> Any:
    start = self.start(row, column)
    indices = start[: len(start) - len(self.shape)]
    spans = [pl.ds(at, n) for at, n in zip(start[len(indices) :], self.shape, strict=True)]
    return array.at[(*indices, *spans)]


HALVES = slice(0, TILE // 2), slice(TILE // 2, TILE)  # of a tile's columns
MATRIX = View((ROWS, TILE), lambda r, c: (r * ROWS, c * TILE))
TURNED = View((TILE, ROWS), lambda r, c: (c * TILE, r * ROWS))  # of the transposed matrix
SPLIT = dataclasses.replace(MATRIX, minor=TILE // 2)  # by HALVES, for bytes
PER_TILE = View((ROWS,), lambda r, c: (c, r * ROWS))  # of [S, M]
PER_ROW = View((ROWS,), lambda r, c: (r * ROWS,))
TURNED_PER_TILE = View((TILE,), lambda r, c: (lax.div(r, 2), c * TILE))  # of [S, M], for TURNED


def refusal(x: jax.Array) -> str | None:
  """Why no kernel can serve this array; None where one can."""
  return hopper.refusal() if x.size else f'there is nothing in {x.shape}'


def run(
  body: Callable[..., None],
  grid: tuple[int, int],
  ins: Sequence[tuple[jax.Array, View]],
  outs: Sequence[tuple[jax.ShapeDtypeStruct, View]],
  scratch: Sequence[tuple[tuple[int, ...], Any]] = (),
) -> list[jax.Array]:
  """`body` on references to shared memory in every block: of `ins`, of `outs`, of `scratch` (shape, dtype)."""

  def kernel(*refs: Any) -> None:
    row, column = lax.axis_index('row'), lax.axis_index('column')
    count = len(ins) + len(outs)
    whole, (loaded, *parts) = refs[:count], refs[count:]
    for (_, view), source, part in zip(ins, whole, parts, strict=False):
      plgpu.copy_gmem_to_smem(view.of(source, row, column), part, loaded)
    plgpu.barrier_wait(loaded)
    body(*parts)
    plgpu.commit_smem()
    for (_, view), part, target in zip(outs, parts[len(ins) :], whole[len(ins) :], strict=False):
      plgpu.copy_smem_to_gmem(part, view.of(target, row, column))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  arrays = [x for x, _ in ins]
  shared = [_shared(view.shape, x.dtype, view.minor) for x, view in (*ins, *outs)]
  shared += [_shared(*each) for each in scratch]
  held = [plgpu.Barrier(num_arrivals=len(ins)), *shared]
  results = tuple(x for x, _ in outs)
  call = hopper.kernel(kernel, results, like=arrays, inside=body, scratch=held, grid=grid)
  return list(call(*arrays))


def flat(x_XD: jax.Array, rows: int = ROWS) -> jax.Array:
  """[.., D] -> [M, D] with zeros up to whole tiles."""
  return hopper.padded(x_XD.reshape(-1, x_XD.shape[-1]), rows, TILE)


def unflat(y_MD: jax.Array, lead: Sequence[int], width: int) -> jax.Array:
  """The first rows and columns of [M, D], with their leading dimensions."""
  rows = 1
  for n in lead:
    rows *= n
  return lax.slice(y_MD, (0, 0), (rows, width)).reshape(*lead, width)


def load(ref: Any, layout: Any = None) -> jax.Array:
  """float32 or int32 in registers."""
  x = plgpu.load(ref, layout=layout or hopper.MATRIX)
  return x.astype(jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.int32)


def scale_of(amax: jax.Array, power_of_two: bool, floor: float) -> tuple[jax.Array, jax.Array]:
  """(scale, 1 / scale) from the bits of the largest magnitudes, as `quantize/xla.py` has them."""
  finite = amax < tiles.INFINITY
  floored = jnp.maximum(tiles.number(amax), jnp.float32(floor))
  if power_of_two:
    bits = tiles.bits(floored)  # 448 is 1.75 * 2^8
    scale_bits = ((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).astype(jnp.int32)) << 23
    scale, inverse = tiles.number(scale_bits), tiles.number((254 << 23) - scale_bits)
  else:
    scale = floored * jnp.float32(1 / 448)
    inverse = _inverse(scale)
  nan = jnp.float32(jnp.nan)
  return jnp.where(finite, scale, nan), jnp.where(finite, inverse, nan)


def quantize(x_RH: jax.Array, power_of_two: bool, floor: float) -> tuple[jax.Array, jax.Array]:
  """float32 [64, 128] -> (float8_e4m3fn, scale [64])."""
  amax_R = jnp.max(tiles.magnitude_bits(x_RH), axis=1)
  scale_R, inverse_R = scale_of(amax_R, power_of_two, floor)
  # 448 at most but for rounding, which the cast takes back: nothing is left to clip.
  codes_RH = (x_RH * hopper.rows(inverse_R, x_RH.shape)).astype(jnp.float8_e4m3fn)
  return codes_RH, scale_R


def _inverse(x: jax.Array) -> jax.Array:
  """1 / x to nearest: the card's own division may be off by 2 in the last place.

  One Newton step with an exact remainder, from halves of 12 bits whose products are exact; the same bits
  whether or not a compiler fuses multiplications with subtractions.
  """
  bits = tiles.bits(x)
  exponent = bits & 0x7F800000
  mantissa = tiles.number((bits & 0x7FFFFF) | 0x3F800000)  # in [1, 2)
  guess = 1 / mantissa
  (m, n), (g, h) = _halves(mantissa), _halves(guess)
  remainder = ((1 - g * m) - g * n) - h * m - h * n
  return (guess + guess * remainder) * tiles.number((254 << 23) - exponent)


def _halves(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  upper = tiles.number(tiles.bits(x) & -0x1000)
  return upper, x - upper


def _shared(shape: tuple[int, ...], dtype: Any, minor: int | None = None) -> Any:
  return hopper.swizzled(shape, dtype, minor) if len(shape) > 1 else plgpu.SMEM(shape, dtype)
