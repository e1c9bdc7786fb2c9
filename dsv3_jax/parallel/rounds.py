"""Dropless exchange with bounded buffers: as many rounds as the routing of the moment needs.

Tokens are cut into up to 64 chunks, alike on every device. A round sends one run of chunks: the longest
after the last round's for which no buffer anywhere overflows. Whether one would follows from counts
alone, summed over those devices whose rows meet in it, so every device finds the same run (one `pmin`).
Ranks of a pipeline are at different micro-batches with rounds of their own, but all take as many as any
(one `pmin` over the whole mesh), the last ones empty: a permute in a loop that some devices leave early
hangs or returns wrong numbers. Even routing needs one round. All tokens on one expert need more, and get
the same result.

The first round is the caller's, is differentiated as usual and keeps its residuals; further ones are
replayed in the backward, so that memory does not grow with their number.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.compat import vary, vary_like
from dsv3_jax.mesh import AXES, TOKENS

_CHUNKS = 64

# (x [T, D], ids [T, K], weight [T, K], experts' weights) -> y [T, D]; ids of -1 are sent nowhere.
Round = Callable[[jax.Array, jax.Array, jax.Array, Any], jax.Array]


def chunk_size(tokens: int) -> int:
  return -(-tokens // _CHUNKS)


def capacity(expected: float, factor: float, least: int, worst: int) -> int:
  """Rows of a buffer: `factor` times what even routing puts there, and five of its standard deviations.

  Those matter where few rows are expected, in decode. A factor below 1 asks for small buffers and gets
  them. At least what one chunk may need, at most what all tokens may.
  """
  rows = factor * expected
  if factor >= 1:
    rows = max(rows, expected + 5 * math.sqrt(expected))
  return min(max(math.ceil(rows), least), worst)


@dataclasses.dataclass(frozen=True)
class Bound:
  """A kind of buffer: `count_TX` says what each token puts into each of X of them here.

  Counts are summed over `meets`, the axes whose devices share the buffer.
  """

  count_TX: jax.Array
  meets: tuple[str, ...]
  limit: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rounds:
  """Where rounds begin and end: running totals [chunks + 1, X] of every bound, and the first end."""

  totals: list[jax.Array]
  first_end: jax.Array  # int32, the same on every device of a pipeline rank
  tokens: int = dataclasses.field(metadata={'static': True})
  limits: tuple[int, ...] = dataclasses.field(metadata={'static': True})

  @property
  def chunks(self) -> int:
    return -(-self.tokens // chunk_size(self.tokens))

  def end(self, begin: jax.Array | int) -> jax.Array:
    """Chunk at which the round that begins at `begin` ends, the same on all devices of a pipeline rank."""
    end = jnp.int32(self.chunks)
    for total_cX, limit in zip(self.totals, self.limits, strict=True):
      added_cX = total_cX - lax.dynamic_index_in_dim(total_cX, begin, keepdims=True)
      # The totals never fall: what fits is a prefix, that of no chunk at all included.
      fits = jnp.sum(jnp.all(added_cX <= limit, axis=1), dtype=jnp.int32) - 1
      end = jnp.minimum(end, fits)
    return lax.pmin(vary(end, TOKENS), TOKENS)

  def walk(self, body: Callable[[jax.Array, jax.Array, Any], Any], carry: Any) -> Any:
    """carry = body(begin, end, carry) for every round after the first, as many times on every device.

    Where a rank of a pipeline is through before others are, its begin and end are the same.
    """

    def one(state: Any) -> Any:
      begin, _, carry = state
      end = jnp.maximum(begin, self.end(begin))
      return end, self._unfinished(end), body(begin, end, carry)

    start = self.first_end, self._unfinished(self.first_end), carry
    return lax.while_loop(lambda state: state[1], one, start)[2]

  def _unfinished(self, begin: jax.Array) -> jax.Array:
    """Whether any device has chunks left."""
    return lax.pmin(vary(begin, AXES), AXES) < self.chunks

  def live(self, ids_TK: jax.Array, begin: jax.Array | int, end: jax.Array) -> jax.Array:
    """The ids of the tokens of chunks begin to end, -1 for all others."""
    chunk_T = jnp.arange(self.tokens, dtype=jnp.int32) // chunk_size(self.tokens)
    return jnp.where(((chunk_T >= begin) & (chunk_T < end))[:, None], ids_TK, -1)


def plan(bounds: Sequence[Bound], tokens: int) -> Rounds:
  """Each chunk must fit every bound by itself."""
  totals = [_running_totals(tokens, bound) for bound in bounds]
  rounds = Rounds(totals, jnp.int32(0), tokens, tuple(bound.limit for bound in bounds))
  return dataclasses.replace(rounds, first_end=rounds.end(0))


def further(
  run: Round,
  rounds: Rounds,
  y_TD: jax.Array,
  x_TD: jax.Array,
  ids_TK: jax.Array,
  weight_TK: jax.Array,
  weights: Any,
) -> tuple[jax.Array, jax.Array]:
  """Adds what all rounds after the first bring to y [T, D]; the number of rounds with it, int32."""
  return _further(run, rounds, y_TD, x_TD, ids_TK, weight_TK, weights)


def _running_totals(tokens: int, bound: Bound) -> jax.Array:
  size = chunk_size(tokens)
  chunks = -(-tokens // size)
  padded_TX = jnp.pad(bound.count_TX.astype(jnp.int32), ((0, chunks * size - tokens), (0, 0)))
  count_cX = jnp.sum(padded_TX.reshape(chunks, size, -1), axis=1)
  if bound.meets:
    count_cX = lax.psum(count_cX, bound.meets)
  return jnp.pad(jnp.cumsum(count_cX, axis=0), ((1, 0), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _further(run, rounds, y_TD, x_TD, ids_TK, weight_TK, weights):
  def body(begin, end, carry):
    y_TD, number = carry
    more_TD = run(x_TD, rounds.live(ids_TK, begin, end), weight_TK, weights)
    return y_TD + more_TD, number + (begin < end).astype(jnp.int32)

  return rounds.walk(body, (y_TD, vary_like(jnp.int32(1), rounds.first_end)))


def _forward(run, rounds, y_TD, *operands):
  return _further(run, rounds, y_TD, *operands), (rounds, operands)


def _backward(run, residuals, cotangents):
  rounds, (x_TD, ids_TK, weight_TK, weights) = residuals
  dy_TD, _ = cotangents

  def body(begin, end, grads):
    live_TK = rounds.live(ids_TK, begin, end)
    again = lambda x_TD, weight_TK, weights: run(x_TD, live_TK, weight_TK, weights)
    _, pull = jax.vjp(again, x_TD, weight_TK, weights)
    return jax.tree.map(jnp.add, grads, pull(dy_TD))

  nothing = jax.tree.map(jnp.zeros_like, (x_TD, weight_TK, weights))
  nothing = vary_like(nothing, x_TD, dy_TD)
  dx_TD, dweight_TK, dweights = rounds.walk(body, nothing)
  return None, dy_TD, dx_TD, None, dweight_TK, dweights


_further.defvjp(_forward, _backward)
