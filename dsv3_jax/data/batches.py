"""Batches of packed rows for training, and the held-out rows for evaluation.

The training data is one endless stream, a pure function of the corpus, the tokenizer, `run.seed` and
`data.fim_rate`:

1. epoch after epoch, the training documents in an order shuffled by `run.seed + epoch`;
2. each turned into tokens, with fill-in-the-middle drawn from (`run.seed`, its number in the stream);
3. packed into rows (`packing.py`); a batch is the next `batch.micro_size` rows.

A place in the stream is a document's number and a token in it, and that is all of an iterator's state:
two numbers, equal on every host, that do not depend on how many hosts, worker processes or rows share
the work. So a run resumes exactly on another number of hosts.

The price: each host turns the whole stream into tokens and keeps its share of the rows. At the report's
pace (14.8T tokens in 54 days) that is 12 MB/s, and a core encodes about 2: six worker processes
(`data.workers`) a host. Sharding the documents over hosts would save that, but then the rows would
depend on the number of hosts.
"""

import dataclasses
import functools
import itertools
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
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator[np.ndarray]:
  """Endless batches, int32 [micro_size / process_count, seq_len + 1].

  The batches of all processes, concatenated in process order, are the same for every `process_count`.
  The iterator prepares batches ahead in a thread. `get_state()` is a small dict for JSON, the place
  after the last batch that was *delivered*; after `set_state(state)` the next batch is the one that
  followed then. `close()` ends the thread and the worker processes.

  Raises ConfigError if `micro_size` does not divide, and on `set_state` if the state is one of other
  data.
  """
  size = cfg.batch.micro_size
  if size % process_count:
    right = f'must be a multiple of {process_count}, the number of processes that share the rows'
    raise ConfigError(f'batch.micro_size = {size}: {right}')
  share = size // process_count
  mine = slice(process_index * share, (process_index + 1) * share)
  batches = _Batches(cfg, corpus, tokenizer, mine)
  return grain.experimental.ThreadPrefetchDatasetIterator(batches, _BATCHES_AHEAD)


class _Batches(grain.DatasetIterator[np.ndarray]):
  """The rows `mine` of each batch, made when asked for."""

  def __init__(self, cfg: Config, corpus: Corpus, tokenizer: Tokenizer, mine: slice):
    super().__init__()
    self._batch, self._workers, self._mine = cfg.batch, cfg.data.workers, mine
    self._data = {
      'fingerprint of data.corpus': corpus.fingerprint,
      'fingerprint of the tokenizer': tokenizer.fingerprint,
      'run.seed': cfg.run.seed,
      'data.fim_rate': cfg.data.fim_rate,
    }
    tokens = functools.partial(_tokens, tokenizer, cfg.data.fim_rate, cfg.run.seed)
    # Grain shuffles epoch e with seed + e, and counts the elements of a repeated dataset onwards.
    documents = grain.MapDataset.source(corpus.train).shuffle(cfg.run.seed % 2**32).repeat()
    self._documents = documents.map_with_index(tokens)
    self._position = packing.Position(0, 0)
    self._source = self._rows = None

  def __next__(self) -> np.ndarray:
    self._assert_not_closed()
    if self._rows is None:
      self._open()
    batch = list(itertools.islice(self._rows, self._batch.micro_size))
    self._position = batch[-1][1]
    return np.stack([row for row, _ in batch[self._mine]])

  def _open(self) -> None:
    """Starts the stream at the position."""
    documents = self._documents[self._position.document :].to_iter_dataset(_READ)
    if self._workers:
      # Worker i of n takes every n-th document from the i-th on, and they are dealt out in turn: the
      # order is the same for every number of workers, and for none.
      if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which are parsed only under absl.app
      options = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=_PER_WORKER)
      documents = documents.mp_prefetch(options)
    self._source = iter(documents)
    self._rows = packing.pack(self._source, self._batch.seq_len, self._position)

  def _close_source(self) -> None:
    if self._source is not None:
      self._source.close()
      self._source = self._rows = None

  def get_state(self) -> dict[str, Any]:
    return {**self._position._asdict(), 'data': self._data}

  def set_state(self, state: dict[str, Any]) -> None:
    for key, here in self._data.items():
      there = state['data'][key]
      if here != there:
        right = f'the saved position in the data belongs to {key} = {there!r}; resume with that'
        raise ConfigError(f'{key} = {here!r}: {right}, or start a new run')
    self._close_source()
    self._position = packing.Position(state['document'], state['token'])

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
