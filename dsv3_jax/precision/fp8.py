"""Linear and SwiGLU layers whose GEMMs run in FP8, forward and backward, each one `custom_vjp`.

| GEMM  | a                              | b                     | out  |
|-------|--------------------------------|-----------------------|------|
| fprop | x [T, K] by 1x128              | w^T [N, K] by 128x128 | BF16 |
| dgrad | dy [T, N] by 1x128             | w [K, N], same codes  | BF16 |
| wgrad | x^T [K, T], 128 tokens a scale | dy^T [N, T], the same | FP32 |

Between forward and backward live codes alone: x by 1x128, dequantised, transposed and quantised again by
128x1 for wgrad; the output of attention in E5M6; SwiGLU's inputs, of which its product is computed again
(3.3.3). Attention itself keeps its output in E5M6 too, and hands on what it keeps, so both see the same
numbers and nothing is stored twice under remat. Weights are quantised from what the caller holds, FP32
masters, at every use, and their gradients come back in FP32. No gradient flows through a scale.

`rows` of experts come in groups, as `kernels/grouped_matmul` wants them: with `sizes_E` every weight has a
leading dimension of experts. Zero rows between groups stay zeros throughout.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax import compat
from dsv3_jax.kernels import e5m6
from dsv3_jax.kernels.quantize import (
  SMALLEST_FLOOR,
  dequantize_tiles,
  quantize_tiles,
  quantize_tiles_transposed,
  requantize_transposed,
)
from dsv3_jax.kernels.swiglu_quantize import swiglu_backward, swiglu_quantize
from dsv3_jax.precision.formats import Codes, Fp8, transpose, weight_codes

_activation = functools.partial(quantize_tiles, floor=SMALLEST_FLOOR)
_requantize = functools.partial(requantize_transposed, power_of_two=False, floor=SMALLEST_FLOOR)

# ---- linear --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Linear:
  """How one linear layer computes; static."""

  formats: Fp8
  stored: str  # its input between forward and backward: 'e4m3', or 'e5m6' behind attention
  dtype: Any  # of its weight, for the gradient's


def linear(formats: Fp8, x_TK: jax.Array, w_KN: jax.Array, *, stored: str) -> jax.Array:
  """x w -> [T, N] in x's dtype. `stored`: 'e4m3', or 'e5m6' with scales that are powers of two."""
  x_TK, w_KN = compat.vary_like((x_TK, w_KN), x_TK, w_KN)
  return _linear(Linear(formats, stored, w_KN.dtype), x_TK, w_KN)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(how, x_TK, w_KN):
  return _linear_forward(how, x_TK, w_KN)[0]


def _linear_forward(how, x_TK, w_KN):
  x, w = _activation(x_TK, power_of_two=how.stored == 'e5m6'), weight_codes(w_KN)
  y_TN = how.formats.matmul(x, transpose(w), None, x_TK.dtype)
  return y_TN, (e5m6.encode(x_TK) if how.stored == 'e5m6' else x, w)


def _linear_backward(how, residuals, dy_TN):
  x, w = residuals
  dy, dy_across = how.formats.gradient_codes(dy_TN)
  dx_TK = how.formats.matmul(dy, w, None, dy_TN.dtype)
  if how.stored == 'e5m6':
    x_TK = e5m6.decode(*x, w[0].shape[0], jnp.bfloat16)
    x_across = quantize_tiles_transposed(x_TK, floor=SMALLEST_FLOOR)
  else:
    x_across = _requantize(*x)
  return dx_TK, how.formats.wgrad(x_across, dy_across, None).astype(how.dtype)


_linear.defvjp(_linear_forward, _linear_backward)

# ---- SwiGLU --------------------------------------------------------------------------------------


def swiglu(
  formats: Fp8,
  x: Codes,
  weight_M: jax.Array | None,
  gate_XDF: jax.Array,
  up_XDF: jax.Array,
  down_XFD: jax.Array,
  sizes_E: jax.Array | None,
  dtype: jnp.dtype,
) -> tuple[jax.Array, Any]:
  """down(silu(x gate) * (x up) * weight) -> [M, D] in `dtype`; what `swiglu_gradients` needs."""
  gate, up, down = (weight_codes(w) for w in (gate_XDF, up_XDF, down_XFD))
  gate_MF = formats.matmul(x, transpose(gate), sizes_E, dtype)
  up_MF = formats.matmul(x, transpose(up), sizes_E, dtype)
  act = swiglu_quantize(gate_MF, up_MF, weight_M, power_of_two=False, floor=SMALLEST_FLOOR)
  y_MD = formats.matmul(act, transpose(down), sizes_E, dtype)
  hidden = checkpoint_name(
    (_activation(gate_MF, power_of_two=False), _activation(up_MF, power_of_two=False)), 'ffn_hidden'
  )
  return y_MD, (x, weight_M, hidden, (gate, up, down), sizes_E)


def swiglu_gradients(
  formats: Fp8, residuals: Any, dy_MD: jax.Array
) -> tuple[jax.Array, jax.Array | None, tuple[jax.Array, jax.Array, jax.Array]]:
  """(dx [M, D] in dy's dtype, dweight float32 [M], float32 gradients of the three weights)."""
  x, weight_M, hidden, (gate, up, down), sizes_E = residuals
  dtype = dy_MD.dtype
  gate_MF, up_MF = (dequantize_tiles(*h, dtype) for h in hidden)
  dy, dy_across = formats.gradient_codes(dy_MD)
  d_MF = formats.matmul(dy, down, sizes_E, dtype)
  act = swiglu_quantize(gate_MF, up_MF, weight_M, power_of_two=False, floor=SMALLEST_FLOOR)
  ddown_XFD = formats.wgrad(_requantize(*act), dy_across, sizes_E)
  dgate_MF, dup_MF, dweight_M = swiglu_backward(gate_MF, up_MF, d_MF, weight_M)
  dgate, dgate_across = formats.gradient_codes(dgate_MF)
  dup, dup_across = formats.gradient_codes(dup_MF)
  dx_MD = formats.matmul(dgate, gate, sizes_E, jnp.float32)
  dx_MD += formats.matmul(dup, up, sizes_E, jnp.float32)
  x_across = _requantize(*x)
  dgate_XDF = formats.wgrad(x_across, dgate_across, sizes_E)
  dup_XDF = formats.wgrad(x_across, dup_across, sizes_E)
  return dx_MD.astype(dtype), dweight_M, (dgate_XDF, dup_XDF, ddown_XFD)


# ---- the FFN of a dense layer, or shared experts -------------------------------------------------


def ffn(
  formats: Fp8, x_TD: jax.Array, gate_DF: jax.Array, up_DF: jax.Array, down_FD: jax.Array
) -> jax.Array:
  """down(silu(x gate) * (x up)) -> [T, D] in x's dtype."""
  arrays = x_TD, gate_DF, up_DF, down_FD
  return _ffn((formats, gate_DF.dtype), *compat.vary_like(arrays, *arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ffn(how, x_TD, *weights):
  return _ffn_forward(how, x_TD, *weights)[0]


def _ffn_forward(how, x_TD, *weights):
  x = _activation(x_TD, power_of_two=False)
  return swiglu(how[0], x, None, *weights, None, x_TD.dtype)


def _ffn_backward(how, residuals, dy_TD):
  formats, dtype = how
  dx_TD, _, dweights = swiglu_gradients(formats, residuals, dy_TD)
  return dx_TD, *(dw.astype(dtype) for dw in dweights)


_ffn.defvjp(_ffn_forward, _ffn_backward)
