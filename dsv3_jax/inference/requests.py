"""What an engine is asked, what it answers, and what it counts."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from dsv3_jax.inference.sampling import GREEDY, Sampling


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
  """One sequence to be continued; compared by identity."""

  prompt: Sequence[int]
  max_tokens: int
  sampling: Sampling = GREEDY
  sample: int = 0  # tells apart the samples of one prompt
  top_logprobs: int = 0

  @property
  def how(self) -> tuple[Sampling, int, int]:
    return self.sampling, self.sample, self.top_logprobs


@dataclasses.dataclass(frozen=True)
class Token:
  id: int
  logprob: float  # of the model as it is, whatever the temperature
  top: tuple[tuple[int, float], ...] = ()  # the most probable ones, as many as were asked for
  drafted: bool = False  # guessed by the MTP module, and right


@dataclasses.dataclass(frozen=True, eq=False)
class Handover:
  """A request whose prompt is in the cache, to go on in another engine."""

  request: Request
  token: Token  # the first one
  drafts: list[int]  # of those behind it
  pages: list[np.ndarray]  # [Y, 64, X] each: what the prompt's pages hold, the last one in part


@dataclasses.dataclass(frozen=True)
class Event:
  request: Request
  tokens: list[Token]
  finish: str | None  # 'stop': eos, the last token | 'length' | None: goes on
  handover: Handover | None = None  # where it goes on elsewhere


@dataclasses.dataclass
class Stats:
  """Sums since the engine was made."""

  requests: int = 0
  prompt_tokens: int = 0
  shared_tokens: int = 0  # of those, found in the cache
  tokens: int = 0
  row_steps: int = 0  # steps of decoding, each counted once for every sequence in it
  drafts: int = 0
  accepted: int = 0
  prompt_seconds: float = 0.0
  decode_seconds: float = 0.0

  @property
  def acceptance(self) -> float:
    """Share of the drafts that were right; of two in a row, the second counts where the first was not."""
    return self.accepted / max(self.drafts, 1)

  @property
  def tokens_per_step(self) -> float:
    """Tokens that a step of decoding gives a sequence: 1 without drafts."""
    return 1 + self.accepted / max(self.row_steps, 1)
