"""On TPU: `xla.py` tile by tile in VMEM; the lower 4 bits of two tiles fill 128 lanes and are stored whole."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dsv3_jax.kernels import tiles, tpu
from dsv3_jax.kernels.e5m6 import xla

_HALF = tiles.TILE // 2


def supports(function: str, x: jax.Array, *arguments: object, **options: object) -> str | None:
  dim = x.shape[-1] if function == 'encode' else arguments[1]
  if dim % (2 * tiles.TILE):
    return f'rows of {dim} numbers do not split into pairs of tiles: must be a multiple of 256'
  return tpu.too_wide(dim, 6, 32) or tpu.supports(function)


def encode(x_XD: jax.Array) -> tuple[jax.Array, jax.Array]:
  *lead, D = x_XD.shape
  outputs = (D * 3 // 2, jnp.uint8), (D // tiles.TILE, jnp.float32)
  codes_MB, scale_MS = tpu.by_rows(_encode_kernel, [x_XD.reshape(-1, D)], outputs, inside=encode)
  return codes_MB.reshape(*lead, -1), scale_MS.reshape(*lead, -1)


def decode(codes_XB: jax.Array, scale_XS: jax.Array, dim: int, dtype: jnp.dtype) -> jax.Array:
  *lead, _ = codes_XB.shape
  operands = [x.reshape(-1, x.shape[-1]) for x in (codes_XB, scale_XS)]
  (x_MD,) = tpu.by_rows(_decode_kernel, operands, [(dim, dtype)], inside=decode)
  return x_MD.reshape(*lead, dim)


def _encode_kernel(x_ref, codes_ref, scale_ref):
  D = x_ref.shape[1]
  for pair in range(D // (2 * tiles.TILE)):
    lower = []
    for t in (2 * pair, 2 * pair + 1):
      at = pl.ds(t * tiles.TILE, tiles.TILE)
      x_MH = x_ref[:, at].astype(jnp.float32)
      amax_M1 = jnp.max(tiles.magnitude_bits(x_MH), axis=1, keepdims=True)
      code_MH, scale_ref[:, t : t + 1] = xla.codes(x_MH, amax_M1)
      codes_ref[:, at] = (code_MH >> 4).astype(jnp.uint8)
      nibble_MH = code_MH & 15
      # Lanes j and j + 64 both get the byte of codes j and j + 64, of which one half is kept.
      other_MH = pltpu.roll(nibble_MH, _HALF, 1)
      first = t == 2 * pair
      lower.append(nibble_MH + (other_MH << 4) if first else other_MH + (nibble_MH << 4))
    lane = lax.broadcasted_iota(jnp.int32, lower[0].shape, 1)
    both = jnp.where(lane < _HALF, lower[0], lower[1])
    codes_ref[:, pl.ds(D + pair * tiles.TILE, tiles.TILE)] = both.astype(jnp.uint8)


def _decode_kernel(codes_ref, scale_ref, x_ref):
  D = x_ref.shape[1]
  for pair in range(D // (2 * tiles.TILE)):
    both = codes_ref[:, pl.ds(D + pair * tiles.TILE, tiles.TILE)].astype(jnp.int32)
    turned = pltpu.roll(both, _HALF, 1)
    lane = lax.broadcasted_iota(jnp.int32, both.shape, 1)
    for t in (2 * pair, 2 * pair + 1):
      at = pl.ds(t * tiles.TILE, tiles.TILE)
      low, high = (both, turned) if t == 2 * pair else (turned, both)
      nibble_MH = jnp.where(lane < _HALF, low & 15, high >> 4)
      code_MH = (codes_ref[:, at].astype(jnp.int32) << 4) | nibble_MH
      value_MH = xla.values(code_MH) * scale_ref[:, t : t + 1]
      x_ref[:, at] = value_MH.astype(x_ref.dtype)
