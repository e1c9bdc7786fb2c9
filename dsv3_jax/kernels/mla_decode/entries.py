"""One token's entry in the latent cache: the latent, then the rotated shared key, in one row.

  as computed   C + R numbers of the compute dtype: 1,152 bytes for V3 in BF16
  fp8           C codes E4M3, a scale FP32 for every 128 of them, R numbers BF16: 656 bytes for V3, the
                layout of FlashMLA's FP8 cache. The key is not quantised: positions live in it.

One row for both halves, because a query reads both and a gather costs by the row.
"""

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import tiles
from dsv3_jax.kernels.quantize import dequantize_tiles, quantize_tiles

PAGE = 64  # tokens


def entry_size(rank: int, rope: int, *, fp8: bool) -> int:
  """Elements of an entry: numbers, or bytes where `fp8`."""
  return rank + 4 * tiles.count(rank) + 2 * rope if fp8 else rank + rope


def pack(latent_XC: jax.Array, k_rope_XR: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """Entries [.., X] of a cache of `dtype`; uint8 means fp8."""
  if dtype != jnp.uint8:
    return jnp.concatenate([latent_XC, k_rope_XR], axis=-1).astype(dtype)
  codes_XC, scale_XS = quantize_tiles(latent_XC, power_of_two=False)
  parts = _bytes(codes_XC), _bytes(scale_XS), _bytes(k_rope_XR.astype(jnp.bfloat16))
  return jnp.concatenate(parts, axis=-1)


def unpack(entry_XY: jax.Array, rank: int, dtype: jnp.dtype) -> jax.Array:
  """Latent and key side by side in `dtype`, [.., C + R]."""
  if entry_XY.dtype != jnp.uint8:
    return entry_XY.astype(dtype)
  scales = rank + 4 * tiles.count(rank)
  codes_XC = lax.bitcast_convert_type(entry_XY[..., :rank], jnp.float8_e4m3fn)
  scale_XS = _numbers(entry_XY[..., rank:scales], jnp.float32)
  k_rope_XR = _numbers(entry_XY[..., scales:], jnp.bfloat16)
  latent_XC = dequantize_tiles(codes_XC, scale_XS, dtype)
  return jnp.concatenate([latent_XC, k_rope_XR.astype(dtype)], axis=-1)


def _bytes(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)


def _numbers(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  return lax.bitcast_convert_type(x.reshape(*x.shape[:-1], -1, jnp.dtype(dtype).itemsize), dtype)
