"""E5M6 in integers, as the other quantisers."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import tiles

_HALF = tiles.TILE // 2
_NAN = 0x7E0


def encode(x_XD: jax.Array) -> tuple[jax.Array, jax.Array]:
  x_XSH = tiles.split(x_XD.astype(jnp.float32))
  code, scale_XS1 = codes(x_XSH, tiles.largest(tiles.magnitude_bits(x_XSH)))
  return join(code.astype(jnp.uint16), x_XD.shape[-1]), scale_XS1[..., 0]


def decode(codes_XB: jax.Array, scale_XS: jax.Array, dim: int, dtype: jnp.dtype) -> jax.Array:
  value = values(split(codes_XB, dim).astype(jnp.int32))
  return tiles.join((value * scale_XS[..., None]).astype(dtype), dim)


def codes(x: jax.Array, amax: jax.Array) -> tuple[jax.Array, jax.Array]:
  """int32 codes and scales; `amax`: bits of each tile's largest magnitude, of size 1 along it."""
  scale = scale_of(amax)
  # A division by a power of two, as the product that is exact on any chip. NaN is set below.
  x = x * tiles.number((254 << 23) - tiles.bits(scale))
  bits, magnitude = tiles.bits(x), tiles.magnitude_bits(x)
  # As `quantize/xla.py` does for E4M3: the larger of two candidates, subnormals as steps of 2^-20.
  tiny = tiles.bits(jnp.minimum(jnp.abs(x), 2.0**-13) + 2.0**3) - tiles.bits(jnp.float32(8))
  normal = (magnitude + ((magnitude >> 17) & 1) + ((1 << 16) - 1 - ((127 - 15) << 23))) >> 17
  code = jnp.maximum(normal, tiny) | ((bits >> 20) & 0x800)
  return jnp.where(amax < tiles.INFINITY, code, _NAN), scale


def values(code: jax.Array) -> jax.Array:
  """float32 of int32 codes. Subnormals are counted: as shifted bits they would be flushed."""
  magnitude = code & 0x7FF
  normal = tiles.number((magnitude << 17) + ((127 - 15) << 23))
  value = jnp.where(magnitude < 64, magnitude.astype(jnp.float32) * 2.0**-20, normal)
  value = jnp.where(magnitude > 0x7C0, jnp.nan, value)
  return tiles.number(tiles.bits(value) | ((code & 0x800) << 20))


def scale_of(amax: jax.Array) -> jax.Array:
  """Smallest power of two at or above amax / 65024 from 2^-100 on; NaN where a tile is not finite."""
  floored = jnp.maximum(amax, tiles.bits(jnp.float32(2.0**-85)))
  above = ((floored & 0x7FFFFF) > 0x7E0000).astype(jnp.int32)  # 65024 is 1.984375 * 2^15
  scale = tiles.number(((floored >> 23) - 15 + above) << 23)
  return jnp.where(amax < tiles.INFINITY, scale, jnp.nan)


def join(code_XSH: jax.Array, dim: int) -> jax.Array:
  """uint16 codes of 12 bits [.., S, 128] -> bytes [.., dim + 64 S]."""
  upper_XD = tiles.join((code_XSH >> 4).astype(jnp.uint8), dim)
  lower_XSH = (code_XSH & 15).astype(jnp.uint8)
  lower = lower_XSH[..., :_HALF] + (lower_XSH[..., _HALF:] << 4)
  return jnp.concatenate([upper_XD, lower.reshape(*upper_XD.shape[:-1], -1)], axis=-1)


def split(codes_XB: jax.Array, dim: int) -> jax.Array:
  """Inverse of `join`."""
  upper_XSH = tiles.split(codes_XB[..., :dim]).astype(jnp.uint16) << 4
  lower = codes_XB[..., dim:].reshape(*upper_XSH.shape[:-1], _HALF)
  lower_XSH = jnp.concatenate([lower & 15, lower >> 4], axis=-1)
  return upper_XSH | lower_XSH.astype(jnp.uint16)
