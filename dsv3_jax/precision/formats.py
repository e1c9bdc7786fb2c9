"""What the three GEMMs of an FP8 linear read (3.3 of arXiv 2412.19437), as one frozen value.

The report's recipe is the default: E4M3 for every tensor; activations and their gradients scaled by 1x128
(along channels for the GEMM that contracts those, along tokens for wgrad), weights by 128x128; sums in
FP32. The other values are what it warns about, for comparison.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import tiles
from dsv3_jax.kernels.fp8_matmul import fp8_matmul
from dsv3_jax.kernels.fp8_wgrad import fp8_wgrad
from dsv3_jax.kernels.grouped_matmul import grouped_matmul
from dsv3_jax.kernels.grouped_matmul import xla as grouped_xla
from dsv3_jax.kernels.grouped_wgrad import grouped_wgrad
from dsv3_jax.kernels.grouped_wgrad import xla as grouped_wgrad_xla
from dsv3_jax.kernels.quantize import (
  SMALLEST_FLOOR,
  dequantize_blocks,
  dequantize_tiles,
  quantize_blocks,
  quantize_tiles,
  quantize_tiles_transposed,
)
from dsv3_jax.precision import fp22

# Codes and their scales; where a weight has one dimension more, it is that of experts.
Codes = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Fp8:
  """Formats of an FP8 linear; every method is one of its operands or GEMMs.

  `sizes_E` None is a dense layer; else rows come in groups, one for each expert (`grouped_matmul`).
  """

  # 'e4m3' by 1x128 | 'e4m3_blocks' by 128x128, which diverges at scale (B.2) | 'e5m2' by 1x128
  gradient: str = 'e4m3'
  # 'fp32' | 'fp22': what Hopper adds up in without promotion (3.3.2)
  sums: str = 'fp32'

  def gradient_codes(self, dy_TN: jax.Array) -> tuple[Codes, Codes]:
    """Codes of an activation's gradient for dgrad [T, N] and, transposed, for wgrad [N, T]."""
    floor = SMALLEST_FLOOR  # gradients of 1e-9 keep their precision
    if self.gradient == 'e4m3_blocks':
      codes_TN, scale_tn = quantize_blocks(dy_TN, floor=floor)
      return (codes_TN, _rows(scale_tn, len(dy_TN))), (
        codes_TN.T,
        _rows(scale_tn.T, dy_TN.shape[1]),
      )
    if self.gradient == 'e5m2':
      return _e5m2(dy_TN), _e5m2(dy_TN.T)
    return (
      quantize_tiles(dy_TN, power_of_two=False, floor=floor),
      quantize_tiles_transposed(dy_TN, power_of_two=False, floor=floor),
    )

  def matmul(
    self, a: Codes, b: Codes, sizes_E: jax.Array | None, out_dtype: jnp.dtype
  ) -> jax.Array:
    """Activations [T, K] by weights [N, K], or [E, N, K] -> [T, N]."""
    if self.sums == 'fp22' and sizes_E is None:
      a_TK, b_NK = dequantize_tiles(*a, jnp.float32), dequantize_blocks(*b, jnp.float32)
      return fp22.dot(a_TK, b_NK).astype(out_dtype)
    if self.sums == 'fp22':
      return grouped_xla.grouped_matmul(*a, *b, sizes_E, out_dtype=out_dtype, dot=fp22.dot)
    if sizes_E is None:
      return fp8_matmul(*a, *b, out_dtype=out_dtype)
    return grouped_matmul(*a, *b, sizes_E, out_dtype=out_dtype)

  def wgrad(self, a: Codes, b: Codes, sizes_E: jax.Array | None) -> jax.Array:
    """[M, T] by [N, T], tokens last -> float32 [M, N], or [E, M, N]."""
    if self.sums == 'fp22' and sizes_E is None:
      return fp22.dot(*(dequantize_tiles(*x, jnp.float32) for x in (a, b)))
    if self.sums == 'fp22':
      return grouped_wgrad_xla.grouped_wgrad(*a, *b, sizes_E, accumulate=None, dot=fp22.dot)
    return fp8_wgrad(*a, *b) if sizes_E is None else grouped_wgrad(*a, *b, sizes_E)


def weight_codes(w_XKN: jax.Array) -> Codes:
  """A weight as stored, by 128x128: the operand of dgrad; `transpose` gives that of the forward."""
  return quantize_blocks(w_XKN, floor=SMALLEST_FLOOR)


def transpose(weight: Codes) -> Codes:
  """The same values the other way round, exactly, for a block's scale does not turn."""
  codes, scale = weight
  return codes.swapaxes(-1, -2), scale.swapaxes(-1, -2)


def _rows(scale_tn: jax.Array, rows: int) -> jax.Array:
  """Scales of blocks as those of each row's tiles."""
  return jnp.repeat(scale_tn, tiles.TILE, axis=0)[:rows]


def _e5m2(x_TN: jax.Array) -> Codes:
  """As `quantize_tiles`, to E5M2, whose largest number is 57344."""
  x_TSH = tiles.split(x_TN.astype(jnp.float32))
  amax_TS1 = tiles.largest(tiles.magnitude_bits(x_TSH))
  scale_TS1 = jnp.maximum(tiles.number(amax_TS1), SMALLEST_FLOOR) / 57344
  scale_TS1 = jnp.where(amax_TS1 < tiles.INFINITY, scale_TS1, jnp.nan)
  codes_TSH = jnp.clip(x_TSH / scale_TS1, -57344, 57344).astype(jnp.float8_e5m2)
  return tiles.join(codes_TSH, x_TN.shape[1]), scale_TS1[..., 0]
