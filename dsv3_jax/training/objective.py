"""The training loss: CE + lambda/D * MTP + alpha * sequence-wise balance (2.1.2, 2.2, 4.2).

Everything is a sum over this device's tokens, divided by numbers of the whole step, so that adding up
over micro-batches and devices gives the loss of the global batch. All terms leave as return values.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dsv3_jax import config
from dsv3_jax.kernels.cross_entropy import cross_entropy
from dsv3_jax.model.transformer import Transformer, Unshard, whole
from dsv3_jax.parallel.dispatch import Traffic


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Terms:
  """This device's share of each term; `counts` in the tree structure of the router biases."""

  ce: jax.Array  # nats per token
  mtp_K: jax.Array  # nats per token, one for each depth; each divided by all tokens (eq. 24)
  balance: jax.Array  # alpha excluded; mean over sequences of the sum over layers
  counts: Any  # int32 tokens per expert
  traffic: Traffic  # of every layer with experts, MTP's last; sums over dispatches


def objective(
  c: config.Config,
  model: Transformer,
  tokens_BX: jax.Array,
  mtp_weight: jax.Array,
  sequences: jax.Array,
  *,
  unshard: Unshard = whole,
) -> tuple[jax.Array, Terms]:
  """Loss and terms of rows of seq_len + 1 tokens; `sequences`: how many the whole step has.

  Inputs are a row without its last token, targets without its first. MTP depth k predicts the token
  k + 1 ahead, from all positions but the last k; its sum is divided by all positions, as eq. 24 does.
  """
  m = c.model
  L = tokens_BX.shape[1] - 1
  share = 1.0 / (sequences.astype(jnp.float32) * L)
  embed_BLD = model.embed(m, tokens_BX[:, :-1])
  hidden_BLD, routing_Y = model.hidden(m, embed_BLD, unshard=unshard)
  head_DV = model.head_DV[...].astype(hidden_BLD.dtype)
  loss = lambda hidden_BLD, depth: share * nats(hidden_BLD, head_DV, tokens_BX, depth)

  ce = loss(hidden_BLD, 0)
  balance = jnp.sum(routing_Y.balance)
  counts = {'moe_layers': {'ffn': {'bias_E': routing_Y.counts_E}}}
  traffic = routing_Y.traffic
  mtp_K = jnp.zeros((0,), jnp.float32)
  total = ce
  if m.mtp_depth:
    hiddens, routing_K = model.predict_further(m, hidden_BLD, embed_BLD, unshard=unshard)
    mtp_K = jnp.stack([loss(h, depth) for depth, h in enumerate(hiddens, 1)])
    balance += jnp.sum(routing_K.balance)
    counts['mtp'] = {'block': {'ffn': {'bias_E': routing_K.counts_E}}}
    traffic = jax.tree.map(lambda *xs: jnp.concatenate(xs), traffic, routing_K.traffic)
    total += mtp_weight * jnp.mean(mtp_K)
  balance = balance / sequences.astype(jnp.float32)
  total += c.objective.balance_alpha * balance
  return total, Terms(ce, mtp_K, balance, counts, traffic)


def nats(hidden_BLD: jax.Array, head_DV: jax.Array, tokens_BX: jax.Array, depth: int) -> jax.Array:
  """Sum of cross entropies of the tokens depth + 1 ahead, from all positions but the last `depth`."""
  L = hidden_BLD.shape[1]
  target_BL = jnp.roll(tokens_BX, -depth - 1, axis=1)[:, :L]
  position_L = jnp.arange(L, dtype=jnp.int32)
  weight_BL = jnp.broadcast_to(position_L < L - depth, target_BL.shape).astype(jnp.float32)
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  return cross_entropy(flat(hidden_BLD), head_DV, flat(target_BL), flat(weight_BL))
