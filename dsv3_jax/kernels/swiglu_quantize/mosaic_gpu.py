"""SwiGLU with the quantiser behind it, and its gradient, on Hopper: one pass over memory each."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.kernels import hopper, tiles
from dsv3_jax.kernels import hopper_tiles as ht

_F32 = jnp.float32


def supports(function: str, gate_MF: jax.Array, *rest: object, **options: object) -> str | None:
  return ht.refusal(gate_MF)


def swiglu_quantize(
  gate_MF: jax.Array,
  up_MF: jax.Array,
  weight_M: jax.Array | None,
  *,
  power_of_two: bool,
  floor: float,
) -> tuple[jax.Array, jax.Array]:
  M, F = gate_MF.shape

  def body(gate: Any, up: Any, *refs: Any) -> None:
    *weight, codes, scale = refs
    x_RH = ht.load(gate)
    x_RH = x_RH * _sigmoid(x_RH) * ht.load(up)
    if weight:
      x_RH = x_RH * hopper.rows(ht.load(weight[0], hopper.ROW), x_RH.shape)
    codes[...], scale[...] = ht.quantize(x_RH, power_of_two, floor)

  ins = _matrices(gate_MF, up_MF) + _weights(weight_M)
  rows, columns = ins[0][0].shape
  grid = rows // ht.ROWS, columns // ht.TILE
  outs = [
    (jax.ShapeDtypeStruct((rows, columns), jnp.float8_e4m3fn), ht.MATRIX),
    (jax.ShapeDtypeStruct((grid[1], rows), _F32), ht.PER_TILE),
  ]
  codes_MF, scale_SM = ht.run(body, grid, ins, outs)
  return ht.unflat(codes_MF, (M,), F), ht.unflat(scale_SM.T, (M,), tiles.count(F))


def swiglu_backward(
  gate_MF: jax.Array, up_MF: jax.Array, d_MF: jax.Array, weight_M: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  M, F = gate_MF.shape

  def body(gate: Any, up: Any, d: Any, *refs: Any) -> None:
    *weight, d_gate, d_up, d_weight = refs if weight_M is not None else (*refs, None)
    weight_R = ht.load(weight[0], hopper.ROW) if weight else None
    dots = []
    for half in ht.HALVES:  # all at once would not fit the registers
      d_RH, gate_RH, up_RH = (ht.load(ref.at[:, half]) for ref in (d, gate, up))
      sigmoid_RH = _sigmoid(gate_RH)
      silu_RH = gate_RH * sigmoid_RH
      if weight:
        dots.append(jnp.sum(d_RH * silu_RH * up_RH, axis=1))
        d_RH = d_RH * hopper.rows(weight_R, d_RH.shape)
      d_up[:, half] = (d_RH * silu_RH).astype(up_MF.dtype)
      slope_RH = sigmoid_RH + silu_RH * (1 - sigmoid_RH)
      d_gate[:, half] = (d_RH * up_RH * slope_RH).astype(gate_MF.dtype)
    if weight:
      d_weight[...] = dots[0] + dots[1]

  ins = _matrices(gate_MF, up_MF, d_MF) + _weights(weight_M)
  rows, columns = ins[0][0].shape
  grid = rows // ht.ROWS, columns // ht.TILE
  outs = [(jax.ShapeDtypeStruct((rows, columns), gate_MF.dtype), ht.MATRIX)] * 2
  if weight_M is not None:  # of each tile; XLA adds them up
    outs += [(jax.ShapeDtypeStruct((grid[1], rows), _F32), ht.PER_TILE)]
  d_gate_MF, d_up_MF, *d_weight_SM = ht.run(body, grid, ins, outs)
  d_weight_M = lax.slice(jnp.sum(d_weight_SM[0], axis=0), (0,), (M,)) if d_weight_SM else None
  return ht.unflat(d_gate_MF, (M,), F), ht.unflat(d_up_MF, (M,), F), d_weight_M


def _matrices(*arrays: jax.Array) -> list[tuple[jax.Array, ht.View]]:
  return [(ht.flat(x), ht.MATRIX) for x in arrays]


def _weights(weight_M: jax.Array | None) -> list[tuple[jax.Array, ht.View]]:
  return [] if weight_M is None else [(hopper.padded(weight_M, ht.ROWS), ht.PER_ROW)]


def _sigmoid(x: jax.Array) -> jax.Array:
  return 1 / (1 + jnp.exp(-x))
