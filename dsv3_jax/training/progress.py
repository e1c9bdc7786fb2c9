"""What a person sees while a run trains: step of how many, loss, tokens/s, time left.

On a terminal a live bar; elsewhere (a file, a pod's log) one plain line about every ten seconds and
one at the end, without carriage returns. The time left comes from the speed of the last minutes,
pauses for evaluation and checkpoints included; it is a dash until two updates give a speed, and the
time before the first update, which compiles, never counts.
"""

import collections
import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

import rich.progress

from dsv3_jax import console
from dsv3_jax.training import metrics

_WINDOW_S = 120.0  # the speed is that of the last two minutes ...
_WINDOW_UPDATES = 20  # ... or of this many updates, where they take longer


class Progress:
  """`with Progress(total_steps, start_step, tokens_per_step) as p: p.update(step, loss=...)`.

  `stream` is where it shows (stdout unless given), `every_s` the seconds between plain lines,
  `clock` gives seconds. `tokens_per_step` yields the tokens/s where `update` is not told them.
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int,
    tokens_per_step: int,
    *,
    stream: TextIO | None = None,
    every_s: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._total, self._step = total_steps, start_step
    self._tokens_per_step = tokens_per_step
    self._stream = stream or sys.stdout
    self._every_s, self._clock = every_s, clock
    self._seen: collections.deque[tuple[float, int]] = collections.deque()  # (seconds, step)
    self._line = ''
    self._printed_at: float | None = None
    self._printed_step: int | None = None
    counted = rich.progress.TextColumn('step'), rich.progress.MofNCompleteColumn()
    self._bar = console.bar(self._stream, *counted)
    if self._bar is not None:
      self._task = self._bar.add_task(
        '', total=total_steps, completed=start_step, figures='compiling'
      )

  def __enter__(self) -> 'Progress':
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if self._bar is not None:
      self._bar.stop()
    elif self._line and self._printed_step != self._step:
      self._print_line(self._clock())

  def update(
    self, step: int, *, loss: float | None = None, tokens_per_s: float | None = None
  ) -> None:
    """Shows that `step` steps are done; `loss` in nats per token."""
    now = self._clock()
    self._step = step
    self._seen.append((now, step))
    while len(self._seen) > _WINDOW_UPDATES and now - self._seen[1][0] > _WINDOW_S:
      self._seen.popleft()
    speed = self._steps_per_s()
    if tokens_per_s is None and speed is not None:
      tokens_per_s = speed * self._tokens_per_step
    figures = '  '.join(
      (
        f'loss {"-" if loss is None else format(loss, ".4f")}',
        f'{"-" if tokens_per_s is None else metrics.short(tokens_per_s)} tokens/s',
        f'left {self._time_left(speed)}',
      )
    )
    if self._bar is not None:
      self._bar.update(self._task, completed=step, figures=figures)
      return
    self._line = f'step {step}/{self._total} {100 * step / max(self._total, 1):3.0f}%  {figures}'
    if self._printed_at is None or now - self._printed_at >= self._every_s:
      self._print_line(now)

  def _print_line(self, now: float) -> None:
    self._printed_at, self._printed_step = now, self._step
    print(self._line, file=self._stream, flush=True)

  def _steps_per_s(self) -> float | None:
    if len(self._seen) < 2:
      return None
    (first_s, first_step), (last_s, last_step) = self._seen[0], self._seen[-1]
    if last_s <= first_s or last_step <= first_step:
      return None
    return (last_step - first_step) / (last_s - first_s)

  def _time_left(self, steps_per_s: float | None) -> str:
    left = self._total - self._step
    if left <= 0:
      return '0:00:00'
    if steps_per_s is None:
      return '-'
    seconds = math.ceil(left / steps_per_s)
    days, seconds = divmod(seconds, 86_400)
    clock = f'{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}'
    return f'{days}d {clock}' if days else clock
