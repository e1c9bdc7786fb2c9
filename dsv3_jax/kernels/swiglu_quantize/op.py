"""Public functions of SwiGLU in FP8."""

import jax

from dsv3_jax.kernels import checks, choice
from dsv3_jax.kernels.quantize import AMAX_FLOOR, SMALLEST_FLOOR


def swiglu_quantize(
  gate_MF: jax.Array,
  up_MF: jax.Array,
  weight_M: jax.Array | None = None,
  *,
  power_of_two: bool = True,
  floor: float = AMAX_FLOOR,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """silu(gate) * up * weight in float32, quantised by 1x128 -> codes [M, F], scale [M, ceil(F / 128)].

  `weight_M`: float32, the router's weight of each row; None is 1. The rest as `quantize_tiles`.
  """
  _check('swiglu_quantize', gate_MF, up_MF, weight_M)
  if floor < SMALLEST_FLOOR:
    raise ValueError(f'floor = {floor:.3g}: must be at least 2^-100, or scales would be flushed')
  return choice.run(
    'swiglu_quantize',
    'swiglu_quantize',
    implementation,
    gate_MF,
    up_MF,
    weight_M,
    power_of_two=power_of_two,
    floor=floor,
  )


def swiglu_backward(
  gate_MF: jax.Array,
  up_MF: jax.Array,
  d_MF: jax.Array,
  weight_M: jax.Array | None = None,
  *,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  """(d_gate, d_up [M, F] in the inputs' dtype, d_weight float32 [M], None without weights).

  Of silu(gate) * up * weight, whose gradient is `d_MF`; computed in float32.
  """
  _check('swiglu_backward', gate_MF, up_MF, weight_M)
  checks.numbers('gradient', d_MF, 2)
  if d_MF.shape != gate_MF.shape:
    raise ValueError(f'gradient {d_MF.shape}: must be {gate_MF.shape}, the shape of gate and up')
  arrays = gate_MF, up_MF, d_MF, weight_M
  return choice.run('swiglu_quantize', 'swiglu_backward', implementation, *arrays)


def _check(function: str, gate_MF: jax.Array, up_MF: jax.Array, weight_M: jax.Array | None) -> None:
  checks.numbers(f'{function}: gate', gate_MF, 2)
  checks.numbers(f'{function}: up', up_MF, 2)
  if up_MF.shape != gate_MF.shape or up_MF.dtype != gate_MF.dtype:
    raise ValueError(
      f'up {up_MF.dtype}{list(up_MF.shape)}: must be as gate, {gate_MF.dtype}{list(gate_MF.shape)}'
    )
  if weight_M is not None and (weight_M.shape, weight_M.dtype.name) != (
    gate_MF.shape[:1],
    'float32',
  ):
    told = f'weight {weight_M.dtype}{list(weight_M.shape)}'
    raise ValueError(f'{told}: must be float32[{len(gate_MF)}], one per row')
