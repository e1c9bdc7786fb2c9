"""What a decode process and a prefill process say to each other: JSON headers and the raw bytes of pages.

  prefill -> decode   {"cache": .., "drafts": .., "max_length": .., "model": .., "room": ..}      on connection
  decode -> prefill   {"run": id, "prompt": [..], "max_tokens": .., "sampling": {..}, ..} | {"cancel": id}
  prefill -> decode   {"id": .., "token": .., "finish": .., "drafts": [..], "pages": n}, then n pages of bytes

A header is one line. Nothing that is read is run: numbers and bytes, of sizes that are known beforehand.
"""

import dataclasses
import json
import socket
from typing import Any, BinaryIO

import numpy as np

from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Event, Handover, Request, Token
from dsv3_jax.inference.sampling import Sampling

_LONGEST = 16 << 20  # bytes of a header


class WireError(Exception):
  """The other side said what it must not, or is gone."""


def send(s: socket.socket, header: dict[str, Any], pages: list[np.ndarray] | None = None) -> None:
  """Raises WireError."""
  try:
    s.sendall(json.dumps(header).encode() + b'\n')
    for page in pages or []:
      s.sendall(page.tobytes())
  except OSError as error:
    raise WireError(f'the other process is gone: {error}') from None


def read(stream: BinaryIO) -> dict[str, Any]:
  """The next header. Raises WireError."""
  try:
    line = stream.readline(_LONGEST)
    header = json.loads(line) if line.endswith(b'\n') else None
  except (OSError, ValueError, RecursionError) as error:
    raise WireError(f'the other process is gone or speaks otherwise: {error}') from None
  if not isinstance(header, dict):
    raise WireError('the other process is gone' if not line else 'a header is no JSON object')
  return header


def about(engine: Engine, model: str) -> dict[str, Any]:
  """What two engines must have alike, and what the one of prompts has room for."""
  shape, dtype = engine.page
  alike = {'cache': [list(shape), str(dtype)], 'drafts': engine.drafts}
  return alike | {'max_length': engine.max_length, 'model': model, 'room': engine.room}


def request_header(i: int, request: Request) -> dict[str, Any]:
  sampling = dataclasses.asdict(request.sampling)
  rest = {'sample': request.sample, 'top_logprobs': request.top_logprobs}
  prompt = list(map(int, request.prompt))
  return {
    'run': i,
    'prompt': prompt,
    'max_tokens': request.max_tokens,
    'sampling': sampling,
    **rest,
  }


def read_request(header: dict[str, Any]) -> Request:
  """Raises WireError."""
  try:
    whole = lambda name: int(header[name])
    sampling = Sampling(
      **{k: float(v) if k != 'seed' else int(v) for k, v in header['sampling'].items()}
    )
    prompt = [int(i) for i in header['prompt']]
    return Request(prompt, whole('max_tokens'), sampling, whole('sample'), whole('top_logprobs'))
  except (LookupError, TypeError, ValueError, AttributeError) as error:
    raise WireError(f'a request is not whole: {error!r}') from None


def send_event(s: socket.socket, i: int, event: Event) -> None:
  """The one event of a prompt: its first token, and the pages where it goes on."""
  [token], handover = event.tokens, event.handover
  header = {'id': i, 'token': dataclasses.asdict(token), 'finish': event.finish}
  pages = handover.pages if handover else []
  drafts = handover.drafts if handover else []
  send(s, header | {'drafts': drafts, 'pages': len(pages)}, pages)


def read_event(stream: BinaryIO, header: dict[str, Any], request: Request, engine: Engine) -> Event:
  """`engine`: the one that takes over. Raises WireError."""
  shape, dtype = engine.page
  size = int(np.prod(shape)) * dtype.itemsize
  try:
    given = header['token']
    top = tuple((int(t), float(p)) for t, p in given['top'])
    token = Token(int(given['id']), float(given['logprob']), top)
    finish, drafts, count = (
      header['finish'],
      [int(d) for d in header['drafts']],
      int(header['pages']),
    )
  except (LookupError, TypeError, ValueError) as error:
    raise WireError(f'an answer is not whole: {error!r}') from None
  pages = []
  for _ in range(count):
    content = stream.read(size)
    if len(content) < size:
      raise WireError('the other process is gone in the middle of a page')
    pages.append(np.frombuffer(content, dtype).reshape(shape))
  handover = None if finish else Handover(request, token, drafts, pages)
  return Event(request, [token], finish, handover)
