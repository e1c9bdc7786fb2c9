"""On TPU: one pass over memory; codes by the integers of `xla.py`, so that the bits are the same.

Scales that are powers of two are exact on any chip. amax / 448 is as good as the chip's division.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl

from dsv3_jax.kernels import tiles, tpu
from dsv3_jax.kernels.quantize import xla

_COLUMNS = 512  # of a block that is transposed
_TILES = 8  # of 128 rows, the same


def supports(function: str, x: jax.Array, *arrays: jax.Array, **options: object) -> str | None:
  rows = {'quantize_tiles': 32, 'quantize_blocks': tiles.TILE}.get(function)
  wide = rows and tpu.too_wide(x.shape[-1], x.dtype.itemsize + 1, rows)
  return wide or tpu.supports(function)


def quantize_tiles(
  x_XD: jax.Array, *, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  *lead, D = x_XD.shape
  S = tiles.count(D)
  kernel = functools.partial(_tiles_kernel, power_of_two=power_of_two, floor=floor)
  outputs = (D, jnp.float8_e4m3fn), (S, jnp.float32)
  codes_MD, scale_MS = tpu.by_rows(kernel, [x_XD.reshape(-1, D)], outputs, inside=quantize_tiles)
  return codes_MD.reshape(*lead, D), scale_MS.reshape(*lead, S)


def _tiles_kernel(x_ref, codes_ref, scale_ref, *, power_of_two, floor):
  for t, at in enumerate(tpu.lanes(x_ref.shape[1])):
    codes, scale = quantize_rows(x_ref[:, at].astype(jnp.float32), power_of_two, floor)
    codes_ref[:, at] = codes
    scale_ref[:, t : t + 1] = scale


def quantize_rows(x_MH: jax.Array, power_of_two: bool, floor: float) -> tuple[jax.Array, jax.Array]:
  """Codes and scale [M, 1] of one tile of rows, inside a kernel."""
  amax_M1 = jnp.max(tiles.magnitude_bits(x_MH), axis=1, keepdims=True)
  codes_MH, scale_M1 = xla.quantize(x_MH, amax_M1, power_of_two, floor)
  return xla.as_codes(codes_MH), scale_M1


def quantize_blocks(
  w_XNK: jax.Array, *, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  *lead, N, K = w_XNK.shape
  w_ENK = w_XNK.reshape(-1, N, K)
  E, n, s = len(w_ENK), tiles.count(N), tiles.count(K)
  spec = pl.BlockSpec((None, tiles.TILE, K), lambda e, n: (e, n, 0))
  codes_ENK, scale_En1s = tpu.call(
    functools.partial(_blocks_kernel, power_of_two=power_of_two, floor=floor, count=N),
    (E, n),
    [w_ENK],
    [spec],
    [((E, N, K), jnp.float8_e4m3fn), ((E, n, 1, s), jnp.float32)],
    [spec, pl.BlockSpec((None, None, 1, s), lambda e, n: (e, n, 0, 0))],
    flops=2 * E * N * K,
    order='pp',
    inside=quantize_blocks,
  )
  return codes_ENK.reshape(*lead, N, K), scale_En1s.reshape(*lead, n, s)


def _blocks_kernel(w_ref, codes_ref, scale_ref, *, power_of_two, floor, count):
  for t, at in enumerate(tpu.lanes(w_ref.shape[1])):
    w = _inside(w_ref[:, at].astype(jnp.float32), pl.program_id(1) * tiles.TILE, count)
    amax = jnp.max(jnp.max(tiles.magnitude_bits(w), axis=0, keepdims=True), axis=1, keepdims=True)
    codes, scale = xla.quantize(w, amax, power_of_two, floor)
    codes_ref[:, at] = xla.as_codes(codes)
    scale_ref[:, t : t + 1] = scale


def quantize_tiles_transposed(
  x_MK: jax.Array, *, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  return _transposed(quantize_tiles_transposed, _read, x_MK, None, power_of_two, floor)


def requantize_transposed(
  codes_MK: jax.Array, scale_MS: jax.Array, *, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  # Scales with rows last, as many tiles at once as a block has; dense in memory, unlike [M, 4].
  missing = -scale_MS.shape[1] % (_COLUMNS // tiles.TILE)
  scale_MS = jnp.pad(scale_MS, ((0, 0), (0, missing)))
  scale_ktM = rearrange(scale_MS, 'M (k t) -> k t M', t=_COLUMNS // tiles.TILE)
  arrays = codes_MK, scale_ktM
  return _transposed(requantize_transposed, _dequantize, *arrays, power_of_two, floor)


def _transposed(inside, read, x_MK, scale_ktM, power_of_two, floor):
  M, K = x_MK.shape
  S = tiles.count(M)
  rows = tiles.TILE * min(_TILES, S)
  operands, specs = [x_MK], [pl.BlockSpec((rows, _COLUMNS), lambda m, k: (m, k))]
  if scale_ktM is not None:
    operands.append(scale_ktM)
    specs.append(pl.BlockSpec((None, scale_ktM.shape[1], rows), lambda m, k: (k, 0, m)))
  codes_KM, scale_SK = tpu.call(
    functools.partial(
      _transposed_kernel, read=read, power_of_two=power_of_two, floor=floor, count=M
    ),
    (pl.cdiv(S * tiles.TILE, rows), pl.cdiv(K, _COLUMNS)),
    operands,
    specs,
    [((K, M), jnp.float8_e4m3fn), ((S, K), jnp.float32)],
    [
      pl.BlockSpec((_COLUMNS, rows), lambda m, k: (k, m)),
      pl.BlockSpec((rows // tiles.TILE, _COLUMNS), lambda m, k: (m, k)),
    ],
    flops=2 * M * K,
    order='pp',
    inside=inside,
  )
  return codes_KM, scale_SK.T


def _transposed_kernel(*refs, read, power_of_two, floor, count):
  *in_refs, codes_ref, scale_ref = refs
  rows = codes_ref.shape[1]
  for t, at in enumerate(tpu.lanes(rows)):
    x_HK = _inside(read(at, *in_refs), pl.program_id(0) * rows + at.start, count)
    amax_1K = jnp.max(tiles.magnitude_bits(x_HK), axis=0, keepdims=True)
    codes_HK, scale_1K = xla.quantize(x_HK, amax_1K, power_of_two, floor)
    codes_ref[:, at] = xla.as_codes(codes_HK.T)
    scale_ref[t : t + 1] = scale_1K


def _read(at, x_ref):
  return x_ref[at].astype(jnp.float32)


def _dequantize(at, codes_ref, scale_ref):
  scale_Ht = scale_ref[:, at].T
  parts = []
  for t, columns in enumerate(tpu.lanes(codes_ref.shape[1])):
    codes_HH = codes_ref[at, columns]
    # The cast of E5M2 is the upper half of a float16's; E4M3 is decoded in integers, as in `xla.py`.
    is_e4m3 = codes_HH.dtype == jnp.float8_e4m3fn
    x_HH = xla.values(codes_HH) if is_e4m3 else codes_HH.astype(jnp.float32)
    parts.append(x_HH * scale_Ht[:, t : t + 1])
  return jnp.concatenate(parts, axis=1)


def _inside(x: jax.Array, start: jax.Array, count: int) -> jax.Array:
  """Zeros for rows behind the last of `count`; only a ragged end needs it."""
  if count % tiles.TILE == 0:
    return x
  row = start + lax.broadcasted_iota(jnp.int32, x.shape, 0)
  return jnp.where(row < count, x, 0)
