"""Time to the first token and from token to token, as OpenAI's own client sees them, many at once.

`python -m dsv3_jax.serving.bench WORKDIR --clients=64`: starts a server, asks it for each client's greedy
continuation alone, then lets all clients stream at once, a request after another. Every answer must be the one
that came alone. A JSON on stdout; ends with 1 where an answer differs.

Wants the `openai` package. Clients run in one process beside the server: on few cores they take time from it.
"""

import argparse
import asyncio
import dataclasses
import importlib.util
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

from dsv3_jax import console
from dsv3_jax.config import ConfigError
from dsv3_jax.serving.own import HOST, own_server

_WORDS = (
  'def',
  'class',
  'import',
  'return',
  'self',
  'for',
  'in',
  'if',
  'None',
  'x',
  'y',
  '(',
  ')',
  ':',
  '=',
)


@dataclasses.dataclass(frozen=True)
class Answer:
  text: str
  tokens: int
  first_s: float
  seconds: float

  @property
  def token_s(self) -> float:
    """Mean from one token to the next."""
    return (self.seconds - self.first_s) / max(self.tokens - 1, 1)


async def _ask(client: Any, prompt: str, max_tokens: int) -> Answer:
  start, first_s, text, tokens = time.perf_counter(), None, '', 0
  stream = await client.completions.create(
    model='served',
    prompt=prompt,
    max_tokens=max_tokens,
    temperature=0,
    stream=True,
    stream_options={'include_usage': True},
  )
  async for chunk in stream:
    if chunk.choices:
      first_s = first_s or time.perf_counter() - start
      text += chunk.choices[0].text
    if chunk.usage:
      tokens = chunk.usage.completion_tokens
  return Answer(text, tokens, first_s, time.perf_counter() - start)


async def _measure(args: argparse.Namespace, port: int) -> tuple[list[Answer], int, float]:
  """All answers, how many of them differ from those that came alone, and how long all took."""
  import openai

  r = random.Random(0)
  prompts = [' '.join(r.choices(_WORDS, k=r.randint(1, args.words))) for _ in range(args.clients)]
  address = f'http://{HOST}:{port}/v1'
  async with openai.AsyncOpenAI(base_url=address, api_key='none', timeout=600) as client:
    alone = [await _ask(client, prompt, args.max_tokens) for prompt in prompts]

    async def one(i: int) -> list[tuple[int, Answer]]:
      mine = [(i + k) % len(prompts) for k in range(args.requests)]
      return [(at, await _ask(client, prompts[at], args.max_tokens)) for at in mine]

    start = time.perf_counter()
    told = [pair for each in await asyncio.gather(*map(one, range(len(prompts)))) for pair in each]
    seconds = time.perf_counter() - start
  return [a for _, a in told], sum(a.text != alone[at].text for at, a in told), seconds


def main(arguments: Sequence[str] | None = None) -> int:
  """Exit code: 0, 1 where an answer was not the one that came alone, 2 after one line about what cannot work."""
  return console.run('bench', _parse, _run, arguments, file='workdir')


def _run(args: argparse.Namespace) -> int:
  if not importlib.util.find_spec('openai'):
    raise ConfigError("openai: not installed; install it: pip install 'openai>=3,<4'")
  with own_server(args.workdir, [f'--slots={args.slots}', '--name=served']) as (_, port):
    answers, wrong, seconds = asyncio.run(_measure(args, port))
  tokens = sum(a.tokens for a in answers)
  figures = {
    'clients': args.clients,
    'slots': args.slots,
    'answers': len(answers),
    'not_as_alone': wrong,
    'tokens_per_s': tokens / seconds,
    'first_token': _spread([a.first_s for a in answers]),
    'token': _spread([a.token_s for a in answers]),
    'cores': os.cpu_count(),
    'load_average': os.getloadavg()[0],
  }
  print(json.dumps(figures, indent=2))
  return int(wrong > 0)


def _spread(seconds: Sequence[float]) -> dict[str, float]:
  rank = lambda p: sorted(seconds)[min(len(seconds) - 1, int(p * len(seconds)))]
  return {f'p{100 * p:g}_ms': round(1000 * rank(p), 2) for p in (0.5, 0.99)}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser(
    'python -m dsv3_jax.serving.bench', description='Latencies that many OpenAI clients see.'
  )
  add = parser.add_argument
  add('workdir', help='folder of a training run, or of imported weights')
  add('--clients', type=int, default=64, help='at the same time (%(default)s)')
  add('--requests', type=int, default=3, help='of each client (%(default)s)')
  add('--max_tokens', type=int, default=64, help='of each answer (%(default)s)')
  add('--words', type=int, default=60, help='of the longest prompt (%(default)s)')
  add('--slots', type=int, default=16, help='of the server (%(default)s)')
  args = parser.parse_args(arguments)
  for name in ('clients', 'requests', 'max_tokens', 'words', 'slots'):
    if getattr(args, name) < 1:
      raise ConfigError(f'--{name}={getattr(args, name)}: must be at least 1')
  return args


if __name__ == '__main__':
  sys.exit(main())
