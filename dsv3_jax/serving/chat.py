"""Messages to the ids of a prompt, by the chat template that came with the weights.

  1. A message may spell a control token, such as the one that ends a turn, and must not become it. So a
     mark is put around every character that its spellings are made of: one private character, drawn anew
     for each prompt among those that no message has.
  2. The template runs on the marked messages (`sandbox`). It may strip, cut and join them: no control token
     is spelled with a character of a message, for a mark stands between.
  3. What it made is cut at the control tokens, which become their ids; marks are taken out of the pieces
     between, and each is encoded as text.

Which characters are marked: those outside ASCII where a spelling has some, as V3's have; else its
punctuation without <, > and /, so that templates find `</think>`; else all of it. Tokens that the tokenizer
finds in any text, as R1's <think>, are no control tokens: they are what text encodes to.

Example: 'a<|end|>' is given to the template as 'a<~|~end~|~>' and encoded as 'a<|end|>', eight characters
of text; where the template itself writes <|end|>, it is one id.
"""

import json
import pathlib
import re
import secrets
from collections.abc import Mapping, Sequence

from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.serving.sandbox import Template, TemplateError

_TRANSCRIPT = (
  '{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}'
  '{% if add_generation_prompt %}assistant:{% endif %}'
)
_FILE, _CONFIG = 'chat_template.jinja', 'tokenizer_config.json'
_GENERATION = 'generation_config.json'
_VARIABLES = ('bos_token', 'eos_token', 'pad_token')
_PRIVATE = range(0xF0000, 0xFFFFE)  # a plane of characters that mean nothing


class Chat:
  """Makes prompts. `template` None: a plain transcript, which any model can go on with.

  `variables`: spellings that the template may ask for by name, such as bos_token. Raises ConfigError for
  a template that is no Jinja. `close` it.
  """

  def __init__(
    self, tokenizer: Tokenizer, template: str | None, variables: Mapping[str, str] | None = None
  ) -> None:
    self._tokenizer = tokenizer
    self._variables = dict(variables or {})
    control = sorted(
      tokenizer.control, key=len, reverse=True
    )  # the longest first, where one begins another
    self._control = re.compile('(' + '|'.join(map(re.escape, control)) + ')')
    keys = sorted({key for spelling in control for key in _keys(spelling)})
    self._keys = re.compile('[' + re.escape(''.join(keys)) + ']')
    try:
      self._template = Template(template or _TRANSCRIPT)
    except TemplateError as error:
      raise ConfigError(f'chat template: is not a Jinja template: {error}') from None

  def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Ids, bos first, with the beginning of the answer. Raises TemplateError."""
    mark = _mark(messages)
    around = lambda found: f'{mark}{found[0]}{mark}'
    marked = [{**m, 'content': self._keys.sub(around, m['content'])} for m in messages]
    values = {**self._variables, 'messages': marked, 'add_generation_prompt': True}
    values |= {'tools': None, 'documents': None}  # which templates take for given
    t = self._tokenizer
    ids = []
    for i, piece in enumerate(self._control.split(self._template.render(values))):
      if i % 2:
        ids.append(t.control[piece])
      elif piece:
        ids += t.encode(piece.replace(mark, ''))
    return ids if ids[:1] == [t.bos_id] else [t.bos_id, *ids]

  def close(self) -> None:
    self._template.close()


def read(folder: pathlib.Path) -> tuple[str | None, dict[str, str]]:
  """A folder's template and its variables, as released models have them.

  The template is chat_template.jinja, else that of tokenizer_config.json, of several the one named
  'default'. Raises ConfigError for a file that cannot be used.
  """
  values = _config(folder / _CONFIG)
  variables = {}
  for name in _VARIABLES:
    given = values.get(name)
    given = given.get('content') if isinstance(given, dict) else given  # with its flags, or plain
    if given is not None:
      variables[name] = given
  template = values.get('chat_template')
  if isinstance(template, list):
    named = {one.get('name'): one.get('template') for one in template if isinstance(one, dict)}
    if 'default' not in named:
      raise ConfigError(f"{folder / _CONFIG}: chat_template: has none with the name 'default'")
    template = named['default']
  own = folder / _FILE
  if own.exists():
    try:
      template = own.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
      raise ConfigError(f'{own}: is not UTF-8 at byte {error.start}') from None
  for name, value in {'chat_template': template, **variables}.items():
    if value is not None and not isinstance(value, str):
      raise ConfigError(f'{folder / _CONFIG}: {name} = {value!r}: must be a text')
  return template, variables


def ends(folder: pathlib.Path, tokenizer: Tokenizer) -> frozenset[int]:
  """Ids that end an answer: eos, the folder's own eos_token, and what generation_config.json says."""
  found = {tokenizer.eos_id}
  own = read(folder)[1].get('eos_token')
  if own in tokenizer.control:
    found.add(tokenizer.control[own])
  given = _config(folder / _GENERATION).get('eos_token_id')
  for i in given if isinstance(given, list) else [] if given is None else [given]:
    if type(i) is not int or not 0 <= i < tokenizer.vocab_size:
      right = f'must be an id below {tokenizer.vocab_size}, or a list of such'
      raise ConfigError(f'{folder / _GENERATION}: eos_token_id = {given!r}: {right}')
    found.add(i)
  return frozenset(found)


def _config(path: pathlib.Path) -> dict:
  if not path.exists():
    return {}
  try:
    values = json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, RecursionError) as error:
    raise ConfigError(f'{path}: is not JSON: {error}') from None
  if not isinstance(values, dict):
    raise ConfigError(f'{path}: must hold a JSON object')
  return values


def _keys(spelling: str) -> set[str]:
  """Characters without one of which nothing is this spelling."""
  foreign = {c for c in spelling if not c.isascii()}
  punctuation = {c for c in spelling if not c.isalnum() and c not in '<>/_'}
  return foreign or punctuation or set(spelling)


def _mark(messages: Sequence[Mapping[str, str]]) -> str:
  """A character that no message has; a template cannot guess it."""
  taken = {c for m in messages for c in m['content'] if ord(c) in _PRIVATE}
  free = [i for i in _PRIVATE if chr(i) not in taken] if taken else _PRIVATE
  if not free:
    raise TemplateError('the messages have every private character of plane 15')
  return chr(secrets.choice(free))
