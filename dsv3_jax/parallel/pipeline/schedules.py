"""Pipeline schedules as data: for every rank, what it does in which order.

| schedule   | bubble (3.2.1, table 2) | weights | activations | stages on a rank      |
|------------|-------------------------|---------|-------------|-----------------------|
| gpipe      | (PP-1)(F+B)             | 1x      | all         | r                     |
| 1f1b       | (PP-1)(F+B)             | 1x      | PP          | r                     |
| zb1p       | (PP-1)(F+B-2W)          | 1x      | PP          | r                     |
| dualpipe   | (PP/2-1)(F&B+B-3W)      | 2x      | PP+1        | r and PP-1-r          |
| dualpipe_v | (PP/2-1)(F&B+B-3W)      | 2x      | PP+1        | r and PP-1-r, PP/2 ranks |

PP stages; F a forward, B a whole backward, W its part for weights, F&B one of each at once. DualPipe feeds
micro-batches from both ends: route 0 goes through stages 0.. on ranks 0.., route 1 through the same stages on
ranks PP-1... DualPipeV folds one route. Both keep the order of
github.com/deepseek-ai/DualPipe.

A schedule is tuples: no JAX here. `simulate.py` gives it times and checks it.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple


class Item(NamedTuple):
  """One micro-batch in one stage."""

  route: int
  micro: int  # number within the route
  stage: int


class Op(NamedTuple):
  """What a rank does at once. `weight` beside `backward` is a whole backward, alone a deferred one."""

  forward: Item | None = None
  backward: Item | None = None  # gradient of the stage's input
  weight: Item | None = None  # gradient of its weights

  @property
  def kind(self) -> str:
    """'F' | 'I' (input alone) | 'W' (weights alone) | 'B' (both) | 'FB'."""
    if self.forward:
      return 'FB' if self.backward else 'F'
    if self.backward:
      return 'B' if self.weight else 'I'
    return 'W'


@dataclasses.dataclass(frozen=True)
class Schedule:
  name: str
  stages: int
  micro_batches: int  # of all routes together
  routes: tuple[tuple[int, ...], ...]  # for each route, the rank of every stage
  ranks: tuple[tuple[Op, ...], ...]  # for each rank, its operations in order


def reader(stages: int, what: str, item: Item) -> Item | None:
  """Whose input the result of `item` is: of the forward ('F') or of the input's gradient ('I')."""
  stage = item.stage + (1 if what == 'F' else -1)
  return item._replace(stage=stage) if 0 <= stage < stages else None


def make(name: str, stages: int, micro_batches: int) -> Schedule:
  """The schedule of that name; ValueError, one line, for sizes it has no order for."""
  if name not in SCHEDULES:
    raise ValueError(f'schedule {name!r}: unknown; there are {", ".join(SCHEDULES)}')
  check(name, stages, micro_batches)
  return SCHEDULES[name](stages, micro_batches)


def check(name: str, stages: int, micro_batches: int) -> None:
  """ValueError unless the schedule has an order for so many stages and micro-batches."""
  two_ends = name in TWO_ENDS
  if stages < 2 or (two_ends and stages % 2):
    near = f'{stages - 1} or {stages + 1}' if stages > 2 else '2'
    want = 'an even number of stages' if two_ends else 'two stages or more'
    raise ValueError(f'{stages} stages: {name} wants {want}; {near} would work')
  least = {'gpipe': 1, 'dualpipe_v': stages}.get(name, 2 * stages if two_ends else stages)
  if name in ('dualpipe', 'uniform') and (micro_batches % 2 or micro_batches < least):
    right = max(least, micro_batches + micro_batches % 2)
    raise ValueError(
      f'{micro_batches} micro-batches over {stages} stages: {name} feeds half from each end and wants an '
      f'even number, at least {least}; {right} would work'
    )
  if micro_batches < least:
    raise ValueError(
      f'{micro_batches} micro-batches over {stages} stages: {name} wants at least {least}; '
      f'{least} would work'
    )


class _Rank:
  """Writes down one rank's operations; each side (one of its stages) counts its own micro-batches."""

  def __init__(self, item: Callable[[int, int], Item]) -> None:
    self.ops: list[Op] = []
    self._item = item  # (side, number of the micro-batch there)
    self._forwards, self._backwards = [0, 0], [0, 0]
    self._deferred: list[Item] = []

  def forward(self, side: int = 0) -> None:
    self.ops.append(Op(forward=self._next(self._forwards, side)))

  def backward(self, side: int = 0, *, whole: bool = True) -> None:
    """Both parts, or the input's, which leaves the weights' for later."""
    item = self._next(self._backwards, side)
    self.ops.append(Op(backward=item, weight=item if whole else None))
    if not whole:
      self._deferred.append(item)

  def weight(self) -> None:
    """The oldest one left."""
    self.ops.append(Op(weight=self._deferred.pop(0)))

  def overlap(self, forward: int, backward: int) -> None:
    """A forward of one side and a whole backward of the other, at once."""
    ahead, behind = self._next(self._forwards, forward), self._next(self._backwards, backward)
    self.ops.append(Op(ahead, behind, behind))

  def _next(self, counts: list[int], side: int) -> Item:
    counts[side] += 1
    return self._item(side, counts[side] - 1)


def _one_way(name: str, stages: int, micro_batches: int, fill: Callable[[_Rank, int], None]):
  ranks = []
  for r in range(stages):
    rank = _Rank(lambda side, micro, r=r: Item(0, micro, r))
    fill(rank, r)
    ranks.append(tuple(rank.ops))
  return Schedule(name, stages, micro_batches, (tuple(range(stages)),), tuple(ranks))


def _gpipe(stages: int, micro_batches: int) -> Schedule:
  def fill(rank: _Rank, r: int) -> None:
    del r
    for _ in range(micro_batches):
      rank.forward()
    for _ in range(micro_batches):
      rank.backward()

  return _one_way('gpipe', stages, micro_batches, fill)


def _one_f_one_b(stages: int, micro_batches: int) -> Schedule:
  def fill(rank: _Rank, r: int) -> None:
    ahead = stages - r
    for _ in range(ahead):
      rank.forward()
    for i in range(micro_batches):
      rank.backward()
      if i < micro_batches - ahead:
        rank.forward()

  return _one_way('1f1b', stages, micro_batches, fill)


def _zb1p(stages: int, micro_batches: int) -> Schedule:
  """ZB-H1 of 2401.10241: as 1F1B, rank r a backward's weights r micro-batches late."""

  def fill(rank: _Rank, r: int) -> None:
    ahead = stages - r
    for _ in range(ahead):
      rank.forward()
    for i in range(micro_batches):
      rank.backward(whole=False)
      if i >= r:
        rank.weight()
      if i < micro_batches - ahead:
        rank.forward()
    for _ in range(r):
      rank.weight()

  return _one_way('zb1p', stages, micro_batches, fill)


def _both_ways(rank: _Rank, h: int, half: int, steady: int, *, first_apart: bool) -> None:
  """DualPipe's eight steps on the h-th rank from an end; side 0 is the near one, which is fed first.

  `half` ranks lie between an end and the turn. On the ranks at the turn (`first_apart`) the very first pair
  cannot overlap: the backward is the forward's own.
  """
  far = half - h - 1
  for _ in range(2 * far):  # 1
    rank.forward(0)
  for _ in range(h + 1):  # 2
    rank.forward(0)
    rank.forward(1)
  for _ in range(far):  # 3
    rank.backward(1, whole=False)
    rank.weight()
    rank.forward(1)
  for i in range(steady):  # 4
    if i == 0 and first_apart:
      rank.forward(0)
      rank.backward(1)
    else:
      rank.overlap(0, 1)
    rank.overlap(1, 0)
  for _ in range(far):  # 5
    rank.backward(1)
    rank.overlap(1, 0)
  for i in range(2 * (h + 1)):  # 6: the second half leaves its weights for later
    rank.backward((i + 1) % 2, whole=i <= h)
  for _ in range(far):  # 7
    rank.weight()
    rank.backward(0, whole=False)
  for _ in range(h + 1):  # 8
    rank.weight()


def _dualpipe(stages: int, micro_batches: int) -> Schedule:
  half, ranks = stages // 2, []
  for r in range(stages):
    second = int(r >= half)

    def item(side: int, micro: int, r: int = r, second: int = second) -> Item:
      route = side ^ second
      return Item(route, micro, stages - 1 - r if route else r)

    rank, h = _Rank(item), min(r, stages - 1 - r)
    steady = micro_batches // 2 - stages + h + 1
    _both_ways(rank, h, half, steady, first_apart=h == half - 1)
    ranks.append(tuple(rank.ops))
  there = tuple(range(stages))
  return Schedule('dualpipe', stages, micro_batches, (there, there[::-1]), tuple(ranks))


def _dualpipe_v(stages: int, micro_batches: int) -> Schedule:
  half, ranks = stages // 2, []
  for r in range(half):
    rank = _Rank(lambda side, micro, r=r: Item(0, micro, stages - 1 - r if side else r))
    steady = micro_batches - stages + r + 1
    _both_ways(rank, r, half, steady, first_apart=r == half - 1)
    ranks.append(tuple(rank.ops))
  there = tuple(range(half))
  return Schedule('dualpipe_v', stages, micro_batches, (there + there[::-1],), tuple(ranks))


SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
  'gpipe': _gpipe,
  '1f1b': _one_f_one_b,
  'zb1p': _zb1p,
  'dualpipe': _dualpipe,
  'dualpipe_v': _dualpipe_v,
}
TWO_ENDS = ('dualpipe', 'dualpipe_v', 'uniform')
