"""How short any order of equal ticks can be: searched through, for four ranks that mirror each other."""

import heapq
import itertools
from collections.abc import Iterator

import pytest

from dsv3_jax.parallel.pipeline import uniform
from dsv3_jax.parallel.pipeline.simulate import Costs

_STAGES, _MICRO = 4, 8
_OF_RANK = (
  (0, 3),
  (1, 2),
)  # stages of rank 0 and of rank 1; ranks 3 and 2 do the same on the other route
_HELD = _STAGES + 1

# Forwards and input gradients done, by stage; weight parts done, by rank.
_State = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _choices(state: _State, kind: str, r: int) -> list[tuple[int | None, int | None, bool]]:
  """What rank r may do in a tick of that kind: (forward of stage, backward of stage, weight part)."""
  ahead, behind, weights = state
  stages, last = _OF_RANK[r], _STAGES - 1
  done = lambda counts: sum(counts[s] for s in stages)
  room = done(ahead) - weights[r] < _HELD
  arrived = lambda s: ahead[s] < _MICRO // 2 and (s == 0 or ahead[s - 1] > ahead[s])
  forwards = [None, *(s for s in stages if room and arrived(s))]
  returned = lambda s: behind[s] < ahead[s] and (s == last or behind[s + 1] > behind[s])
  backwards = [None, *(s for s in stages if returned(s))]
  if kind == 'W':
    return [(None, None, done(behind) > weights[r])]
  if kind == 'F':
    return [(f, None, False) for f in forwards]
  if kind == 'I':
    return [(None, b, False) for b in backwards]
  return [(f, b, b is not None) for f in forwards for b in backwards]


def _next(state: _State, kind: str) -> Iterator[_State]:
  for both in itertools.product(*(_choices(state, kind, r) for r in (0, 1))):
    ahead, behind, weights = map(list, state)
    for r, (f, b, w) in enumerate(both):
      if f is not None:
        ahead[f] += 1
      if b is not None:
        behind[b] += 1
      weights[r] += w
    yield tuple(ahead), tuple(behind), tuple(weights)


def _shortest(costs: Costs) -> float:
  """By Dijkstra's algorithm."""
  start, half = ((0,) * 4, (0,) * 4, (0, 0)), (_MICRO // 2,) * 4
  best, heap = {start: 0.0}, [(0.0, start)]
  while heap:
    time, state = heapq.heappop(heap)
    if state == (half, half, (_MICRO, _MICRO)):
      return time
    if time > best[state]:
      continue
    for kind in ('F', 'FB', 'I', 'W'):
      later = time + costs.of(kind)
      for found in _next(state, kind):
        if later < best.get(found, float('inf')):
          best[found] = later
          heapq.heappush(heap, (later, found))
  raise AssertionError('no order ends')


def test_no_order_is_shorter_where_a_pair_saves_a_fifth():
  costs = Costs(overlap=2.4)
  assert uniform.makespan(_STAGES, _MICRO, costs) == pytest.approx(_shortest(costs)) == 25.4


def test_no_order_has_a_bubble_below_two_ranks_less_two_doubled_where_a_pair_saves_nothing():
  assert _shortest(Costs()) - 3 * _MICRO == 2 * _STAGES - 4
  assert uniform.makespan(_STAGES, _MICRO) - 3 * _MICRO == 2.5 * _STAGES - 5
