"""The OpenAI API over the engine, as an ASGI application.

  POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics   GET /

A request is read up to a size, checked, and queued, or refused with a reason; whoever goes away is
cancelled. Streams send an event for each token, with `drafted` beside the fields of the API.
"""

import asyncio
import contextlib
import dataclasses
import functools
import hmac
import json
import pathlib
import threading
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import (
  HTMLResponse,
  JSONResponse,
  PlainTextResponse,
  Response,
  StreamingResponse,
)
from starlette.routing import Route

from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.requests import Event, Request, Token
from dsv3_jax.inference.stream import StopText, TextStream
from dsv3_jax.serving import asking
from dsv3_jax.serving.asking import Asked, Refused
from dsv3_jax.serving.chat import Chat
from dsv3_jax.serving.sandbox import TemplateError
from dsv3_jax.serving.worker import Busy, Ending, Worker

_LINGER_S = 0.2
_PAGE = pathlib.Path(__file__).with_name('chat.html').read_text(encoding='utf-8')


@dataclasses.dataclass(frozen=True)
class Limits:
  body_bytes: int = 1_000_000
  seconds: float = 600.0  # of one request, queue included
  body_seconds: float = 30.0  # until a body is there


@dataclasses.dataclass(frozen=True)
class _Piece:
  """What one token adds to one choice."""

  index: int
  text: str
  token: Token | None
  finish: str | None


class Server:
  def __init__(
    self,
    worker: Worker,
    tokenizer: Tokenizer,
    chat: Chat,
    name: str,
    key: str | None,
    limits: Limits,
  ) -> None:
    self._worker, self._tokenizer, self._chat = worker, tokenizer, chat
    self._name, self._key, self._limits = name, key, limits
    self._created = int(time.time())
    self._answers: dict[int, int] = {}  # by status
    self._ends = False

  def app(self) -> Starlette:
    post = lambda path, kind: Route(path, functools.partial(self._ask, kind), methods=['POST'])
    routes = [
      Route('/', _page),
      Route('/health', self._health),
      Route('/metrics', self._metrics),
      Route('/v1/models', self._models),
      post('/v1/completions', 'completions'),
      post('/v1/chat/completions', 'chat'),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
      del app
      self._worker.start()
      yield
      await asyncio.to_thread(self._worker.stop)
      self._chat.close()

    return Starlette(routes=routes, lifespan=lifespan)

  def end(self, seconds: float) -> None:
    """Takes nothing new from now on; what is in goes on for `seconds`, and is then told 503."""
    if not self._ends:
      self._ends = True
      timer = threading.Timer(seconds, self._worker.stop)
      timer.daemon = True  # nothing waits for it where all is done before
      timer.start()

  # ---- what is not a question --------------------------------------------------------------------

  async def _health(self, http: HttpRequest) -> Response:
    del http
    status = 'failed' if self._worker.failure else 'ending' if self._ends else 'ok'
    return JSONResponse({'status': status}, 200 if status == 'ok' else 503)

  async def _models(self, http: HttpRequest) -> Response:
    if refused := self._refuse_stranger(http):
      return refused
    model = {'id': self._name, 'object': 'model', 'created': self._created, 'owned_by': 'dsv3_jax'}
    return JSONResponse({'object': 'list', 'data': [model]})

  async def _metrics(self, http: HttpRequest) -> Response:
    del http
    engine = self._worker.engine
    sums = dataclasses.asdict(engine.stats)
    now = {'running': engine.running, 'waiting': engine.waiting, 'pages_owned': engine.pages_owned}
    lines = [f'# TYPE dsv3_{n}_total counter\ndsv3_{n}_total {v}' for n, v in sums.items()]
    lines += [f'# TYPE dsv3_{n} gauge\ndsv3_{n} {v}' for n, v in now.items()]
    lines.append('# TYPE dsv3_answers_total counter')
    lines += [f'dsv3_answers_total{{status="{s}"}} {n}' for s, n in sorted(self._answers.items())]
    return PlainTextResponse('\n'.join(lines) + '\n')

  # ---- questions ---------------------------------------------------------------------------------

  def _refuse_stranger(self, http: HttpRequest) -> Response | None:
    given = http.headers.get('authorization', '').removeprefix('Bearer ')
    if self._key and not hmac.compare_digest(given.encode(), self._key.encode()):
      return self._error(Refused('the API key is missing or wrong', status=401))
    return None

  async def _ask(self, kind: str, http: HttpRequest) -> Response:
    if refused := self._refuse_stranger(http):
      return refused
    if self._ends:
      return self._error(_ending())
    try:
      asked = asking.read(kind, await self._body(http), self._name)
      prompt = await asyncio.to_thread(self._encode, asked)
      room = self._worker.engine.max_length - len(prompt)
      requests = [
        Request(prompt, asked.max_tokens or max(room, 1), asked.sampling, i, asked.top_logprobs)
        for i in range(asked.n)
      ]
      answer = _Answer(asked, self._name, len(prompt), self._tokenizer)
      pieces = self._pieces(asked, requests)
      first = await anext(pieces)  # queued; what can be refused has been
    except (Refused, ConfigError) as error:
      return self._error(error if isinstance(error, Refused) else Refused(str(error)))
    except Busy:
      return self._error(Refused('too many requests wait; try again soon', status=429))
    except Ending:
      return self._error(_ending())
    except ClientDisconnect:
      return Response(status_code=400)
    del first
    if asked.stream:
      self._count(200)
      return StreamingResponse(_stream(answer, pieces), media_type='text/event-stream')
    return await self._whole(http, answer, pieces)

  async def _whole(
    self, http: HttpRequest, answer: '_Answer', pieces: AsyncIterator[_Piece | None]
  ) -> Response:
    async def collect() -> None:
      async for piece in pieces:
        answer.add(piece)

    work, gone = asyncio.ensure_future(collect()), asyncio.ensure_future(_disconnected(http))
    await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
    for task in (work, gone):
      task.cancel()
    done = await asyncio.gather(work, return_exceptions=True)
    if isinstance(done[0], Refused):
      return self._error(done[0])
    if isinstance(done[0], asyncio.CancelledError):
      return Response(status_code=400)  # to nobody
    if done[0]:
      raise done[0]
    self._count(200)
    return JSONResponse(answer.whole())

  async def _body(self, http: HttpRequest) -> Any:
    body, limits, parts = b'', self._limits, http.stream()
    try:
      async with asyncio.timeout(limits.body_seconds):
        async for part in parts:
          body += part
          if len(body) > limits.body_bytes:
            await _read_away(parts)
            raise Refused(f'the body has more than {limits.body_bytes} bytes', status=413)
    except TimeoutError:
      raise Refused(f'no body after {limits.body_seconds:g} seconds', status=408) from None
    try:
      return json.loads(body)
    except (ValueError, RecursionError) as error:
      raise Refused(f'the body is not JSON: {error}') from None

  def _encode(self, asked: Asked) -> list[int]:
    t = self._tokenizer
    if isinstance(asked.prompt, list) and not asked.chat:
      if not all(0 <= i < t.vocab_size for i in asked.prompt):
        raise Refused(f'prompt: token ids must be from 0 to {t.vocab_size - 1}', 'prompt')
      return asked.prompt
    if not asked.chat:
      return [t.bos_id, *t.encode(asked.prompt)]
    try:
      return self._chat.encode(asked.prompt)
    except TemplateError as error:
      raise Refused(f'messages: the chat template refuses them: {error}', 'messages') from None

  async def _pieces(self, asked: Asked, requests: list[Request]) -> AsyncIterator[_Piece | None]:
    """None once all is queued, then what every token adds; ends with the last choice."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue()
    put = lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)
    texts = [TextStream(self._tokenizer) for _ in requests]
    stops = [StopText(asked.stop) for _ in requests]
    index = {request: i for i, request in enumerate(requests)}
    ends = loop.time() + self._limits.seconds
    self._worker.submit(requests, put)
    try:
      yield None
      while index:
        try:
          event: Event | None = await asyncio.wait_for(queue.get(), ends - loop.time())
        except TimeoutError:
          told = f'took more than {self._limits.seconds:g} seconds'
          raise Refused(told, status=408) from None
        if event is None:
          raise _ending()
        i = index.get(event.request)
        for token in event.tokens if i is not None else ():
          last = token is event.tokens[-1]
          text = stops[i].push(texts[i].push(token.id))
          if last and event.finish and not stops[i].stopped:
            text += stops[i].push(texts[i].close())
            text += '' if stops[i].stopped else stops[i].close()
          finish = 'stop' if stops[i].stopped else event.finish if last else None
          yield _Piece(i, text, token, finish)
          if finish:
            self._worker.cancel([event.request])
            del index[event.request]
            break
    finally:
      self._worker.cancel(list(index))

  def _error(self, refused: Refused) -> Response:
    self._count(refused.status)
    headers = {'retry-after': '1'} if refused.status == 429 else None
    return JSONResponse(_error_body(refused), refused.status, headers)

  def _count(self, status: int) -> None:
    self._answers[status] = self._answers.get(status, 0) + 1


class _Answer:
  """An answer in the words of the API, whole or in chunks."""

  def __init__(self, asked: Asked, model: str, prompt_tokens: int, tokenizer: Tokenizer) -> None:
    self._asked, self._tokenizer = asked, tokenizer
    self._prompt_tokens, self.tokens = prompt_tokens, 0
    self._texts = [''] * asked.n
    self._logs: list[list[tuple[Token, int]]] = [[] for _ in range(asked.n)]  # offset of its text
    self._finish: list[str | None] = [None] * asked.n
    self._head = {
      'id': ('chatcmpl-' if asked.chat else 'cmpl-') + uuid.uuid4().hex,
      'object': 'chat.completion' if asked.chat else 'text_completion',
      'created': int(time.time()),
      'model': model,
    }

  def add(self, piece: _Piece) -> None:
    self.tokens += 1
    self._logs[piece.index].append((piece.token, len(self._texts[piece.index])))
    self._texts[piece.index] += piece.text
    self._finish[piece.index] = piece.finish

  def whole(self) -> dict[str, Any]:
    choices = []
    for i, text in enumerate(self._texts):
      said = (
        {'message': {'role': 'assistant', 'content': text}} if self._asked.chat else {'text': text}
      )
      logprobs = self._logprobs(self._logs[i])
      choices.append({'index': i, **said, 'logprobs': logprobs, 'finish_reason': self._finish[i]})
    return {**self._head, 'choices': choices, 'usage': self.usage()}

  def chunk(self, piece: _Piece) -> dict[str, Any]:
    self.add(piece)
    first = len(self._logs[piece.index]) == 1
    delta = {'role': 'assistant'} if first else {}
    said = {'delta': delta | {'content': piece.text}} if self._asked.chat else {'text': piece.text}
    choice = {
      'index': piece.index,
      **said,
      'logprobs': self._logprobs(self._logs[piece.index][-1:]),
      'finish_reason': piece.finish,
      'drafted': piece.token.drafted,
    }
    return self._chunk([choice])

  def usage_chunk(self) -> dict[str, Any]:
    return self._chunk([]) | {'usage': self.usage()}

  def usage(self) -> dict[str, int]:
    total = self._prompt_tokens + self.tokens
    return {
      'prompt_tokens': self._prompt_tokens,
      'completion_tokens': self.tokens,
      'total_tokens': total,
    }

  @property
  def include_usage(self) -> bool:
    return self._asked.usage

  def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
    kind = {'object': 'chat.completion.chunk'} if self._asked.chat else {}
    return self._head | kind | {'choices': choices}

  def _logprobs(self, logs: list[tuple[Token, int]]) -> dict[str, Any] | None:
    if not self._asked.logprobs:
      return None
    spell = lambda token: self._tokenizer.decode([token], skip_special=False)
    if self._asked.chat:
      one = lambda i, p: {'token': spell(i), 'logprob': p, 'bytes': list(spell(i).encode())}
      content = [one(t.id, t.logprob) | {'top_logprobs': [one(*x) for x in t.top]} for t, _ in logs]
      return {'content': content, 'refusal': None}
    return {
      'tokens': [spell(t.id) for t, _ in logs],
      'token_logprobs': [t.logprob for t, _ in logs],
      'top_logprobs': [{spell(i): p for i, p in t.top} for t, _ in logs],
      'text_offset': [offset for _, offset in logs],
    }


async def _stream(answer: _Answer, pieces: AsyncIterator[_Piece | None]) -> AsyncIterator[str]:
  event = lambda body: f'data: {json.dumps(body)}\n\n'
  try:
    async for piece in pieces:
      yield event(answer.chunk(piece))
    if answer.include_usage:
      yield event(answer.usage_chunk())
    yield 'data: [DONE]\n\n'
  except Refused as refused:  # too late for a status
    yield event(_error_body(refused))
  finally:
    await pieces.aclose()


async def _read_away(parts: AsyncIterator[bytes]) -> None:
  """What is on its way for a moment: unread, it would make the kernel drop the answer with the connection."""
  with contextlib.suppress(TimeoutError):
    async with asyncio.timeout(_LINGER_S):
      async for _ in parts:
        pass


def _ending() -> Refused:
  return Refused('the server is ending', status=503)


def _error_body(refused: Refused) -> dict[str, Any]:
  kind = 'invalid_request_error' if refused.status < 500 else 'server_error'
  error = {'message': str(refused), 'type': kind, 'param': refused.param, 'code': None}
  return {'error': error}


async def _disconnected(http: HttpRequest) -> None:
  while (await http.receive())['type'] != 'http.disconnect':
    pass


async def _page(http: HttpRequest) -> Response:
  del http
  return HTMLResponse(
    _PAGE, headers={'content-security-policy': "default-src 'self' 'unsafe-inline'"}
  )
