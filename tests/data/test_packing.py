import numpy as np
import pytest

from dsv3_jax.data import packing
from dsv3_jax.data.packing import Position


def random_documents(rng: np.random.Generator, count: int) -> list[np.ndarray]:
  lengths = [int(rng.choice([2, 3, 7, 8, 9, 40, 200])) for _ in range(count)]
  tokens = iter(range(10**6))
  return [np.array([next(tokens) for _ in range(n)], np.int32) for n in lengths]


def naive_rows(documents: list[np.ndarray], seq_len: int) -> list[list[int]]:
  stream = [int(t) for document in documents for t in document]
  return [stream[i : i + seq_len + 1] for i in range(0, len(stream) - seq_len, seq_len)]


@pytest.mark.parametrize('seq_len', [1, 2, 7, 8, 64])
def test_rows_are_those_of_one_long_list_and_every_position_continues_it(seq_len):
  for seed in range(5):
    rng = np.random.default_rng(seed)
    documents = random_documents(rng, 12)
    want = naive_rows(documents, seq_len)
    got = list(packing.pack(documents, seq_len))
    assert [row.tolist() for row, _ in got] == want
    for k, (_, position) in enumerate(got):
      assert position.token < len(documents[position.document])
      rest = packing.pack(documents[position.document :], seq_len, position)
      assert [row.tolist() for row, _ in rest] == want[k + 1 :]


def test_every_token_but_the_first_is_a_target_exactly_once():
  documents = random_documents(np.random.default_rng(1), 30)
  stream = np.concatenate(documents)
  rows = [row for row, _ in packing.pack(documents, 8)]
  targets = np.concatenate([row[1:] for row in rows])
  np.testing.assert_array_equal(targets, stream[1 : len(targets) + 1])
  assert len(stream) - 1 - len(targets) < 8


def test_the_example_of_the_docstring():
  documents = [np.frombuffer(b'abcde', np.uint8), np.frombuffer(b'fghi', np.uint8)]
  rows, positions = zip(*packing.pack(documents, 3), strict=True)
  assert [bytes(row) for row in rows] == [b'abcd', b'defg']
  assert positions == (Position(0, 3), Position(1, 1))


@pytest.mark.parametrize('length', [2, 8, 9, 10, 17, 18])
def test_all_rows_pad_the_last_and_weigh_every_target_once(length):
  stream = np.arange(10, 10 + length, dtype=np.int32)
  tokens, weights = packing.pack_all([stream[:1], stream[1:]], 8, pad_id=2)
  assert tokens.dtype == np.int32
  assert weights.dtype == np.float32
  n = -(-(length - 1) // 8)
  assert tokens.shape == (n, 9)
  assert weights.shape == (n, 8)
  np.testing.assert_array_equal(tokens[:, 1:][weights == 1], stream[1:])
  np.testing.assert_array_equal(tokens[:, 1:][weights == 0], 2)
  np.testing.assert_array_equal(tokens[1:, 0], tokens[:-1, -1])
  assert set(np.unique(weights)) <= {0, 1}


# ---- fill in the middle --------------------------------------------------------------------------


def parse(ids: list[int], toks) -> tuple[str, str, str]:
  """prefix, middle and suffix of begin, prefix, hole, suffix, end, middle."""
  assert ids[0] == toks.fim_begin_id
  hole, end = ids.index(toks.fim_hole_id), ids.index(toks.fim_end_id)
  return toks.decode(ids[1:hole]), toks.decode(ids[end + 1 :]), toks.decode(ids[hole + 1 : end])


def test_fim_documents_reassemble_to_the_text_and_the_others_are_plain(toks):
  text = 'def f(é):\n    return 日本 <｜fim▁hole｜> 12345\n'  # noqa: RUF001
  kinds = []
  for seed in range(400):
    ids = packing.document_tokens(text, toks, 0.3, np.random.default_rng(seed))
    assert ids.dtype == np.int32
    bos, *inner, eos = ids.tolist()
    assert (bos, eos) == (toks.bos_id, toks.eos_id)
    kinds.append(inner[0] == toks.fim_begin_id)
    if kinds[-1]:
      prefix, middle, suffix = parse(inner, toks)
      assert prefix + middle + suffix == text
      pieces = [toks.encode(piece) for piece in (prefix, suffix, middle)]
      marks = [[toks.fim_begin_id], [toks.fim_hole_id], [toks.fim_end_id]]
      assert inner == [t for mark, piece in zip(marks, pieces, strict=True) for t in mark + piece]
    else:
      assert inner == toks.encode(text)
  assert 0.2 < np.mean(kinds) < 0.4


def test_fim_rates_of_zero_and_one_hold_for_every_document(toks):
  for seed in range(100):
    for rate in (0, 1):
      ids = packing.document_tokens('some text', toks, rate, np.random.default_rng(seed))
      assert (toks.fim_begin_id in ids) == bool(rate)


def test_cuts_fall_on_every_pair_of_places_and_only_on_characters():
  seen = {packing.cut('añ日', np.random.default_rng(seed)) for seed in range(500)}
  places = range(4)
  assert seen == {('añ日'[:a], 'añ日'[a:b], 'añ日'[b:]) for a in places for b in places if a <= b}
  assert packing.cut('', np.random.default_rng(0)) == ('', '', '')
