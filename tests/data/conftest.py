"""A folder of text to train on, and the config that reads it."""

import dataclasses
import pathlib

import numpy as np
import pytest

from dsv3_jax.config import Config
from dsv3_jax.data import corpora, tokenizer

VOCAB = 320
WORDS = ['def', 'return', 'self', 'value', 'for', 'in', 'range', 'None', 'True', 'import']


def make_text(rng: np.random.Generator, words: int) -> str:
  ends = [' ', '\n', '(', ') ', '    ', '= 12345 ', '\n\n', 'é ', '日本 ']
  return ''.join(str(rng.choice(WORDS)) + str(rng.choice(ends)) for _ in range(words))


@pytest.fixture(scope='session')
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """40 documents of 1 to 200 words."""
  rng = np.random.default_rng(0)
  root = tmp_path_factory.mktemp('corpus')
  for i in range(40):
    path = root / f'part{i % 3}' / f'{i:02}.txt'
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(f'{i} {make_text(rng, int(rng.integers(1, 200)))}'.encode())
  return root


@pytest.fixture(scope='session')
def cfg(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
  c = Config()
  return dataclasses.replace(
    c,
    data=dataclasses.replace(
      c.data,
      corpus=str(folder),
      heldout=0.2,
      cache_dir=str(tmp_path_factory.mktemp('cache')),
      fim_rate=0.5,
      shuffle_rows=20,
    ),
    model=dataclasses.replace(c.model, vocab_size=VOCAB),
    batch=dataclasses.replace(c.batch, seq_len=24, micro_size=8),
    run=dataclasses.replace(c.run, seed=3),
  )


@pytest.fixture(scope='session')
def corpus(cfg: Config) -> corpora.Corpus:
  return corpora.open_corpus(cfg.data)


@pytest.fixture(scope='session')
def toks(cfg: Config, corpus: corpora.Corpus) -> tokenizer.Tokenizer:
  return tokenizer.load_tokenizer(cfg.data, cfg.model.vocab_size, corpus)
