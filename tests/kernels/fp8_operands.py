"""What tests of FP8 operations share: random operands, their exact values, one error metric with limits."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.kernels import tiles
from dsv3_jax.kernels.quantize import (
  quantize_blocks,
  quantize_tiles,
  quantize_tiles_transposed,
  requantize_transposed,
)

# Largest relative Frobenius error against float64 of the quantised operands, by where and what.
# Positive data with K = 4096 tells promotion (5e-4 by a model of the chip) from none (7e-2).
LIMIT = {'float32': 1e-6, 'bfloat16': 2.5e-3, 'hopper': 5e-4, 'hopper_positive': 2e-3}

tile_codes = jax.jit(quantize_tiles, static_argnames=('power_of_two', 'floor', 'implementation'))
block_codes = jax.jit(quantize_blocks, static_argnames=('power_of_two', 'floor', 'implementation'))
transposed_codes = jax.jit(
  quantize_tiles_transposed, static_argnames=('power_of_two', 'floor', 'implementation')
)
requantized = jax.jit(
  requantize_transposed, static_argnames=('power_of_two', 'floor', 'implementation')
)


def error(actual: Any, expected: np.ndarray) -> float:
  """|actual - expected| / |expected|, Frobenius; infinite for a NaN."""
  actual = np.asarray(actual, np.float64)
  assert actual.shape == expected.shape, f'shape {actual.shape}, expected {expected.shape}'
  wrong = np.linalg.norm(actual - expected)
  if not np.isfinite(wrong):
    return np.inf
  return float(wrong / (np.linalg.norm(expected) or 1.0))


def random(seed: int, *shape: int, dtype: str = 'float32', positive: bool = False) -> jax.Array:
  """Normal numbers, or even ones in [0, 1)."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.uniform(size=shape) if positive else rng.normal(size=shape), dtype)


def tile_values(codes_XD: jax.Array, scale_XS: jax.Array) -> np.ndarray:
  """float64 of codes scaled by 1x128."""
  spread_XD = np.repeat(f64(scale_XS), tiles.TILE, axis=-1)[..., : codes_XD.shape[-1]]
  return f64(codes_XD) * spread_XD


def block_values(codes_XNK: jax.Array, scale_Xnk: jax.Array) -> np.ndarray:
  """float64 of codes scaled by 128x128."""
  N, K = codes_XNK.shape[-2:]
  spread = np.repeat(np.repeat(f64(scale_Xnk), tiles.TILE, axis=-2), tiles.TILE, axis=-1)
  return f64(codes_XNK) * spread[..., :N, :K]


def f64(x: Any) -> np.ndarray:
  return np.asarray(x, np.float64)


def starts(sizes: list[int]) -> list[int]:
  """Where groups of rows start, each at a multiple of 128."""
  blocks = [-(-n // tiles.TILE) for n in sizes]
  return [tiles.TILE * sum(blocks[:e]) for e in range(len(sizes))]


@functools.cache
def grouped_rows(sizes: tuple[int, ...], slots: int, dim: int, seed: int = 0) -> np.ndarray:
  """float32 [slots, dim]: normal rows in the groups, zeros between and behind them."""
  x_SD = np.zeros((slots, dim), np.float32)
  rng = np.random.default_rng(seed)
  for start, size in zip(starts(list(sizes)), sizes, strict=True):
    x_SD[start : start + size] = rng.normal(size=(size, dim))
  return x_SD
