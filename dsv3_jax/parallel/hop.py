"""One leg of an exchange: rows to the members of some mesh axes, and back, by explicit permutes.

A row goes once to each member that any of its K choices leads to. Slots are filled by gathers in a fixed
order, with no scatter of rows: the same bits every time. Buffers have fixed sizes; `rounds.py` sees to it
that no round overflows them.

Rows come off the links in parts, one from each member, and `join` puts them side by side: what is to end
with the exchange is held before that, or schedulers for TPU take the copy first and put the work behind it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

Parts = tuple[jax.Array, ...]  # rows as they come off the links


@dataclasses.dataclass(frozen=True)
class Leg:
  """Where a hop goes: along `axes`, to members with `behind` devices each.

  `capacity`: rows to each member. `ragged`: one buffer of so many rows for all that arrive.
  """

  axes: tuple[str, ...]
  behind: int
  capacity: int
  ragged: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hop:
  """n members with `capacity` slots each; block k of the slots goes k members on.

  At the other end the slots are the same: block k came from k members back.
  """

  send_S: jax.Array  # int32 [n capacity]: which row lies in each slot; T where none does
  place_TK: (
    jax.Array
  )  # int32 [T, K]: the slot of the row sent for each choice; out of range for none
  axes: tuple[str, ...] = dataclasses.field(metadata={'static': True})

  @property
  def parts(self) -> int:
    """Into how many equal parts rows come off the links."""
    return lax.axis_size(self.axes)

  def spread(self, rows_TX: jax.Array) -> Parts:
    """Rows to their members -> n of [capacity, X], zeros in slots without one."""
    return self._rotate(take(rows_TX, self.send_S), 1)

  def collect(self, rows_SX: jax.Array) -> Parts:
    """The members' rows, in the slots of `spread`, back where they came from -> n of [capacity, X]."""
    return self._rotate(rows_SX, -1)

  def _rotate(self, rows_SX: jax.Array, direction: int) -> Parts:
    n = lax.axis_size(self.axes)
    blocks = jnp.split(rows_SX, n)
    for k in range(1, n):
      pairs = [(i, (i + direction * k) % n) for i in range(n)]
      blocks[k] = lax.ppermute(blocks[k], self.axes, pairs)
    return tuple(blocks)


def join(parts: Parts) -> jax.Array:
  """Rows of all members side by side -> [S, X]."""
  return jnp.concatenate(parts)


def plan(member_TK: jax.Array, leg: Leg) -> Hop:
  """Slots for rows whose K choices lead to members 0..n-1 of the leg; -1 leads nowhere.

  At most `leg.capacity` rows may go to any one member.
  """
  n, capacity = lax.axis_size(leg.axes), leg.capacity
  offset_TK = jnp.where(member_TK >= 0, (member_TK - lax.axis_index(leg.axes)) % n, -1)
  goes_TK, rank_TK, _ = ranks(offset_TK, n)
  place_TK = jnp.where(goes_TK, offset_TK * capacity + rank_TK, n * capacity)
  return Hop(fill(place_TK, n * capacity), place_TK, leg.axes)


def ranks(member_TK: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Whether a row is sent for this choice, its rank among the rows to that member, rows to each [n].

  Of several choices that lead to one member the first counts; -1 leads nowhere.
  """
  K = member_TK.shape[1]
  each_n = jnp.arange(n, dtype=jnp.int32)[None, None]
  need_Tn = jnp.any(member_TK[:, :, None] == each_n, axis=1)
  total_Tn = jnp.cumsum(need_Tn, axis=0, dtype=jnp.int32)
  rank_TK = jnp.take_along_axis(total_Tn - 1, jnp.maximum(member_TK, 0), axis=1)
  earlier_KK = jnp.tril(jnp.ones((K, K), bool), -1)
  same_TKK = member_TK[:, :, None] == member_TK[:, None, :]
  goes_TK = (member_TK >= 0) & ~jnp.any(same_TKK & earlier_KK[None], axis=2)
  return goes_TK, rank_TK, total_Tn[-1]


def fill(place_TK: jax.Array, slots: int) -> jax.Array:
  """Which row lies in each slot -> int32 [slots]; T where none does."""
  T, K = place_TK.shape
  row_TK = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[:, None], (T, K))
  return jnp.full((slots,), T, jnp.int32).at[place_TK].set(row_TK, mode='drop')


def take(rows_TX: jax.Array, index: jax.Array) -> jax.Array:
  """Rows by index, zeros where it is out of range."""
  return rows_TX.at[index].get(mode='fill', fill_value=0)


def sum_choices(rows_SX: jax.Array, place_TK: jax.Array) -> jax.Array:
  """Sum over each row's choices of what lies at their slots, in FP32 -> [T, X]."""
  total_TX = take(rows_SX, place_TK[:, 0]).astype(jnp.float32)
  for k in range(1, place_TK.shape[1]):
    total_TX += take(rows_SX, place_TK[:, k]).astype(jnp.float32)
  return total_TX
