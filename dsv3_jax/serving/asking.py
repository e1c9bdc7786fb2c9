"""What a client asks for, checked: the bodies of OpenAI's completions and chat completions.

A parameter that is not served is refused by name unless it has the value that changes nothing; `user` and
the like, which say nothing about the answer, are let through.
"""

import dataclasses
import math
from typing import Any

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.sampling import Sampling

_COMMON = {
  'model', 'max_tokens', 'temperature', 'top_p', 'min_p', 'n', 'stream', 'stream_options', 'stop', 'seed',
  'logprobs',
}  # fmt: skip
_KNOWN = {
  'completions': _COMMON | {'prompt'},
  'chat': _COMMON | {'messages', 'max_completion_tokens', 'top_logprobs'},
}
_NEUTRAL = {
  'frequency_penalty': (0, None), 'presence_penalty': (0, None), 'logit_bias': ({}, None), 'best_of': (1, None),
  'echo': (False, None), 'suffix': (None,),
}  # fmt: skip
_SAYS_NOTHING = {'user', 'metadata', 'store'}
_DEFAULT_TOKENS = {'completions': 16, 'chat': None}  # as OpenAI has them; None: as many as fit
_MOST_CHOICES, _MOST_STOPS = 8, 4


class Refused(Exception):
  """A request that cannot be served: HTTP status, reason, and the parameter at fault."""

  def __init__(self, reason: str, param: str | None = None, status: int = 400) -> None:
    super().__init__(reason)
    self.param, self.status = param, status


@dataclasses.dataclass(frozen=True)
class Asked:
  chat: bool
  prompt: Any  # text, or token ids; of a chat, its messages
  max_tokens: int | None
  sampling: Sampling
  n: int
  stream: bool
  usage: bool  # at the end of a stream
  stop: list[str]
  logprobs: bool
  top_logprobs: int


def read(kind: str, body: Any, model: str) -> Asked:
  """Raises Refused with what is wrong and what would be right."""
  if not isinstance(body, dict):
    raise Refused('the body must be a JSON object')
  for name, value in body.items():
    if name in _NEUTRAL:
      if value not in _NEUTRAL[name]:
        raise Refused(f'{name} = {value!r}: is not served; leave it out', name)
    elif name not in _KNOWN[kind] | _SAYS_NOTHING:
      raise Refused(f'{name}: is not a parameter of {kind}', name)
  if body.get('model', model) != model:
    raise Refused(f'model = {body["model"]!r}: this server has {model!r}', 'model', 404)
  chat = kind == 'chat'
  prompt = _messages(body) if chat else _prompt(body)
  limit = _number(body, 'max_tokens', None, 1, math.inf, int)
  if chat:
    limit = _number(body, 'max_completion_tokens', limit, 1, math.inf, int)
  try:
    sampling = Sampling(
      temperature=float(_number(body, 'temperature', 1.0, 0, 1000, (int, float))),
      top_p=float(_number(body, 'top_p', 1.0, 0, 1, (int, float))),
      min_p=float(_number(body, 'min_p', 0.0, 0, 1, (int, float))),
      seed=_number(body, 'seed', 0, 0, 2**32 - 1, int),
    )
  except ConfigError as error:
    raise Refused(str(error)) from None
  if chat:
    logprobs = _flag(body, 'logprobs')
    top = _number(body, 'top_logprobs', 0, 0, 20, int)
    if top and not logprobs:
      raise Refused('top_logprobs: wants logprobs = true', 'top_logprobs')
  else:
    top = _number(body, 'logprobs', None, 0, 5, int)
    logprobs, top = top is not None, top or 0
  options = body.get('stream_options') or {}
  if not isinstance(options, dict) or set(options) - {'include_usage'}:
    raise Refused('stream_options: must be {"include_usage": true or false}', 'stream_options')
  return Asked(
    chat=chat,
    prompt=prompt,
    max_tokens=limit or _DEFAULT_TOKENS[kind],
    sampling=sampling,
    n=_number(body, 'n', 1, 1, _MOST_CHOICES, int),
    stream=_flag(body, 'stream'),
    usage=_flag(options, 'include_usage'),
    stop=_stop(body),
    logprobs=logprobs,
    top_logprobs=top,
  )


def _number(body: dict, name: str, default: Any, low: float, high: float, types: Any) -> Any:
  value = body.get(name)
  if value is None:
    return default
  right = f'a whole number of {low} or more' if high == math.inf else f'from {low} to {high}'
  if isinstance(value, bool) or not isinstance(value, types) or not low <= value <= high:
    raise Refused(f'{name} = {value!r}: must be {right}', name)
  return value


def _flag(body: dict, name: str) -> bool:
  value = body.get(name)
  if value not in (None, True, False) or type(value) in (int, float):
    raise Refused(f'{name} = {value!r}: must be true or false', name)
  return bool(value)


def _is_text(value: Any) -> bool:
  return isinstance(value, str) and not any('\ud800' <= c <= '\udfff' for c in value)


def _stop(body: dict) -> list[str]:
  stop = body.get('stop') or []
  stop = [stop] if isinstance(stop, str) else stop
  if (
    not isinstance(stop, list)
    or len(stop) > _MOST_STOPS
    or not all(s and _is_text(s) for s in stop)
  ):
    raise Refused(f'stop: must be a text or a list of at most {_MOST_STOPS}, none empty', 'stop')
  return stop


def _prompt(body: dict) -> str | list[int]:
  prompt = body.get('prompt')
  if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
    prompt = prompt[0]
  ids = isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt)
  if not ids and not _is_text(prompt):
    raise Refused('prompt: must be one text, or one list of token ids', 'prompt')
  return prompt


def _messages(body: dict) -> list[dict[str, str]]:
  messages = body.get('messages')
  right = 'must be a list of {"role": .., "content": text}, not empty'
  if not isinstance(messages, list) or not messages:
    raise Refused(f'messages: {right}', 'messages')
  for i, message in enumerate(messages):
    fine = isinstance(message, dict) and message.keys() == {'role', 'content'}
    if (
      not fine
      or message['role'] not in ('system', 'user', 'assistant')
      or not _is_text(message['content'])
    ):
      raise Refused(f'messages[{i}]: {right}; roles are system, user, assistant', 'messages')
  return messages
