"""The quantisers on Hopper, in one pass each. Ragged edges are padded, which copies; the model has few."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper, tiles
from dsv3_jax.kernels import hopper_tiles as ht

if hopper.AVAILABLE:
  import jax.experimental.pallas.mosaic_gpu as plgpu

_E4M3, _F32 = jnp.float8_e4m3fn, jnp.float32


def supports(function: str, x: jax.Array, *rest: object, **options: object) -> str | None:
  if function == 'requantize_transposed' and x.dtype != _E4M3:
    return f'codes are {x.dtype}, the kernel reads float8_e4m3fn'
  return ht.refusal(x)


def quantize_tiles(
  x_XD: jax.Array, *, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  *lead, dim = x_XD.shape
  x_MD = ht.flat(x_XD)

  def body(x: Any, codes: Any, scale: Any) -> None:
    codes[...], scale[...] = ht.quantize(ht.load(x), power_of_two, floor)

  M, S = x_MD.shape[0], x_MD.shape[1] // ht.TILE
  outs = [
    (jax.ShapeDtypeStruct(x_MD.shape, _E4M3), ht.MATRIX),
    (jax.ShapeDtypeStruct((S, M), _F32), ht.PER_TILE),
  ]
  codes_MD, scale_SM = ht.run(body, (M // ht.ROWS, S), [(x_MD, ht.MATRIX)], outs)
  return ht.unflat(codes_MD, lead, dim), ht.unflat(scale_SM.T, lead, tiles.count(dim))


def quantize_tiles_transposed(
  x_MK: jax.Array, *, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  def body(x: Any, codes: Any, scale: Any) -> None:
    codes[...], scale[...] = ht.quantize(ht.load(x.T), power_of_two, floor)

  return _transposed(body, x_MK, [])


def requantize_transposed(
  codes_MK: jax.Array, scale_MS: jax.Array, *, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  # Bytes cannot be turned on their way to registers, float32 can.
  def body(old: Any, old_scale: Any, codes: Any, scale: Any, x: Any) -> None:
    old_MK = ht.load(old)
    x[...] = old_MK * hopper.rows(ht.load(old_scale, hopper.ROW), old_MK.shape)
    plgpu.commit_smem()
    codes[...], scale[...] = ht.quantize(ht.load(x.T), power_of_two, floor)

  scale_SM = hopper.padded(scale_MS.T, ht.TILE)
  scratch = [(ht.TURNED.shape, _F32)]
  return _transposed(body, codes_MK, [(scale_SM, ht.TURNED_PER_TILE)], scratch)


def quantize_blocks(
  w_XNK: jax.Array, *, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  *lead, N, K = w_XNK.shape
  w_XNK = hopper.padded(w_XNK, ht.TILE, ht.TILE)
  w_RK = w_XNK.reshape(-1, w_XNK.shape[-1])
  # Read twice from shared memory, half by half: all of a block at once would fill the registers.
  halves = [slice(0, ht.ROWS), slice(ht.ROWS, ht.TILE)]

  def body(w: Any, codes: Any, scale: Any, shared: Any) -> None:
    amax_R = [jnp.max(tiles.magnitude_bits(ht.load(w.at[half])), axis=1) for half in halves]
    # Across rows by way of shared memory: written as a column, read as a row of 64 columns.
    shared[...] = jnp.maximum(*amax_R)
    plgpu.commit_smem()
    amax_C = ht.load(shared, hopper.COLUMN)
    amax_R = jnp.max(hopper.columns(amax_C, (ht.ROWS, ht.ROWS)), axis=1)
    scale[...], inverse_R = ht.scale_of(amax_R, power_of_two, floor)
    for half in halves:
      x = ht.load(w.at[half])
      codes[half] = (x * hopper.rows(inverse_R, x.shape)).astype(_E4M3)

  R, S = w_RK.shape[0] // ht.TILE, w_RK.shape[1] // ht.TILE
  block = ht.View((ht.TILE, ht.TILE), lambda r, c: (r * ht.TILE, c * ht.TILE))
  # The same scale for every row of a half: what a warpgroup holds, 0.5 % of what is written.
  row = ht.View((ht.ROWS,), lambda r, c: (r, c * ht.ROWS))
  outs = [
    (jax.ShapeDtypeStruct(w_RK.shape, _E4M3), block),
    (jax.ShapeDtypeStruct((R, S * ht.ROWS), _F32), row),
  ]
  codes_RK, scale_RS = ht.run(body, (R, S), [(w_RK, block)], outs, [((ht.ROWS,), jnp.int32)])
  scale_XRS = scale_RS[:, :: ht.ROWS].reshape(*lead, -1, S)
  return codes_RK.reshape(w_XNK.shape)[..., :N, :K], scale_XRS


def _transposed(
  body: Callable[..., None], x_MK: jax.Array, ins: list[Any], scratch: Sequence[Any] = ()
) -> tuple[jax.Array, jax.Array]:
  M, K = x_MK.shape
  x_MK = hopper.padded(x_MK, ht.TILE, ht.ROWS)
  columns, rows = x_MK.shape
  grid = rows // ht.ROWS, columns // ht.TILE
  outs = [
    (jax.ShapeDtypeStruct((rows, columns), _E4M3), ht.MATRIX),
    (jax.ShapeDtypeStruct((grid[1], rows), _F32), ht.PER_TILE),
  ]
  codes_KM, scale_SK = ht.run(body, grid, [(x_MK, ht.TURNED), *ins], outs, scratch)
  return lax.slice(codes_KM, (0, 0), (K, M)), lax.slice(scale_SK.T, (0, 0), (K, tiles.count(M)))
