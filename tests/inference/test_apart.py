"""Prompts in one engine and answers in another, on meshes of their own, against one engine."""

import dataclasses

import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.inference.apart import Apart
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.sampling import GREEDY, Sampling

_HOW = {'vocab_size': 8, 'eos_ids': (), 'slots': 8, 'chunk': 64}


def _engine(small, **changes):
  return Engine(small.decoder, **(_HOW | changes))


def _requests(count, seed=0):
  rng = np.random.default_rng(seed)
  ways = [GREEDY, Sampling(1.0, 1.0, 1), Sampling(0.7, 0.9, 2)]
  lengths = rng.choice([1, 9, 63, 64, 65, 128, 170], count)
  return [
    Request(rng.integers(0, 250, n).tolist(), int(rng.integers(1, 14)), ways[i % 3], i)
    for i, n in enumerate(lengths)
  ]


def _run(engine, requests):
  """Ids of every request; they join a few at a time."""
  found, waiting = {id(r): [] for r in requests}, list(requests)
  while waiting or not engine.idle:
    for request in waiting[:3]:
      engine.submit(request)
    waiting = waiting[3:]
    for event in engine.step():
      found[id(event.request)] += [token.id for token in event.tokens]
  assert not engine.pages_owned
  return [found[id(r)] for r in requests]


def test_two_engines_on_two_meshes_give_the_tokens_of_one(long, make_small):
  """Experts over four devices for prompts, over two for answers."""
  wide = make_small('long', config.Mesh(node=2, local=2, zero=0))
  small = make_small('long', config.Mesh(local=2, zero=0))
  requests = _requests(16)
  apart = Apart(_engine(wide, drafts=1, prompts_only=True), _engine(small, drafts=1))
  assert _run(apart, requests) == _run(_engine(long, drafts=1), requests)
  assert apart.stats.accepted


@pytest.mark.parametrize(
  'how', [{'drafts': 3}, {'cache': 'fp8'}, {'drafts': 1, 'dual_batch': True}]
)
def test_apart_or_not_drafts_an_fp8_cache_and_halves_give_the_same_tokens(long, how):
  requests = _requests(16)
  apart = Apart(_engine(long, prompts_only=True, **how), _engine(long, **how))
  assert _run(apart, requests) == _run(_engine(long, **how), requests)


def test_pages_arrive_as_they_left_and_only_once(long):
  prompts, decode = _engine(long, prompts_only=True), _engine(long)
  request = _requests(1)[0]
  request = dataclasses.replace(request, prompt=list(range(170)), max_tokens=3)
  prompts.submit(request)
  events = []
  while not events:
    events = prompts.step()
  [handover] = [event.handover for event in events]
  assert prompts.idle and not prompts.pages_owned and len(handover.pages) == 3
  decode.take_over(handover)
  decode._admit()
  pages = decode._slots[0].pages
  for page, entries in zip(pages, handover.pages, strict=False):
    there = decode._decoder.read_page(decode._cache, 0, page)
    np.testing.assert_array_equal(there.view(np.uint8), entries.view(np.uint8))
  again = dataclasses.replace(request)
  decode.take_over(dataclasses.replace(handover, request=again))
  decode._admit()
  assert decode._slots[1].pages[:2] == pages[:2] and decode._slots[1].pages[2] != pages[2]


def test_cancelled_on_either_side_leaves_nothing(long):
  apart = Apart(_engine(long, prompts_only=True), _engine(long))
  a, b = (Request([i] * 100, 20) for i in range(2))
  for request in (a, b):
    apart.submit(request)
  apart.step()
  apart.cancel(a)
  while apart._decode.idle:
    apart.step()
  apart.cancel(b)
  assert apart.idle and not apart.pages_owned


def test_what_does_not_fit_together_is_named(long, v3):
  with pytest.raises(ConfigError, match='drafts = 1 for prompts: must be 2'):
    Apart(_engine(long, prompts_only=True, drafts=1), _engine(long, drafts=2))
  with pytest.raises(ConfigError, match='bytes_per_token'):
    Apart(_engine(long, prompts_only=True, cache='fp8'), _engine(long))
  prompts, decode = _engine(long, prompts_only=True), _engine(long, drafts=1)
  prompts.submit(Request([1], 4))
  [event] = prompts.step()
  with pytest.raises(ConfigError, match=r'handover of 1 pages .* must be 1 of'):
    decode.take_over(event.handover)
