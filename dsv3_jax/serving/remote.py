"""Prompts that run in another process, for an `inference.apart.Apart` in this one."""

import itertools
import queue
import socket
import threading
from typing import Any

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Event, Request
from dsv3_jax.serving import wire
from dsv3_jax.serving.wire import WireError

_WAIT_S = 0.02  # for a prompt, where nothing is to be decoded


class RemotePrompts:
  """`decode`: the engine that takes over; `model`: the name of its weights, which must be the same there.

  For one thread. Raises ConfigError where nobody listens, or somebody with another model.
  """

  pages_owned = 0  # here

  def __init__(self, address: str, decode: Engine, model: str) -> None:
    host, _, port = address.rpartition(':')
    try:
      self._socket = socket.create_connection((host, int(port)), timeout=60)
    except (OSError, ValueError) as error:
      raise ConfigError(
        f'--prefill={address}: {error}; wants HOST:PORT of a dsv3_jax.serve --prompts_only'
      ) from None
    self._socket.settimeout(None)
    self._stream = self._socket.makefile('rb')
    self._decode = decode
    try:
      theirs = self._meet(wire.about(decode, model))
    except (ConfigError, WireError) as error:
      self._stream.close()
      self._socket.close()
      raise ConfigError(f'--prefill={address}: {error}') from None
    self._room = theirs['room']
    self._numbers = itertools.count()
    self._requests: dict[int, Request] = {}  # that run there
    self._lock = threading.Lock()
    self._come: queue.SimpleQueue[Event | WireError] = queue.SimpleQueue()
    threading.Thread(target=self._read, name='prefill', daemon=True).start()

  def _meet(self, ours: dict[str, Any]) -> dict[str, Any]:
    theirs = wire.read(self._stream)
    for name in ours.keys() - {'room'}:
      if theirs.get(name) != ours[name]:
        raise ConfigError(f'has {name} = {theirs.get(name)}: must be {ours[name]}')
    return theirs

  @property
  def idle(self) -> bool:
    return not self._requests

  @property
  def running(self) -> int:
    return 0  # what is there waits here

  @property
  def waiting(self) -> int:
    return len(self._requests)

  def check(self, request: Request) -> None:
    """Raises ConfigError for a prompt that the other process has no room for."""
    if len(request.prompt) + 1 > self._room:
      told = f'prompt has {len(request.prompt)} tokens'
      raise ConfigError(f'{told}: the process of prompts has room for {self._room - 1}')

  def submit(self, request: Request) -> None:
    i = next(self._numbers)
    with self._lock:
      self._requests[i] = request
    wire.send(self._socket, wire.request_header(i, request))

  def cancel(self, request: Request) -> None:
    with self._lock:
      found = [i for i, r in self._requests.items() if r is request]
      for i in found:
        del self._requests[i]
    for i in found:
      wire.send(self._socket, {'cancel': i})

  def step(self) -> list[Event]:
    """What has come. Raises WireError once the other process is gone."""
    events = []
    try:
      come = self._come.get(timeout=_WAIT_S) if self._decode.idle else self._come.get_nowait()
      while True:
        if isinstance(come, WireError):
          raise come
        events.append(come)
        come = self._come.get_nowait()
    except queue.Empty:
      return [e for e in events if self._ended(e.request)]

  def warm_up(self) -> None:
    """It did before it listened."""

  def close(self) -> None:
    self._socket.shutdown(socket.SHUT_RDWR)
    self._socket.close()

  def _ended(self, request: Request) -> bool:
    """Forgets a request; whether it was still wanted."""
    with self._lock:
      found = [i for i, r in self._requests.items() if r is request]
      for i in found:
        del self._requests[i]
    return bool(found)

  def _read(self) -> None:
    try:
      while True:
        header = wire.read(self._stream)
        with self._lock:
          request = self._requests.get(header.get('id'))
        # Of one that was cancelled meanwhile the pages are read and dropped.
        request = request or Request([], 1)
        self._come.put(wire.read_event(self._stream, header, request, self._decode))
    except WireError as error:
      self._come.put(error)
    finally:
      self._stream.close()
