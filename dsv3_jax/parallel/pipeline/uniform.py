"""The bidirectional schedule that one SPMD program can run: all ranks do the same kind of thing in a tick.

Four loops, of forwards, of F&B pairs, of input gradients and of deferred weight gradients. Which micro-batch
of which route a rank takes stands in tables; a rank that has nothing to do computes all the same and its
result is masked. So collectives stand everywhere in straight code, permutes included, which hang or mix up
values in a branch that ranks take differently.

Price against DualPipe's own order, in which ranks do different things at one time: the bubble is 2.5 PP - 5
forwards where that one's is PP - 2 (F = I = W, F&B = 3F). No order of equal ticks has less than 2 PP - 4. A
rank in the middle gets its first forward after PP/2 - 1 ticks that have one, has one in M more at least, and its
last one then has PP/2 - 1 ranks before it: M + PP - 2 ticks with a forward. The same holds for input gradients,
and M have a weight part. The other PP/2 - 1 are weight parts: middle ranks have none yet in the first pairs.
An order for four ranks does without, yet with at least two pairs fewer; where a pair saves a fifth, this one is the
shortest there is (searched through for four mirrored ranks, `tests/parallel/test_uniform_bound.py`).

Deferred weight parts wait in PP/2 + 1 buffers, of all that they need beside the activations. Without them
(`deferred=False`) the last input gradients are whole backwards: PP/2 - 1 weight parts more, and no buffer.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from dsv3_jax.parallel.pipeline.schedules import Item, Op, Schedule, check
from dsv3_jax.parallel.pipeline.simulate import UNIT, Costs


class Tick(NamedTuple):
  kind: str  # 'F' | 'FB' | 'B' | 'I' | 'W', the same on all ranks
  ops: tuple[Op | None, ...]  # for each rank; an 'FB' may hold an F or a B alone


def ticks(stages: int, micro_batches: int, *, deferred: bool = True) -> list[Tick]:
  """Greedy: every rank takes the oldest work that is there, the route that is behind first."""
  check('uniform', stages, micro_batches)
  state, out = _State(stages, micro_batches // 2), []
  for i in range(stages):
    # In the last of these the far route goes first: its first micro-batch is about to turn back.
    out.append(state.tick('F', far_first=i == stages - 1))
  while not state.all_forward:
    out.append(state.tick('FB'))
  while not state.all_done:
    tick = state.tick('I' if deferred else 'B')
    out.append(tick if any(tick.ops) else state.tick('W'))
  return out


class _State:
  """How far every rank is on both routes."""

  def __init__(self, stages: int, per_route: int) -> None:
    self.stages, self.per_route = stages, per_route
    self.ahead = np.zeros((2, stages), int)  # forwards done, by route and rank
    self.behind = np.zeros((2, stages), int)  # input gradients done
    self.deferred: list[list[Item]] = [[] for _ in range(stages)]

  @property
  def all_forward(self) -> bool:
    return bool((self.ahead == self.per_route).all())

  @property
  def all_done(self) -> bool:
    return bool((self.behind == self.per_route).all()) and not any(self.deferred)

  def tick(self, kind: str, *, far_first: bool = False) -> Tick:
    seen = self.ahead.copy(), self.behind.copy()  # what other ranks have sent before this tick
    return Tick(kind, tuple(self._rank(kind, r, far_first, *seen) for r in range(self.stages)))

  def _rank(self, kind, r, far_first, ahead, behind) -> Op | None:
    if kind == 'W':
      return Op(weight=self.deferred[r].pop(0)) if self.deferred[r] else None
    forward = self._forward(r, far_first, ahead, behind) if 'F' in kind else None
    backward = None
    if kind != 'F':
      ready = [d for d in (0, 1) if self._backward_ready(d, r, ahead, behind)]
      first = int(np.argmin(behind[:, r]))
      backward = first if first in ready else ready[0] if ready else None
      if backward is not None and backward == forward:
        # A pair is of both routes where it can be.
        other = 1 - forward
        forward = other if self._forward_ready(other, r, ahead, behind) else forward
    item = lambda counts, d: Item(d, int(counts[d, r]), self.stages - 1 - r if d else r)
    a = b = None
    if forward is not None:
      a = item(self.ahead, forward)
      self.ahead[forward, r] += 1
    if backward is not None:
      b = item(self.behind, backward)
      self.behind[backward, r] += 1
      if kind == 'I':
        self.deferred[r].append(b)
    return Op(a, b, None if kind == 'I' else b) if a or b else None

  def _forward(self, r, far_first, ahead, behind) -> int | None:
    ready = [d for d in (0, 1) if self._forward_ready(d, r, ahead, behind)]
    near = int(r >= self.stages // 2)
    first = 1 - near if far_first else int(np.argmin(ahead[:, r]))
    return first if first in ready else ready[0] if ready else None

  def _forward_ready(self, d, r, ahead, behind) -> bool:
    before = r - 1 if d == 0 else r + 1
    there = not 0 <= before < self.stages or ahead[d, before] > ahead[d, r]
    held = (ahead[:, r] - behind[:, r]).sum() + len(self.deferred[r])
    return bool(ahead[d, r] < self.per_route and there and held < self.stages + 1)

  def _backward_ready(self, d, r, ahead, behind) -> bool:
    after = r + 1 if d == 0 else r - 1
    there = not 0 <= after < self.stages or behind[d, after] > behind[d, r]
    return bool(behind[d, r] < ahead[d, r] and there)


def as_schedule(stages: int, micro_batches: int) -> Schedule:
  """The ticks as streams, to be verified and drawn like any schedule."""
  rows = [tick.ops for tick in ticks(stages, micro_batches)]
  streams = tuple(tuple(op for op in column if op) for column in zip(*rows, strict=True))
  there = tuple(range(stages))
  return Schedule('uniform', stages, micro_batches, (there, there[::-1]), streams)


def makespan(
  stages: int, micro_batches: int, costs: Costs = UNIT, *, deferred: bool = True
) -> float:
  """All ticks, each as long as its kind takes: PP F + (M - 2) F&B + PP I + (PP/2 + 1) W, or PP W."""
  return sum(costs.of(tick.kind) for tick in ticks(stages, micro_batches, deferred=deferred))


def formula(
  stages: int, micro_batches: int, costs: Costs = UNIT, *, deferred: bool = True
) -> float:
  c = costs
  steady = (micro_batches - 2) * c.overlap
  weights = stages // 2 + 1 if deferred else stages
  return stages * (c.forward + c.input) + steady + weights * c.weight


# ---- where things are kept -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tables:
  """What every rank does in every tick, int32 [ticks, ranks]; slots of the buffers it reads and writes.

  What nobody will read goes into one slot more than a buffer's size; activations, which are large, have none:
  a rank without a forward leaves its slot as it is.
  """

  kinds: tuple[str, ...]  # of the ticks
  columns: dict[str, np.ndarray]
  kept: int  # slots for a stage's activations: at most PP + 1
  inputs: int  # for activations from the neighbours, until their forward
  gradients: int  # for gradients from the neighbours, until their backward
  deferred: int  # for what a deferred weight part needs beside the activations


def tables(stages: int, micro_batches: int, *, deferred: bool = True) -> Tables:
  """Columns: f_on, f_route, f_micro, f_slot, f_from and to_right, to_left for forwards (`f_from` the slot of
  the input, `to_*` where the neighbour's result goes that comes by that link); b_* for backwards, where `b_ctx`
  is the slot of what the weight part needs; w_* for deferred weight parts.
  """
  rows = ticks(stages, micro_batches, deferred=deferred)
  at: dict[tuple[str, Item], int] = {}
  for k, tick in enumerate(rows):
    for op in filter(None, tick.ops):
      at |= {(what, item): k for what, item in zip('FIW', op, strict=True) if item}
  rank_of = lambda item: stages - 1 - item.stage if item.route else item.stage
  step = lambda item, by: item._replace(stage=item.stage + by)
  items = [item for what, item in at if what == 'F']
  inner = lambda by: [item for item in items if 0 <= item.stage + by < stages]
  late = [item for item in items if at['W', item] > at['I', item]]
  kept, kept_size = _slots(rank_of, {item: (at['F', item], at['W', item]) for item in items})
  spans = {item: (at['F', step(item, -1)], at['F', item]) for item in inner(-1)}
  inputs, inputs_size = _slots(rank_of, spans)
  spans = {item: (at['I', step(item, 1)], at['I', item]) for item in inner(1)}
  gradients, gradients_size = _slots(rank_of, spans)
  ctx, ctx_size = _slots(rank_of, {item: (at['I', item], at['W', item]) for item in late})

  names = [f'{part}_{field}' for part in 'fbw' for field in ('on', 'route', 'micro', 'slot')]
  columns = {name: np.zeros((len(rows), stages), np.int32) for name in names}
  unused = {'f_from': inputs_size, 'b_from': gradients_size}
  unused |= {'b_ctx': ctx_size, 'w_ctx': ctx_size}
  unused |= {f'f_to_{side}': inputs_size for side in ('right', 'left')}
  unused |= {f'b_to_{side}': gradients_size for side in ('right', 'left')}
  columns |= {name: np.full((len(rows), stages), slot, np.int32) for name, slot in unused.items()}
  for k, tick in enumerate(rows):
    for r, op in enumerate(tick.ops):
      put = lambda name, value, r=r, k=k: columns[name].__setitem__((k, r), value)
      for part, item in zip('fbw', op or Op(), strict=True):
        if item is None or (part == 'w' and tick.kind != 'W'):
          continue
        put(f'{part}_on', 1)
        put(f'{part}_route', item.route)
        put(f'{part}_micro', item.micro)
        put(f'{part}_slot', kept[item])
        if part == 'w':
          put('w_ctx', ctx[item])
          continue
        by, slots = (1, inputs) if part == 'f' else (-1, gradients)
        if item in slots:
          put(f'{part}_from', slots[item])
        if part == 'b' and tick.kind == 'I':
          put('b_ctx', ctx[item])
        target = step(item, by)
        if target in slots:
          there = rank_of(target)
          columns[f'{part}_to_{"right" if there > r else "left"}'][k, there] = slots[target]
  kinds = tuple(tick.kind for tick in rows)
  return Tables(kinds, columns, kept_size, inputs_size, gradients_size, ctx_size)


def _slots(rank_of, spans: dict[Item, tuple[int, int]]) -> tuple[dict[Item, int], int]:
  """Slot of every item on its rank, and how many a rank needs: none is written while another reads it.

  A span is the ticks of the first write and the last read; a slot read in a tick is free in the next.
  """
  slots: dict[Item, int] = {}
  busy: dict[int, list[int]] = {}  # for every rank, the last tick of each slot
  for item, (first, last) in sorted(spans.items(), key=lambda pair: pair[1]):
    ends = busy.setdefault(rank_of(item), [])
    free = [slot for slot, end in enumerate(ends) if end < first]
    slot = free[0] if free else len(ends)
    ends[slot : slot + 1] = [last]
    slots[item] = slot
  return slots, max(map(len, busy.values()), default=0)
