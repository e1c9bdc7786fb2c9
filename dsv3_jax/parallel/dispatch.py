"""Brings tokens to their experts and the results back, whatever the mesh; nothing is ever dropped.

One form so far: every device of an expert group (`node` x `local`) sees all tokens of the group and
runs its own experts on those that chose them. Right for few devices: bytes grow with the group, not
with the experts a token chose.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.mesh import EXPERTS

# (x_tD, ids_tK into the local experts, weight_tK) -> y_tD; the id `e`, one past the last, is "not here".
Experts = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def dispatch(
  x_TD: jax.Array, ids_TK: jax.Array, weight_TK: jax.Array, experts: Experts, num_experts: int
) -> jax.Array:
  """Weighted sum of the chosen experts' outputs for this device's tokens -> [T, D].

  Bytes received per device, of a group of n: (n-1) T (D activations + K ids + K weights) going out,
  (n-1) T D coming back.
  """
  n = lax.axis_size(EXPERTS)
  if n == 1:
    return experts(x_TD, ids_TK, weight_TK)
  gather = lambda x: lax.all_gather(x, EXPERTS, axis=0, tiled=True)  # [T, .] -> [n T, .]
  x_tD, ids_tK, weight_tK = gather(x_TD), gather(ids_TK), gather(weight_TK)
  here = num_experts // n
  local_tK = ids_tK - here * lax.axis_index(EXPERTS)
  local_tK = jnp.where((local_tK >= 0) & (local_tK < here), local_tK, here)
  y_tD = experts(x_tD, local_tK, weight_tK)
  return lax.psum_scatter(
    y_tD, EXPERTS, scatter_dimension=0, tiled=True
  )  # [n T, D] -> [T, D], summed
