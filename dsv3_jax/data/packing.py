"""From a document's text to rows of tokens (4.1).

A document becomes `bos, tokens, eos`, or with probability `fim_rate` the prefix-suffix-middle form

    bos, fim_begin, prefix, fim_hole, suffix, fim_end, middle, eos

cut at two random characters. The report writes the string from `fim_begin` to `eos` and says nothing of
bos; here every document has one, so that a model can be asked to begin a document.

Documents follow each other in one stream without padding and without masks between them. A row is
`seq_len + 1` tokens, inputs and targets overlapping, and the next row starts `seq_len` later: its first
token is the last one of the row before, so every token but the first is a target exactly once.

    stream  a b c d e f g h i ...      seq_len 3:   a b c d | d e f g | g h i ...

Left out: the report splits a random fraction of the tokens that join punctuation and line breaks, and
does not say which fraction.
"""

import collections
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dsv3_jax.data.tokenizer import Tokenizer


class Position(NamedTuple):
  """Where a row starts: the number of the document in the endless sequence, and a token within it."""

  document: int
  token: int


START = Position(0, 0)


def document_tokens(
  text: str, tokenizer: Tokenizer, fim_rate: float, rng: np.random.Generator
) -> np.ndarray:
  """`text` as int32 tokens from bos to eos, in prefix-suffix-middle form with probability `fim_rate`."""
  t = tokenizer
  if rng.random() >= fim_rate:
    return np.array([t.bos_id, *t.encode(text), t.eos_id], np.int32)
  prefix, middle, suffix = t.encode_batch(cut(text, rng))
  return np.array(
    [t.bos_id, t.fim_begin_id, *prefix, t.fim_hole_id, *suffix, t.fim_end_id, *middle, t.eos_id],
    np.int32,
  )


def cut(text: str, rng: np.random.Generator) -> tuple[str, str, str]:
  """Prefix, middle and suffix: `text` cut at two characters, each uniform over all places."""
  a, b = sorted(rng.integers(0, len(text), size=2, endpoint=True).tolist())
  return text[:a], text[a:b], text[b:]


def pack(
  documents: Iterable[np.ndarray], seq_len: int, start: Position = START
) -> Iterator[tuple[np.ndarray, Position]]:
  """Yields rows [seq_len + 1] of the concatenated documents, each with the position of the next row.

  `documents` begin with number `start.document`, whose first `start.token` tokens are passed over, so
  `pack(documents[p.document:], seq_len, p)` continues from any position `p` that was yielded. What does
  not fill a row at the end is not yielded.
  """
  document, token = start
  pieces = []  # tokens from the start of `document` on
  lengths = collections.deque()  # of the same documents
  ahead = -token  # how many tokens there are from the position on
  for tokens in documents:
    pieces.append(tokens)
    lengths.append(len(tokens))
    ahead += len(tokens)
    if ahead <= seq_len:
      continue
    stream = np.concatenate(pieces)
    at = token
    while ahead > seq_len:
      row = stream[at : at + seq_len + 1]
      at, token, ahead = at + seq_len, token + seq_len, ahead - seq_len
      while token >= lengths[0]:
        token -= lengths.popleft()
        document += 1
      yield row, Position(document, token)
    pieces = [stream[at - token :]]


def pack_all(
  documents: Iterable[np.ndarray], seq_len: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
  """All rows, the last one padded: tokens [n, seq_len + 1] int32 and weights [n, seq_len] float32.

  A weight is 1 where the target is a token of a document and 0 where it is padding.
  """
  stream = np.concatenate(list(documents))
  targets = len(stream) - 1
  n = -(-targets // seq_len)
  padded = np.full(n * seq_len + 1, pad_id, np.int32)
  padded[: len(stream)] = stream
  at = seq_len * np.arange(n)[:, None] + np.arange(seq_len + 1)
  return padded[at], (at[:, 1:] <= targets).astype(np.float32)
