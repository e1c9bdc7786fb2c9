"""The formulas; gradients by JAX."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels.quantize.reference import quantize_tiles


def swiglu_quantize(
  gate_MF: jax.Array,
  up_MF: jax.Array,
  weight_M: jax.Array | None,
  *,
  power_of_two: bool,
  floor: float,
) -> tuple[jax.Array, jax.Array]:
  act_MF = swiglu(gate_MF, up_MF, weight_M)
  return quantize_tiles(act_MF, power_of_two=power_of_two, floor=floor)


def swiglu_backward(
  gate_MF: jax.Array, up_MF: jax.Array, d_MF: jax.Array, weight_M: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  _, pull = jax.vjp(swiglu, gate_MF, up_MF, weight_M)
  return pull(d_MF.astype(jnp.float32))


def swiglu(gate_MF: jax.Array, up_MF: jax.Array, weight_M: jax.Array | None) -> jax.Array:
  """silu(gate) * up * weight, float32."""
  gate_MF, up_MF = gate_MF.astype(jnp.float32), up_MF.astype(jnp.float32)
  act_MF = gate_MF * jax.nn.sigmoid(gate_MF) * up_MF
  return act_MF if weight_M is None else act_MF * weight_M[:, None]
