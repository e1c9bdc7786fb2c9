"""AdamW on each device's part of the weights (4.2): Optax's Adam, moments stored in a chosen dtype.

Weights and arithmetic are FP32; only what is kept between steps is rounded (BF16 in the report, 3.3.3).
The moments are a plain dict {'mu', 'nu'}; Adam's count is the step of the state.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from dsv3_jax import config
from dsv3_jax.mesh import path_names

_MOMENTS = {'fp32': jnp.float32, 'bf16': jnp.bfloat16}


def init(c: config.Optimizer, params: Any) -> dict[str, Any]:
  zeros = lambda: jax.tree.map(lambda p: jnp.zeros_like(p, _MOMENTS[c.moments]), params)
  return {'mu': zeros(), 'nu': zeros()}


def update(
  c: config.Optimizer,
  grads: Any,
  opt: dict[str, Any],
  params: Any,
  step: jax.Array,
  rate: jax.Array,
) -> tuple[Any, dict[str, Any]]:
  """One AdamW step with decoupled decay on matrices -> (params, opt). `step`: updates done before."""
  adam = optax.scale_by_adam(c.beta1, c.beta2, c.eps)
  fp32 = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
  state = optax.ScaleByAdamState(step.astype(jnp.int32), fp32(opt['mu']), fp32(opt['nu']))
  with jax.numpy_dtype_promotion('standard'):  # Optax raises a float to an integer count
    updates, state = adam.update(grads, state)

  def apply(path: tuple[Any, ...], p: jax.Array, u: jax.Array) -> jax.Array:
    decay = c.weight_decay if is_matrix(path) else 0.0
    return p - rate * (u + decay * p)

  params = jax.tree_util.tree_map_with_path(apply, params, updates)
  stored = lambda tree: jax.tree.map(lambda x: x.astype(_MOMENTS[c.moments]), tree)
  return params, {'mu': stored(state.mu), 'nu': stored(state.nu)}


def is_matrix(path: tuple[Any, ...]) -> bool:
  """Whether a weight decays: two dimensions or more by its name, stacking aside. Norms do not."""
  return len(path_names(path)[-1].rpartition('_')[2]) > 1


def clip(c: config.Optimizer, grads: Any, norm: jax.Array) -> Any:
  """Scales gradients down to `clip_norm` where their global norm is above it."""
  factor = jnp.minimum(1.0, c.clip_norm / (norm + 1e-6))
  return jax.tree.map(lambda g: g * factor, grads)
