"""From prompts to tokens as they come, and from tokens to text as it comes, up to a stop string."""

from collections.abc import Iterator, Sequence

from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.decode import Decoder
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.kernels.mla_decode import PAGE

_SLOTS = 16  # sequences on a device that decode together; more wait


def engine_for(
  decoder: Decoder,
  tokenizer: Tokenizer,
  prompts: Sequence[Sequence[int]],
  *,
  max_tokens: int,
  samples: int = 1,
  drafts: int = 0,
) -> Engine:
  """An engine with room for these prompts, in powers of two: its programs serve the next ones too.

  Raises:
    ConfigError: a prompt is empty or leaves no room for a token, or a number is not positive.
  """
  longest = decoder.config.max_length
  _check(prompts, longest, max_tokens, samples)
  slots = min(_SLOTS, _power_of_two(-(-len(prompts) * samples // decoder.ways)))
  tokens = min(max(map(len, prompts)) + max_tokens, longest) + drafts
  return Engine(
    decoder,
    vocab_size=tokenizer.vocab_size,
    eos_ids={tokenizer.eos_id},
    slots=slots * decoder.ways,
    pages=slots * _power_of_two(-(-tokens // PAGE)),
    drafts=drafts,
  )


def stream(
  engine: Engine,
  prompts: Sequence[Sequence[int]],
  *,
  sampling: Sampling,
  max_tokens: int,
  samples: int = 1,
) -> Iterator[list[list[int] | None]]:
  """Yields each step's new tokens of every sequence, and None for one that has ended, until all have.

  Sequences are the samples of the first prompt, then those of the second. One ends with eos, which is
  yielded, after `max_tokens` tokens, or where prompt and tokens together reach the longest length.
  """
  requests = [
    Request(prompt, max_tokens, sampling, sample) for prompt in prompts for sample in range(samples)
  ]
  place = {id(request): i for i, request in enumerate(requests)}
  for request in requests:
    engine.submit(request)
  ended = [False] * len(requests)
  while not all(ended):
    new: list[list[int] | None] = [None if end else [] for end in ended]
    for event in engine.step():
      i = place[id(event.request)]
      new[i] += [token.id for token in event.tokens]
      ended[i] = event.finish is not None
    yield new


def _check(prompts: Sequence[Sequence[int]], longest: int, max_tokens: int, samples: int) -> None:
  for name, value in (('max_tokens', max_tokens), ('samples', samples), ('prompts', len(prompts))):
    if value < 1:
      raise ConfigError(f'{name} = {value}: must be at least 1')
  for i, prompt in enumerate(prompts, 1):
    if not 0 < len(prompt) < longest:
      raise ConfigError(
        f'prompt {i} has {len(prompt)} tokens: must have at least 1 and at most {longest - 1}, '
        f'so that one more fits into model.max_length = {longest}'
      )


def _power_of_two(n: int) -> int:
  """The smallest one that is at least n."""
  return 1 << (int(n) - 1).bit_length()


class TextStream:
  """Text of a growing list of tokens, never cut inside a character.

  A token may end in the middle of a character. Its bytes so far decode to one U+FFFD at the end, which
  is held back until later tokens complete it or show it to be broken.
  """

  def __init__(self, tokenizer: Tokenizer) -> None:
    self._tokenizer = tokenizer
    self._ids: list[int] = []  # since the last place between two characters
    self._shown = 0  # characters of their text that are out already

  def push(self, token: int) -> str:
    """What the token adds to the text for certain."""
    self._ids.append(token)
    text = self._tokenizer.decode(self._ids)
    if text.endswith('\ufffd'):
      new, self._shown = text[self._shown : -1], len(text) - 1
    else:
      new = self._flush(text)
    return new

  def close(self) -> str:
    """What is held back, now that nothing follows."""
    return self._flush(self._tokenizer.decode(self._ids))

  def _flush(self, text: str) -> str:
    new = text[self._shown :]
    self._ids, self._shown = [], 0
    return new


class StopText:
  """Text up to the first of some stop strings, wherever pieces are cut.

  What may be the beginning of a stop string is held back until it is known.
  """

  def __init__(self, stops: Sequence[str]) -> None:
    self._stops = [stop for stop in stops if stop]
    self._held = ''
    self.stopped = False

  def push(self, piece: str) -> str:
    """What is certain to stand before any stop string; nothing once `stopped`."""
    if self.stopped:
      return ''
    text = self._held + piece
    found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
    if found:
      self.stopped, self._held = True, ''
      return text[: min(found)]
    held = max((_begun(text, stop) for stop in self._stops), default=0)
    self._held = text[len(text) - held :]
    return text[: len(text) - held]

  def close(self) -> str:
    """What is held back, now that nothing follows."""
    held, self._held = self._held, ''
    return held


def _begun(text: str, stop: str) -> int:
  """Characters at the end of `text` that begin `stop`."""
  return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
