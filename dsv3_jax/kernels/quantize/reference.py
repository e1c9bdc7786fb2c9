"""The quantisers as they are defined, by the backend's own casts."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import tiles
from dsv3_jax.kernels.quantize.xla import dequantize_tiles


def quantize_tiles(
  x_XD: jax.Array, *, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  codes_XSH, scale_XS1 = _quantize(tiles.split(x_XD), (-1,), power_of_two, floor)
  return tiles.join(codes_XSH, x_XD.shape[-1]), scale_XS1[..., 0]


def quantize_tiles_transposed(
  x_MK: jax.Array, *, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  return quantize_tiles(x_MK.T, power_of_two=power_of_two, floor=floor)


def quantize_blocks(
  w_XNK: jax.Array, *, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  blocks = tiles.split_blocks(w_XNK)
  codes, scale = _quantize(blocks, (-3, -1), power_of_two, floor)
  return tiles.join_blocks(codes, w_XNK.shape[-2:]), scale[..., 0, :, 0]


def requantize_transposed(
  codes_MK: jax.Array, scale_MS: jax.Array, *, power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  x_MK = dequantize_tiles(codes_MK, scale_MS, jnp.float32)
  return quantize_tiles_transposed(x_MK, power_of_two=power_of_two, floor=floor)


def _quantize(
  x: jax.Array, axes: tuple[int, ...], power_of_two: bool, floor: float
) -> tuple[jax.Array, jax.Array]:
  """Codes, and scales with the tile's axes of size 1."""
  x = x.astype(jnp.float32)
  # Asked on its own: a maximum over floats may lose NaN on XLA:CPU (seen on 0.10.2).
  finite = jnp.all(jnp.isfinite(x), axis=axes, keepdims=True)
  amax = jnp.maximum(jnp.max(jnp.abs(x), axis=axes, keepdims=True), floor)
  if power_of_two:
    mantissa, exponent = jnp.frexp(amax)  # mantissa in [1/2, 1), and 448 = 7/8 * 2^9
    scale = jnp.ldexp(jnp.ones_like(mantissa), exponent - jnp.where(mantissa > 0.875, 8, 9))
  else:
    scale = amax / 448
  scale = jnp.where(finite, scale, jnp.nan)
  return jnp.clip(x / scale, -448, 448).astype(jnp.float8_e4m3fn), scale
