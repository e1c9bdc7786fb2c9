"""E5M6 on Hopper: codes by the integers of `xla.py`, both parts of a row written at once."""

from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import hopper, tiles
from dsv3_jax.kernels import hopper_tiles as ht

_HALF, _NAN, _F32 = tiles.TILE // 2, 0x7E0, jnp.float32
_EIGHT = 0x41000000  # bits of 8.0


def supports(function: str, x: jax.Array, *rest: object, **options: object) -> str | None:
  return ht.refusal(x)


def encode(x_XD: jax.Array) -> tuple[jax.Array, jax.Array]:
  *lead, dim = x_XD.shape
  x_MD = ht.flat(x_XD)

  def body(x: Any, upper: Any, lower: Any, scale: Any) -> None:
    halves = [ht.load(x.at[:, ht.HALVES[h]]) for h in range(2)]
    amax_R = jnp.maximum(*(jnp.max(tiles.magnitude_bits(x_RH), axis=1) for x_RH in halves))
    scale_R, inverse_R = _scale(amax_R)
    codes = []
    for h, x_RH in enumerate(halves):
      code = _code(x_RH * hopper.rows(inverse_R, x_RH.shape))
      code = jnp.where(hopper.rows(amax_R, code.shape) < tiles.INFINITY, code, _NAN)
      upper[:, ht.HALVES[h]] = (code >> 4).astype(jnp.uint8)
      codes.append(code & 15)
    lower[...] = (codes[0] + (codes[1] << 4)).astype(jnp.uint8)
    scale[...] = scale_R

  M, S = x_MD.shape[0], x_MD.shape[1] // ht.TILE
  outs = [
    (jax.ShapeDtypeStruct(x_MD.shape, jnp.uint8), ht.SPLIT),
    (jax.ShapeDtypeStruct((M, S * _HALF), jnp.uint8), _LOWER),
    (jax.ShapeDtypeStruct((S, M), _F32), ht.PER_TILE),
  ]
  upper_MD, lower, scale_SM = ht.run(body, (M // ht.ROWS, S), [(x_MD, ht.MATRIX)], outs)
  parts = [ht.unflat(upper_MD, lead, dim), ht.unflat(lower, lead, S * _HALF)]
  return jnp.concatenate(parts, axis=-1), ht.unflat(scale_SM.T, lead, S)


def decode(codes_XB: jax.Array, scale_XS: jax.Array, dim: int, dtype: jnp.dtype) -> jax.Array:
  *lead, _ = codes_XB.shape
  upper_MD = ht.flat(codes_XB[..., :dim])
  M, S = upper_MD.shape[0], upper_MD.shape[1] // ht.TILE
  lower = hopper.padded(codes_XB[..., dim:].reshape(-1, S * _HALF), ht.ROWS, 1)
  scale_SM = hopper.padded(scale_XS.reshape(-1, S).T, ht.ROWS)

  def body(upper: Any, lower: Any, scale: Any, out: Any) -> None:
    scale_R = ht.load(scale, hopper.ROW)
    low = ht.load(lower)
    for h in range(2):
      code = (ht.load(upper.at[:, ht.HALVES[h]]) << 4) | ((low >> (4 * h)) & 15)
      out[:, ht.HALVES[h]] = (_value(code) * hopper.rows(scale_R, code.shape)).astype(dtype)

  ins = [(upper_MD, ht.SPLIT), (lower, _LOWER), (scale_SM, ht.PER_TILE)]
  outs = [(jax.ShapeDtypeStruct(upper_MD.shape, dtype), ht.MATRIX)]
  (out_MD,) = ht.run(body, (M // ht.ROWS, S), ins, outs)
  return ht.unflat(out_MD, lead, dim)


_LOWER = ht.View((ht.ROWS, _HALF), lambda r, c: (r * ht.ROWS, c * _HALF))


def _scale(amax: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(scale, 1 / scale): the smallest power of two at or above amax / 65024, from 2^-100 on."""
  floored = jnp.maximum(amax, (127 - 85) << 23)
  above = ((floored & 0x7FFFFF) > 0x7E0000).astype(jnp.int32)  # 65024 is 1.984375 * 2^15
  bits = ((floored >> 23) - 15 + above) << 23
  nan = jnp.float32(jnp.nan)
  return jnp.where(amax < tiles.INFINITY, tiles.number(bits), nan), tiles.number((254 << 23) - bits)


def _code(x: jax.Array) -> jax.Array:
  """float32 -> int32 codes of 12 bits, to nearest even; subnormals as steps of 2^-20."""
  bits, magnitude = tiles.bits(x), tiles.magnitude_bits(x)
  tiny = tiles.bits(jnp.minimum(tiles.number(magnitude), jnp.float32(2.0**-13)) + 8) - _EIGHT
  normal = (magnitude + ((magnitude >> 17) & 1) + ((1 << 16) - 1 - ((127 - 15) << 23))) >> 17
  return jnp.maximum(normal, tiny) | ((bits >> 20) & 0x800)


def _value(code: jax.Array) -> jax.Array:
  magnitude = code & 0x7FF
  normal = tiles.number((magnitude << 17) + ((127 - 15) << 23))
  value = jnp.where(magnitude < 64, magnitude.astype(_F32) * 2.0**-20, normal)
  value = jnp.where(magnitude > 0x7C0, jnp.float32(jnp.nan), value)
  return tiles.number(tiles.bits(value) | ((code & 0x800) << 20))
