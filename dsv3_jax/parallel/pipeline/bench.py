"""Runs a schedule on a real clock: a thread for each rank, which sleeps where the stage would compute.

Results are arrays that go from rank to rank through queues, so a rank waits for what it waits for in a
pipeline. Sleeping takes no core: many ranks run at one time on a small machine. What comes out beside the
simulated time is what threads and queues add; stages' own compute is not in it.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from dsv3_jax.parallel.pipeline.schedules import Item, Schedule, make, reader
from dsv3_jax.parallel.pipeline.simulate import Costs, simulate

_MESSAGE = np.zeros((1, 64, 64), np.float32)  # an activation of a small model
_PATIENCE_S = 60.0


def measure(schedule: Schedule, costs: Costs, unit_s: float) -> float:
  """Time from the first operation to the last, in the costs' unit of `unit_s` seconds.

  ValueError where the schedule stands still. `costs.transfer` must be 0: messages take what they take.
  """
  if costs.transfer:
    raise ValueError(f'transfer = {costs.transfer}: must be 0 where messages are real')
  simulate(schedule)
  ranks = len(schedule.ranks)
  links = {(what, r): queue.Queue() for what in 'FI' for r in range(ranks)}
  together, ends, faults = threading.Barrier(ranks + 1), [0.0] * ranks, []

  def run(r: int) -> None:
    try:
      arrived: dict[tuple[str, Item], np.ndarray] = {}
      together.wait()
      for op in schedule.ranks[r]:
        for what, item in (('F', op.forward), ('I', op.backward)):
          if item is None or item.stage == (0 if what == 'F' else schedule.stages - 1):
            continue
          while (what, item) not in arrived:
            target, message = links[what, r].get(timeout=_PATIENCE_S)
            arrived[what, target] = message
          del arrived[what, item]
        time.sleep(costs.of(op.kind) * unit_s)
        for what, item in (('F', op.forward), ('I', op.backward)):
          target = item and reader(schedule.stages, what, item)
          if target:
            to = schedule.routes[target.route][target.stage]
            links[what, to].put((target, _MESSAGE.copy()))
      ends[r] = time.perf_counter()
    except Exception as error:  # told by the caller's thread
      faults.append(error)

  threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(ranks)]
  for thread in threads:
    thread.start()
  together.wait()
  start = time.perf_counter()
  for thread in threads:
    thread.join()
  if faults:
    raise faults[0]
  return (max(ends) - start) / unit_s


def table(
  names: Sequence[str], sizes: list[tuple[int, int]], costs: Costs, unit_s: float
) -> Iterator[str]:
  """A line for each schedule and (stages, micro-batches): times and bubbles, simulated and measured."""
  head = f'{"schedule":<11} {"stages":>6} {"micro":>6} {"simulated":>10} {"measured":>9} {"off":>6}'
  yield f'{head} {"bubble":>7} {"measured":>9}'
  for stages, micro in sizes:
    for name in names:
      schedule = make(name, stages, micro)
      expected = simulate(schedule, costs)
      took = measure(schedule, costs, unit_s)
      work = expected.makespan - expected.bubble
      off = took / expected.makespan - 1
      yield (
        f'{name:<11} {stages:>6} {micro:>6} {expected.makespan:>10.2f} {took:>9.2f} {off:>6.1%} '
        f'{expected.bubble:>7.2f} {took - work:>9.2f}'
      )
