"""Rows as they cross a link: one vector of words each, so that one permute carries all that belongs to it.

| form       | bytes of a row of D numbers, S = ceil(D / 128) tiles                 | D = 7168, bf16 |
|------------|----------------------------------------------------------------------|----------------|
| `plain`    | D numbers as they are                                                | 14,336         |
| `bf16`     | D numbers                                                            | 14,336         |
| `fp8`      | D codes E4M3, S exponents of power-of-two scales (UE8M0)             | 7,224          |
| `logfmt8`  | D codes, S low, S high (bfloat16)                                    | 7,392          |
| `logfmt10` | D upper bytes of codes, 32 S bytes of lower bits, S low, S high       | 9,184          |

Four codes of 10 bits share five bytes. The fifth lies in a plane of its own: byte j of a tile holds sign
and lowest bit of codes j, j + 32, j + 64, j + 96, so that nothing is read in strides. The lowest bit and
not the highest, because XLA may compute codes once for each plane and round midpoints differently: mixed,
these two are one step off, a highest bit would be 256.

A word is as wide as the narrowest part of the row: uint16 where all is BF16 and wider, uint8 where codes
are. TPUs take BF16 apart into bytes by long multiplications, which schedulers then put beside the
transfer in the place of a matmul.

A row of zeros decodes to zeros in every form: empty slots need no mask. NaN and infinity arrive as
NaN, in the coded forms together with the rest of their tile. Decoding and encoding an `fp8` row again
changes no value. Nothing here is differentiable: the exchange states its own gradients.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.kernels import logfmt, quantize, tiles

FORMATS = ('plain', 'bf16', 'fp8', 'logfmt8', 'logfmt10')
_BITS = {'logfmt8': 8, 'logfmt10': 10}
_REST = tiles.TILE // 4  # bytes a tile for two bits of each code
_SHIFTS = np.array([0, 2, 4, 6], np.int32).reshape(1, 1, 4, 1)


def row_bytes(form: str, dim: int, dtype: jnp.dtype) -> int:
  """Bytes of one row of `dim` numbers of `dtype`; only 'plain' asks for the dtype."""
  return sum(columns * jnp.dtype(part).itemsize for columns, part in _layout(form, dim, dtype))


def row_word(form: str, dim: int, dtype: jnp.dtype) -> jnp.dtype:
  """The words of one such row: unsigned, as wide as its narrowest part."""
  return _word(part for _, part in _layout(form, dim, dtype))


def encode(x_RD: jax.Array, form: str) -> jax.Array:
  """Rows of bfloat16 or float32 -> words [R, X] of row_bytes; raises ValueError for an unknown form."""
  _layout(form, x_RD.shape[1], x_RD.dtype)
  if form in ('plain', 'bf16'):
    return pack(x_RD if form == 'plain' else x_RD.astype(jnp.bfloat16))
  if form == 'fp8':
    # Gradients of 1e-9 keep their precision: the floor stands far below anything that occurs.
    codes_RD, scale_RS = quantize.quantize_tiles(x_RD, floor=quantize.SMALLEST_FLOOR)
    exponent_RS = tiles.bits(scale_RS) >> 23  # 255 for NaN
    return pack(codes_RD, exponent_RS.astype(jnp.uint8))
  codes_RD, low_RS, high_RS = logfmt.encode(x_RD, _BITS[form])
  if form == 'logfmt8':
    return pack(codes_RD.astype(jnp.uint8), low_RS, high_RS)
  return pack(*_split_ten(codes_RD), low_RS, high_RS)


def decode(row_RX: jax.Array, form: str, dim: int, dtype: jnp.dtype) -> jax.Array:
  """Inverse of `encode` -> [R, dim] in `dtype`; raises ValueError for rows of another length."""
  parts = unpack(row_RX, *_layout(form, dim, dtype))
  if form in ('plain', 'bf16'):
    return parts[0].astype(dtype)
  if form == 'fp8':
    codes_RD, exponent_RS = parts
    scale_RS = tiles.number(exponent_RS.astype(jnp.int32) << 23)
    return quantize.dequantize_tiles(codes_RD, scale_RS, dtype)
  *planes, low_RS, high_RS = parts
  codes_RD = planes[0].astype(jnp.uint16) if form == 'logfmt8' else _join_ten(*planes)
  return logfmt.decode(codes_RD, low_RS, high_RS, _BITS[form], dtype)


def pack(*parts: jax.Array) -> jax.Array:
  """Arrays [R, n_i] of any dtypes side by side -> words [R, X] as wide as the narrowest of them."""
  word = _word(part.dtype for part in parts)
  return jnp.concatenate([_as_words(part, word) for part in parts], axis=1)


def unpack(row_RX: jax.Array, *likes: tuple[int, jnp.dtype]) -> list[jax.Array]:
  """Inverse of `pack`: arrays [R, columns] for pairs (columns, dtype).

  Raises ValueError when they do not add up to the bytes of a row.
  """
  width = row_RX.dtype.itemsize
  sizes = [columns * jnp.dtype(dtype).itemsize for columns, dtype in likes]
  if sum(sizes) != row_RX.shape[1] * width:
    raise ValueError(f'rows of {row_RX.shape[1] * width} bytes: {likes} takes {sum(sizes)}')
  parts, start = [], 0
  for size, (_, dtype) in zip(sizes, likes, strict=True):
    parts.append(_from_words(row_RX[:, start // width : (start + size) // width], dtype))
    start += size
  return parts


def _layout(form: str, dim: int, dtype: jnp.dtype) -> list[tuple[int, jnp.dtype]]:
  """(columns, dtype) of what a row holds, in order."""
  scales = tiles.count(dim)
  layouts = {
    'plain': [(dim, dtype)],
    'bf16': [(dim, jnp.bfloat16)],
    'fp8': [(dim, jnp.float8_e4m3fn), (scales, jnp.uint8)],
    'logfmt8': [(dim, jnp.uint8), (scales, jnp.bfloat16), (scales, jnp.bfloat16)],
    'logfmt10': [
      (dim, jnp.uint8),
      (_REST * scales, jnp.uint8),
      (scales, jnp.bfloat16),
      (scales, jnp.bfloat16),
    ],
  }
  if form not in layouts:
    raise ValueError(f'wire form {form!r}: must be one of {", ".join(FORMATS)}')
  return layouts[form]


def _split_ten(codes_RD: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Codes of 10 bits -> (bits 1 to 8 [R, D], bits 0 and 9 of four codes [R, 32 S]), uint8."""
  rest_RSH = tiles.split((codes_RD & 1) | (codes_RD >> 9 << 1)).astype(jnp.int32)
  rest_RS4r = rest_RSH.reshape(*rest_RSH.shape[:2], 4, _REST) << _SHIFTS
  # A sum, though the bits are apart: XLA:CPU does not vectorise an "or" of slices.
  rest_RSr = jnp.sum(rest_RS4r, axis=2).astype(jnp.uint8)
  return (codes_RD >> 1).astype(jnp.uint8), rest_RSr.reshape(len(codes_RD), -1)


def _join_ten(upper_RD: jax.Array, rest_RX: jax.Array) -> jax.Array:
  """Inverse of `_split_ten` -> uint16 [R, D]."""
  rest_RS1r = rest_RX.reshape(len(rest_RX), -1, 1, _REST).astype(jnp.int32)
  rest_RSH = (rest_RS1r >> _SHIFTS).reshape(len(rest_RX), -1, tiles.TILE)
  rest_RD = tiles.join(rest_RSH, upper_RD.shape[1])
  codes_RD = (upper_RD.astype(jnp.int32) << 1) | (rest_RD & 1) | ((rest_RD & 2) << 8)
  return codes_RD.astype(jnp.uint16)


def as_float(words: jax.Array) -> jax.Array:
  """The floats that lie in words: gradients have the dtypes of floats. Not to be computed with."""
  floats = {1: jnp.float8_e4m3fn, 2: jnp.bfloat16, 4: jnp.float32}
  return lax.bitcast_convert_type(words, floats[words.dtype.itemsize])


def as_words(floats: jax.Array) -> jax.Array:
  """Inverse of `as_float`."""
  return lax.bitcast_convert_type(floats, jnp.dtype(f'uint{8 * floats.dtype.itemsize}'))


def _word(dtypes: Iterable[jnp.dtype]) -> jnp.dtype:
  return jnp.dtype(f'uint{8 * min(jnp.dtype(dtype).itemsize for dtype in dtypes)}')


def _as_words(x_RN: jax.Array, word: jnp.dtype) -> jax.Array:
  words = lax.bitcast_convert_type(x_RN, word)  # wider numbers get a last dimension of their words
  return words.reshape(x_RN.shape[0], -1)


def _from_words(row_RX: jax.Array, dtype: jnp.dtype) -> jax.Array:
  count = jnp.dtype(dtype).itemsize // row_RX.dtype.itemsize
  if count > 1:
    row_RX = row_RX.reshape(row_RX.shape[0], -1, count)
  return lax.bitcast_convert_type(row_RX, dtype)
