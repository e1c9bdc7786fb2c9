"""Several processes on this machine that are one program: real collectives between them, on CPU devices.

  python launch/local.py --processes 4 --devices-per-process 2 -- \\
    python -m dsv3_jax.train --config=configs/quickstart.py:debug --workdir=/tmp/four \\
      --config.mesh.data=2 --config.mesh.node=2 --config.mesh.local=2

What a pod does, in small: every process has its own devices, data and part of each checkpoint. Process 0
is shown as it is; of the others each line of stderr, behind its number.

A process that ends with an error, or is killed, ends the others: SIGTERM, and SIGKILL after --grace
seconds, since those that wait in a collective hear nothing. `--restarts=N` then starts all again, and
training continues from its last checkpoint. SIGTERM and Ctrl-C here go to all, which save and end.
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from dsv3_jax import console, processes
from dsv3_jax.config import ConfigError

_POLL_S = 0.1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser(
    prog='local', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--processes', type=int, default=2)
  parser.add_argument('--devices-per-process', type=int, default=1)
  parser.add_argument(
    '--restarts', type=int, default=0, help='how often to start again after a loss'
  )
  parser.add_argument('--grace', type=float, default=5.0, help='seconds from SIGTERM to SIGKILL')
  parser.add_argument('command', nargs=argparse.REMAINDER, help='behind --')
  args = parser.parse_args(arguments)
  args.command = args.command[args.command[:1] == ['--'] :]
  if not args.command:
    raise ConfigError('no command: give it behind --, like -- python -m dsv3_jax.train ...')
  for name in ('processes', 'devices_per_process'):
    if getattr(args, name) < 1:
      flag = name.replace('_', '-')
      raise ConfigError(f'--{flag} = {getattr(args, name)}: must be at least 1')
  return args


def main(args: argparse.Namespace) -> int:
  asked: list[int] = []
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda got, frame: asked.append(got))
  for attempt in range(args.restarts + 1):
    code = _run(args, asked)
    if code == 0 or asked:
      return code
    if attempt < args.restarts:
      print(f'local: starts all again ({attempt + 1} of {args.restarts})', file=sys.stderr)
  return code


def _run(args: argparse.Namespace, asked: list[int]) -> int:
  """All processes once -> 0, or the first code that is not: 128 + the signal of a killed one."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  started = [_start(args, address, number) for number in range(args.processes)]
  told = 0
  try:
    while True:
      codes = [process.poll() for process in started]
      lost = next((number for number, code in enumerate(codes) if code), None)
      if lost is not None:
        code = codes[lost] if codes[lost] > 0 else 128 - codes[lost]
        print(
          f'local: process {lost} of {args.processes} ended with {code}: ends the others',
          file=sys.stderr,
        )
        return code
      if None not in codes:
        return 0
      for number in asked[told:]:
        _signal(started, number)
      told = len(asked)
      time.sleep(_POLL_S)
  finally:
    _end(started, args.grace)


def _start(args: argparse.Namespace, address: str, number: int) -> subprocess.Popen[str]:
  # A number of devices given there as well would be one too many.
  flags = re.sub(r'--xla_force_host_platform_device_count=\d+', '', os.environ.get('XLA_FLAGS', ''))
  environment = os.environ | {
    'XLA_FLAGS': flags,
    processes.ADDRESS: address,
    processes.COUNT: str(args.processes),
    processes.ID: str(number),
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': str(args.devices_per_process),
  }
  # A session of its own, so that Ctrl-C reaches it from here and not twice.
  process = subprocess.Popen(
    args.command,
    env=environment,
    text=True,
    start_new_session=True,
    stdout=None if number == 0 else subprocess.DEVNULL,
    stderr=None if number == 0 else subprocess.PIPE,
  )
  if number:
    threading.Thread(target=_show, args=(process, number), daemon=True).start()
  return process


def _show(process: subprocess.Popen[str], number: int) -> None:
  for line in process.stderr:
    print(f'[{number}] {line}', end='', file=sys.stderr, flush=True)


def _signal(started: list[subprocess.Popen[str]], number: int) -> None:
  for process in started:
    if process.poll() is None:
      process.send_signal(number)


def _end(started: list[subprocess.Popen[str]], grace: float) -> None:
  _signal(started, signal.SIGTERM)
  until = time.monotonic() + grace
  while any(process.poll() is None for process in started) and time.monotonic() < until:
    time.sleep(_POLL_S)
  _signal(started, signal.SIGKILL)
  for process in started:
    process.wait()


if __name__ == '__main__':
  sys.exit(console.run('local', parse, main, None, file='command'))
