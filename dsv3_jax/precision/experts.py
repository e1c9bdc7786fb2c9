"""The SwiGLU experts of one device in FP8, dropless: `kernels/expert_ffn` with FP8 GEMMs.

1. Each expert gets slots for its (token, choice) pairs, from a multiple of 128 on (`aligned_starts`).
2. Tokens are quantised once, by powers of two: what came in FP8 keeps its very codes (3.3.2), and the
   payload's quantisation is the only one. Slots gather codes; slots without a pair hold zeros.
3. Grouped GEMMs; the router's weight multiplies inside SwiGLU, before the down-projection.
4. The K results of each token are added up, by a gather, in a step of its own.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dsv3_jax import compat
from dsv3_jax.kernels.grouped_matmul import aligned_slots, aligned_starts
from dsv3_jax.kernels.quantize import SMALLEST_FLOOR, quantize_tiles
from dsv3_jax.precision import fp8
from dsv3_jax.precision.formats import Fp8


def expert_slots(
  formats: Fp8,
  x_TD: jax.Array,
  ids_TK: jax.Array,
  weight_TK: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  *,
  bound: int | None = None,
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
  """Outputs at their slots [S, D], and what sums them over a token's choices -> [T, D].

  Arguments as those of `kernels.expert_ffn.expert_slots`.
  """
  how = How(formats, len(gate_EDF), bound, gate_EDF.dtype, weight_TK.dtype)
  arrays = x_TD, ids_TK, weight_TK, gate_EDF, up_EDF, down_EFD
  y_SD = _experts(how, *compat.vary_like(arrays, *arrays))
  return y_SD, lambda y_SD: _sum(how, y_SD, ids_TK)


@dataclasses.dataclass(frozen=True)
class How:
  """What is static about a call."""

  formats: Fp8
  num_experts: int
  bound: int | None  # at most so many pairs are here
  dtype: jnp.dtype  # of the experts' weights
  router_dtype: jnp.dtype  # of the router's


class _Slots:
  """Where each pair lies; `pair_S` is T*K in slots without one, and `slot_TK` is S for pairs not here."""

  def __init__(self, how: How, ids_TK: jax.Array) -> None:
    E, pairs = how.num_experts, ids_TK.size
    self.slots = aligned_slots(pairs if how.bound is None else min(how.bound, pairs), E)
    flat_P = ids_TK.reshape(-1)
    order_P = jnp.argsort(flat_P, stable=True).astype(jnp.int32)
    experts_E = jnp.arange(E + 1, dtype=ids_TK.dtype)
    edges = jnp.searchsorted(flat_P, experts_E, sorter=order_P, method='compare_all')
    first_E = edges[:-1].astype(jnp.int32)
    self.sizes_E = jnp.diff(edges).astype(jnp.int32)
    expert_P = jnp.minimum(flat_P[order_P], E - 1)
    rank_P = jnp.arange(pairs, dtype=jnp.int32) - first_E[expert_P]
    place_P = aligned_starts(self.sizes_E)[expert_P] + rank_P
    place_P = jnp.where(flat_P[order_P] < E, place_P, self.slots)
    empty_S = jnp.full((self.slots,), pairs, jnp.int32)
    self.pair_S = empty_S.at[place_P].set(order_P, mode='drop', unique_indices=False)
    slot_P = jnp.zeros_like(order_P).at[order_P].set(place_P, unique_indices=True)
    self.slot_TK = slot_P.reshape(ids_TK.shape)
    self.token_S = self.pair_S // ids_TK.shape[1]  # T where there is none

  def sum_choices(self, y_SD: jax.Array) -> jax.Array:
    """In FP32 -> [T, D] in y's dtype."""
    total_TD = 0.0
    for k in range(self.slot_TK.shape[1]):
      total_TD += _take(y_SD, self.slot_TK[:, k]).astype(jnp.float32)
    return total_TD.astype(y_SD.dtype)


def _take(x_TX: jax.Array, index_S: jax.Array) -> jax.Array:
  """Rows by index, zeros for those past the end."""
  return x_TX.at[index_S].get(mode='fill', fill_value=0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(how, x_TD, ids_TK, weight_TK, *weights):
  return _forward(how, x_TD, ids_TK, weight_TK, *weights)[0]


def _forward(how, x_TD, ids_TK, weight_TK, *weights):
  slots = _Slots(how, ids_TK)
  codes_TD, scale_TS = quantize_tiles(x_TD, floor=SMALLEST_FLOOR)
  x = _take_codes(codes_TD, slots.token_S), _take(scale_TS, slots.token_S)
  weight_S = _take(weight_TK.reshape(-1), slots.pair_S).astype(jnp.float32)
  y_SD, residuals = fp8.swiglu(how.formats, x, weight_S, *weights, slots.sizes_E, x_TD.dtype)
  return y_SD, (residuals, ids_TK)


def _take_codes(codes_TD: jax.Array, index_S: jax.Array) -> jax.Array:
  """As bytes: a zero byte is zero, and no backend gathers FP8 worse than bytes."""
  bytes_TD = jax.lax.bitcast_convert_type(codes_TD, jnp.uint8)
  return jax.lax.bitcast_convert_type(_take(bytes_TD, index_S), codes_TD.dtype)


def _backward(how, residuals, dy_SD):
  residuals, ids_TK = residuals
  dx_SD, dweight_S, dweights = fp8.swiglu_gradients(how.formats, residuals, dy_SD)
  slots = _Slots(how, ids_TK)
  dweight_TK = _take(dweight_S, slots.slot_TK).astype(how.router_dtype)
  return slots.sum_choices(dx_SD), None, dweight_TK, *(d.astype(how.dtype) for d in dweights)


_experts.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(how, y_SD, ids_TK):
  return _Slots(how, ids_TK).sum_choices(y_SD)


_sum.defvjp(
  lambda how, y_SD, ids_TK: (_sum(how, y_SD, ids_TK), ids_TK),
  lambda how, ids_TK, dy_TD: (_take(dy_TD, _Slots(how, ids_TK).token_S), None),
)
