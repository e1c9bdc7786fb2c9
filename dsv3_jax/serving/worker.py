"""The thread that owns the engine: requests go in from any thread, events go out by a callback of each."""

import threading
from collections.abc import Callable, Sequence

from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Event, Request


class Busy(Exception):
  """More requests wait than the server lets in."""


class Ending(Exception):
  """The engine has ended, or failed: nothing runs any more."""


class Worker:
  """`most_waiting`: requests that may wait for a slot; one more is Busy."""

  def __init__(self, engine: Engine, most_waiting: int) -> None:
    self.engine = engine
    self.failure: Exception | None = None
    self._most_waiting = most_waiting
    self._lock = threading.Condition()
    self._new: list[Request] = []
    self._cancelled: list[Request] = []
    self._callbacks: dict[Request, Callable[[Event | None], None]] = {}
    self._ends = False
    self._thread = threading.Thread(target=self._work, name='engine', daemon=True)

  def start(self) -> None:
    self._thread.start()

  def submit(self, requests: Sequence[Request], callback: Callable[[Event | None], None]) -> None:
    """Queues all or none. The thread calls `callback` with each event; with None if it fails.

    Raises:
      Busy: the queue is full.
      Ending: nothing runs any more.
      ConfigError: a request can never run.
    """
    for request in requests:
      self.engine.check(request)
    with self._lock:
      if self._ends or self.failure:
        raise Ending
      if self.engine.waiting + len(self._new) + len(requests) > self._most_waiting:
        raise Busy
      self._new += requests
      self._callbacks |= dict.fromkeys(requests, callback)
      self._lock.notify()

  def cancel(self, requests: Sequence[Request]) -> None:
    """Frees what they hold before the next step; those that ended are left alone."""
    with self._lock:
      for request in requests:
        if self._callbacks.pop(request, None):
          self._cancelled.append(request)
      self._lock.notify()

  def stop(self) -> None:
    """Ends the thread behind its step; whoever runs is told None. Again, it does nothing."""
    with self._lock:
      self._ends = True
      self._lock.notify()
    self._thread.join()

  def _work(self) -> None:
    try:
      while True:
        with self._lock:
          while self.engine.idle and not (self._new or self._cancelled or self._ends):
            self._lock.wait()
          if self._ends:
            break
          for request in self._new:
            self.engine.submit(request)
          for request in self._cancelled:
            self.engine.cancel(request)
          self._new, self._cancelled = [], []
        for event in self.engine.step():
          with self._lock:
            find = self._callbacks.pop if event.finish else self._callbacks.get
            callback = find(event.request, None)
          if callback:
            callback(event)
    except Exception as error:  # whatever it is, nobody may wait for ever
      self.failure = error
      raise
    finally:
      with self._lock:
        left, self._callbacks = set(self._callbacks.values()), {}
      for callback in left:
        callback(None)
