"""The listening side of prompts that run in a process of their own; `serving.remote` is the other.

Each connection sends requests and gets first tokens and pages of the latent cache (`serving.wire`). Whoever
reaches it is answered, so it wants an address that only servers reach.
"""

import socketserver
import sys

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Event, Request
from dsv3_jax.serving import wire
from dsv3_jax.serving.worker import Busy, Ending, Worker

_MOST_WAITING = 100_000  # servers have bounds of their own


def listener(engine: Engine, model: str, host: str, port: int) -> socketserver.ThreadingTCPServer:
  """Listening; the engine runs in a thread of its own. `model` is told to who connects."""
  worker = Worker(engine, _MOST_WAITING)
  worker.start()

  class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
      _answer(self, worker, wire.about(engine, model))

  class Listener(socketserver.ThreadingTCPServer):
    daemon_threads = allow_reuse_address = True

    def server_close(self) -> None:
      super().server_close()
      worker.stop()

  return Listener((host, port), Handler)


def _answer(handler: socketserver.StreamRequestHandler, worker: Worker, hello: dict) -> None:
  """One server's requests until it goes; what it has left is cancelled."""
  running: dict[int, Request] = {}
  numbers: dict[Request, int] = {}

  def come(event: Event | None) -> None:
    try:
      if event is None:
        handler.connection.close()
      elif event.request in numbers:
        running.pop(numbers[event.request], None)
        wire.send_event(handler.connection, numbers.pop(event.request), event)
    except (wire.WireError, OSError):
      pass  # it is gone, which its reader sees too

  try:
    wire.send(handler.connection, hello)
    while True:
      header = wire.read(handler.rfile)
      if 'cancel' in header:
        request = running.pop(header['cancel'], None)
        if request:
          numbers.pop(request, None)
          worker.cancel([request])
      else:
        request = wire.read_request(header)
        running[header['run']], numbers[request] = request, header['run']
        worker.submit([request], come)
  except (wire.WireError, ConfigError, Busy, Ending) as error:
    if str(error) != 'the other process is gone':
      print(f'prefill: {error}', file=sys.stderr)
  finally:
    worker.cancel(list(running.values()))
