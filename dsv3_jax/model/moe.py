"""DeepSeekMoE (2.1.2): the router, its balance loss, and the layer of shared and routed experts.

Two rules, by `moe.scoring`:
- 'sigmoid' (V3): affinity s = sigmoid(x . e). Experts are *selected* by s + bias among the `top_groups`
  groups with the largest sum of their two best biased scores, and *weighted* by s alone.
- 'softmax' (V2): affinity s = softmax(x . e), no bias, a group counts by its best score.
Masked experts get -inf, not 0: biased scores may be negative (DeepSeek-V3 issue 741).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax import config
from dsv3_jax.kernels.expert_ffn import expert_ffn
from dsv3_jax.model.layers import Ffn, RouterBias, normal
from dsv3_jax.parallel.dispatch import dispatch


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
  """Statistics of one layer on one device's tokens."""

  counts_E: jax.Array  # int32: how many valid tokens chose each expert
  balance: jax.Array  # float32: sum over sequences of the sequence-wise loss, alpha excluded


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
    self, c: config.Model, x_BLD: jax.Array, valid_BL: jax.Array
  ) -> tuple[jax.Array, Routing]:
    """shared(x) + sum of the chosen experts, without the residual; statistics over the valid tokens."""
    B, L, D = x_BLD.shape
    x_TD = x_BLD.reshape(-1, D)
    ids_TK, weight_TK, affinity_TE = route(c.moe, x_TD, self.router_DE[...], self.bias_E[...])
    ids_TK = checkpoint_name(ids_TK, 'routing')
    weight_TK = checkpoint_name(weight_TK, 'routing')
    weights = [w[...].astype(x_TD.dtype) for w in (self.gate_EDF, self.up_EDF, self.down_EFD)]

    def experts(x_tD: jax.Array, ids_tK: jax.Array, weight_tK: jax.Array) -> jax.Array:
      how = 'reference' if c.moe.dispatch == 'dense' else 'xla'
      return expert_ffn(x_tD, ids_tK, weight_tK, *weights, implementation=how)

    y_BLD = dispatch(x_TD, ids_TK, weight_TK, experts, c.moe.num_experts).reshape(B, L, D)
    if c.moe.num_shared:
      y_BLD += self.shared(x_BLD)
    chosen_TKE = ids_TK[:, :, None] == jnp.arange(c.moe.num_experts, dtype=jnp.int32)[None, None]
    counts_E = jnp.sum(
      chosen_TKE & valid_BL.reshape(-1)[:, None, None], axis=(0, 1), dtype=jnp.int32
    )
    return y_BLD, Routing(counts_E, balance_loss(c.moe, affinity_TE.reshape(B, L, -1), valid_BL))
