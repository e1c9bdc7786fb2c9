"""Pieces that every block shares: initialisation, RMSNorm, the dense SwiGLU FFN.

Modules are plain pytrees: parameters and `__call__`, nothing else. Only JAX transforms them.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax import config
from dsv3_jax.precision import recipe


class RouterBias(nnx.Variable):
  """Bias of the router's selection (2.1.2): no gradient, no optimizer, a slot of its own in the state."""


def normal(key: jax.Array, shape: tuple[int, ...], std: float) -> nnx.Param:
  """Every matrix of the model starts as N(0, std^2) (4.2)."""
  return nnx.Param(jax.random.normal(key, shape, jnp.float32) * std)


def ones(size: int) -> nnx.Param:
  """Weight of an RMSNorm."""
  return nnx.Param(jnp.ones((size,), jnp.float32))


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
  """x / rms(x) * weight over the last axis; in FP32, returned in x's dtype."""
  x32 = x.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
  weight = weight_D.reshape((1,) * (x.ndim - 1) + (-1,))
  return (x32 * scale * weight).astype(x.dtype)


class Ffn(nnx.Module):
  """SwiGLU: down(silu(gate x) * up x); a dense layer's FFN, or the shared experts as one."""

  def __init__(self, dim: int, hidden: int, std: float, key: jax.Array) -> None:
    keys = jax.random.split(key, 3)
    self.gate_DF = normal(keys[0], (dim, hidden), std)
    self.up_DF = normal(keys[1], (dim, hidden), std)
    self.down_FD = normal(keys[2], (hidden, dim), std)

  def __call__(self, c: config.Model, x_BLD: jax.Array) -> jax.Array:
    return recipe.ffn(c.precision, x_BLD, self.gate_DF[...], self.up_DF[...], self.down_FD[...])
