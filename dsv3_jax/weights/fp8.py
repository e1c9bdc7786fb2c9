"""Weights in FP8 with one scale per block of 128x128: the format of the released checkpoints.

A matrix `w_XY` of E4M3 codes has scales `scale_xy`, x = ceil(X/128), y = ceil(Y/128), stored beside it
as `<name>_scale_inv`: block (i, j) holds the values w * scale[i, j], multiplied in float32 and then
rounded to the wanted dtype, to nearest even (weight_dequant in inference/kernel.py of DeepSeek-V3).
Blocks at the lower and right edges are cropped. Scales are float32, or powers of two (UE8M0) as in
V3.1, there stored as float32 or as E8M0.

Both directions work in strips of one block of rows, a few columns at a time: beside input and result
they hold some 2 MB, whatever the size of the matrix. The casts inside the FP8 matmul of a training
step are none of this module's business.
"""

import functools
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from dsv3_jax.weights.headers import FormatError

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
MAX = 448.0  # largest value of E4M3
AMAX_FLOOR = 1e-4  # the reference's: a block of zeros gets a scale too
_STRIP = 2**17  # elements at once: about what the second-level cache holds as float32 and indices


def scale_shape(shape: tuple[int, ...], block: int = 128) -> tuple[int, ...]:
  """Shape of the scales of a matrix: (576, 7168) has (5, 56)."""
  return tuple(-(-n // block) for n in shape)


def dequantise(
  w_XY: np.ndarray,
  scale_xy: np.ndarray,
  block: int = 128,
  dtype: np.typing.DTypeLike = np.float32,
) -> np.ndarray:
  """The values of an FP8 matrix, [X, Y] in `dtype`.

  Args:
    w_XY: E4M3 codes.
    scale_xy: the factor of each block, float32 or E8M0.

  Raises:
    FormatError: another dtype or shape, a scale that is NaN, infinite, zero or negative, a code that
      is NaN, or scales so large that values would overflow `dtype`.
  """
  dtype = np.dtype(dtype)
  scale_xy = _checked_scales(w_XY, scale_xy, block, dtype)
  out_XY = np.empty(w_XY.shape, dtype)
  codes_XY = w_XY.view(np.uint8)
  room = _room(w_XY.shape, block, np.float32)
  for rows, cols in _strips(w_XY.shape, block):
    codes = np.ascontiguousarray(codes_XY[rows, cols])
    if ((codes & 0x7F) == 0x7F).any():
      raise FormatError(f'FP8 weight {list(w_XY.shape)}: holds NaN in rows {_span(rows)}')
    values = _part(room, codes.shape)
    # A look-up: an order faster than ml_dtypes' own cast. Every code is in range: clip checks nothing.
    np.take(_values_of_codes(), codes, out=values, mode='clip')
    values *= _spread(scale_xy, rows, cols, block)
    out_XY[rows, cols] = values
  return out_XY


def quantise(
  w_XY: np.ndarray, block: int = 128, power_of_two: bool = False
) -> tuple[np.ndarray, np.ndarray]:
  """E4M3 codes [X, Y] of a matrix and the float32 scales [x, y] that give it back.

  scale = amax / 448 with amax floored at 1e-4, code = round(w / scale); with `power_of_two` the scale
  is 2^ceil(log2(amax / 448)), the UE8M0 rule. What `dequantise` returns of it in float32 is quantised
  to the same values again; a float32 scale becomes the same too, a power of two may halve once.

  Raises:
    FormatError: not a matrix of floating point, or not finite.
  """
  if w_XY.ndim != 2 or not (w_XY.dtype.kind == 'f' or w_XY.dtype == ml_dtypes.bfloat16):
    raise FormatError(
      f'{w_XY.dtype} {list(w_XY.shape)}: only a matrix of floating point has blocks'
    )
  out_XY = np.empty(w_XY.shape, E4M3)
  codes_XY = out_XY.view(np.uint8)
  scale_xy = np.ones(scale_shape(w_XY.shape, block), np.float32)
  room = [_room(w_XY.shape, block, t) for t in (np.float32, np.float32, np.float32, np.int32)]
  for rows, cols in _strips(w_XY.shape, block):
    values, magnitude, *rest = (_part(r, w_XY[rows, cols].shape) for r in room)
    values[...] = w_XY[rows, cols]
    np.abs(values, out=magnitude)
    amax_y = np.maximum.reduceat(magnitude.max(axis=0), np.arange(0, magnitude.shape[1], block))
    if not np.isfinite(amax_y).all():
      raise FormatError(f'weight {list(w_XY.shape)}: rows {_span(rows)} are not finite')
    i, j = rows.start // block, cols.start // block
    scale_xy[i, j : j + amax_y.size] = _scale_of(amax_y, power_of_two)
    magnitude /= _spread(scale_xy, rows, cols, block)
    codes_XY[rows, cols] = _round(magnitude, *rest)
    np.right_shift(values.view(np.int32), 24, out=rest[1])
    rest[1] &= 0x80
    codes_XY[rows, cols] |= rest[1].astype(np.uint8)
  return out_XY, scale_xy


def _scale_of(amax_y: np.ndarray, power_of_two: bool) -> np.ndarray:
  amax_y = np.maximum(amax_y, np.float32(AMAX_FLOOR))
  scale_y = amax_y / np.float32(MAX)
  if power_of_two:
    mantissa, exponent = np.frexp(scale_y)  # mantissa in [0.5, 1): 0.5 is a power of two already
    return np.ldexp(np.float32(1), exponent - (mantissa == 0.5))
  # A fixed point: fl(fl(448 * s) / 448) is s for every s that is fl(amax / 448), all 2^23 of a binade.
  return scale_y


def _checked_scales(
  w_XY: np.ndarray, scale_xy: np.ndarray, block: int, dtype: np.dtype
) -> np.ndarray:
  if w_XY.dtype != E4M3 or w_XY.ndim != 2:
    raise FormatError(f'FP8 weight: {w_XY.dtype} {list(w_XY.shape)}; must be a matrix of {E4M3}')
  where = f'scales of an FP8 weight {list(w_XY.shape)}'
  if scale_xy.dtype not in (np.float32, E8M0):
    raise FormatError(f'{where}: {scale_xy.dtype}; must be float32 or {E8M0}')
  if scale_xy.shape != scale_shape(w_XY.shape, block):
    raise FormatError(
      f'{where}: shape {list(scale_xy.shape)}; must be {list(scale_shape(w_XY.shape, block))}, '
      f'one for each block of {block}x{block}'
    )
  scale_xy = scale_xy.astype(np.float32)
  bad = ~(np.isfinite(scale_xy) & (scale_xy > 0))
  if bad.any():
    at = tuple(np.argwhere(bad)[0].tolist())
    raise FormatError(f'{where}: {scale_xy[at]} in block {list(at)}; must be finite and above 0')
  largest = float(scale_xy.max(initial=0))
  if largest * MAX > float(ml_dtypes.finfo(dtype).max):
    raise FormatError(f'{where}: {largest:.3g} gives values that {dtype} cannot hold')
  return scale_xy


def _strips(shape: tuple[int, ...], block: int) -> Iterator[tuple[slice, slice]]:
  """Rows and columns of parts of one block of rows, of whole blocks of columns, about _STRIP large."""
  for row in range(0, shape[0], block):
    for col in range(0, shape[1], _width(block)):
      yield slice(row, min(row + block, shape[0])), slice(col, min(col + _width(block), shape[1]))


def _width(block: int) -> int:
  """Columns of a strip."""
  return max(1, _STRIP // block**2) * block


def _spread(scale_xy: np.ndarray, rows: slice, cols: slice, block: int) -> np.ndarray:
  """[1, columns of the strip]: the scale of each column, within the one block of rows."""
  of_blocks = scale_xy[rows.start // block, cols.start // block : -(-cols.stop // block)]
  return np.repeat(of_blocks, block)[None, : cols.stop - cols.start]


def _round(magnitude: np.ndarray, tiny: np.ndarray, odd: np.ndarray) -> np.ndarray:
  """E4M3 codes, as int32, of float32 from 0 to 448, to nearest even; ten times as fast as ml_dtypes.

  Two candidates, both rounded by the carry of an addition: `normal` is the upper bits of the float with
  its bias changed from 127 to 7, `tiny` counts steps of 2^-9 (the last bit of 2^14 and a little), up to
  16. From 2^-6 on `normal` is right and `tiny` no larger; below it is the other way round. So the
  larger is right, and nothing is chosen by a mask, which would cost more than all of this.

  Args:
    magnitude, tiny, odd: the values, overwritten; float32 and int32 of the same shape for use here.
  """
  np.minimum(magnitude, np.float32(2**-5), out=tiny)
  tiny += np.float32(2**14)
  steps, normal = tiny.view(np.int32), magnitude.view(np.int32)
  steps -= np.float32(2**14).view(np.int32)
  np.right_shift(normal, 20, out=odd)
  odd &= 1
  normal += odd
  normal += (1 << 19) - 1 - ((127 - 7) << 23)
  normal >>= 20
  return np.maximum(normal, steps, out=normal)


def _room(shape: tuple[int, ...], block: int, dtype: np.typing.DTypeLike) -> np.ndarray:
  """For the values of any strip. Made once: fresh memory costs more than the arithmetic in it."""
  return np.empty((min(block, shape[0]), min(_width(block), shape[1])), dtype)


def _part(room: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  return room[: shape[0], : shape[1]]


@functools.cache
def _values_of_codes() -> np.ndarray:
  return np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float32)


def _span(rows: slice) -> str:
  return f'{rows.start} to {rows.stop - 1}'
