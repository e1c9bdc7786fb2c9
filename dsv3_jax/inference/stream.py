"""From prompts to tokens as they come, and from tokens to text as it comes.

The loop runs on the host one step ahead of itself: the next decode is under way before the host reads
the token that it decodes, so the devices never wait for it. Shapes are rounded up to powers of two, so
that programs compiled for one request serve the next ones.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from dsv3_jax.config import ConfigError
from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.inference.decode import Decoder
from dsv3_jax.inference.sampling import Sampling

_SHORTEST = 16  # tokens that a prompt's row has at least


def stream(
  decoder: Decoder,
  prompts: Sequence[Sequence[int]],
  tokenizer: Tokenizer,
  *,
  sampling: Sampling,
  max_tokens: int,
  samples: int = 1,
) -> Iterator[list[int | None]]:
  """Yields the next token of every sequence, and None for one that has ended, until all have.

  Sequences are the samples of the first prompt, then those of the second. One ends with eos, which is
  yielded, after `max_tokens` tokens, or where prompt and tokens together reach `model.max_length`.

  Raises:
    ConfigError: a prompt is empty or leaves no room for a token, or a number is not positive.
  """
  longest = decoder.config.max_length
  _check(prompts, longest, max_tokens, samples)
  # ---- shapes ------------------------------------------------------------------------------------
  n = len(prompts) * samples
  length_B = np.ones(decoder.ways * _power_of_two(-(-n // decoder.ways)), np.int32)
  length_B[:n] = np.repeat([len(p) for p in prompts], samples)
  limit_B = np.minimum(max_tokens, longest - length_B[:n])
  L = min(_power_of_two(max(_SHORTEST, length_B.max())), longest)
  M = min(_power_of_two(max(L, int((length_B[:n] + limit_B).max()))), longest)
  tokens_BL = np.full((len(length_B), L), tokenizer.pad_id, np.int32)
  for i in range(n):
    prompt = prompts[i // samples]
    tokens_BL[i, : len(prompt)] = prompt
  sample_B = np.arange(len(length_B), dtype=np.int32) % samples
  # ---- tokens ------------------------------------------------------------------------------------
  logits, cache = decoder.prefill(tokens_BL, length_B, decoder.empty(len(length_B), M))
  live_B = np.ones(n, bool)
  for step in range(int(limit_B.max())):
    position_B = length_B + step
    token_B1 = decoder.sample(sampling, logits, sample_B, position_B, tokenizer.vocab_size)
    if step + 1 < limit_B.max():
      logits, cache = decoder.decode(token_B1, position_B[:, None], cache)
    tokens = np.asarray(token_B1)[:n, 0].tolist()
    yield [token if live else None for token, live in zip(tokens, live_B, strict=True)]
    live_B &= (np.asarray(tokens) != tokenizer.eos_id) & (step + 1 < limit_B)
    if not live_B.any():
      return


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
