"""Requests that join and leave against each one alone, and against the expanded forward of training."""

import dataclasses

import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.config import ConfigError
from dsv3_jax.inference import decode
from dsv3_jax.inference.engine import Engine
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.sampling import Sampling

_VOCAB = 8  # few tokens to choose from, so that an untrained module guesses some of them
_LONGEST = 192


def _engine(small, **changes):
  how = {'vocab_size': _VOCAB, 'eos_ids': (), 'slots': 8, 'chunk': 64} | changes
  return Engine(small.decoder, **how)


def _requests(count, seed=0, **how):
  rng = np.random.default_rng(seed)
  lengths = rng.choice([1, 2, 9, 33, 63, 64, 65, 100, 128, 140, 170], count)
  return [
    Request(rng.integers(0, 250, n).tolist(), int(rng.integers(1, 16)), **how) for n in lengths
  ]


def _run(engine, requests, at_once=3, seed=0):
  """Tokens of every request; they join a few at a time, in random order."""
  found = {id(r): [] for r in requests}
  waiting = [requests[i] for i in np.random.default_rng(seed).permutation(len(requests))]
  while waiting or not engine.idle:
    for _ in range(min(at_once, len(waiting))):
      engine.submit(waiting.pop())
    for event in engine.step():
      found[id(event.request)] += event.tokens
  assert not engine.pages_owned
  return [found[id(r)] for r in requests]


def _ids(runs):
  return [[token.id for token in tokens] for tokens in runs]


@pytest.fixture(scope='module')
def requests():
  return _requests(200)


@pytest.fixture(scope='module')
def plain(long, requests):
  return _run(_engine(long), requests)


@pytest.fixture(scope='module')
def expected(long, requests, plain):
  """Greedy continuation by forwards over whole sequences: right where each token is the best of its own."""
  full_BL = np.zeros((200, _LONGEST), np.int32)
  for row, request, tokens in zip(full_BL, requests, _ids(plain), strict=True):
    row[: len(request.prompt) + len(tokens)] = [*request.prompt, *tokens]
  best_BL = np.concatenate(
    [long.expanded(full_BL[i : i + 50])[:, :, :_VOCAB].argmax(2) for i in range(0, 200, 50)]
  )
  return [
    best[len(r.prompt) - 1 : len(r.prompt) - 1 + r.max_tokens].tolist()
    for best, r in zip(best_BL, requests, strict=True)
  ]


def test_200_prompts_joining_and_leaving_get_the_tokens_of_the_full_forward(plain, expected):
  assert _ids(plain) == expected


def test_a_request_alone_gets_the_same_bits(long, requests, plain):
  engine = _engine(long)
  for i in range(0, 200, 8):
    assert _run(engine, [requests[i]]) == [plain[i]]


@pytest.mark.parametrize('drafts', [1, 3])
def test_speculation_changes_no_token_and_saves_steps(long, requests, plain, drafts):
  engine = _engine(long, drafts=drafts)
  assert _ids(_run(engine, requests, seed=1)) == _ids(plain)
  s = engine.stats
  assert 0.05 < s.acceptance < 0.5  # one in eight by chance
  assert s.row_steps + s.accepted + len(requests) == s.tokens == sum(map(len, plain))
  assert s.tokens_per_step == 1 + s.accepted / s.row_steps


@pytest.mark.parametrize('drafts', [0, 2])
def test_several_steps_in_a_call_change_no_token_and_end_where_one_would(
  long, requests, plain, drafts
):
  some = slice(0, 48)
  tokens = _ids(plain)[some]
  eos = max(range(_VOCAB), key=lambda t: sum(t in each for each in tokens))
  cut = [each[: each.index(eos) + 1] if eos in each else each for each in tokens]
  for eos_ids, expected in (((), tokens), ({eos}, cut)):
    engine = _engine(long, drafts=drafts, steps=5, eos_ids=eos_ids)
    assert _ids(_run(engine, requests[some], seed=3)) == expected
    assert engine.stats.tokens == sum(map(len, expected))


def test_as_many_steps_in_a_call_as_nobody_waits_for(long):
  engine = _engine(long, slots=1, steps=4)
  first, second = Request([1, 2], 11), Request([3], 2)
  engine.submit(first)
  assert [len(e.tokens) for e in engine.step()] == [1, 4]
  engine.submit(second)
  told = [[len(e.tokens) for e in engine.step()] for _ in range(2)]
  assert told == [[4], [2]]  # first has 11
  assert [len(e.tokens) for e in engine.step()] == [1, 1]


def test_drawn_tokens_follow_the_seed_and_neither_speculation_nor_neighbours(long):
  ways = [Sampling(1.0, 1.0, 1), Sampling(0.7, 0.9, 2), Sampling(1.3, 1.0, 3, min_p=0.1)]
  requests = [
    dataclasses.replace(r, sampling=ways[i % 3], sample=i) for i, r in enumerate(_requests(24, 5))
  ]
  drawn = _ids(_run(_engine(long), requests))
  assert _ids(_run(_engine(long, drafts=3), requests, seed=2)) == drawn
  other = [dataclasses.replace(r, sample=r.sample + 100) for r in requests]
  assert _ids(_run(_engine(long), other)) != drawn


def test_a_prompt_that_begins_alike_takes_the_pages_that_are_there(long, requests, plain):
  engine = _engine(long, drafts=1)
  again = [r for r in requests if len(r.prompt) == 170][:1] * 3
  again = [dataclasses.replace(r) for r in again]
  first = _run(engine, again[:1])
  assert engine.stats.shared_tokens == 0
  later = _run(engine, again[1:])
  assert engine.stats.shared_tokens == 2 * 128  # the third page is not full
  assert later == first * 2
  assert _ids(first) == _ids(
    [plain[requests.index(r)] for r in requests if len(r.prompt) == 170][:1]
  )


def test_requests_wait_for_pages_and_cancelled_ones_leave_at_once(long):
  engine = _engine(long, pages=4)
  a, b, c = (Request([i] * 100, 20) for i in range(3))  # two pages each
  for request in (a, b, c):
    engine.submit(request)
  engine.step()
  assert (engine.running, engine.waiting, engine.pages_owned) == (2, 1, 4)
  engine.cancel(a)
  assert (engine.running, engine.pages_owned) == (1, 2)
  engine.step()
  assert (engine.running, engine.waiting) == (2, 0)
  waiting = Request([1], 1)
  engine.submit(waiting)
  for request in (b, c, waiting, a):
    engine.cancel(request)
  assert engine.idle and not engine.pages_owned


def test_eos_ends_a_sequence_and_is_its_last_token(long, requests, plain):
  [alone] = _ids(_run(_engine(long), requests[:1]))
  long_one = next(i for i, tokens in enumerate(_ids(plain)) if len(set(tokens)) > 2)
  tokens = _ids(plain)[long_one]
  eos = next(token for token in tokens if token != tokens[0])
  engine = _engine(long, eos_ids={eos}, drafts=3)
  [ended] = _ids(_run(engine, [requests[long_one]]))
  assert ended == tokens[: tokens.index(eos) + 1]
  assert alone == _ids(plain)[0]


def test_logprobs_are_those_of_the_expanded_forward(each_small):
  rng = np.random.default_rng(0)
  requests = [Request(rng.integers(0, 512, n).tolist(), 8, top_logprobs=20) for n in (16, 1, 7, 12)]
  runs = _run(_engine(each_small, vocab_size=512, slots=4), requests)
  for request, tokens in zip(requests, runs, strict=True):
    whole = [*request.prompt, *(t.id for t in tokens)]
    logits_LV = each_small.expanded(np.array([whole + [0] * (24 - len(whole))], np.int32))[0]
    logits_LV = logits_LV[len(request.prompt) - 1 :][: len(tokens)].astype(np.float64)
    top = np.abs(logits_LV).max()
    logprob_LV = logits_LV - np.log(np.exp(logits_LV).sum(1, keepdims=True))
    for logprob_V, token in zip(logprob_LV, tokens, strict=True):
      ids, values = map(np.array, zip(*token.top, strict=True))
      assert token.id == ids[0] and token.logprob == pytest.approx(values[0], abs=1e-5)
      assert ids.tolist() == np.argsort(-logprob_V, kind='stable')[:20].tolist()
      np.testing.assert_allclose(values, logprob_V[ids], atol=2e-5 * top)


def test_a_mesh_gives_the_tokens_of_one_device(make_small, long):
  spread = make_small('long', config.Mesh(data=2, local=2, zero=1))
  requests = _requests(30, 3)
  engine = _engine(spread, drafts=1, slots=8)
  assert _ids(_run(engine, requests, at_once=8)) == _ids(_run(_engine(long, drafts=1), requests))


def test_several_prompts_at_a_time_change_no_token(long, requests, plain):
  engine = _engine(long, drafts=1, prompts=3)
  assert _ids(_run(engine, requests[:48], at_once=8)) == _ids(plain)[:48]


@pytest.mark.parametrize('drafts', [0, 2])
def test_two_halves_out_of_step_change_no_token(long, requests, plain, drafts):
  engine = _engine(long, drafts=drafts, dual_batch=True)
  assert _ids(_run(engine, requests, at_once=8, seed=4)) == _ids(plain)


def test_two_halves_on_a_mesh_give_the_tokens_of_one_device(make_small, long, requests, plain):
  """Both hops of the exchange, and a chunk of two prompts on every device at a time."""
  spread = make_small('long', config.Mesh(node=2, local=2, zero=1))
  engine = _engine(spread, drafts=1, dual_batch=True)
  prompts, run = [], engine._decoder.step
  engine._decoder.step = lambda how, rows, cache: (
    prompts.append(int((rows.count_B > 0).sum())),
    run(how, rows, cache),
  )[1]
  assert _ids(_run(engine, requests[:48], at_once=8)) == _ids(plain)[:48]
  assert max(prompts) == 8


def test_halves_leave_the_cache_in_place(long):
  """A copy of it would be made wherever one half wrote what the other may still read."""
  engine = _engine(long, dual_batch=True)
  how, c = engine._decode, long.config
  traced, _, cache = decode.trace(c.model, long.device_mesh, how, 8, 1, 1 << 16)
  size = cache.entries_YPMX.size * cache.entries_YPMX.dtype.itemsize
  memory = traced.lower().compile().memory_analysis()
  assert memory.temp_size_in_bytes < size / 8 < memory.alias_size_in_bytes


def test_an_fp8_cache_moves_logprobs_a_little(long):
  requests = _requests(8, 4)
  runs = _run(_engine(long, cache='fp8'), requests)
  exact = _run(_engine(long), requests)
  first = [
    (a[0].logprob, b[0].logprob) for a, b in zip(runs, exact, strict=True) if a[0].id == b[0].id
  ]
  assert len(first) >= 6
  difference = [abs(a - b) for a, b in first]
  assert 0 < max(difference) < 0.5


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    ({'slots': 0}, 'slots = 0: must be a positive multiple of the 1 devices'),
    ({'chunk': 100}, 'chunk = 100: must be a positive multiple of 64'),
    ({'prompts': 9}, 'prompts = 9: must be between 1 and 8, the slots of a device'),
    (
      {'prompts': 1, 'dual_batch': True},
      'prompts = 1: must be a multiple of 2: dual_batch halves the rows of each device',
    ),
    (
      {'slots': 3, 'dual_batch': True},
      'slots = 3: must be a multiple of 2: dual_batch halves the rows of each device',
    ),
    ({'drafts': -1}, 'drafts = -1: must be at least 0'),
    ({'cache': 'int4'}, "cache = 'int4': must be 'plain' or 'fp8'"),
  ],
)
def test_an_engine_that_cannot_work_is_named(long, changes, told):
  with pytest.raises(ConfigError) as error:
    _engine(long, **changes)
  assert str(error.value).startswith(told)


def test_a_request_that_can_never_run_is_named(long):
  engine = _engine(long, pages=2)
  for request, told in [
    (Request([], 1), 'prompt has 0 tokens'),
    (Request([1] * 256, 1), 'prompt has 256 tokens: must have at least 1 and at most 255'),
    (Request([1], 0), 'max_tokens = 0'),
    (Request([1] * 100, 60), 'prompt and answer of 160 tokens: the cache has room for 128'),
  ]:
    with pytest.raises(ConfigError) as error:
      engine.submit(request)
    assert str(error.value).startswith(told)
