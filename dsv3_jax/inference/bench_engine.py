"""What benchmarks of the engine share: how it is made, prompts run to their end, ratios told."""

import statistics
from collections.abc import Sequence

from dsv3_jax import config
from dsv3_jax.inference.decode import Decoder
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Request

PROMPT = 64  # tokens
_STEPS = 8  # of decoding in one call
_PROMPTS = 8  # that a device runs at a time


def make(c: config.Model, decoder: Decoder, slots: int, drafts: int = 0) -> Engine:
  """Compiled; no token ends a sequence, so that all have one length."""
  how = {'vocab_size': c.vocab_size, 'eos_ids': (), 'chunk': PROMPT, 'drafts': drafts}
  prompts = min(slots // decoder.ways, _PROMPTS)
  made = Engine(decoder, slots=slots, steps=_STEPS, prompts=prompts, **how)
  made.warm_up()
  return made


def run(engine: Engine, requests: Sequence[Request]) -> list[list[int]]:
  """New tokens of each."""
  found = {id(request): [] for request in requests}
  for request in requests:
    engine.submit(request)
  while not engine.idle:
    for event in engine.step():
      found[id(event.request)] += [token.id for token in event.tokens]
  return [found[id(request)] for request in requests]


def spread(ratios: Sequence[float]) -> dict[str, float]:
  return {'median': statistics.median(ratios), 'least': min(ratios), 'most': max(ratios)}
