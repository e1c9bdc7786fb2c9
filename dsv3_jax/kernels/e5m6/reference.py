"""By float16: its subnormals included, rounded to 6 bits of mantissa by hand."""

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import tiles
from dsv3_jax.kernels.e5m6.xla import join, scale_of, split


def encode(x_XD: jax.Array) -> tuple[jax.Array, jax.Array]:
  x_XSH = tiles.split(x_XD.astype(jnp.float32))
  scale_XS1 = scale_of(tiles.largest(tiles.magnitude_bits(x_XSH)))
  _, exponent = jnp.frexp(x_XSH / scale_XS1)
  quantum = jnp.exp2(jnp.maximum(exponent - 1, -14).astype(jnp.float32) - 6)
  rounded = jnp.round(x_XSH / scale_XS1 / quantum) * quantum  # exact in float16
  half_XSH = jnp.where(jnp.isnan(scale_XS1), jnp.nan, rounded).astype(jnp.float16)
  codes_XSH = lax.bitcast_convert_type(half_XSH, jnp.uint16) >> 4
  return join(codes_XSH, x_XD.shape[-1]), scale_XS1[..., 0]


def decode(codes_XB: jax.Array, scale_XS: jax.Array, dim: int, dtype: jnp.dtype) -> jax.Array:
  half_XSH = lax.bitcast_convert_type(split(codes_XB, dim) << 4, jnp.float16)
  x_XSH = half_XSH.astype(jnp.float32) * scale_XS[..., None]
  return tiles.join(x_XSH.astype(dtype), dim)
