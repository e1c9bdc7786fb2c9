"""On TPU: gate and up are read once, and nothing but codes and scales is written.

Router's weights come as one row of lanes and are turned inside: [M, 1] would be padded to 128 in memory.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dsv3_jax.kernels import tiles, tpu
from dsv3_jax.kernels.quantize.pallas_tpu import quantize_rows
from dsv3_jax.kernels.swiglu_quantize import xla

_ROWS, _COLUMNS = 128, 2048


def supports(function: str, gate_MF: jax.Array, *arrays: object, **options: object) -> str | None:
  each = 2 * gate_MF.dtype.itemsize + 1
  wide = tpu.too_wide(gate_MF.shape[1], each, _ROWS) if function == 'swiglu_quantize' else None
  return wide or tpu.supports(function)


def swiglu_quantize(
  gate_MF: jax.Array,
  up_MF: jax.Array,
  weight_M: jax.Array | None,
  *,
  power_of_two: bool,
  floor: float,
) -> tuple[jax.Array, jax.Array]:
  M, F = gate_MF.shape
  spec = lambda columns: pl.BlockSpec((_ROWS, columns), lambda m: (m, 0))
  weight = [] if weight_M is None else [weight_M[None]]
  codes_MF, scale_MS = tpu.call(
    functools.partial(_forward_kernel, power_of_two=power_of_two, floor=floor),
    (pl.cdiv(M, _ROWS),),
    [gate_MF, up_MF, *weight],
    [spec(F), spec(F), *[pl.BlockSpec((1, _ROWS), lambda m: (0, m)) for _ in weight]],
    [((M, F), jnp.float8_e4m3fn), ((M, tiles.count(F)), jnp.float32)],
    [spec(F), spec(tiles.count(F))],
    flops=8 * M * F,
    order='p',
    inside=swiglu_quantize,
  )
  return codes_MF, scale_MS


def _forward_kernel(gate_ref, up_ref, *refs, power_of_two, floor):
  *weight, codes_ref, scale_ref = refs
  weight_M1 = weight[0][...].T if weight else None
  for t, at in enumerate(tpu.lanes(gate_ref.shape[1])):
    act_MH = xla.swiglu(gate_ref[:, at], up_ref[:, at], None)
    act_MH = act_MH if weight_M1 is None else act_MH * weight_M1
    codes, scale = quantize_rows(act_MH, power_of_two, floor)
    codes_ref[:, at] = codes
    scale_ref[:, t : t + 1] = scale


def swiglu_backward(
  gate_MF: jax.Array, up_MF: jax.Array, d_MF: jax.Array, weight_M: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
  M, F = gate_MF.shape
  columns = min(_COLUMNS, tpu.round_up(F, tiles.TILE))
  spec = pl.BlockSpec((_ROWS, columns), lambda m, f: (m, f))
  row_spec = pl.BlockSpec((1, _ROWS), lambda m, f: (0, m))
  weight = [] if weight_M is None else [weight_M[None]]
  d_gate_MF, d_up_MF, *d_weight = tpu.call(
    functools.partial(_backward_kernel, count=F),
    (pl.cdiv(M, _ROWS), pl.cdiv(F, columns)),
    [gate_MF, up_MF, d_MF, *weight],
    [spec, spec, spec, *[row_spec for _ in weight]],
    [((M, F), gate_MF.dtype)] * 2 + [((1, M), jnp.float32) for _ in weight],
    [spec, spec, *[row_spec for _ in weight]],
    flops=12 * M * F,
    order='pa',
    inside=swiglu_backward,
  )
  return d_gate_MF, d_up_MF, d_weight[0][0] if d_weight else None


def _backward_kernel(gate_ref, up_ref, d_ref, *refs, count):
  f, columns = pl.program_id(1), gate_ref.shape[1]
  if len(refs) == 2:
    d_gate_ref, d_up_ref = refs
    d_gate_ref[...], d_up_ref[...], _ = xla.gradients(gate_ref[...], up_ref[...], d_ref[...], None)
    return
  weight_ref, d_gate_ref, d_up_ref, d_weight_ref = refs
  weight_M1 = weight_ref[...].T
  gradients = xla.gradients(gate_ref[...], up_ref[...], d_ref[...], weight_M1)
  d_gate_ref[...], d_up_ref[...], part_MF = gradients
  if count % columns:
    column = f * columns + lax.broadcasted_iota(jnp.int32, part_MF.shape, 1)
    part_MF = jnp.where(column < count, part_MF, 0)

  @pl.when(f == 0)
  def _():
    d_weight_ref[...] = jnp.zeros_like(d_weight_ref)

  d_weight_ref[...] += jnp.sum(part_MF, axis=1, keepdims=True).T
