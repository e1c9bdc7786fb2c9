"""Experts that move while requests run, on several devices, against experts in order on one."""

import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.inference.decode import Decoder
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Request

_HOW = {'vocab_size': 8, 'eos_ids': (), 'slots': 8, 'chunk': 64}


def _run(engine, requests):
  found = {id(r): [] for r in requests}
  for request in requests:
    engine.submit(request)
  while not engine.idle:
    for event in engine.step():
      found[id(event.request)] += [token.id for token in event.tokens]
  return [found[id(r)] for r in requests]


@pytest.mark.parametrize('dual_batch', [False, True])
def test_experts_and_copies_move_between_steps_and_no_token_changes(long, make_small, dual_batch):
  spread = make_small('long', config.Mesh(local=4, zero=0))
  decoder = Decoder(spread.config.model, spread.device_mesh, spread.model, redundant=4)
  rng = np.random.default_rng(0)
  requests = [Request(rng.integers(0, 250, n).tolist(), 12) for n in rng.choice([5, 64, 100], 12)]
  engine = Engine(decoder, balance_every=5, dual_batch=dual_batch, **_HOW)
  before = decoder.placement
  assert _run(engine, requests) == _run(Engine(long.decoder, **_HOW), requests)
  load_YE = engine.balancer.load_YE
  assert engine.balancer.moved and load_YE.sum() > 0
  assert decoder.placement.unevenness(load_YE).mean() < before.unevenness(load_YE).mean()
  # Every expert is somewhere, and copies are what they copy: placed back in order, it is as it was.
  decoder.place(np.ones_like(load_YE))
  assert _run(engine, requests[:4]) == _run(Engine(long.decoder, **_HOW), requests[:4])


def test_copies_that_devices_cannot_share_are_named(long):
  with pytest.raises(ConfigError, match='redundant = -1: must be at least 0'):
    Decoder(long.config.model, long.device_mesh, long.model, redundant=-1)
