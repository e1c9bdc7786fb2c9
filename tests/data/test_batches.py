import contextlib
import dataclasses
import itertools
import json
import pathlib
import time

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.data import batches, corpora


def change(cfg, **groups):
  """`cfg` with values of its groups replaced: `change(cfg, run=dict(seed=4))`."""
  return dataclasses.replace(
    cfg, **{g: dataclasses.replace(getattr(cfg, g), **values) for g, values in groups.items()}
  )


def in_order(cfg):
  """`cfg` with the rows in the order of the stream."""
  return change(cfg, data=dict(shuffle_rows=1))


def take(iterator, count: int) -> np.ndarray:
  return np.stack(list(itertools.islice(iterator, count)))


@contextlib.contextmanager
def opened(*args, **kwargs):
  with contextlib.closing(batches.train_batches(*args, **kwargs)) as iterator:
    yield iterator


def stream_of(rows: np.ndarray) -> list[int]:
  """The tokens behind rows [n, seq_len + 1], after checking that each row starts with the last of the one before."""
  np.testing.assert_array_equal(rows[1:, 0], rows[:-1, -1])
  return [*rows[:, :-1].reshape(-1).tolist(), int(rows[-1, -1])]


def texts_of(stream: list[int], toks) -> list[str]:
  """The whole documents of a stream, fill-in-the-middle undone."""
  starts = [i for i, t in enumerate(stream) if t == toks.bos_id]
  texts = []
  for a, b in itertools.pairwise(starts):
    assert stream[b - 1] == toks.eos_id
    ids = stream[a + 1 : b - 1]
    if ids[0] == toks.fim_begin_id:
      hole, end = ids.index(toks.fim_hole_id), ids.index(toks.fim_end_id)
      ids = ids[1:hole] + ids[end + 1 :] + ids[hole + 1 : end]
      assert not {toks.fim_begin_id, toks.fim_hole_id, toks.fim_end_id} & set(ids)
    texts.append(toks.decode(ids))
  return texts


def test_the_stream_holds_every_training_document_once_an_epoch_in_a_new_order(cfg, corpus, toks):
  with opened(in_order(cfg), corpus, toks) as iterator:
    out = take(iterator, 150)
  assert out.shape == (150, 8, 25)
  assert out.dtype == np.int32
  texts = texts_of(stream_of(out.reshape(-1, 25)), toks)
  n = len(corpus.train)
  epochs = [texts[i : i + n] for i in range(0, len(texts) - n, n)]
  assert len(epochs) >= 2
  for epoch in epochs:
    assert sorted(epoch) == sorted(corpus.train)
  assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_fim_cuts_differ_between_epochs_and_are_absent_at_rate_zero(cfg, corpus, toks):
  with opened(change(in_order(cfg), data=dict(fim_rate=1.0)), corpus, toks) as iterator:
    stream = stream_of(take(iterator, 150).reshape(-1, 25))
  starts = [i for i, t in enumerate(stream) if t == toks.bos_id]
  forms = {tuple(stream[a:b]) for a, b in itertools.pairwise(starts)}
  assert len(forms) > 1.5 * len(corpus.train)
  with opened(change(cfg, data=dict(fim_rate=0.0)), corpus, toks) as iterator:
    plain = take(iterator, 50)
  assert not np.isin(
    plain, [toks.fim_begin_id, toks.fim_hole_id, toks.fim_end_id, toks.pad_id]
  ).any()


def test_the_seed_decides_the_stream(cfg, corpus, toks):
  outs = []
  for seed in (3, 3, 4):
    with opened(change(cfg, run=dict(seed=seed)), corpus, toks) as iterator:
      outs.append(take(iterator, 4))
  np.testing.assert_array_equal(outs[0], outs[1])
  assert (outs[0] != outs[2]).any()


@pytest.mark.parametrize(
  'shares', [[range(4), range(4, 8)], [[0, 4], [1, 5], [2, 6], [3, 7]]], ids=['blocks', 'strided']
)
def test_the_global_batch_is_the_same_whichever_rows_a_process_keeps(cfg, corpus, toks, shares):
  with opened(cfg, corpus, toks) as iterator:
    want = take(iterator, 12)
  parts, states = [], []
  for mine in shares:
    with opened(cfg, corpus, toks, mine=mine) as iterator:
      parts.append(take(iterator, 12))
      states.append(iterator.get_state())
  for mine, part in zip(shares, parts, strict=True):
    np.testing.assert_array_equal(part, want[:, list(mine)])
  assert all(state == states[0] for state in states)


def test_rows_are_shuffled_within_windows_and_none_is_lost(cfg, corpus, toks):
  with opened(in_order(cfg), corpus, toks) as iterator:
    plain = take(iterator, 50).reshape(20, 20, 25)
  with opened(cfg, corpus, toks) as iterator:
    mixed = take(iterator, 50).reshape(20, 20, 25)
  orders = set()
  for window, rows in zip(plain, mixed, strict=True):
    number = {row.tobytes(): i for i, row in enumerate(window)}
    orders.add(tuple(number[row.tobytes()] for row in rows))
    assert sorted(row.tobytes() for row in rows) == sorted(row.tobytes() for row in window)
  assert len(orders) == 20 and tuple(range(20)) not in orders


def test_a_run_resumes_on_another_number_of_processes_and_another_row_length(cfg, corpus, toks):
  cfg = in_order(cfg)
  with opened(cfg, corpus, toks) as iterator:
    take(iterator, 17)
    state = iterator.get_state()
    want = take(iterator, 3)
  parts = []
  for index in range(4):
    with opened(cfg, corpus, toks, mine=range(2 * index, 2 * index + 2)) as iterator:
      iterator.set_state(state)
      parts.append(take(iterator, 3))
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), want)
  longer = change(cfg, batch=dict(seq_len=48, micro_size=4))
  with opened(longer, corpus, toks) as iterator:
    iterator.set_state(state)
    assert stream_of(take(iterator, 3).reshape(-1, 49)) == stream_of(want.reshape(-1, 25))


def test_resumed_equals_uninterrupted_from_many_positions(cfg, corpus, toks):
  rng = np.random.default_rng(0)
  with opened(cfg, corpus, toks) as iterator:
    states, out = [iterator.get_state()], []
    for _ in range(120):
      out.append(next(iterator))
      states.append(json.loads(json.dumps(iterator.get_state())))
    for k in [0, 1, 118, *rng.integers(0, 118, 15).tolist()]:
      iterator.set_state(states[k])
      assert iterator.get_state() == states[k]
      np.testing.assert_array_equal(take(iterator, 2), out[k : k + 2])
      assert iterator.get_state() == states[k + 2]
  assert all(len(json.dumps(state)) < 300 for state in states)


def test_the_state_is_that_of_the_delivered_batch_while_others_wait(cfg, corpus, toks):
  with opened(cfg, corpus, toks) as iterator:
    take(iterator, 5)
    time.sleep(0.3)  # the thread fills its buffer
    state = iterator.get_state()
    time.sleep(0.1)
    assert iterator.get_state() == state
    want = next(iterator)
  with opened(cfg, corpus, toks) as other:
    other.set_state(state)
    np.testing.assert_array_equal(next(other), want)


def test_worker_processes_give_the_same_batches_and_resume_exactly(cfg, corpus, toks):
  with opened(cfg, corpus, toks) as iterator:
    out, states = [], []
    for _ in range(40):
      out.append(next(iterator))
      states.append(iterator.get_state())
  with opened(change(cfg, data=dict(workers=2)), corpus, toks) as iterator:
    for k in range(40):
      np.testing.assert_array_equal(next(iterator), out[k])
      assert iterator.get_state() == states[k]
    iterator.set_state(states[22])
    np.testing.assert_array_equal(take(iterator, 5), out[23:28])


def test_a_state_of_other_data_is_refused_and_the_difference_named(cfg, corpus, toks):
  with opened(cfg, corpus, toks) as iterator:
    state = iterator.get_state()
  for other, key in (
    (dict(run=dict(seed=9)), 'run.seed = 9'),
    (dict(data=dict(fim_rate=0.1)), 'data.fim_rate = 0.1'),
    (dict(data=dict(shuffle_rows=7)), 'data.shuffle_rows = 7'),
  ):
    with (
      opened(change(cfg, **other), corpus, toks) as iterator,
      pytest.raises(ConfigError, match=key),
    ):
      iterator.set_state(state)
  renamed = dataclasses.replace(corpus, fingerprint='other')
  with opened(cfg, renamed, toks) as iterator, pytest.raises(ConfigError, match=r'data\.corpus'):
    iterator.set_state(state)


def test_an_error_in_a_document_reaches_the_training_loop(cfg, toks, tmp_path):
  good, bad = '{"text": "good"}', '{"body": "bad"}'
  (tmp_path / 'a.jsonl').write_text('\n'.join([good, *[good, bad] * 20]))
  broken = change(cfg, data=dict(corpus=str(tmp_path)))
  corpus = corpora.open_corpus(broken.data)
  with opened(broken, corpus, toks) as iterator, pytest.raises(ConfigError, match='it has body'):
    take(iterator, 100)


# ---- held-out ------------------------------------------------------------------------------------


def test_held_out_rows_spell_the_held_out_documents_without_fim(cfg, corpus, toks):
  held = batches.heldout_rows(cfg, corpus, toks)
  assert held.text.decode() == ''.join(corpus.heldout)
  targets = held.tokens[:, 1:][held.weights == 1].tolist()
  stream = [int(held.tokens[0, 0]), *targets]
  assert texts_of([*stream, toks.bos_id], toks) == list(corpus.heldout)
  assert not {toks.fim_begin_id, toks.fim_hole_id, toks.fim_end_id} & set(stream)
  assert held.tokens.shape == (held.weights.shape[0], cfg.batch.seq_len + 1)


def test_held_out_text_is_whole_documents_within_the_budget_but_at_least_one(cfg, corpus, toks):
  sizes = [len(text.encode()) for text in corpus.heldout]
  for count in (1, 2, len(sizes)):
    for slack in (0, sizes[count] - 1 if count < len(sizes) else 10**6):
      budget = sum(sizes[:count]) + slack
      held = batches.heldout_rows(change(cfg, run=dict(eval_bytes=budget)), corpus, toks)
      assert held.text.decode() == ''.join(corpus.heldout[i] for i in range(count))
  held = batches.heldout_rows(change(cfg, run=dict(eval_bytes=1)), corpus, toks)
  assert held.text.decode() == corpus.heldout[0]


def test_the_description_is_one_line_with_the_figures(cfg, corpus, toks):
  line = batches.describe(corpus, toks)
  assert '\n' not in line
  assert f'{len(corpus.train)} training and {len(corpus.heldout)} held-out documents' in line
  assert 'vocabulary 320' in line
  assert pathlib.Path(corpus.name).is_dir()
