"""Auxiliary-loss-free balancing (2.1.2): the router's bias follows the load of the whole step.

An expert that got more tokens than the mean of its layer loses `speed`, one that got fewer gains it;
one exactly at the mean stays. The counts must be summed over every token of the step, on every device
and in every micro-batch, before the sign is taken: signs of partial counts drive replicas apart.
"""

from typing import Any

import jax
import jax.numpy as jnp


def update_bias(bias: Any, counts: Any, speed: jax.Array) -> Any:
  """bias + speed * sign(mean load - load), for trees of [layers, experts]."""

  def one(bias_YE: jax.Array, count_YE: jax.Array) -> jax.Array:
    # In integers, so that "exactly at the mean" is exact: sign(sum - E * count).
    E = count_YE.shape[-1]
    under_YE = jnp.sign(jnp.sum(count_YE, axis=-1, keepdims=True) - E * count_YE)
    return bias_YE + speed * under_YE.astype(jnp.float32)

  return jax.tree.map(one, bias, counts)


def relative_load(counts: Any) -> jax.Array:
  """Load of every expert over its layer's mean, float32 [layers, experts]; 1 everywhere is even."""
  count_YE = jnp.concatenate(jax.tree.leaves(counts)).astype(jnp.float32)
  return count_YE / jnp.mean(count_YE, axis=1, keepdims=True)
