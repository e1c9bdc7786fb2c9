"""FP8 (E4M3): tiles of 1x128, the format of activations and of the dispatch; blocks of 128x128, of weights.

`transposed` versions are for wgrad, which contracts over tokens: tiles of 128 tokens, written token-last.
The reference casts by the backend's own cast, `xla` in integers.
"""

from dsv3_jax.kernels.quantize.op import (
  AMAX_FLOOR,
  SMALLEST_FLOOR,
  dequantize_blocks,
  dequantize_tiles,
  quantize_blocks,
  quantize_tiles,
  quantize_tiles_transposed,
  requantize_transposed,
)

__all__ = [
  'AMAX_FLOOR',
  'SMALLEST_FLOOR',
  'dequantize_blocks',
  'dequantize_tiles',
  'quantize_blocks',
  'quantize_tiles',
  'quantize_tiles_transposed',
  'requantize_transposed',
]
