"""Batches of packed rows for training, and the held-out rows for evaluation.

The training data is one endless stream, a pure function of the corpus, the tokenizer, `run.seed` and
`data.fim_rate`:

1. epoch after epoch, the training documents in an order shuffled by `run.seed + epoch`;
2. each turned into tokens, with fill-in-the-middle drawn from (`run.seed`, its number in the stream);
3. packed into rows (`packing.py`);
4. each window of `data.shuffle_rows` rows in an order shuffled by `run.seed` and its number: rows of one
   document follow each other, and batches of a single document teach little (the quickstart's loss was
   1 nat higher); a batch is the next `batch.micro_size` rows.

A place in the stream is where a window starts, a document's number and a token in it, and how many of
the window's rows are taken. That is all of an iterator's state: four numbers, equal on every host, that
do not depend on how many hosts or worker processes share the work. So a run resumes exactly on another
number of hosts.

The price: each host turns the whole stream into tokens and keeps its share of the rows. At the report's
pace (14.8T tokens in 54 days) that is 12 MB/s, and a core encodes about 2: six worker processes
(`data.workers`) a host. Sharding the documents over hosts would save that, but then the rows would
depend on the number of hosts.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.data import packing
from dsv3_jax.data.corpora import Corpus
from dsv3_jax.data.tokenizer import Tokenizer

_READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=32)  # documents, per process
_PER_WORKER = 16  # documents that a worker process keeps ready
_BATCHES_AHEAD = 2


def train_batches(
  cfg: Config,
  corpus: Corpus,
  tokenizer: Tokenizer,
  *,
  mine: Sequence[int] | None = None,
) -> grain.DatasetIterator[np.ndarray]:
  """Endless batches, int32 [rows, seq_len + 1]: the rows `mine` of each batch of micro_size, or all.

  The batch is the same for every process, whichever rows of it each one keeps.
  The iterator prepares batches ahead in a thread. `get_state()` is a small dict for JSON, the place
  after the last batch that was *delivered*; after `set_state(state)` the next batch is the one that
  followed then. `close()` ends the thread and the worker processes.

  Raises ConfigError on `set_state` if the state is one of other data.
  """
  batches = _Batches(cfg, corpus, tokenizer, range(cfg.batch.micro_size) if mine is None else mine)
  return grain.experimental.ThreadPrefetchDatasetIterator(batches, _BATCHES_AHEAD)


class _Batches(grain.DatasetIterator[np.ndarray]):
  """The rows `mine` of each batch, made when asked for."""

  def __init__(self, cfg: Config, corpus: Corpus, tokenizer: Tokenizer, mine: Sequence[int]):
    super().__init__()
    self._batch, self._workers, self._mine = cfg.batch, cfg.data.workers, mine
    self._data = {
      'fingerprint of data.corpus': corpus.fingerprint,
      'fingerprint of the tokenizer': tokenizer.fingerprint,
      'run.seed': cfg.run.seed,
      'data.fim_rate': cfg.data.fim_rate,
      'data.shuffle_rows': cfg.data.shuffle_rows,
    }
    self._seed, self._size = cfg.run.seed, cfg.data.shuffle_rows
    tokens = functools.partial(_tokens, tokenizer, cfg.data.fim_rate, cfg.run.seed)
    # Grain shuffles epoch e with seed + e, and counts the elements of a repeated dataset onwards.
    documents = grain.MapDataset.source(corpus.train).shuffle(cfg.run.seed % 2**32).repeat()
    self._documents = documents.map_with_index(tokens)
    self._number, self._start, self._taken = (
      0,
      packing.START,
      0,
    )  # window, where it starts, rows taken
    self._window = self._end = self._source = self._rows = None

  def __next__(self) -> np.ndarray:
    self._assert_not_closed()
    batch = [self._next_row() for _ in range(self._batch.micro_size)]
    return np.stack([batch[i] for i in self._mine])

  def _next_row(self) -> np.ndarray:
    if self._rows is None:
      self._open()
    if self._window is None:
      self._fill()
    row = self._window[self._taken]
    self._taken += 1
    if self._taken == self._size:
      self._number, self._start, self._taken, self._window = self._number + 1, self._end, 0, None
    return row

  def _fill(self) -> None:
    """Reads the rows of a window, and shuffles them."""
    rows = list(itertools.islice(self._rows, self._size))
    self._end = rows[-1][1]
    order = np.random.default_rng((self._seed, self._number)).permutation(self._size)
    self._window = [rows[i][0] for i in order]

  def _open(self) -> None:
    """Starts the stream where the window starts."""
    documents = self._documents[self._start.document :].to_iter_dataset(_READ)
    if self._workers:
      # Worker i of n takes every n-th document from the i-th on, and they are dealt out in turn: the
      # order is the same for every number of workers, and for none.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which are parsed only under absl.app
      options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=_PER_WORKER)
      documents = documents.mp_prefetch(options)
    self._source = iter(documents)
    self._rows = packing.pack(self._source, self._batch.seq_len, self._start)

  def _close_source(self) -> None:
    if self._source is not None:
      self._source.close()
      self._source = self._rows = self._window = None

  def get_state(self) -> dict[str, Any]:
    place = {'window': self._number, **self._start._asdict(), 'taken': self._taken}
    return place | {'data': self._data}

  def set_state(self, state: dict[str, Any]) -> None:
    for key, here in self._data.items():
      there = state['data'][key]
      if here != there:
        right = f'the saved position in the data belongs to {key} = {there!r}; resume with that'
        raise ConfigError(f'{key} = {here!r}: {right}, or start a new run')
    self._close_source()
    self._number, self._taken = state['window'], state['taken']
    self._start = packing.Position(state['document'], state['token'])

  def close(self) -> None:
    self._close_source()
    super().close()


def _tokens(tokenizer: Tokenizer, fim_rate: float, seed: int, number: int, text: str) -> np.ndarray:
  """Tokens of the `number`-th document of the stream; a document's cuts differ between epochs."""
  rng = np.random.default_rng((seed, number))
  return packing.document_tokens(text, tokenizer, fim_rate, rng)


# ---- held-out ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Heldout:
  """Rows for evaluation, and the bytes that they spell, for a loss per byte."""

  tokens: np.ndarray  # [n, seq_len + 1] int32
  weights: np.ndarray  # [n, seq_len] float32: 1 where the target counts, 0 where it is padding
  text: bytes


def heldout_rows(cfg: Config, corpus: Corpus, tokenizer: Tokenizer) -> Heldout:
  """The first held-out documents, whole, as many as `run.eval_bytes` holds, but at least one.

  Each goes from bos to eos, without fill-in-the-middle, and they are packed as in training: a row sees
  nothing before its first token. All but the first token are targets, bos and eos too.
  """
  texts, left = [], cfg.run.eval_bytes
  for text in filter(None, corpus.heldout):
    left -= len(text.encode('utf-8'))
    if left < 0 and texts:
      break
    texts.append(text)
  if not texts:
    raise ConfigError(f'data.corpus = {corpus.name!r}: all held-out documents are empty')
  documents = [
    np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], np.int32)
    for ids in tokenizer.encode_batch(texts)
  ]
  tokens, weights = packing.pack_all(documents, cfg.batch.seq_len, tokenizer.pad_id)
  return Heldout(tokens, weights, ''.join(texts).encode('utf-8'))


def describe(corpus: Corpus, tokenizer: Tokenizer) -> str:
  """One line for logs; bytes per token are those of up to 64 documents from all over the training ones."""
  train = corpus.train
  texts = [train[i * len(train) // 64] for i in range(64)] if len(train) > 64 else list(train)
  tokens = sum(map(len, tokenizer.encode_batch(texts)))
  ratio = sum(len(text.encode('utf-8')) for text in texts) / max(tokens, 1)
  size = '' if corpus.bytes is None else f', {corpus.bytes / 1e6:,.1f} MB'
  documents = f'{len(train):,} training and {len(corpus.heldout):,} held-out documents{size}'
  return (
    f'{corpus.name}: {documents}; vocabulary {tokenizer.vocab_size:,}, {ratio:.2f} bytes per token'
  )
