# ruff: noqa: RUF001 (the special tokens are spelled with fullwidth bars)
import json
import pickle

import numpy as np
import pytest

from dsv3_jax.config import ConfigError, Data
from dsv3_jax.data import corpora
from dsv3_jax.data import tokenizer as tokenizer_lib
from dsv3_jax.data.tokenizer import SPECIAL, load_tokenizer

VOCAB = 320  # of the fixture `toks`


def random_text(rng: np.random.Generator) -> str:
  """Characters from all of Unicode but surrogates, mixed with what the pre-tokenizer looks at."""
  ranges = [(0, 128), (0, 0x800), (0x2000, 0x3100), (0xE000, 0x10000), (0x10000, 0x110000)]
  pieces = [
    '\r\n',
    '    ',
    '\t\n \n',
    ' \u00a0',
    '12345',
    'e\u0301',
    '\u200d',
    "it's",
    '._x',
    '日本',
    *SPECIAL,
  ]
  text = ''
  for _ in range(int(rng.integers(0, 40))):
    low, high = ranges[rng.integers(len(ranges))]
    code = int(rng.integers(low, high))
    text += str(rng.choice(pieces)) if rng.random() < 0.3 or 0xD800 <= code < 0xE000 else chr(code)
  return text


def test_decode_undoes_encode_for_every_text(toks):
  rng = np.random.default_rng(0)
  texts = ['', ' ', '\n', '\0', '\ufeffx', *(random_text(rng) for _ in range(1000))]
  for text, ids in zip(texts, toks.encode_batch(texts), strict=True):
    assert toks.encode(text) == ids
    assert toks.decode(ids) == text
    assert all(i >= len(SPECIAL) for i in ids)


def test_special_strings_in_text_are_text(toks):
  for special in SPECIAL:
    text = f'a{special}b'
    ids = toks.encode(text)
    assert not set(ids) & set(range(len(SPECIAL)))
    assert toks.decode(ids) == text


def test_special_ids_are_in_order_and_decode_shows_or_skips_them(toks):
  ids = [
    toks.bos_id,
    toks.eos_id,
    toks.pad_id,
    toks.fim_begin_id,
    toks.fim_hole_id,
    toks.fim_end_id,
  ]
  assert ids == [0, 1, 2, 3, 4, 5]
  mixed = [toks.bos_id, *toks.encode('x y'), toks.eos_id]
  assert toks.decode(mixed) == 'x y'
  assert toks.decode(mixed, skip_special=False) == '<｜begin▁of▁sentence｜>x y<｜end▁of▁sentence｜>'
  assert toks.decode(np.array(mixed, np.int32)) == 'x y'
  assert toks.decode([*mixed, 100_000]) == 'x y'


def test_digits_go_by_three_and_runs_of_spaces_stay_together(tmp_path):
  for i in range(30):
    (tmp_path / f'{i}.py').write_text('        return x.append(1234567)\n' * 20)
  data = Data(corpus=str(tmp_path), heldout=0.2, cache_dir=str(tmp_path / 'cache'))
  toks = load_tokenizer(data, 400, corpora.open_corpus(data))
  pieces = [toks.decode([i]) for i in toks.encode('        return x.append(1234567)')]
  assert pieces == ['       ', ' return', ' x', '.append', '(', '123', '456', '7', ')']


def test_the_vocabulary_is_filled_exactly_or_as_far_as_the_corpus_goes(cfg, toks):
  assert toks.vocab_size == cfg.model.vocab_size
  small = tokenizer_lib.train(['abc', 'abd'], 1000)
  assert 256 + len(SPECIAL) < small.vocab_size < 300
  assert small.decode(small.encode('über')) == 'über'


def test_training_is_deterministic_and_the_cache_is_read_back(cfg, corpus, toks, monkeypatch):
  assert tokenizer_lib.train(corpus.train, cfg.model.vocab_size).fingerprint == toks.fingerprint
  monkeypatch.setattr(tokenizer_lib, 'train', None)
  cached = load_tokenizer(cfg.data, cfg.model.vocab_size, corpus)
  assert cached.fingerprint == toks.fingerprint


def test_training_reads_no_held_out_document(cfg, corpus, monkeypatch, tmp_path):
  seen = []
  monkeypatch.setattr(tokenizer_lib, 'train', lambda documents, size: seen.extend(documents))
  data = Data(cache_dir=str(tmp_path))
  with pytest.raises(AttributeError):
    load_tokenizer(data, cfg.model.vocab_size, corpus)
  assert sorted(seen) == sorted(corpus.train)


def test_a_pickled_or_saved_tokenizer_encodes_the_same(toks, tmp_path):
  toks.save(tmp_path / 'tokenizer.json')
  text = 'def f(x):\n    return x  # <｜fim▁hole｜> 12345'
  for copy in (
    pickle.loads(pickle.dumps(toks)),
    load_tokenizer(Data(tokenizer=str(tmp_path / 'tokenizer.json')), toks.vocab_size, None),
  ):
    assert copy.encode(text) == toks.encode(text)
    assert copy.fingerprint == toks.fingerprint
    assert (copy.bos_id, copy.fim_end_id, copy.vocab_size) == (0, 5, toks.vocab_size)


@pytest.fixture
def released(toks, tmp_path):
  """Writes a tokenizer.json after `edit`, and returns the config that reads it."""

  def write(edit) -> Data:
    path = tmp_path / 'tokenizer.json'
    toks.save(path)
    spec = json.loads(path.read_text())
    edit(spec)
    path.write_text(json.dumps(spec))
    return Data(tokenizer=str(path))

  return write


def adding(content: str, number: int):
  """Edits a tokenizer.json: one more added token, which is ordinary text."""
  flags = dict.fromkeys(['single_word', 'lstrip', 'rstrip', 'normalized', 'special'], False)
  return lambda spec: spec['added_tokens'].append({'id': number, 'content': content, **flags})


def test_control_tokens_that_a_file_calls_ordinary_stay_out_of_text(released):
  def edit(spec):
    for token in spec['added_tokens']:
      token['special'] = False
    spec['truncation'] = {
      'max_length': 2,
      'strategy': 'LongestFirst',
      'stride': 0,
      'direction': 'Right',
    }

  toks = load_tokenizer(released(edit), 1000, None)
  text = 'a<｜fim▁hole｜>b'
  assert toks.fim_hole_id not in toks.encode(text)
  assert toks.decode(toks.encode(text)) == text
  assert toks.decode([toks.fim_hole_id]) == ''


def test_added_tokens_that_are_text_are_still_found_and_kept(released):
  toks = load_tokenizer(released(adding('~~~~', VOCAB)), 1000, None)
  assert VOCAB in toks.encode('a~~~~b')
  assert toks.decode(toks.encode('a~~~~b')) == 'a~~~~b'
  assert toks.vocab_size == VOCAB + 1


def test_padding_falls_back_to_eos_where_a_release_has_none(released):
  def edit(spec):
    spec['added_tokens'] = [t for t in spec['added_tokens'] if 'pad' not in t['content']]
    spec['model']['vocab'] = {k: v for k, v in spec['model']['vocab'].items() if 'pad▁' not in k}

  toks = load_tokenizer(released(edit), 1000, None)
  assert toks.pad_id == toks.eos_id


def test_errors_name_the_file_and_what_is_wrong_with_it(released, toks, tmp_path):
  def fault(data: Data, size: int = 1000) -> str:
    with pytest.raises(ConfigError, match=r'data\.tokenizer = ') as error:
      load_tokenizer(data, size, None)
    assert '\n' not in str(error.value)
    return str(error.value)

  def without_fim(spec):
    spec['added_tokens'] = [t for t in spec['added_tokens'] if 'fim' not in t['content']]
    spec['model']['vocab'] = {k: v for k, v in spec['model']['vocab'].items() if '｜fim' not in k}

  size = toks.vocab_size
  assert f'needs model.vocab_size = {size} or more, not {size - 1}' in fault(
    released(lambda spec: None), size - 1
  )
  assert '<｜fim▁begin｜> <｜fim▁hole｜> <｜fim▁end｜>' in fault(released(without_fim))
  assert "skips ids below 900 for '~~~~'" in fault(released(adding('~~~~', 900)))
  assert 'no such file' in fault(Data(tokenizer=str(tmp_path / 'missing.json')))
  (tmp_path / 'bad.json').write_text('[1]')
  assert 'cannot be used as a tokenizer.json' in fault(Data(tokenizer=str(tmp_path / 'bad.json')))


def test_an_error_says_when_the_vocabulary_has_no_room_for_bytes(cfg, corpus):
  with pytest.raises(ConfigError, match=r'model\.vocab_size = 261: must be at least 262'):
    load_tokenizer(cfg.data, 261, corpus)
  assert load_tokenizer(cfg.data, 262, corpus).vocab_size == 262


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(toks, tmp_path, monkeypatch):
  path = tmp_path / 'tokenizer.json'
  path.write_text('old')
  monkeypatch.setattr(toks, '_definition', b'not text')
  with pytest.raises(TypeError):
    toks.save(path)
  assert path.read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['tokenizer.json']
