"""The leg of an exchange by `lax.ragged_all_to_all`: no padding on the links, TPU and GPU only.

Rows lie in order of their members on the way out, and in order of their senders where they arrive; one
gather of everybody's counts says where. XLA:CPU cannot run it (ThunkEmitter: 'HLO opcode
`ragged-all-to-all` is not supported'). On GPUs it has had faults: wrong gradients by the one-shot
lowering, illegal addresses above 32 ranks (openxla/xla 47283, 47146).
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax import compat
from dsv3_jax.parallel import hop


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RaggedHop:
  """As `hop.Hop`; the slots of the sending end and of the receiving end are different ones."""

  send_S: jax.Array  # int32 [S]: rows to send, in order of their members; T behind the last
  place_TK: jax.Array  # int32 [T, K]: the slot of each choice's row here; out of range for none
  count_nn: jax.Array  # int32: rows from each sender to each receiver, the same on every device
  axes: tuple[str, ...] = dataclasses.field(metadata={'static': True})
  received: int = dataclasses.field(metadata={'static': True})  # slots for rows that arrive

  @property
  def parts(self) -> int:
    return 1

  def spread(self, rows_TX: jax.Array) -> hop.Parts:
    """Rows to their members -> one part [received, X], zeros behind the last."""
    me, start_nn, arrives_nn = self._offsets()
    return self._exchange(
      hop.take(rows_TX, self.send_S),
      self.received,
      input_offsets=start_nn[me],
      send_sizes=self.count_nn[me],
      output_offsets=arrives_nn[me],
      recv_sizes=self.count_nn[:, me],
    )

  def collect(self, rows_RX: jax.Array) -> hop.Parts:
    """The members' rows, in the slots of `spread`, back where they came from -> one part [S, X]."""
    me, start_nn, arrives_nn = self._offsets()
    return self._exchange(
      rows_RX,
      self.send_S.shape[0],
      input_offsets=arrives_nn[:, me],
      send_sizes=self.count_nn[:, me],
      output_offsets=start_nn[:, me],
      recv_sizes=self.count_nn[me],
    )

  def _offsets(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """This device; where rows for each receiver start at a sender; where they arrive."""
    before = lambda axis: jnp.cumsum(self.count_nn, axis, dtype=jnp.int32) - self.count_nn
    return lax.axis_index(self.axes), before(1), before(0)

  def _exchange(self, rows_SX: jax.Array, slots: int, **where: jax.Array) -> hop.Parts:
    empty = compat.zeros_like_varying((slots, rows_SX.shape[1]), rows_SX.dtype, rows_SX)
    return (lax.ragged_all_to_all(rows_SX, empty, **where, axis_name=self.axes),)


def plan(member_TK: jax.Array, leg: hop.Leg) -> RaggedHop:
  """Slots for rows whose K choices lead to members 0..n-1 of the leg; -1 leads nowhere.

  At most `leg.capacity` rows may arrive at any one member.
  """
  (T, K), n = member_TK.shape, lax.axis_size(leg.axes)
  goes_TK, rank_TK, count_n = hop.ranks(member_TK, n)
  start_n = jnp.cumsum(count_n, dtype=jnp.int32) - count_n
  slots = T * min(K, n)
  place_TK = jnp.where(goes_TK, start_n[jnp.maximum(member_TK, 0)] + rank_TK, slots)
  count_nn = lax.all_gather(count_n, leg.axes, axis=0)
  return RaggedHop(hop.fill(place_TK, slots), place_TK, count_nn, leg.axes, leg.capacity)
