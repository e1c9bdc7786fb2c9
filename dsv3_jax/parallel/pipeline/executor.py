"""Runs the uniform schedule inside a shard_map: one scan per kind of tick, no branch that ranks take differently.

What one rank does in an F&B tick, top to bottom:
1. Read what the backward needs from its slots.
2. The forward of one route and the whole backward of the other, which share no value, in turns (`turns`):
   each one's exchange stands beside the other's compute.
3. Write the forward's activations into its slot, add up gradients where the tick's tables say so.
4. Send activations and gradients to both neighbours; each keeps what its tables say. Bytes per rank and tick:
   four times the activation.

A rank with nothing to do computes on whatever its slots hold. Nothing of that is kept: results are picked by
`where`, for a product with 0 would let a NaN through.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.compat import vary
from dsv3_jax.mesh import AXES
from dsv3_jax.parallel.pipeline.split import Split, split
from dsv3_jax.parallel.pipeline.uniform import tables

PIPE = 'pipe'


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weights:
  """A rank's: both its stages', and what stands once because a rank has one end of the model at most."""

  routes: Any  # leaves [2, ...]
  ends: Any

  def of(self, route: jax.Array) -> Any:
    return jax.tree.map(lambda w: _at(w, route), self.routes), self.ends


@dataclasses.dataclass(frozen=True)
class Stage:
  """What both executors run. `given` is what all stages of a rank need besides weights; it has 'rank'.

  function: ((weights of a stage, ends), constants, x) -> ((y, loss), statistics)
  constants: (given, route, micro, on) -> constants; `on`: whether the result counts
  live: (given, route, micro) -> whether this micro-batch counts at all
  """

  function: Callable[[Any, Any, jax.Array], tuple[tuple[jax.Array, jax.Array], Any]]
  constants: Callable[[Any, jax.Array, jax.Array, jax.Array], Any]
  live: Callable[[Any, jax.Array, jax.Array], jax.Array]

  def split(self, weights: Any, given: Any, x: jax.Array) -> Split:
    """For weights as `Weights.of` gives them, all varying over all axes."""
    zero = vary(jnp.int32(0), AXES)
    example = vary(self.constants(given, zero, zero, zero > 0), AXES)
    return split(self.function, weights, example, x)


def run(
  stages: int,
  micro_batches: int,
  stage: Stage,
  weights: Weights,
  given: Any,
  x: jax.Array,
  *,
  deferred: bool = True,
) -> tuple[jax.Array, Any, Weights]:
  """This rank's shares of the loss, of the statistics (leaves [2, ...], by route), FP32 gradients.

  `x` is like an activation; `deferred`: `uniform.ticks`.
  """
  t = tables(stages, micro_batches, deferred=deferred)
  rank = lax.axis_index(PIPE)
  weights, given, x = vary((weights, given, x), AXES)
  parts = stage.split(weights.of(vary(jnp.int32(0), AXES)), given, x)
  slots = lambda n, like: jax.tree.map(
    lambda v: vary(jnp.zeros((n, *v.shape), v.dtype), AXES), like
  )
  fp32 = lambda w: vary(jnp.zeros(w.shape, jnp.float32), AXES)
  carry = {
    'kept': slots(t.kept, parts.kept),
    'inputs': slots(t.inputs + 1, x),
    'gradients': slots(t.gradients + 1, x),
    'crossing': slots(t.deferred + 1 if deferred else 0, parts.crossing),
    'totals': jax.tree.map(fp32, weights),
    'loss': vary(jnp.float32(0), AXES),
    'statistics': slots(2, parts.others),
  }
  ticks = _Ticks(stages, parts, weights, stage, given, rank)
  columns = {
    name: vary(_at(jnp.asarray(column.T), rank), AXES) for name, column in t.columns.items()
  }
  done = 0
  for kind, group in itertools.groupby(t.kinds):
    count = len(list(group))
    rows = {name: column[done : done + count] for name, column in columns.items()}
    body = {
      'F': ticks.forward,
      'FB': ticks.both,
      'B': ticks.backward,
      'I': ticks.input,
      'W': ticks.weight,
    }[kind]
    carry = lax.scan(lambda carry, row, body=body: (body(carry, row), None), carry, rows)[0]
    done += count
  return carry['loss'], carry['statistics'], carry['totals']


@dataclasses.dataclass(frozen=True)
class _Ticks:
  """The bodies of the four loops: (carry, row of the tables) -> carry."""

  stages: int
  parts: Split
  weights: Weights
  stage: Stage
  given: Any
  rank: jax.Array

  def forward(self, carry: Any, row: Any) -> Any:
    return self._keep(carry, row, self.parts.forward(*self._ahead(carry, row)))

  def both(self, carry: Any, row: Any) -> Any:
    kept, dy = self._before(carry, row)
    # The slots are read before the forward writes into one: else XLA copies them all in every tick.
    names = 'kept', 'inputs', 'gradients'
    held, kept, dy = lax.optimization_barrier(({n: carry[n] for n in names}, kept, dy))
    carry = carry | held
    weights, constants, on, route = self._of(row, 'b')
    behind = weights, constants, kept, dy
    ahead, (dweights, dx) = self.parts.both(self._ahead(carry, row), behind)
    carry = self._add(self._keep(carry, row, ahead), route, on, dweights)
    return self._send(carry, row, 'b', 'gradients', dx)

  def backward(self, carry: Any, row: Any) -> Any:
    kept, dy = self._before(carry, row)
    weights, constants, on, route = self._of(row, 'b')
    dweights, dx = self.parts.backward(weights, constants, kept, dy)
    return self._send(self._add(carry, route, on, dweights), row, 'b', 'gradients', dx)

  def input(self, carry: Any, row: Any) -> Any:
    kept, dy = self._before(carry, row)
    weights, constants, _, _ = self._of(row, 'b')
    dx, crossing = self.parts.input(weights, constants, kept, dy)
    stored = jax.tree.map(lambda b, v: _put(b, v, row['b_ctx']), carry['crossing'], crossing)
    return self._send(carry | {'crossing': stored}, row, 'b', 'gradients', dx)

  def weight(self, carry: Any, row: Any) -> Any:
    weights, constants, on, route = self._of(row, 'w')
    read = lambda name, slot: jax.tree.map(lambda b: _at(b, row[slot]), carry[name])
    kept, crossing = read('kept', 'w_slot'), read('crossing', 'w_ctx')
    return self._add(carry, route, on, self.parts.weight(weights, constants, kept, crossing))

  def _of(self, row: Any, part: str) -> tuple[Any, Any, jax.Array, jax.Array]:
    """Weights, constants, whether it counts, route; of what the row does in this part."""
    route, micro = row[f'{part}_route'], row[f'{part}_micro']
    on = (row[f'{part}_on'] > 0) & self.stage.live(self.given, route, micro)
    constants = vary(self.stage.constants(self.given, route, micro, on), AXES)
    return self.weights.of(route), constants, on, route

  def _ahead(self, carry: Any, row: Any) -> tuple[Any, Any, jax.Array]:
    """What the forward of `Split` takes."""
    weights, constants, _, _ = self._of(row, 'f')
    return weights, constants, _at(carry['inputs'], row['f_from'])

  def _keep(self, carry: Any, row: Any, ahead: Any) -> Any:
    (y, loss), statistics, kept = ahead
    _, _, on, route = self._of(row, 'f')
    slot = row['f_slot']
    # Also of a micro-batch that does not count: its backward reads the slot, to no effect.
    filled = row['f_on'] > 0
    store = lambda b, v: _put(b, jnp.where(filled, v, _at(b, slot)), slot)
    add = lambda total, v: total.at[route].add(jnp.where(on, v, jnp.zeros_like(v)))
    carry = carry | {
      'kept': jax.tree.map(store, carry['kept'], kept),
      'loss': carry['loss'] + jnp.where(on, loss, 0.0),
      'statistics': jax.tree.map(add, carry['statistics'], statistics),
    }
    return self._send(carry, row, 'f', 'inputs', y)

  def _before(self, carry: Any, row: Any) -> Any:
    """What the row's backward kept, and the gradients of its outputs: 1 of the loss, 0 of the last y."""
    kept = jax.tree.map(lambda b: _at(b, row['b_slot']), carry['kept'])
    last = self.rank == jnp.where(row['b_route'] == 0, self.stages - 1, 0)
    dy = _at(carry['gradients'], row['b_from'])
    return kept, (jnp.where(last, jnp.zeros_like(dy), dy), vary(jnp.float32(1), AXES))

  def _add(self, carry: Any, route: jax.Array, on: jax.Array, grads: Any) -> Any:
    of_stage, of_ends = jax.tree.map(lambda g: jnp.where(on, g, 0).astype(jnp.float32), grads)
    totals = carry['totals']
    routes = jax.tree.map(lambda total, g: total.at[route].add(g), totals.routes, of_stage)
    ends = jax.tree.map(jnp.add, totals.ends, of_ends)
    return carry | {'totals': Weights(routes, ends)}

  def _send(self, carry: Any, row: Any, part: str, name: str, x: jax.Array) -> Any:
    """[b, L, D] to the next rank and to the one before; each puts it where its tables say."""
    there = [(r, r + 1) for r in range(self.stages - 1)]
    from_left = lax.ppermute(x, PIPE, there)
    from_right = lax.ppermute(x, PIPE, [(b, a) for a, b in there])
    buffer = _put(carry[name], from_left, row[f'{part}_to_right'])
    return carry | {name: _put(buffer, from_right, row[f'{part}_to_left'])}


def _at(x: jax.Array, i: jax.Array) -> jax.Array:
  return lax.dynamic_index_in_dim(x, i, keepdims=False)


def _put(x: jax.Array, value: jax.Array, i: jax.Array) -> jax.Array:
  return lax.dynamic_update_index_in_dim(x, value, i, 0)
