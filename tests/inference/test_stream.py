"""Sequences of a batch as they come; text that is never cut in a character, and ends at a stop string."""

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.data import tokenizer
from dsv3_jax.inference.sampling import GREEDY, Sampling
from dsv3_jax.inference.stream import StopText, TextStream, engine_for, stream


@pytest.fixture(scope='module')
def bytes_only() -> tokenizer.Tokenizer:
  """One token for every byte."""
  return tokenizer.train(['x'], 256 + len(tokenizer.SPECIAL))


def _sequences(small, t, prompts, *, sampling, **sizes) -> list[list[int]]:
  engine = engine_for(small.decoder, t, prompts, **sizes)
  steps = list(stream(engine, prompts, sampling=sampling, **sizes))
  columns = [list(column) for column in zip(*steps, strict=True)]
  for column in columns:
    ended = column.index(None) if None in column else len(column)
    assert set(map(str, column[ended:])) <= {'None'}
  assert engine.idle and not engine.pages_owned
  return [[t for tokens in column if tokens for t in tokens] for column in columns]


def test_each_sequence_gets_its_own_tokens_and_samples_of_one_prompt_differ(v3, bytes_only):
  rng = np.random.default_rng(1)
  prompts = [rng.integers(3, 250, n).tolist() for n in (1, 16, 5)]
  sizes = {'max_tokens': 12, 'samples': 2}
  greedy = _sequences(v3, bytes_only, prompts, sampling=GREEDY, **sizes)
  assert greedy[::2] == greedy[1::2]
  drawn = _sequences(v3, bytes_only, prompts, sampling=Sampling(1.0, 0.9, seed=3), **sizes)
  assert all(one != other for one, other in zip(drawn[::2], drawn[1::2], strict=True))


def test_a_sequence_ends_at_the_longest_length_of_the_model(v3, bytes_only):
  longest = v3.config.model.max_length
  prompts = [[5] * (longest - 20), [6] * (longest - 1)]
  run = _sequences(v3, bytes_only, prompts, sampling=Sampling(5.0, 1.0), max_tokens=100)
  assert [len(tokens) for tokens in run] == [20, 1]


@pytest.mark.parametrize(
  ('prompts', 'max_tokens', 'told'),
  [
    ([[3], [3] * 64], 1, 'prompt 2 has 64 tokens: must have at least 1 and at most 63'),
    ([[]], 1, 'prompt 1 has 0 tokens'),
    ([], 1, 'prompts = 0: must be at least 1'),
    ([[3]], 0, 'max_tokens = 0: must be at least 1'),
  ],
)
def test_what_cannot_be_continued_is_named(v3, bytes_only, prompts, max_tokens, told):
  with pytest.raises(ConfigError) as error:
    engine_for(v3.decoder, bytes_only, prompts, max_tokens=max_tokens)
  assert str(error.value).startswith(told)


# ---- text ----------------------------------------------------------------------------------------


def _pieces(t: tokenizer.Tokenizer, ids: list[int]) -> list[str]:
  text = TextStream(t)
  return [text.push(i) for i in ids] + [text.close()]


def test_a_character_comes_whole_with_its_last_byte(bytes_only):
  pieces = _pieces(bytes_only, bytes_only.encode('aé€😀\ufffdb'))
  assert pieces == ['a', '', 'é', '', '', '€', '', '', '', '😀', '', '', '', '\ufffdb', '']


def test_pieces_join_to_the_text_of_all_tokens_whatever_the_bytes(bytes_only):
  rng = np.random.default_rng(0)
  hard = [bytes_only.encode(c)[0] for c in 'a\x7f'] + bytes_only.encode('é€😀߿\uffff\U0010ffff')
  for _ in range(300):
    ids = rng.choice(hard, 20).tolist()
    assert ''.join(_pieces(bytes_only, ids)) == bytes_only.decode(ids)


def test_special_tokens_leave_no_text_and_cut_no_character(bytes_only):
  first, *rest = bytes_only.encode('€')
  ids = [bytes_only.bos_id, first, bytes_only.fim_hole_id, *rest, bytes_only.eos_id]
  assert ''.join(_pieces(bytes_only, ids)) == bytes_only.decode(ids) == '€'


def test_text_ends_at_the_first_stop_string_however_it_is_cut():
  rng = np.random.default_rng(0)
  for _ in range(500):
    text = ''.join(rng.choice(list('abc'), 12))
    stops = [''.join(rng.choice(list('abc'), rng.integers(1, 5))) for _ in range(2)]
    cuts = sorted(rng.integers(0, 13, 4).tolist())
    stopping = StopText(stops)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, 12], strict=True)]
    out = ''.join(map(stopping.push, pieces)) + stopping.close()
    ends = [text.index(stop) for stop in stops if stop in text]
    # Of two stop strings in one piece the one that begins first counts; held back, it may be the other.
    assert stopping.stopped == bool(ends)
    assert text.startswith(out) and not any(stop in out for stop in stops)
    if not ends:
      assert out == text
