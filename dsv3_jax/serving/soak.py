"""Random load on a server of our own, for a while: `python -m dsv3_jax.serving.soak WORKDIR --seconds=600`.

Starts `dsv3_jax.serve` on a free port of 127.0.0.1 and sends it, from a number of clients that each do one
thing after another: answers whole and streamed, people who leave before, in the middle and abruptly, bodies
too large, cut off, malformed, or asking for what is not served. It holds that

  - every refusal is a 4xx or 5xx with a reason, of the status that is due, and every answer is whole;
  - nobody waits longer than --patience seconds;
  - once all have gone, no page is owned and nothing runs or waits;
  - the server's memory in the last third of the time is that of the first, by at most --growth.

Prints what was done and the percentiles of time to the first token and from token to token, as JSON; ends
with 1 where something did not hold. Bounded by --seconds; never talks to another machine.
"""

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import pathlib
import random
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from dsv3_jax import console
from dsv3_jax.config import ConfigError
from dsv3_jax.serving.own import HOST, own_server

_BODY_BYTES = 20_000
_PAUSE_S = 0.05  # of a client between two things, on average
_MOST_FAULTS = 20  # that are told
_Reader, _Writer = asyncio.StreamReader, asyncio.StreamWriter


@dataclasses.dataclass
class Tally:
  done: collections.Counter = dataclasses.field(
    default_factory=collections.Counter
  )  # by kind, status
  faults: list[str] = dataclasses.field(default_factory=list)
  first_s: list[float] = dataclasses.field(default_factory=list)  # to the first token of a stream
  token_s: list[float] = dataclasses.field(default_factory=list)  # between tokens, a mean a stream
  rss: list[tuple[float, int]] = dataclasses.field(default_factory=list)  # when, bytes


# ---- what clients do -----------------------------------------------------------------------------


def _body(r: random.Random, **changes: Any) -> tuple[str, dict[str, Any]]:
  """Path and body of a question that is fine."""
  text = ''.join(r.choices('abcdef \n', k=r.choice([1, 5, 20, 40])))
  body = {
    'max_tokens': r.choice([1, 4, 12, 30]),
    'temperature': r.choice([0, 0.7, 1.0]),
    'top_p': r.choice([1.0, 0.9]),
    'seed': r.randrange(1000),
    'n': r.choice([1, 1, 1, 2]),
    **changes,
  }
  if r.random() < 0.5:
    return '/v1/completions', body | {'prompt': text}
  return '/v1/chat/completions', body | {'messages': [{'role': 'user', 'content': text[:10]}]}


_MALFORMED = (
  b'', b'{', b'[]', b'null', b'\xff\xfe', b'[' * 5000, b'{"prompt": 3}', b'{"prompt": "\\ud800"}',
  b'{"prompt": "a", "max_tokens": -1}', b'{"prompt": "a", "n": 1e9}', b'{"prompt": "a", "beams": 2}',
  b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "stop": [1]}', b'{"prompt": [99999999]}',
  b'{"prompt": "' + b'x' * 5000 + b'"}', b'{"prompt": "a", "model": "another"}',
)  # fmt: skip


async def _whole(port: int, r: random.Random, tally: Tally) -> str:
  path, body = _body(r)
  async with _posted(port, path, json.dumps(body).encode()) as (reader, _):
    status, text = await _answer(reader)
  if status == 429:
    return _refused(status, text, {429})
  choices = json.loads(text)['choices']
  _must(status == 200 and len(choices) == body['n'], f'status {status}, {len(choices)} choices')
  _must(all(c['finish_reason'] in ('stop', 'length') for c in choices), 'a choice has no end')
  return '200'


async def _stream(port: int, r: random.Random, tally: Tally) -> str:
  path, body = _body(r, stream=True, n=1)
  start, times, last = time.monotonic(), [], b''
  async with _posted(port, path, json.dumps(body).encode()) as (reader, _):
    status = await _head(reader)
    if status != 200:
      return _refused(status, await reader.read(), {429})
    async for line in reader:
      if line.startswith(b'data: '):
        last = line
        if b'choices' in line:
          times.append(time.monotonic())
  _must(last == b'data: [DONE]\n', f'a stream ends with {last[:200]!r}')
  tally.first_s.append(times[0] - start)
  if len(times) > 1:
    tally.token_s.append((times[-1] - times[0]) / (len(times) - 1))
  return '200'


async def _leave(port: int, r: random.Random, tally: Tally) -> str:
  path, body = _body(r, stream=r.random() < 0.5, max_tokens=60)
  raw = json.dumps(body).encode()
  cut = r.choice([0, len(raw) // 2, None, None, None])  # in its own body
  async with _posted(port, path, raw, sent=cut) as (reader, writer):
    if cut is None and body['stream'] and await _head(reader) == 200:
      for _ in range(r.randrange(8)):
        await reader.readline()
    elif cut is None:
      await asyncio.sleep(r.random() * 0.1)
    if r.random() < 0.5:  # by RST
      linger = struct.pack('ii', 1, 0)
      writer.get_extra_info('socket').setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
  return 'left'


async def _oversized(port: int, r: random.Random, tally: Tally) -> str:
  size = _BODY_BYTES + r.choice([1, 1000, 10**9])
  sent = b'{"prompt": "' + b'x' * min(size - 12, 2 * _BODY_BYTES)
  async with _posted(port, '/v1/completions', sent, length=size) as (reader, _):
    return _refused(*await _answer(reader), {413})


async def _malformed(port: int, r: random.Random, tally: Tally) -> str:
  path = r.choice(['/v1/completions', '/v1/chat/completions', '/v1/completions', '/v1/nothing'])
  async with _posted(port, path, r.choice(_MALFORMED)) as (reader, _):
    return _refused(*await _answer(reader), {400, 404})


async def _no_http(port: int, r: random.Random, tally: Tally) -> str:
  reader, writer = await asyncio.open_connection(HOST, port)
  try:
    writer.write(r.randbytes(200) + b'\r\n\r\n')
    await writer.drain()
    return _refused(*await _answer(reader), {400})
  finally:
    await _close(writer)


_KINDS: dict[Callable, int] = {
  _whole: 5, _stream: 6, _leave: 5, _oversized: 1, _malformed: 3, _no_http: 1,
}  # fmt: skip


async def _client(port: int, seed: int, end: float, patience: float, tally: Tally) -> None:
  r = random.Random(seed)
  while time.monotonic() < end and len(tally.faults) < _MOST_FAULTS:
    [kind] = r.choices(list(_KINDS), list(_KINDS.values()))
    name = kind.__name__.strip('_')
    try:
      async with asyncio.timeout(patience):
        tally.done[f'{name} {await kind(port, r, tally)}'] += 1
    except TimeoutError:
      tally.faults.append(f'{name}: no end after {patience:g} seconds')
    except (_Fault, OSError, ValueError, LookupError, asyncio.IncompleteReadError) as error:
      tally.faults.append(f'{name}: {type(error).__name__}: {error}')
    await asyncio.sleep(r.expovariate(1 / _PAUSE_S))


# ---- HTTP, as little as this needs ---------------------------------------------------------------


class _Fault(Exception):
  """The server did what it must not."""


def _must(true: bool, told: str) -> None:
  if not true:
    raise _Fault(told)


def _refused(status: int, text: bytes, due: set[int]) -> str:
  _must(status in due, f'status {status} where {sorted(due)} is due: {text[:200]!r}')
  reason = json.loads(text)['error']['message'] if text.startswith(b'{') else text
  _must(bool(reason), f'status {status} without a reason')
  return str(status)


@contextlib.asynccontextmanager
async def _posted(
  port: int, path: str, body: bytes, *, length: int | None = None, sent: int | None = None
) -> Any:
  """A connection that has sent a POST, `sent` bytes of its body; one that ends before is not at fault."""
  length = len(body) if length is None else length
  reader, writer = await asyncio.open_connection(HOST, port)
  try:
    head = f'POST {path} HTTP/1.1\r\nhost: {HOST}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n'
    with contextlib.suppress(ConnectionError):  # it may refuse before it has read all
      writer.write(head.encode() + body[:sent])
      await writer.drain()
    yield reader, writer
  finally:
    await _close(writer)


async def _close(writer: _Writer) -> None:
  writer.close()
  with contextlib.suppress(ConnectionError):
    await writer.wait_closed()


async def _head(reader: _Reader) -> int:
  head = await reader.readuntil(b'\r\n\r\n')
  return int(head.split(b' ', 2)[1])


async def _answer(reader: _Reader) -> tuple[int, bytes]:
  return await _head(reader), await reader.read()


async def _metrics(port: int) -> dict[str, float]:
  reader, writer = await asyncio.open_connection(HOST, port)
  try:
    writer.write(f'GET /metrics HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n\r\n'.encode())
    _, text = await _answer(reader)
  finally:
    await _close(writer)
  return {n: float(v) for n, v in re.findall(r'^(\w+) (\S+)$', text.decode(), re.MULTILINE)}


# ---- the run -------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
  """Exit code: 0, 1 where something did not hold, 2 after one line about what cannot work."""
  return console.run('soak', _parse, _run, arguments, file='workdir')


def _run(args: argparse.Namespace) -> int:
  flags = [f'--slots={args.slots}', f'--waiting={args.waiting}', f'--body_bytes={_BODY_BYTES}']
  with own_server(args.workdir, flags) as (server, port):
    tally = asyncio.run(_load(args, server, port))
  if server.returncode != -signal.SIGTERM:
    tally.faults.append(f'at SIGTERM the server ended with {server.returncode}')
  print(json.dumps(_figures(args, tally), indent=2))
  return 1 if tally.faults else 0


async def _load(args: argparse.Namespace, server: subprocess.Popen, port: int) -> Tally:
  tally = Tally()
  start = time.monotonic()
  end = start + args.seconds
  clients = [
    asyncio.create_task(_client(port, args.seed + i, end, args.patience, tally))
    for i in range(args.clients)
  ]
  while not all(task.done() for task in clients):
    tally.rss.append((time.monotonic() - start, _rss(server.pid)))
    await asyncio.wait(clients, timeout=min(1.0, args.seconds / 20))
  await asyncio.gather(*clients)
  # Those who left are noticed by and by.
  for _ in range(100):
    left = await _metrics(port)
    left = {n: left[f'dsv3_{n}'] for n in ('running', 'waiting', 'pages_owned')}
    if not any(left.values()):
      break
    await asyncio.sleep(0.1)
  else:
    tally.faults.append(f'all have gone, and there are still {left}')
  growth = _growth(tally.rss)
  if growth > args.growth:
    tally.faults.append(f'memory grew by {growth:.1%}')
  return tally


def _rss(pid: int) -> int:
  """Bytes, on Linux."""
  text = pathlib.Path(f'/proc/{pid}/status').read_text(encoding='ascii')
  return 1024 * int(re.search(r'VmRSS:\s+(\d+)', text)[1])


def _growth(rss: list[tuple[float, int]]) -> float:
  """Median of the last third over that of the first, less 1."""
  third = rss[-1][0] / 3
  first = [b for t, b in rss if t <= third]
  last = [b for t, b in rss if t >= 2 * third]
  return statistics.median(last) / statistics.median(first) - 1


def _figures(args: argparse.Namespace, tally: Tally) -> dict[str, Any]:
  percentile = lambda values, p: sorted(values)[min(len(values) - 1, int(p * len(values)))]
  spread = lambda values: {
    f'p{p}_ms': round(1000 * percentile(values, p / 100), 2) for p in (50, 99) if values
  }
  return {
    'seconds': args.seconds,
    'clients': args.clients,
    'done': dict(sorted(tally.done.items())),
    'first_token': spread(tally.first_s),
    'token': spread(tally.token_s),
    'rss_mib': [round(b / 2**20) for _, b in (tally.rss[0], tally.rss[-1])],
    'rss_growth': round(_growth(tally.rss), 4),
    'faults': tally.faults,
  }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser(
    'python -m dsv3_jax.serving.soak', description='Random load on a server of our own.'
  )
  add = parser.add_argument
  add('workdir', help='folder of a training run, or of imported weights')
  add('--seconds', type=float, default=60.0, help='of load (%(default)s)')
  add('--clients', type=int, default=8, help='at the same time (%(default)s)')
  add('--slots', type=int, default=4, help='of the server (%(default)s)')
  add('--waiting', type=int, default=3, help='requests that may wait there (%(default)s)')
  add('--patience', type=float, default=60.0, help='seconds until one is stuck (%(default)s)')
  add('--growth', type=float, default=0.05, help="of memory, by thirds' medians (%(default)s)")
  add('--seed', type=int, default=0, help='of the load (%(default)s)')
  args = parser.parse_args(arguments)
  for name in ('seconds', 'clients', 'patience'):
    if getattr(args, name) <= 0:
      raise ConfigError(f'{name} = {getattr(args, name)}: must be above 0')
  return args


if __name__ == '__main__':
  sys.exit(main())
