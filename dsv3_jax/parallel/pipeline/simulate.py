"""Runs a schedule on a clock, checks it, and says what the formulas of table 2 say.

A rank starts an operation when its previous one is done and what it waits for has arrived; results are sent
at once and travel beside compute. Times are in any unit; 1 for each of forward, input and weight part is that
in which DualPipe's formula is exact (else its bubble is at most the formula's, for balanced parts).
"""

import dataclasses
import itertools
from typing import NamedTuple, Protocol

from dsv3_jax.parallel.pipeline.schedules import Item, Op, Schedule


@dataclasses.dataclass(frozen=True)
class Costs:
  forward: float = 1.0
  input: float = 1.0
  weight: float = 1.0
  overlap: float = 3.0  # F&B: a forward and a whole backward at once; 3.0 saves nothing
  transfer: float = 0.0  # from rank to rank

  def of(self, kind: str) -> float:
    whole = self.input + self.weight
    times = {'F': self.forward, 'I': self.input, 'W': self.weight, 'B': whole, 'FB': self.overlap}
    return times[kind]

  def time(self, op: Op) -> float:
    return self.of(op.kind)


class Timed(Protocol):
  """What `simulate` asks of costs: `Costs`, or times of its own for each stage."""

  transfer: float

  def time(self, op: Op) -> float: ...


UNIT = Costs()


class Span(NamedTuple):
  start: float
  end: float
  op: Op


@dataclasses.dataclass(frozen=True)
class Timeline:
  schedule: Schedule
  ranks: tuple[tuple[Span, ...], ...]

  @property
  def makespan(self) -> float:
    return max(spans[-1].end for spans in self.ranks)

  @property
  def bubbles(self) -> list[float]:
    """Idle time of every rank."""
    return [self.makespan - sum(s.end - s.start for s in spans) for spans in self.ranks]

  @property
  def bubble(self) -> float:
    """Of the rank that idles most."""
    return max(self.bubbles)

  @property
  def live(self) -> list[int]:
    """For every rank, how many micro-batches' activations it holds at most (until their weights' part)."""
    return [max(itertools.accumulate(map(_held, stream))) for stream in self.schedule.ranks]


def _held(op: Op) -> int:
  """In an F&B the backward's activations are still there while the forward's come: counted before they go."""
  return int(op.forward is not None) - int(op.weight is not None)


def simulate(schedule: Schedule, costs: Timed = UNIT) -> Timeline:
  """ValueError, naming rank and operation, where the schedule is no schedule or stands still."""
  verify(schedule)
  done: dict[tuple[str, Item], float] = {}
  spans: list[list[Span]] = [[] for _ in schedule.ranks]
  waiting = set(range(len(schedule.ranks)))
  while waiting:
    moved = False
    for r in sorted(waiting):
      while len(spans[r]) < len(schedule.ranks[r]):
        op = schedule.ranks[r][len(spans[r])]
        needs = list(_needs(schedule, op))
        if not all(need in done for need in needs):
          break
        arrive = lambda need, r=r: (
          done[need] + costs.transfer * (schedule.routes[need[1].route][need[1].stage] != r)
        )
        start = max([spans[r][-1].end if spans[r] else 0.0, *map(arrive, needs)])
        spans[r].append(Span(start, start + costs.time(op), op))
        done |= {result: spans[r][-1].end for result in _results(op)}
        moved = True
      else:
        waiting.discard(r)
        moved = True
    if not moved:
      r = min(waiting)
      op = schedule.ranks[r][len(spans[r])]
      raise ValueError(f'{schedule.name}: deadlock; rank {r} waits to start {describe(op)}')
  return Timeline(schedule, tuple(map(tuple, spans)))


def verify(schedule: Schedule) -> None:
  """ValueError unless each micro-batch goes once forward and back through every stage, on its rank."""
  found: list[tuple[str, Item]] = []
  for r, stream in enumerate(schedule.ranks):
    for op in stream:
      for what, item in _results(op):
        if schedule.routes[item.route][item.stage] != r:
          raise ValueError(f'{schedule.name}: {describe(op)} on rank {r}, where its stage is not')
        found.append((what, item))
  per_route = schedule.micro_batches // len(schedule.routes)
  numbers = itertools.product(range(len(schedule.routes)), range(per_route), range(schedule.stages))
  wanted = {(what, Item(*n)) for n in numbers for what in 'FIW'}
  if len(found) != len(set(found)):
    raise ValueError(f'{schedule.name}: something is done twice')
  if set(found) != wanted:
    raise ValueError(f'{schedule.name}: missing or too much: {sorted(set(found) ^ wanted)[:3]}')


def _results(op: Op) -> list[tuple[str, Item]]:
  parts = zip('FIW', op, strict=True)
  return [(what, item) for what, item in parts if item is not None]


def _needs(schedule: Schedule, op: Op) -> list[tuple[str, Item]]:
  """What must be done before; an operation's own parts aside."""
  needs = []
  if op.forward and op.forward.stage:
    needs.append(('F', op.forward._replace(stage=op.forward.stage - 1)))
  if op.backward:
    needs.append(('F', op.backward))
    if op.backward.stage < schedule.stages - 1:
      needs.append(('I', op.backward._replace(stage=op.backward.stage + 1)))
  if op.weight and op.weight != op.backward:
    needs.append(('I', op.weight))
  return needs


def formula(name: str, stages: int, costs: Costs = UNIT) -> float:
  """Bubble of one rank by table 2, in the unit of the costs."""
  c, whole = costs, costs.input + costs.weight
  if name in ('gpipe', '1f1b'):
    return (stages - 1) * (c.forward + whole)
  if name == 'zb1p':
    return (stages - 1) * (c.forward + whole - 2 * c.weight)
  return (stages / 2 - 1) * (c.overlap + whole - 3 * c.weight)


def describe(op: Op) -> str:
  """'F0.3' is a forward of route 0's micro-batch 3; 'F0.3&B1.2' one with a backward of the other route."""
  name = lambda kind, item: f'{kind}{item.route}.{item.micro}'
  if op.kind == 'FB':
    return f'{name("F", op.forward)}&{name("B", op.backward)}'
  return name(op.kind, op.forward or op.backward or op.weight)
