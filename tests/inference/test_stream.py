"""Batches of prompts against each alone; where sequences end; text that is never cut in a character."""

import dataclasses

import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.data import tokenizer
from dsv3_jax.inference.sampling import Sampling
from dsv3_jax.inference.stream import TextStream, stream

_GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope='module')
def bytes_only() -> tokenizer.Tokenizer:
  """One token for every byte."""
  return tokenizer.train(['x'], 256 + len(tokenizer.SPECIAL))


def _sequences(*args, **kwargs) -> list[list[int]]:
  steps = [list(tokens) for tokens in stream(*args, **kwargs)]
  columns = [list(column) for column in zip(*steps, strict=True)]
  for column in columns:
    ended = column.index(None) if None in column else len(column)
    assert set(column[ended:]) <= {None}
  return [[token for token in column if token is not None] for column in columns]


@pytest.mark.parametrize('sampling', [_GREEDY, Sampling(1.0, 0.9, seed=3)])
def test_a_batch_of_mixed_lengths_gives_each_prompt_the_tokens_it_gets_alone(
  v3, bytes_only, sampling
):
  rng = np.random.default_rng(1)
  prompts = [rng.integers(3, 250, n).tolist() for n in (1, 16, 5, 9, 2)]
  how = {'sampling': sampling, 'max_tokens': 16, 'samples': 2}
  together = _sequences(v3.decoder, prompts, bytes_only, **how)
  alone = [s for prompt in prompts for s in _sequences(v3.decoder, [prompt], bytes_only, **how)]
  assert together == alone
  samples_agree = [one == other for one, other in zip(together[::2], together[1::2], strict=True)]
  assert samples_agree == [sampling == _GREEDY] * len(prompts)


def test_sequences_are_the_greedy_continuation_of_the_expanded_forward(v3, bytes_only):
  prompt = [5, 77, 130]
  [tokens] = _sequences(v3.decoder, [prompt], bytes_only, sampling=_GREEDY, max_tokens=10)
  logits_LV = v3.expanded(np.array([prompt + tokens], np.int32))[0, 2:-1, : bytes_only.vocab_size]
  assert tokens == logits_LV.argmax(1).tolist()


class _Script:
  """A decoder that says what it is told to: `columns[i]` at the steps of sequence i."""

  def __init__(self, columns: list[list[int]], max_length: int) -> None:
    self.columns, self.ways = columns, 1
    self.config = dataclasses.replace(config.Model(), max_length=max_length)
    self.decoded: list[list[int]] = []  # positions of each call
    self._step = 0

  def empty(self, sequences, capacity):
    self.shape = (sequences, capacity)

  def prefill(self, tokens_BL, length_B, cache):
    self.prompt_length = tokens_BL.shape[1]
    return None, None

  def decode(self, tokens_B1, positions_B1, cache):
    self.decoded.append(positions_B1[:, 0].tolist())
    return None, None

  def sample(self, s, logits, sample_B, position_B, vocab_size):
    column = [c[self._step] for c in self.columns]
    self._step += 1
    return np.array(column + [0] * (len(sample_B) - len(column)), np.int32)[:, None]


def test_a_sequence_ends_behind_its_eos_and_the_others_go_on(bytes_only):
  eos = bytes_only.eos_id
  script = _Script([[9, 8, 7, 6], [9, eos, 7, 6], [eos, 8, eos, 6]], max_length=64)
  run = _sequences(script, [[3]] * 3, bytes_only, sampling=_GREEDY, max_tokens=4)
  assert run == [[9, 8, 7, 6], [9, eos], [eos]]


def test_nothing_is_computed_behind_the_end_of_the_last_sequence(bytes_only):
  script = _Script([[9] * 50, [9, 9, bytes_only.eos_id] + [9] * 50], max_length=64)
  _sequences(script, [[3] * 4, [3] * 6], bytes_only, sampling=_GREEDY, max_tokens=5)
  assert script.decoded == [[4 + i, 6 + i] for i in range(4)]
  script = _Script([[9, bytes_only.eos_id] + [9] * 50], max_length=64)
  _sequences(script, [[3] * 4], bytes_only, sampling=_GREEDY, max_tokens=5)
  assert len(script.decoded) == 2  # one of them was under way when eos was read


def test_a_sequence_ends_at_the_longest_length_of_the_model(bytes_only):
  script = _Script([[9] * 100, [8] * 100], max_length=50)
  run = _sequences(script, [[3] * 30, [3] * 49], bytes_only, sampling=_GREEDY, max_tokens=100)
  assert [len(tokens) for tokens in run] == [20, 1]


@pytest.mark.parametrize(
  ('lengths', 'max_tokens', 'sequences', 'row', 'capacity'),
  [
    ((1,), 1, 1, 16, 16),
    ((3, 17, 4), 10, 4, 32, 32),
    ((16,), 17, 1, 16, 64),
    ((90,), 9, 1, 100, 100),
  ],
)
def test_shapes_are_powers_of_two_up_to_the_longest_length(
  bytes_only, lengths, max_tokens, sequences, row, capacity
):
  script = _Script([[9] * 100] * len(lengths), max_length=100)
  prompts = [[3] * n for n in lengths]
  _sequences(script, prompts, bytes_only, sampling=_GREEDY, max_tokens=max_tokens)
  assert (script.shape, script.prompt_length) == ((sequences, capacity), row)


@pytest.mark.parametrize(
  ('prompts', 'max_tokens', 'told'),
  [
    ([[3], [3] * 64], 1, 'prompt 2 has 64 tokens: must have at least 1 and at most 63'),
    ([[]], 1, 'prompt 1 has 0 tokens'),
    ([], 1, 'prompts = 0: must be at least 1'),
    ([[3]], 0, 'max_tokens = 0: must be at least 1'),
  ],
)
def test_what_cannot_be_continued_is_named(bytes_only, prompts, max_tokens, told):
  with pytest.raises(ConfigError) as error:
    next(stream(_Script([], 64), prompts, bytes_only, sampling=_GREEDY, max_tokens=max_tokens))
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
