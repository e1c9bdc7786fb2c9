"""One element-wise pass and the integer quantiser; gradients written out, so that nothing is kept."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.quantize.xla import quantize_tiles
from dsv3_jax.kernels.swiglu_quantize.reference import swiglu


def swiglu_quantize(
  gate_MF: jax.Array,
  up_MF: jax.Array,
  weight_M: jax.Array | None,
  *,
  power_of_two: bool,
  floor: float,
) -> tuple[jax.Array, jax.Array]:
  # Else XLA:CPU computes the exponential for every reader: the maximum and the codes.
  act_MF = jax.lax.optimization_barrier(swiglu(gate_MF, up_MF, weight_M))
  return quantize_tiles(act_MF, power_of_two=power_of_two, floor=floor)


def swiglu_backward(
  gate_MF: jax.Array, up_MF: jax.Array, d_MF: jax.Array, weight_M: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  weight_M1 = None if weight_M is None else weight_M[:, None]
  d_gate_MF, d_up_MF, d_weight_MF = gradients(gate_MF, up_MF, d_MF, weight_M1)
  return d_gate_MF, d_up_MF, None if weight_M is None else jnp.sum(d_weight_MF, axis=1)


def gradients(
  gate_MF: jax.Array, up_MF: jax.Array, d_MF: jax.Array, weight_M1: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """(d_gate, d_up, what to sum over a row for d_weight in float32)."""
  dtype = gate_MF.dtype
  gate_MF, up_MF, d_MF = (x.astype(jnp.float32) for x in (gate_MF, up_MF, d_MF))
  sigmoid_MF = jax.nn.sigmoid(gate_MF)
  silu_MF = gate_MF * sigmoid_MF
  d_weight_MF = None
  if weight_M1 is not None:
    d_weight_MF = d_MF * silu_MF * up_MF
    d_MF = d_MF * weight_M1
  d_gate_MF = d_MF * up_MF * (sigmoid_MF + silu_MF * (1 - sigmoid_MF))
  return d_gate_MF.astype(dtype), (d_MF * silu_MF).astype(dtype), d_weight_MF
