"""What a person sees while weights are converted: how much of how much, the rate, the time left.

On a terminal a live bar; elsewhere one plain line about every ten seconds and one at the end.
"""

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

import rich.progress

from dsv3_jax import console


class Meter:
  """`with Meter('import', total_bytes) as m: m.add(nbytes)`; to stderr unless told otherwise.

  `skip` counts what an earlier, interrupted conversion has done: it is no part of the rate.
  """

  def __init__(
    self,
    what: str,
    total: int,
    *,
    stream: TextIO | None = None,
    every_s: float = 10.0,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    self._what, self._total = what, total
    self._done = self._skipped = 0
    self._stream = stream or sys.stderr
    self._every_s, self._clock = every_s, clock
    self._began = self._printed = clock()
    self._bar = console.bar(self._stream, rich.progress.TextColumn(what))
    if self._bar is not None:
      self._task = self._bar.add_task('', total=total, figures='')

  def __enter__(self) -> 'Meter':
    if self._bar is not None:
      self._bar.start()
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
  ) -> None:
    if self._bar is not None:
      self._bar.stop()
    elif kind is None:
      print(self._line(), file=self._stream, flush=True)

  def add(self, nbytes: int) -> None:
    self._done += nbytes
    self._show()

  def skip(self, nbytes: int) -> None:
    self._done += nbytes
    self._skipped += nbytes
    self._show()

  def _show(self) -> None:
    now = self._clock()
    if self._bar is not None:
      self._bar.update(self._task, completed=self._done, figures=self._figures())
    elif now - self._printed >= self._every_s:
      self._printed = now
      print(self._line(), file=self._stream, flush=True)

  def _line(self) -> str:
    return f'{self._what} {100 * self._done / max(self._total, 1):3.0f}%  {self._figures()}'

  def _figures(self) -> str:
    seconds = self._clock() - self._began
    fresh = self._done - self._skipped
    rate = fresh / seconds if seconds > 0 else 0.0
    left = math.ceil((self._total - self._done) / rate) if rate else None
    shown = '-' if left is None else f'{left // 3600}:{left // 60 % 60:02}:{left % 60:02}'
    return f'{_size(self._done)} of {_size(self._total)}  {_size(rate)}/s  left {shown}'


def _size(nbytes: float) -> str:
  for unit, size in (('GB', 1e9), ('MB', 1e6), ('kB', 1e3)):
    if nbytes >= size:
      return f'{nbytes / size:.2f} {unit}'
  return f'{nbytes:.0f} B'
