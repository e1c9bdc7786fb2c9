"""The expert exchange out of explicit permutes: rows to the devices of their experts, and back summed.

A row is one token on its way to one device: its activations in the payload's format, its expert ids and
weights, packed into words (`wire.py`), so that a permute carries all of it. An exchange is a chain of
hops (`hop.py`):

  flat     one over (node, local): a token is sent once to every device that has experts of its own
  two_hop  one over `node`, to the device with the sender's `local` index, then one over `local`: a
           token crosses the slow links at most once per node (3.2.2, 3.5.1)
  ragged   as flat, without padding (`ragged.py`)

Nothing is sent twice to one place. Coming back, the experts' outputs of a token are summed on their
device, then by each forwarder, then at home, so that the combine is as lean as the dispatch.

The dispatch's gradient is a combine and the combine's a dispatch, along the same slots: the backward
sends FP8 where the forward did, and the gradients of the router's weights ride along.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.compat import zeros_like_varying
from dsv3_jax.parallel import ragged, wire
from dsv3_jax.parallel.hop import Hop, Leg, Parts, join, plan, sum_choices

Hops = list[Hop | ragged.RaggedHop]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sent:
  """Rows as they come off the last link. The zeros are never read: gradients go back through them."""

  packed: Parts
  zeros: tuple[
    jax.Array, jax.Array
  ]  # like the activations [R, D] and the weights [R, K] in the rows
  hops: Hops


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Arrived:
  """Rows on the device of their experts."""

  x_RD: jax.Array
  ids_RK: jax.Array  # int32, of the experts here; one past the last is "not here"
  weight_RK: jax.Array  # 0 where not here
  hops: Hops  # the way back


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Loaded:
  """Outputs in the combine's format. Gradients come back through the zeros as they come off the link."""

  rows_RX: jax.Array
  zeros: Parts  # words as floats
  dim: int = dataclasses.field(metadata={'static': True})
  dtype: jnp.dtype = dataclasses.field(metadata={'static': True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Returned:
  """Rows as they come off the last link on the way back; zeros as in `Sent`."""

  rows: Parts
  zeros_TD: jax.Array
  hop: Hop | ragged.RaggedHop


def hold(x: Any, beside: Any) -> tuple[Any, Any]:
  """Both, once both are there: what is computed beside an exchange, here, ends with its hop.

  So one hop of an exchange stands beside one piece of other work, and the scheduler cannot put all the
  work beside the last hop. Its gradient holds the backward likewise. XLA:CPU drops the barrier. Rows are
  held as they come off the link: with their decoding in between, schedulers put the work behind it.
  """
  if not jax.tree.leaves(beside):
    return x, beside
  return lax.optimization_barrier((x, beside))


@dataclasses.dataclass(frozen=True)
class Exchange:
  """A chain of hops with its formats. Static: what varies from batch to batch is in the hops.

  Five steps, each with what is computed `beside` it, held when the step's last hop is through (`arrive`,
  `home`), between its hops (`send`, `back`) or before them (`load`: what the way back stands beside starts
  there, and ends there in the backward).
  """

  legs: tuple[Leg, ...]
  here: int  # experts of one device
  payload: str  # wire format of activations on their way to experts, and of gradients of outputs
  combine: str  # wire format of outputs on their way back, and of gradients of activations

  def send(
    self, x_TD: jax.Array, ids_TK: jax.Array, weight_TK: jax.Array, beside: Any = ()
  ) -> tuple[Sent, Any]:
    """Rows on their way to their experts; ids of -1 are sent nowhere."""
    return _send(self, x_TD, ids_TK, weight_TK, beside)

  def arrive(self, sent: Sent, beside: Any = ()) -> tuple[Arrived, Any]:
    """The rows, decoded."""
    return _arrive(self, sent, beside)

  def load(self, arrived: Arrived, y_RD: jax.Array, beside: Any = ()) -> tuple[Loaded, Any]:
    """The rows' outputs, coded for their way home."""
    return _load(self, arrived.hops, y_RD, beside)

  def back(self, arrived: Arrived, loaded: Loaded, beside: Any = ()) -> tuple[Returned, Any]:
    """The rows' outputs on their way home, summed at every forwarder."""
    return _back(self, arrived.hops, loaded, beside)

  def home(self, returned: Returned, beside: Any = ()) -> tuple[jax.Array, Any]:
    """Sums of the outputs -> [T, D], zeros for tokens that were not sent."""
    return _home(self, returned, beside)

  # ---- both directions, without gradients --------------------------------------------------------

  def _out(self, x_TD, ids_TK, weight_TK, beside):
    """Packed rows in the last hop's slots, and the hops."""
    D, K = x_TD.shape[1], ids_TK.shape[1]
    rows = wire.encode(x_TD, self.payload)
    first, packed, hops = 0, None, []  # first: the first expert of the devices still in reach
    for leg in self.legs:
      if hops:
        packed, beside = hold(packed, beside)
        rows, ids_TK, weight_TK = self._unpack(join(packed), D, K, x_TD.dtype)
      per_member = leg.behind * self.here
      local_TK = ids_TK - first
      reachable = (local_TK >= 0) & (local_TK < per_member * lax.axis_size(leg.axes))
      make = ragged.plan if leg.ragged else plan
      hop = make(jnp.where(reachable, local_TK // per_member, -1), leg)
      # Ids one up: a slot without a row is zeros.
      packed = hop.spread(wire.pack(rows, (ids_TK + 1).astype(jnp.int16), weight_TK))
      first += per_member * lax.axis_index(leg.axes)
      hops.append(hop)
    packed, hops = checkpoint_name((packed, hops), 'dispatched')
    slots = sum(map(len, packed))
    zeros = lambda n, dtype: zeros_like_varying((slots, n), dtype, *packed)
    return Sent(packed, (zeros(D, x_TD.dtype), zeros(K, weight_TK.dtype)), hops), beside

  def _unpack(self, packed_RX, dim, top_k, dtype):
    words = wire.row_bytes(self.payload, dim, dtype) // packed_RX.dtype.itemsize
    likes = (words, packed_RX.dtype), (top_k, jnp.int16), (top_k, jnp.float32)
    rows, ids_RK, weight_RK = wire.unpack(packed_RX, *likes)
    return rows, ids_RK.astype(jnp.int32) - 1, weight_RK

  def _open(self, sent):
    like_x, like_weight = sent.zeros
    dim, top_k = like_x.shape[1], like_weight.shape[1]
    rows, ids_RK, weight_RK = self._unpack(join(sent.packed), dim, top_k, like_x.dtype)
    device = 0  # this one's number among all that the legs reach
    for leg in self.legs:
      device += leg.behind * lax.axis_index(leg.axes)
    local_RK = ids_RK - device * self.here
    mine_RK = (local_RK >= 0) & (local_RK < self.here)
    return Arrived(
      wire.decode(rows, self.payload, dim, like_x.dtype),
      jnp.where(mine_RK, local_RK, self.here),
      jnp.where(mine_RK, weight_RK, 0),
      sent.hops,
    )

  def _again(self, hops, x_TD, beside):
    """`_out` along slots that are known already, activations alone, as they come off the last link."""
    rows, parts = wire.encode(x_TD, self.payload), None
    for hop in hops:
      if parts:
        parts, beside = hold(parts, beside)
        rows = join(parts)
      parts = hop.spread(rows)
    return parts, beside

  def _return(self, hops, rows_RX, dim, dtype, extra_RK, beside):
    """Rows with all that they bring, in the first hop's slots at home; `extra_RK`: FP32, or None.

    Sums at forwarders are in FP32; extras are never rounded.
    """
    parts, back = None, None
    for hop in reversed(hops):
      if back is not None:
        parts, beside = hold(parts, beside)
        y_RD, extra_RK = self._sum(parts, dim, dtype, extra_RK, back)
        rows_RX = wire.encode(y_RD, self.combine)
      parts = hop.collect(rows_RX if extra_RK is None else wire.pack(rows_RX, extra_RK))
      back = hop
    return parts, beside

  def _sum(self, parts, dim, dtype, like_extra, hop):
    """What rows bring, summed over each token's -> [T, D], and [T, K] where extras ride along."""
    rows_SX, extra_TK = join(parts), None
    if like_extra is not None:
      words = wire.row_bytes(self.combine, dim, dtype) // rows_SX.dtype.itemsize
      likes = (words, rows_SX.dtype), (like_extra.shape[1], jnp.float32)
      rows_SX, extra_SK = wire.unpack(rows_SX, *likes)
      extra_TK = sum_choices(extra_SK, hop.place_TK)
    y_SD = wire.decode(rows_SX, self.combine, dim, dtype)
    return sum_choices(y_SD, hop.place_TK).astype(dtype), extra_TK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _send(exchange, x_TD, ids_TK, weight_TK, beside):
  return exchange._out(x_TD, ids_TK, weight_TK, beside)


def _send_forward(exchange, x_TD, ids_TK, weight_TK, beside):
  sent, beside = exchange._out(x_TD, ids_TK, weight_TK, beside)
  return (sent, beside), sent.hops


def _send_backward(exchange, hops, cotangents):
  sent, beside = cotangents
  dx_RD, dweight_RK = sent.zeros
  dim, dtype = dx_RD.shape[1], dx_RD.dtype
  rows_RX = wire.encode(dx_RD, exchange.combine)
  parts, beside = exchange._return(hops, rows_RX, dim, dtype, dweight_RK, beside)
  dx_TD, dweight_TK = exchange._sum(parts, dim, dtype, dweight_RK, hops[0])
  return dx_TD, None, dweight_TK, beside


_send.defvjp(_send_forward, _send_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _arrive(exchange, sent, beside):
  packed, beside = hold(sent.packed, beside)
  return exchange._open(dataclasses.replace(sent, packed=packed)), beside


def _arrive_backward(exchange, mine_RK, cotangents):
  arrived, beside = cotangents
  dweight_RK = jnp.where(mine_RK, arrived.weight_RK, 0)
  zeros, beside = hold((arrived.x_RD, dweight_RK), beside)
  return Sent(None, zeros, None), beside


def _arrive_forward(exchange, sent, beside):
  arrived, beside = _arrive(exchange, sent, beside)
  return (arrived, beside), arrived.ids_RK < exchange.here


_arrive.defvjp(_arrive_forward, _arrive_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _load(exchange, hops, y_RD, beside):
  y_RD, beside = hold(y_RD, beside)
  (R, dim), dtype = y_RD.shape, y_RD.dtype
  word = wire.row_word(exchange.payload, dim, dtype)
  words = wire.row_bytes(exchange.payload, dim, dtype) // word.itemsize
  part = zeros_like_varying((R // hops[-1].parts, words), word, y_RD)
  zeros = (wire.as_float(part),) * hops[-1].parts
  return Loaded(wire.encode(y_RD, exchange.combine), zeros, dim, dtype), beside


def _load_forward(exchange, hops, y_RD, beside):
  return _load(exchange, hops, y_RD, beside), None


def _load_backward(exchange, _, cotangents):
  loaded, beside = cotangents
  parts, beside = hold(loaded.zeros, beside)
  rows_RX = join(tuple(map(wire.as_words, parts)))
  return None, wire.decode(rows_RX, exchange.payload, loaded.dim, loaded.dtype), beside


_load.defvjp(_load_forward, _load_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _back(exchange, hops, loaded, beside):
  dim, dtype = loaded.dim, loaded.dtype
  parts, beside = exchange._return(hops, loaded.rows_RX, dim, dtype, None, beside)
  zeros_TD = zeros_like_varying((hops[0].place_TK.shape[0], dim), dtype, *parts)
  return Returned(parts, zeros_TD, hops[0]), beside


def _back_forward(exchange, hops, loaded, beside):
  return _back(exchange, hops, loaded, beside), hops


def _back_backward(exchange, hops, cotangents):
  returned, beside = cotangents
  dy_TD = returned.zeros_TD
  parts, beside = exchange._again(hops, dy_TD, beside)
  return None, Loaded(None, tuple(map(wire.as_float, parts)), dy_TD.shape[1], dy_TD.dtype), beside


_back.defvjp(_back_forward, _back_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _home(exchange, returned, beside):
  parts, beside = hold(returned.rows, beside)
  dim, dtype = returned.zeros_TD.shape[1], returned.zeros_TD.dtype
  return exchange._sum(parts, dim, dtype, None, returned.hop)[0], beside


def _home_forward(exchange, returned, beside):
  return _home(exchange, returned, beside), None


def _home_backward(exchange, _, cotangents):
  dy_TD, beside = hold(*cotangents)
  return Returned(None, dy_TD, None), beside


_home.defvjp(_home_forward, _home_backward)
