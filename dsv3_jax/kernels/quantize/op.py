"""Public functions of the quantisers."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import checks, choice
from dsv3_jax.kernels.quantize import xla

AMAX_FLOOR = 1e-4  # of the released kernels; keeps the scale of a tile of zeros positive
SMALLEST_FLOOR = (
  2.0**-100
)  # with it every scale, and every code times its scale, is a normal number

Codes = tuple[jax.Array, jax.Array]


def quantize_tiles(
  x_XD: jax.Array,
  *,
  power_of_two: bool = True,
  floor: float = AMAX_FLOOR,
  implementation: str | None = None,
) -> Codes:
  """(codes float8_e4m3fn [.., D], scale float32 [.., ceil(D / 128)]): x is about codes * scale.

  Per tile of 128 along the last axis, scale = amax / 448 with amax at least `floor`; with
  `power_of_two` the next power of two at or above that, exact (UE8M0). codes = x / scale to nearest
  even, at most 448. Section 3.3 of arXiv 2412.19437. Relative error at most 2^-4 down to 2^-6 scale,
  below that absolute, 2^-10 scale. Zeros give zeros. NaN or infinity anywhere in a tile makes all of
  its codes and its scale NaN: what is lost shows. Powers of two are quantised again without loss.

  `x_XD`: bfloat16 or float32. `floor`: gradients want a small one, down to SMALLEST_FLOOR.
  `implementation`: a name of `kernels/choice.py`, or None. Not differentiable.
  """
  checks.numbers('quantize_tiles', x_XD)
  return _run('quantize_tiles', implementation, x_XD, power_of_two=power_of_two, floor=floor)


def quantize_tiles_transposed(
  x_MK: jax.Array,
  *,
  power_of_two: bool = True,
  floor: float = AMAX_FLOOR,
  implementation: str | None = None,
) -> Codes:
  """(codes [K, M], scale [K, ceil(M / 128)]): as `quantize_tiles` of the transposed matrix, 128x1."""
  checks.numbers('quantize_tiles_transposed', x_MK, 2)
  options = {'power_of_two': power_of_two, 'floor': floor}
  return _run('quantize_tiles_transposed', implementation, x_MK, **options)


def quantize_blocks(
  w_XNK: jax.Array,
  *,
  power_of_two: bool = False,
  floor: float = AMAX_FLOOR,
  implementation: str | None = None,
) -> Codes:
  """(codes [.., N, K], scale [.., ceil(N / 128), ceil(K / 128)]): as tiles, per block of 128x128.

  The codes transposed, with the scales transposed, are those of the transposed matrix.
  """
  checks.numbers('quantize_blocks', w_XNK)
  if w_XNK.ndim < 2:
    raise ValueError(f'quantize_blocks {w_XNK.shape}: must have 2 dimensions or more')
  return _run('quantize_blocks', implementation, w_XNK, power_of_two=power_of_two, floor=floor)


def requantize_transposed(
  codes_MK: jax.Array,
  scale_MS: jax.Array,
  *,
  power_of_two: bool = True,
  floor: float = AMAX_FLOOR,
  implementation: str | None = None,
) -> Codes:
  """Tiles of 1x128, dequantised in float32, transposed, quantised by 128x1 (3.3.2): [K, M] and scale."""
  checks.codes('codes', codes_MK, 2)
  checks.tile_scale('scale', scale_MS, codes_MK)
  options = {'power_of_two': power_of_two, 'floor': floor}
  return _run('requantize_transposed', implementation, codes_MK, scale_MS, **options)


def dequantize_tiles(codes_XD: jax.Array, scale_XS: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """codes * scale, multiplied in float32 and rounded once -> [.., D] in `dtype`."""
  checks.tile_scale('scale', scale_XS, codes_XD)
  return xla.dequantize_tiles(codes_XD, scale_XS, dtype)


def dequantize_blocks(codes_XNK: jax.Array, scale_Xnk: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """The same of blocks of 128x128 -> [.., N, K]."""
  checks.block_scale('scale', scale_Xnk, codes_XNK)
  return xla.dequantize_blocks(codes_XNK, scale_Xnk, dtype)


def _run(function: str, implementation: str | None, *arrays: jax.Array, **options: object) -> Codes:
  floor = options['floor']
  if floor < SMALLEST_FLOOR:
    raise ValueError(f'floor = {floor:.3g}: must be at least 2^-100, or scales would be flushed')
  return choice.run('quantize', function, implementation, *arrays, **options)
