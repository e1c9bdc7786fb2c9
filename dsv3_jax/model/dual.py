"""Two halves of the rows out of step through one layer of experts (3.4.1, there for prefill).

| computes  | heads b | project b | half of experts a | other half | half of experts b | other half | shared a | shared b |
| exchanges | hop 1 a | hop 2 a   | hop 1 b           | hop 2 b    | hop 2 back a      | hop 1 back | 2 back b | 1 back b |

Each column starts when the one before it is through, forward, and from right to left backward, because
that is what the gradient of a barrier does. The barriers say what stands beside what; the compiler then
starts an exchange first and waits for it last. Without them it computes all there is to compute beside
the first exchange, or none beside most. An exchange of one hop takes the place of both.

What needs further rounds comes last, when nothing else is under way.
"""

import functools
from typing import Any

import jax

from dsv3_jax import config
from dsv3_jax.model import moe
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.parallel.dispatch import Trip
from dsv3_jax.parallel.exchange import hold


def run(
  c: config.Model,
  block: Any,
  parts: tuple[Any, ...],
  valids: tuple[jax.Array, ...],
  slots: moe.Slots | None = None,
  *,
  implementation: str = 'xla',
) -> tuple[tuple[jax.Array, ...], moe.Routing]:
  """`block`, with experts, on both halves -> [B/2, L, D] each; statistics of all rows.

  A half is what the block's attention takes: [B/2, L, D] of `transformer.Block` in training, queries over
  a cache in generation (`inference.layer`). `slots`, `implementation`: as `moe.Moe` takes them.
  """
  (a_part, b_part), (a_valid_BL, b_valid_BL) = parts, valids
  ffn, experts = block.ffn, moe.experts(c, implementation)
  weights = ffn.expert_weights(c)

  def start(x_BLD: jax.Array, valid_BL: jax.Array) -> tuple[Trip, moe.Routing]:
    return ffn.start(c, rms_norm(x_BLD, block.ffn_norm_D[...], c.norm_eps), valid_BL, slots)

  def shared(x_TD: jax.Array) -> jax.Array:
    return ffn.shared_output(c, x_TD.reshape(a_BLD.shape))

  a_BLD = block.attend(c, a_part)
  a_trip, a_routing = start(a_BLD, a_valid_BL)
  held, b_part = hold(a_trip.held, b_part)
  a_trip = a_trip.after(held)
  # ---- out a, attention b
  a_sent, heads_BLNV = a_trip.send(beside=block.heads(c, b_part))
  b_BLD = block.add_attention(c, b_part, heads_BLNV)
  b_trip, b_routing = start(b_BLD, b_valid_BL)
  a_arrived, held = a_trip.arrive(a_sent, beside=b_trip.held)
  b_trip = b_trip.after(held)
  # ---- out b, experts a
  first, second = a_trip.run_halves(a_arrived, experts, weights)
  x_RD = a_arrived.x_RD
  some, a_total = first(x_RD)
  b_sent, (x_RD, some) = b_trip.send(beside=(x_RD, some))
  others, a_other_total = second(x_RD)
  b_arrived, (some, others) = b_trip.arrive(b_sent, beside=(some, others))
  a_RD = a_total(some) + a_other_total(others)
  # ---- back a, experts b
  first, second = b_trip.run_halves(b_arrived, experts, weights)
  a_loaded, x_RD = a_trip.load(a_arrived, a_RD, beside=b_arrived.x_RD)
  some, b_total = first(x_RD)
  a_returned, (x_RD, some) = a_trip.back(a_arrived, a_loaded, beside=(x_RD, some))
  others, b_other_total = second(x_RD)
  a_TD, (some, others, a_x_TD) = a_trip.home(a_returned, beside=(some, others, a_trip.x_TD))
  b_RD = b_total(some) + b_other_total(others)
  b_loaded, a_x_TD = b_trip.load(b_arrived, b_RD, beside=a_x_TD)
  # ---- back b, shared experts
  b_returned, (b_x_TD, a_shared_BLD) = b_trip.back(
    b_arrived, b_loaded, beside=(b_trip.x_TD, shared(a_x_TD))
  )
  b_TD, b_shared_BLD = b_trip.home(b_returned, beside=shared(b_x_TD))
  # ---- further rounds
  finish = functools.partial(ffn.finish, c, implementation=implementation)
  a_more_BLD, a_routing = finish(a_trip, a_TD, a_shared_BLD, a_routing)
  b_more_BLD, b_routing = finish(b_trip, b_TD, b_shared_BLD, b_routing)
  return (a_BLD + a_more_BLD, b_BLD + b_more_BLD), moe.merge(a_routing, b_routing)
