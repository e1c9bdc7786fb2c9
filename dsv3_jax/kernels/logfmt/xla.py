"""LogFMT in plain XLA: a logarithm to encode, a power to decode, nothing else of note per element.

With r = 2^step the mean of two neighbours lies log2((1 + r) / 2) / step codes above the lower one, the
same for every pair. So the code nearest in linear space is one floor in the logarithm:

  k = floor(log2(|x| / low) / step + 2 - log2((1 + r) / 2) / step)

and only the first mean, low / 2 against zero, is compared on its own.

The logarithm is a polynomial, 4e-7 octaves off at most, a ten-thousandth of a usual step of 10 bits. XLA
calls its own one expensive and therefore writes all of it to memory as soon as a row has two readers.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import tiles

_BF16_MAX, _BF16_NAN = 0x7F7F, 0x7FC0  # bits
_OCTAVE = 1 << 7  # between the bits of a bfloat16 and of its double
# log2(1 + f) = f + f (1 - f) (c0 + c1 f + ..) for f in [0, 1], minimax in the absolute error.
_LOG2 = (0.442666441, -0.277887762, 0.195436195, -0.129703328, 0.0633253604, -0.0152089121)


def encode(x_XD: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  x_XSH = tiles.split(x_XD.astype(jnp.float32))
  magnitude_XSH = tiles.magnitude_bits(x_XSH)
  largest_XS1 = tiles.largest(magnitude_XSH)
  low_XS1, high_XS1 = bounds(largest_XS1, tiles.smallest(nonzero(magnitude_XSH)))
  codes_XSH = codes(x_XSH, low_XS1, high_XS1, bits).astype(jnp.uint16)
  as_bf16 = lambda x_XS1: x_XS1.astype(jnp.bfloat16)[..., 0]  # exact
  return tiles.join(codes_XSH, x_XD.shape[-1]), as_bf16(low_XS1), as_bf16(high_XS1)


def decode(
  codes_XD: jax.Array, low_XS: jax.Array, high_XS: jax.Array, bits: int, dtype: jnp.dtype
) -> jax.Array:
  low_XS1, high_XS1 = (x_XS.astype(jnp.float32)[..., None] for x_XS in (low_XS, high_XS))
  x_XSH = values(tiles.split(codes_XD).astype(jnp.int32), low_XS1, high_XS1, bits)
  return tiles.join(x_XSH.astype(dtype), codes_XD.shape[-1])


def codes(x: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> jax.Array:
  """int32, of float32 tiles along the last axis; `low` and `high` have size 1 there."""
  return code(x, *of_tile(low, high, bits), bits)


def of_tile(low: jax.Array, high: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(1 / step, offset, bits of low): what all numbers of a tile share."""
  step = _step(low, high, bits)
  step = jnp.where(step > 0, step, 1)  # any will do for a single magnitude: its code is 1
  return 1 / step, 2 - _mean(step * math.log(2)), tiles.bits(low)


def code(
  x: jax.Array, per_step: jax.Array, offset: jax.Array, low: jax.Array, bits: int
) -> jax.Array:
  """int32, of float32 numbers, by the results of `of_tile`."""
  magnitude = tiles.magnitude_bits(x)
  place = _octaves(magnitude, low) * per_step + offset
  code = jnp.clip(place.astype(jnp.int32), 1, _last(bits))
  half_low = jnp.maximum(low - tiles.SMALLEST, tiles.SMALLEST)
  code = jnp.where(magnitude < half_low, 0, code)
  return code | (lax.shift_right_logical(tiles.bits(x), 31) << (bits - 1))


def values(codes: jax.Array, low: jax.Array, high: jax.Array, bits: int) -> jax.Array:
  """float32 of int32 codes, in tiles along the last axis."""
  return value(codes, low, log_ratio(low, high, bits), bits)


def log_ratio(low: jax.Array, high: jax.Array, bits: int) -> jax.Array:
  """Natural logarithm of the ratio of two neighbouring values."""
  return _step(low, high, bits) * math.log(2)


def value(codes: jax.Array, low: jax.Array, log_r: jax.Array, bits: int) -> jax.Array:
  code = codes & _last(bits)
  power = jnp.exp((code - 1).astype(jnp.float32) * log_r)
  # A low of NaN times the zero of code 0 is NaN as well.
  x = low * jnp.where(code == 0, 0, power)
  return tiles.number(tiles.bits(x) | ((codes >> (bits - 1)) << 31))


def nonzero(magnitude: jax.Array) -> jax.Array:
  """Magnitudes, zeros (and what is flushed to zero) out of the way of a minimum."""
  return jnp.where(magnitude < tiles.SMALLEST, tiles.INFINITY, magnitude)


def bounds(largest: jax.Array, smallest: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(low, high), float32 with the values of bfloat16, from the bits of the extreme magnitudes."""
  upper = jnp.minimum((largest + 0xFFFF) >> 16, _BF16_MAX)
  lower = jnp.maximum(smallest >> 16, upper - 32 * _OCTAVE)

  def settle(bits: jax.Array) -> jax.Array:
    bits = jnp.where(largest < tiles.SMALLEST, 0, bits)
    return tiles.number(jnp.where(largest < tiles.INFINITY, bits, _BF16_NAN) << 16)

  return settle(lower), settle(upper)


def _mean(log_r: jax.Array) -> jax.Array:
  """log((1 + r) / 2) / log(r) = 1/2 + log(cosh(z)) / 2z with z = log(r) / 2; a series where r is near 1."""
  z = log_r / 2
  near = z * (0.25 - z * z * (1 / 24 - z * z * (1 / 90)))
  far = (z + jnp.log(1 + jnp.exp(-2 * z)) - math.log(2)) / (2 * z)
  return 0.5 + jnp.where(z < 0.25, near, far)


def _last(bits: int) -> int:
  """The code of `high`."""
  return 2 ** (bits - 1) - 1


def _step(low: jax.Array, high: jax.Array, bits: int) -> jax.Array:
  """log2 of the ratio of two neighbouring values; 0 for a single magnitude, zeros and NaN."""
  return _octaves(tiles.bits(high), tiles.bits(low)) / (_last(bits) - 1)


def _octaves(bits: jax.Array, from_bits: jax.Array) -> jax.Array:
  """log2 of the ratio of two positive numbers by their bits; whole octaves are subtracted as integers."""
  whole = (bits >> 23) - (from_bits >> 23)
  return whole.astype(jnp.float32) + (_log2_mantissa(bits) - _log2_mantissa(from_bits))


def _log2_mantissa(bits: jax.Array) -> jax.Array:
  f = tiles.number((bits & 0x7FFFFF) | 0x3F800000) - 1
  curve = jnp.full_like(f, _LOG2[-1])
  for c in _LOG2[-2::-1]:
    curve = curve * f + c
  return f + f * (1 - f) * curve
