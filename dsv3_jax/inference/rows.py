"""`step.Rows` while an engine fills it."""

from collections.abc import Sequence

import numpy as np

from dsv3_jax.inference.sampling import GREEDY, Sampling, Samplings
from dsv3_jax.inference.step import Rows


class Filling:
  """`rows` empty rows of up to `length` tokens, whose sequences have up to `table` pages."""

  def __init__(self, rows: int, length: int, table: int) -> None:
    self._tokens_BL = np.zeros((rows, length), np.int32)
    self._start_B = np.zeros(rows, np.int32)
    self.count_B = np.zeros(rows, np.int32)
    self._table_BJ = np.zeros((rows, table), np.int32)
    self._next_B = np.full(rows, -1, np.int32)
    self._samplings = [GREEDY] * rows
    self._sample = [0] * rows
    self._top = False

  def put(
    self,
    b: int,
    tokens: Sequence[int],
    start: int,
    pages: Sequence[int],
    how: tuple[Sampling, int, int],
    behind: int = -1,
  ) -> None:
    """Row b runs `tokens` from position `start`; `how`: sampling, sample, top_logprobs of its request."""
    self._tokens_BL[b, : len(tokens)] = tokens
    self._start_B[b], self.count_B[b], self._next_B[b] = start, len(tokens), behind
    self._table_BJ[b, : len(pages)] = pages
    self._samplings[b], self._sample[b], top = how
    self._top |= top > 0

  def arrays(self) -> Rows:
    samplings = Samplings.of(self._samplings, self._sample)
    return Rows(
      self._tokens_BL,
      self._start_B,
      self.count_B,
      self._table_BJ,
      self._next_B,
      samplings,
      np.array(self._top),
    )
