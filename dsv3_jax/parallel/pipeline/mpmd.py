"""Runs DualPipe as its schedule is written: every rank its own stream of small programs.

Five programs, each over the devices of one rank: a forward (F), a whole backward (B), its input part (I), its
weight part (W), and a forward of one route with a whole backward of the other (FB), which share no value: each
one's exchange may stand beside the other's compute. They are traced once and compiled for every rank. What a
stage sends stays among its rank's devices, so ranks may do different things at one time, as those of the
uniform executor, who share one program, cannot.

Each process hands out the streams of the ranks that it has devices of, in the order of a simulated clock that
all processes share. An activation [devices, b, L, D] goes to the next rank
- by a copy from device to device, where one process has both ranks;
- else by a program over both ranks' devices with one permute, which all their processes reach in one order.
Bytes per device: one activation for each forward, one gradient of its size for each input part.

Activations live until their weight part has run: those of PP + 1 micro-batches at most, by DualPipe's order.
Outside of programs every array has a leading axis of devices, split over all axes of its mesh.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.compat import vary
from dsv3_jax.mesh import AXES
from dsv3_jax.parallel.pipeline.executor import PIPE, Stage, Weights
from dsv3_jax.parallel.pipeline.schedules import Item, Op, Schedule, reader
from dsv3_jax.parallel.pipeline.simulate import simulate
from dsv3_jax.parallel.pipeline.split import Split

_DEVICES = P(AXES)


class Held(NamedTuple):
  """What the ranks hold before a step."""

  routes: tuple[Any, Any]  # weights of the stages of either route
  ends: Any
  given: Any
  x: jax.Array  # zeros like an activation: enters the first stage, comes back into the last


class Sums(NamedTuple):
  """What they add up in it; gradients in FP32."""

  routes: tuple[Any, Any]
  ends: Any
  results: tuple[Any, Any]  # (loss, statistics) of either route


def hold(weights: Weights, given: Any, x: jax.Array) -> Held:
  """Inside a shard_map over the whole mesh; its results go out as P(AXES)."""
  routes = tuple(jax.tree.map(lambda w, d=d: w[d], weights.routes) for d in (0, 1))
  return _led(vary(Held(routes, weights.ends, given, x), AXES))


def added(sums: Sums) -> tuple[jax.Array, Any, Weights]:
  """Inside a shard_map again: what the uniform executor's `run` gives."""
  sums = _bare(sums)
  pair = lambda two: jax.tree.map(lambda *xs: jnp.stack(xs), *two)
  loss_d, statistics = pair(sums.results)
  return jnp.sum(loss_d), statistics, Weights(pair(sums.routes), sums.ends)


class Event(NamedTuple):
  """An operation of a rank; or its result, which is there now and wanted by another rank."""

  rank: int
  op: Op | None
  what: str = ''  # 'F' or 'I'
  item: Item | None = None  # whose input it is
  to: int = -1


def events(schedule: Schedule) -> list[Event]:
  """In the order of the simulated clock."""
  found: list[tuple[float, int, Event]] = []
  for r, spans in enumerate(simulate(schedule).ranks):
    for span in spans:
      found.append((span.start, 1, Event(r, span.op)))
      for what, item in (('F', span.op.forward), ('I', span.op.backward)):
        target = item and reader(schedule.stages, what, item)
        if target:
          to = schedule.routes[target.route][target.stage]
          found.append((span.end, 0, Event(r, None, what, target, to)))
  return [event for *_, event in sorted(found, key=lambda x: (*x[:2], x[2].rank))]


class Streams:
  """The executor: from what the ranks hold to what they have added up after all their operations."""

  def __init__(self, schedule: Schedule, stage: Stage, device_mesh: Mesh) -> None:
    """`schedule` has two routes, and as many ranks as the mesh along `pipe`."""
    self._stages, self._stage, self._mesh = schedule.stages, stage, device_mesh
    self._ranks = [_mesh(d[None]) for d in device_mesh.devices]
    self._here = [r for r, m in enumerate(self._ranks) if m.local_devices]
    self._events = events(schedule)
    self._links = _Links(self._ranks)
    self._programs: _Programs | None = None
    self.live = 0  # activations that a rank of this process held at most in the last step
    self._numbers = {
      r: {item: _number(self._ranks[r], item) for op in schedule.ranks[r] for item in op if item}
      for r in self._here
    }

  def __call__(self, held: Held) -> Sums:
    parts = {r: _part(held, self._ranks[r], len(self._ranks)) for r in self._here}
    del held
    if self._programs is None:
      self._programs = _Programs(self._stage, parts[self._here[0]])
    ranks = {
      r: _Rank(self._stages, self._programs, self._numbers[r], parts.pop(r)) for r in self._here
    }
    for event in self._events:
      r, to = event.rank, event.to
      if event.op and r in ranks:
        ranks[r].run(event.op)
      elif not event.op and (r in ranks or to in ranks):
        key = event.what, event.item
        result = ranks[r].results.pop(key) if r in ranks else None
        arrived = self._links.send(result, r, to, ranks[to].held.x if to in ranks else None)
        if to in ranks:
          ranks[to].arrived[key] = arrived
    self.live = max(rank.live for rank in ranks.values())
    return _whole([ranks[r].sums for r in self._here], self._mesh)


class _Rank:
  """One rank in a step: what it holds, has added up, and has under way."""

  def __init__(self, stages: int, programs: '_Programs', numbers: Any, held: Held) -> None:
    self.stages, self.programs, self.numbers, self.held = stages, programs, numbers, held
    self.sums = programs.zeros(held)
    self.arrived: dict[tuple[str, Item], jax.Array] = {}  # by what, and whose input
    self.results: dict[tuple[str, Item], jax.Array] = {}
    self.kept: dict[Item, Any] = {}
    self.crossing: dict[Item, Any] = {}
    self.live = 0

  def run(self, op: Op) -> None:
    p, ahead, behind = self.programs, op.forward, op.backward or op.weight
    if op.kind == 'F':
      self._forward_done(ahead, *p.forward(self._forward(ahead), self._results(ahead)))
    elif op.kind == 'I':
      dx, self.crossing[behind] = p.input((*self._of(behind), self.kept[behind], self._dy(behind)))
      self._put('I', behind, dx)
    elif op.kind == 'W':
      read = *self._of(behind), self.kept.pop(behind), self.crossing.pop(behind)
      self._add(behind, p.weight(read, self._grads(behind)))
    elif op.kind == 'B':
      self._backward_done(behind, *p.backward(self._backward(behind), self._grads(behind)))
    else:
      self.live = max(self.live, len(self.kept) + 1)
      read = self._forward(ahead), self._backward(behind)
      of_ahead, of_behind = p.both(read, (self._results(ahead), self._grads(behind)))
      self._forward_done(ahead, *of_ahead)
      self._backward_done(behind, *of_behind)
    self.live = max(self.live, len(self.kept))

  def _of(self, item: Item) -> Any:
    return (self.held.routes[item.route], self.held.ends), self.held.given, self.numbers[item]

  def _forward(self, item: Item) -> Any:
    return *self._of(item), self.arrived.pop(('F', item), self.held.x)

  def _backward(self, item: Item) -> Any:
    return *self._of(item), self.kept.pop(item), self._dy(item)

  def _dy(self, item: Item) -> jax.Array:
    return self.arrived.pop(('I', item), self.held.x)

  def _results(self, item: Item) -> Any:
    return self.sums.results[item.route]

  def _grads(self, item: Item) -> Any:
    return self.sums.routes[item.route], self.sums.ends

  def _forward_done(self, item: Item, y: jax.Array, kept: Any, results: Any) -> None:
    self.kept[item] = kept
    self.sums = self.sums._replace(results=_with(self.sums.results, item.route, results))
    self._put('F', item, y)

  def _backward_done(self, item: Item, dx: jax.Array, grads: Any) -> None:
    self._add(item, grads)
    self._put('I', item, dx)

  def _add(self, item: Item, grads: Any) -> None:
    routes = _with(self.sums.routes, item.route, grads[0])
    self.sums = self.sums._replace(routes=routes, ends=grads[1])

  def _put(self, what: str, item: Item, x: jax.Array) -> None:
    if target := reader(self.stages, what, item):
      self.results[what, target] = x


class _Programs:
  """(what is read[, what is added to, donated]) -> results, the new sums last; for the devices of any rank."""

  def __init__(self, stage: Stage, example: Held) -> None:
    self._stage = stage
    self._mesh = example.x.sharding.mesh.abstract_mesh
    self._parts = self._split(example)
    jit = lambda f, **options: jax.jit(self._on_devices(f), **options)
    self.zeros, self.input = jit(self._zeros, keep_unused=True), jit(self._input)
    adding = functools.partial(jit, donate_argnums=1)
    self.forward, self.weight = adding(self._forward), adding(self._weight)
    self.backward, self.both = adding(self._backward), adding(self._both)

  def _on_devices(self, f: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(f)  # the name of the program
    def bare(*arguments: Any) -> Any:
      return _led(f(*_bare(arguments)))

    return jax.shard_map(bare, mesh=self._mesh, in_specs=_DEVICES, out_specs=_DEVICES)

  def _split(self, held: Held) -> Split:
    """Traced once; all programs are parts of it."""
    found = []

    def trace(held: Held) -> jax.Array:
      found.append(self._stage.split((held.routes[0], held.ends), held.given, held.x))
      return held.x

    jax.eval_shape(self._on_devices(trace), held)
    return found[0]

  def _zeros(self, held: Held) -> Sums:
    fp32 = lambda tree: jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), tree)
    like = lambda tree: jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), tree)
    results = jnp.float32(0), like(self._parts.others)
    return vary(Sums(fp32(held.routes), fp32(held.ends), (results, results)), AXES)

  def _constants(self, given: Any, number: Any) -> tuple[Any, jax.Array]:
    """And whether the micro-batch counts."""
    on = self._stage.live(given, *number)
    return vary(self._stage.constants(given, *number, on), AXES), on

  def _ahead(self, read: Any) -> tuple[Any, jax.Array]:
    """What the forward of `Split` takes, and whether it counts."""
    weights, given, number, x = read
    constants, on = self._constants(given, number)
    return (weights, constants, x), on

  def _behind(self, read: Any) -> tuple[Any, jax.Array]:
    """What its backward takes, likewise."""
    weights, given, number, kept, dy = read
    constants, on = self._constants(given, number)
    # Nothing comes back into the last stage: its dy are zeros.
    return (weights, constants, kept, (dy, vary(jnp.float32(1), AXES))), on

  def _forward(self, read: Any, results: Any) -> Any:
    ahead, on = self._ahead(read)
    return _taken(self._parts.forward(*ahead), on, results)

  def _input(self, read: Any) -> Any:
    return self._parts.input(*self._behind(read)[0])

  def _weight(self, read: Any, grads: Any) -> Any:
    weights, given, number, kept, crossing = read
    constants, on = self._constants(given, number)
    return _added(self._parts.weight(weights, constants, kept, crossing), on, grads)

  def _backward(self, read: Any, grads: Any) -> Any:
    behind, on = self._behind(read)
    dweights, dx = self._parts.backward(*behind)
    return dx, _added(dweights, on, grads)

  def _both(self, read: Any, sums: Any) -> Any:
    (ahead, ahead_on), (behind, behind_on) = self._ahead(read[0]), self._behind(read[1])
    made, (dweights, dx) = self._parts.both(ahead, behind)
    return _taken(made, ahead_on, sums[0]), (dx, _added(dweights, behind_on, sums[1]))


def _taken(made: Any, on: jax.Array, results: Any) -> Any:
  (y, loss), statistics, kept = made
  add = lambda total, v: total + jnp.where(on, v, jnp.zeros_like(v))
  return y, kept, jax.tree.map(add, results, (loss, statistics))


def _added(dweights: Any, on: jax.Array, grads: Any) -> Any:
  add = lambda total, g: total + jnp.where(on, g, jnp.zeros_like(g)).astype(jnp.float32)
  return jax.tree.map(add, grads, dweights)


# ---- arrays of the mesh, of a rank, of two ranks -------------------------------------------------


class _Links:
  """Hands arrays from rank to rank."""

  def __init__(self, ranks: list[Mesh]) -> None:
    self._ranks = ranks

  def send(
    self, x: jax.Array | None, rank: int, to: int, like: jax.Array | None
  ) -> jax.Array | None:
    """`x` on the next rank's devices. A process without `rank` has no x, one without `to` nothing like it."""
    ends = self._ranks[rank], self._ranks[to]
    if len({d.process_index for m in ends for d in m.devices.flat}) == 1:
      return jax.device_put(x, NamedSharding(ends[1], _DEVICES))
    first = min(rank, to)
    pair = _mesh(np.concatenate([self._ranks[r].devices for r in (first, first + 1)]))
    there = [(0, 1)] if rank == first else [(1, 0)]
    both = _whole([v for v in ((x, like) if rank == first else (like, x)) if v is not None], pair)
    moved = _permute(pair.abstract_mesh, tuple(there))(both)
    return None if like is None else _part(moved, ends[1], 2)


@functools.cache
def _permute(mesh: Any, there: tuple[tuple[int, int], ...]) -> Callable[[jax.Array], jax.Array]:
  move = lambda x: lax.ppermute(x, PIPE, there)
  return jax.jit(jax.shard_map(move, mesh=mesh, in_specs=_DEVICES, out_specs=_DEVICES))


def _mesh(devices: np.ndarray) -> Mesh:
  return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _number(rank: Mesh, item: Item) -> tuple[jax.Array, jax.Array]:
  """Its route and number in the route, on each of the rank's devices."""
  at = NamedSharding(rank, _DEVICES)
  put = lambda n: jax.make_array_from_callback((rank.size,), at, lambda _: np.full(1, n, np.int32))
  return put(item.route), put(item.micro)


def _part(tree: Any, mesh: Mesh, of: int) -> Any:
  """Arrays over `of` ranks -> their parts on the one of this mesh."""
  at = NamedSharding(mesh, _DEVICES)
  here = set(mesh.local_devices)

  def one(x: jax.Array) -> jax.Array:
    shards = [s.data for s in x.addressable_shards if s.device in here]
    return jax.make_array_from_single_device_arrays((x.shape[0] // of, *x.shape[1:]), at, shards)

  return jax.tree.map(one, tree)


def _whole(parts: list[Any], mesh: Mesh) -> Any:
  """Parts on ranks of this process -> arrays over the whole mesh."""
  at = NamedSharding(mesh, _DEVICES)

  def one(*xs: jax.Array) -> jax.Array:
    shards = [s.data for x in xs for s in x.addressable_shards]
    return jax.make_array_from_single_device_arrays((mesh.size, *xs[0].shape[1:]), at, shards)

  return jax.tree.map(one, *parts)


def _with(pair: tuple[Any, Any], i: int, value: Any) -> tuple[Any, Any]:
  return (value, pair[1]) if i == 0 else (pair[0], value)


def _led(tree: Any) -> Any:
  """A device's own -> with an axis of devices in front; `_bare` takes it away."""
  return jax.tree.map(lambda x: x[None], tree)


def _bare(tree: Any) -> Any:
  return jax.tree.map(lambda x: x[0], tree)
