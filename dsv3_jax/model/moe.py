"""DeepSeekMoE (2.1.2): the router, its balance loss, and the layer of shared and routed experts.

Two rules, by `moe.scoring`:
- 'sigmoid' (V3): affinity s = sigmoid(x . e). Experts are *selected* by s + bias among the `top_groups`
  groups with the largest sum of their two best biased scores, and *weighted* by s alone.
- 'softmax' (V2): affinity s = softmax(x . e), no bias, a group counts by its best score.
Masked experts get -inf, not 0: biased scores may be negative (DeepSeek-V3 issue 741).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax import config
from dsv3_jax.mesh import EXPERTS
from dsv3_jax.model.layers import Ffn, RouterBias, normal
from dsv3_jax.parallel.dispatch import Experts, Outputs, Traffic, Trip
from dsv3_jax.precision import recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """What one layer chose on one device's rows; statistics of more rows are sums."""

  ids_BLK: jax.Array  # int32: experts of each token, best first; where nobody asks XLA drops them
  counts_E: jax.Array  # int32: how many valid tokens chose each expert
  balance: jax.Array  # float32: sum over sequences of the sequence-wise loss, alpha excluded
  traffic: Traffic | None  # where the tokens went, all of them; None until they are back


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
  """Where the experts of a layer lie if not in order, one or several copies of each (`placement`)."""

  slot_EC: jax.Array  # int32
  copies_E: jax.Array  # int32

  def choose(self, ids_TK: jax.Array) -> jax.Array:
    """Slots of the chosen experts; a token's row picks the copies, so that these share the load."""
    row_T1 = jnp.arange(len(ids_TK), dtype=jnp.int32)[:, None]
    return self.slot_EC[ids_TK, row_T1 % self.copies_E[ids_TK]]


def merge(a: Routing | None, b: Routing | None) -> Routing | None:
  """Routing of one layer that saw its rows in two parts, a before b; a dense layer has none."""
  if a is None or b is None:
    return None
  both = jax.tree.map(jnp.add, a, b)
  return dataclasses.replace(both, ids_BLK=jnp.concatenate([a.ids_BLK, b.ids_BLK]))


def route(
  c: config.Moe, x_TD: jax.Array, router_DE: jax.Array, bias_E: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Chosen experts, int32 [T, K], best first; their weights, float32 [T, K]; affinities, float32 [T, E]."""
  # FP32, as transformers computes it: near ties decide which experts a token sees.
  logits_TE = jnp.dot(x_TD.astype(jnp.float32), router_DE)
  if c.scoring == 'sigmoid':
    affinity_TE = jax.nn.sigmoid(logits_TE)
    score_TE = affinity_TE + bias_E[None]
  else:
    affinity_TE = jax.nn.softmax(logits_TE)
    score_TE = affinity_TE
  score_TE = lax.stop_gradient(score_TE)
  if c.num_groups > 1:
    score_TE = _keep_groups(c, score_TE)
  ids_TK = lax.top_k(score_TE, c.top_k)[1]
  weight_TK = jnp.take_along_axis(affinity_TE, ids_TK, axis=1)
  if c.normalize:
    weight_TK = weight_TK / jnp.sum(weight_TK, axis=1, keepdims=True)
  return ids_TK, weight_TK * c.route_scale, affinity_TE


def _keep_groups(c: config.Moe, score_TE: jax.Array) -> jax.Array:
  """-inf outside the `top_groups` best groups of contiguous experts."""
  score_TGe = score_TE.reshape(len(score_TE), c.num_groups, -1)
  per_group = 2 if c.scoring == 'sigmoid' else 1
  group_TG = jnp.sum(lax.top_k(score_TGe, per_group)[0], axis=2)
  kept_TM = lax.top_k(group_TG, c.top_groups)[1]
  kept_TG = jnp.any(kept_TM[:, :, None] == jnp.arange(c.num_groups)[None, None], axis=1)
  return jnp.where(kept_TG[:, :, None], score_TGe, -jnp.inf).reshape(score_TE.shape)


def balance_loss(c: config.Moe, affinity_BLE: jax.Array, valid_BL: jax.Array) -> jax.Array:
  """Sum over sequences of sum_i f_i P_i (eq. 17-20), over the valid tokens of each.

  f_i counts tokens whose top K of the plain affinities contain i: no bias, no groups, as eq. 18 writes
  it. The gradient flows through P alone.
  """
  E = c.num_experts
  top_BLK = lax.top_k(lax.stop_gradient(affinity_BLE), c.top_k)[1]
  valid_BL1 = valid_BL[:, :, None].astype(jnp.float32)
  length_B1 = jnp.sum(valid_BL1, axis=1)
  chosen_BE = jnp.sum(jnp.sum(jax.nn.one_hot(top_BLK, E), axis=2) * valid_BL1, axis=1)
  fraction_BE = chosen_BE * E / (c.top_k * length_B1)
  share_BLE = affinity_BLE / jnp.sum(affinity_BLE, axis=2, keepdims=True)
  prob_BE = jnp.sum(share_BLE * valid_BL1, axis=1) / length_B1
  return jnp.sum(fraction_BE * prob_BE)


class Moe(nnx.Module):
  def __init__(self, c: config.Model, key: jax.Array) -> None:
    m, std = c.moe, c.init_std
    keys = jax.random.split(key, 5)
    self.router_DE = normal(keys[0], (c.dim, m.num_experts), std)
    self.bias_E = RouterBias(jnp.zeros((m.num_experts,), jnp.float32))
    self.gate_EDF = normal(keys[1], (m.num_experts, c.dim, m.expert_dim), std)
    self.up_EDF = normal(keys[2], (m.num_experts, c.dim, m.expert_dim), std)
    self.down_EFD = normal(keys[3], (m.num_experts, m.expert_dim, c.dim), std)
    if m.num_shared:
      self.shared = Ffn(c.dim, m.num_shared * m.expert_dim, std, keys[4])

  def __call__(
    self,
    c: config.Model,
    x_BLD: jax.Array,
    valid_BL: jax.Array,
    slots: Slots | None = None,
    *,
    implementation: str = 'xla',
  ) -> tuple[jax.Array, Routing]:
    """shared(x) + sum of the chosen experts, without the residual; statistics over the valid tokens.

    `slots`: where the experts lie; in order without. Statistics are of experts, wherever they are.
    `implementation`: of `kernels.expert_ffn`.
    """
    trip, routing = self.start(c, x_BLD, valid_BL, slots)
    y_TD = trip.there_and_back(experts(c, implementation), self.expert_weights(c))
    shared_BLD = self.shared_output(c, x_BLD)
    return self.finish(c, trip, y_TD, shared_BLD, routing, implementation=implementation)

  def start(
    self, c: config.Model, x_BLD: jax.Array, valid_BL: jax.Array, slots: Slots | None = None
  ) -> tuple[Trip, Routing]:
    """Where every token goes; nothing has been sent yet, and the traffic is not known."""
    B, L, D = x_BLD.shape
    x_TD = x_BLD.reshape(-1, D)
    ids_TK, weight_TK, affinity_TE = route(c.moe, x_TD, self.router_DE[...], self.bias_E[...])
    ids_TK = checkpoint_name(ids_TK, 'routing')
    weight_TK = checkpoint_name(weight_TK, 'routing')
    chosen_TKE = ids_TK[:, :, None] == jnp.arange(c.moe.num_experts, dtype=jnp.int32)[None, None]
    counts_E = jnp.sum(
      chosen_TKE & valid_BL.reshape(-1)[:, None, None], axis=(0, 1), dtype=jnp.int32
    )
    balance = balance_loss(c.moe, affinity_TE.reshape(B, L, -1), valid_BL)
    moe, slot_TK = c.moe, ids_TK
    if slots:
      here = len(self.gate_EDF[...])
      moe = dataclasses.replace(moe, num_experts=here * lax.axis_size(EXPERTS))
      slot_TK = slots.choose(ids_TK)
    trip = Trip.start(moe, x_TD, slot_TK, weight_TK)
    return trip, Routing(ids_TK.reshape(B, L, -1), counts_E, balance, None)

  def expert_weights(self, c: config.Model) -> list[jax.Array]:
    """What `experts` takes first: the matrices of this device's experts."""
    dtype = recipe.weight_dtype(c.precision)
    return [w[...].astype(dtype) for w in (self.gate_EDF, self.up_EDF, self.down_EFD)]

  def shared_output(self, c: config.Model, x_BLD: jax.Array) -> jax.Array:
    return self.shared(c, x_BLD) if c.moe.num_shared else jnp.zeros_like(x_BLD)

  def finish(
    self,
    c: config.Model,
    trip: Trip,
    y_TD: jax.Array,
    shared_BLD: jax.Array,
    routing: Routing,
    *,
    implementation: str = 'xla',
  ) -> tuple[jax.Array, Routing]:
    """Adds what came in further rounds, and the shared experts."""
    y_TD, traffic = trip.finish(y_TD, experts(c, implementation), self.expert_weights(c))
    return y_TD.reshape(shared_BLD.shape) + shared_BLD, dataclasses.replace(
      routing, traffic=traffic
    )


def experts(c: config.Model, implementation: str = 'xla') -> Experts:
  """How this device's experts are run, as the dispatch calls it."""
  how = 'reference' if c.moe.dispatch.form == 'dense' else implementation
  return functools.partial(_experts, c.precision, how)


def _experts(
  precision: str,
  how: str,
  weights: list[jax.Array],
  x_tD: jax.Array,
  ids_tK: jax.Array,
  weight_tK: jax.Array,
  bound: int | None,
) -> Outputs:
  return recipe.expert_slots(precision, how, x_tD, ids_tK, weight_tK, *weights, bound=bound)
