"""A server of our own for measurements: `dsv3_jax.serve` in a process, on a free port of this machine."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from dsv3_jax.config import ConfigError

HOST = '127.0.0.1'
_ENDS_S, _STARTS_S = 60, 600


@contextlib.contextmanager
def own_server(workdir: str, flags: Sequence[str]) -> Iterator[tuple[subprocess.Popen, int]]:
  """The process and its port, once it listens; stopped by SIGTERM at the end, or killed if that takes a minute.

  Its `returncode` then says which. Raises ConfigError where it does not listen after ten minutes.
  """
  with socket.socket() as s:
    s.bind((HOST, 0))
    port = s.getsockname()[1]
  environment = {k: v for k, v in os.environ.items() if k != 'DSV3_API_KEY'}
  address = f'--host={HOST}', f'--port={port}'
  command = [sys.executable, '-m', 'dsv3_jax.serve', workdir, *address, *flags]
  with subprocess.Popen(command, env=environment) as server:
    try:
      _wait(server, port)
      yield server, port
    finally:
      server.send_signal(signal.SIGTERM)
      try:
        server.wait(timeout=_ENDS_S)
      except subprocess.TimeoutExpired:
        server.kill()


def _wait(server: subprocess.Popen, port: int) -> None:
  end = time.monotonic() + _STARTS_S
  while time.monotonic() < end:
    connection = http.client.HTTPConnection(HOST, port, timeout=_STARTS_S)
    try:
      connection.request('GET', '/health')
      connection.getresponse().read()
      return
    except ConnectionRefusedError:
      if server.poll() is not None:
        raise ConfigError(f'the server ended with {server.returncode}') from None
      time.sleep(0.1)
    finally:
      connection.close()
  raise ConfigError(f'the server does not listen after {_STARTS_S} seconds')
