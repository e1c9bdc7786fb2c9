"""Rotary position embedding with YaRN (4.3), on the decoupled rope dimensions only.

Pairs are adjacent dimensions (2j, 2j+1), as in the released weights. YaRN is on where the model is set
up for more than the original length: slow dimensions are interpolated by `factor`, fast ones left
alone, a ramp between; the softmax scale grows by m^2 with m = 0.1 mscale ln(factor) + 1.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax import config


def _yarn_on(c: config.Model) -> bool:
  return c.max_length > c.rope.original_length


def _mscale(c: config.Model, mscale: float) -> float:
  return 0.1 * mscale * math.log(c.rope.factor) + 1.0 if c.rope.factor > 1 else 1.0


def yarn_range(c: config.Model) -> tuple[int, int]:
  """First and last pair of the ramp; (10, 23) for V3."""
  rotations = lambda n: (
    c.mla.rope_dim
    * math.log(c.rope.original_length / (n * 2 * math.pi))
    / (2 * math.log(c.rope.theta))
  )
  low = max(math.floor(rotations(c.rope.beta_fast)), 0)
  high = min(math.ceil(rotations(c.rope.beta_slow)), c.mla.rope_dim - 1)
  return low, high


def frequencies(c: config.Model) -> np.ndarray:
  """Radians per position of each pair, float64 [R/2]."""
  pairs = np.arange(c.mla.rope_dim // 2)
  freq = c.rope.theta ** (-2.0 * pairs / c.mla.rope_dim)
  if not _yarn_on(c):
    return freq
  low, high = yarn_range(c)
  ramp = np.clip((pairs - low) / max(high - low, 0.001), 0, 1)
  return freq * (1 - ramp) + freq / c.rope.factor * ramp


def softmax_scale(c: config.Model) -> float:
  """1 / sqrt(nope + rope), times m(mscale_all_dim)^2 under YaRN; 0.13523378 for V3 beyond 4096."""
  scale = (c.mla.nope_dim + c.mla.rope_dim) ** -0.5
  if _yarn_on(c) and c.rope.mscale_all_dim:
    scale *= _mscale(c, c.rope.mscale_all_dim) ** 2
  return scale


def table(c: config.Model, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """cos and sin, float32 [*positions.shape, R/2], scaled by m(mscale) / m(mscale_all_dim) under YaRN."""
  freq = jnp.asarray(frequencies(c), jnp.float32)
  angle = positions.astype(jnp.float32)[..., None] * freq.reshape((1,) * positions.ndim + (-1,))
  scale = _mscale(c, c.rope.mscale) / _mscale(c, c.rope.mscale_all_dim) if _yarn_on(c) else 1.0
  return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotates adjacent pairs of x [..., R] by tables that broadcast to [..., R/2]; in FP32, back in x's dtype."""
  x32 = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  even, odd = x32[..., 0], x32[..., 1]
  return (
    jnp.stack([even * cos - odd * sin, odd * cos + even * sin], -1).reshape(x.shape).astype(x.dtype)
  )
