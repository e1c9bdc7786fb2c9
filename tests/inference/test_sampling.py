"""Sampling against NumPy: which tokens are kept, and that nothing else is ever drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.sampling import Sampling, Samplings, nucleus, sample

_V = 12
_MANY = 20_000


_sample = jax.jit(sample)


def _kept(logits_V: np.ndarray, temperature: float, top_p: float) -> set[int]:
  """The shortest run of most probable tokens whose sum reaches top_p."""
  weights_V = np.exp(logits_V.astype(np.float64) / temperature)
  prob_V = weights_V / weights_V.sum()
  kept, total = set(), 0.0
  for token in np.argsort(-prob_V, kind='stable'):
    if total >= top_p:
      break
    kept.add(int(token))
    total += prob_V[token]
  return kept


def _draw(s: Sampling, logits_V: np.ndarray, samples: int = _MANY) -> np.ndarray:
  """Tokens of `samples` samples of one prompt."""
  logits_BV = jnp.broadcast_to(jnp.asarray(logits_V), (samples, len(logits_V)))
  each = Samplings.of([s] * samples, np.arange(samples))
  return np.asarray(_sample(each, logits_BV, jnp.full(samples, 7)))


def _logits(seed: int, size: int = _V) -> np.ndarray:
  return np.random.default_rng(seed).normal(0, 1, size).astype(np.float32)


@pytest.mark.parametrize('temperature', [0.5, 1.0, 2.0])
@pytest.mark.parametrize('top_p', [0.05, 0.6, 0.9])
def test_exactly_the_tokens_of_the_nucleus_are_drawn(temperature, top_p):
  logits_V = _logits(0)
  drawn = set(_draw(Sampling(temperature, top_p), logits_V).tolist())
  assert drawn == _kept(logits_V, temperature, top_p)


def test_nucleus_is_what_numpy_computes_for_many_distributions():
  find = jax.jit(jax.vmap(nucleus, in_axes=(0, None)))
  logits_BV = np.stack([_logits(seed, 100) * (1 + seed % 7) for seed in range(200)])
  for top_p in (0.1, 0.5, 0.95, 0.999):
    order_BV, kept_BV = map(np.asarray, find(logits_BV, top_p))
    for logits_V, order_V, kept_V in zip(logits_BV, order_BV, kept_BV, strict=True):
      assert set(order_V[kept_V].tolist()) == _kept(logits_V, 1.0, top_p)
      np.testing.assert_array_equal(order_V, np.argsort(-logits_V, kind='stable'))


def test_of_equal_tokens_the_nucleus_keeps_those_of_lower_id():
  order_V, kept_V = nucleus(jnp.zeros(8), 0.5)
  assert order_V.tolist() == list(range(8))
  assert kept_V.tolist() == [True] * 4 + [False] * 4


def test_top_p_of_one_keeps_every_token_even_below_rounding():
  logits_V = np.zeros(3, np.float32)
  logits_V[2] = -9.0  # one draw in 16,000
  assert set(_draw(Sampling(1.0, 1.0), logits_V, 200_000).tolist()) == {0, 1, 2}


def test_temperature_zero_is_the_most_probable_token_the_lowest_id_among_equals():
  logits_BV = jnp.array([[0.0, 2.0, 2.0], [3.0, -1.0, 2.0]])
  greedy = Samplings.of([Sampling(temperature=0.0, top_p=0.1)] * 2, [0, 1])
  assert _sample(greedy, logits_BV, jnp.arange(2)).tolist() == [1, 0]


@pytest.mark.parametrize('temperature', [1e-30, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature):
  logits_V = _logits(1) * 30
  assert set(_draw(Sampling(temperature, 1.0), logits_V).tolist()) == {int(logits_V.argmax())}


def test_temperature_divides_the_logits():
  logits_V = _logits(2)
  halved = _draw(Sampling(0.5, 0.9), logits_V)
  np.testing.assert_array_equal(halved, _draw(Sampling(1.0, 0.9), 2 * logits_V))


def test_draws_follow_seed_sample_and_position_and_not_the_rest_of_the_batch():
  logits_V = _logits(3, 1000)
  logits_BV = jnp.asarray(np.stack([_logits(9, 1000), logits_V, logits_V, logits_V]))
  samples, positions = jnp.array([0, 5, 5, 6]), jnp.array([1, 2, 3, 2])

  def draw(s: Sampling, rows: jax.Array) -> list[int]:
    each = Samplings.of([s] * len(rows), samples[rows])
    return _sample(each, logits_BV[rows], positions[rows]).tolist()

  s = Sampling(1.0, 0.99, seed=1)
  together = draw(s, jnp.arange(4))
  assert together == [draw(s, jnp.array([i]))[0] for i in range(4)]
  assert len(set(together[1:])) == 3
  assert draw(Sampling(1.0, 0.99, seed=2), jnp.arange(4)) != together


def test_min_p_keeps_what_is_at_least_that_share_of_the_best():
  logits_V = _logits(4)
  share_V = np.exp(logits_V - logits_V.max())
  drawn = set(_draw(Sampling(1.0, 1.0, min_p=0.3), logits_V).tolist())
  assert drawn == set(np.flatnonzero(share_V >= 0.3).tolist()) and 1 < len(drawn) < _V


def test_every_sequence_of_a_batch_is_sampled_in_its_own_way():
  ways = [
    Sampling(0.0, 1.0),
    Sampling(1.0, 0.5, 1),
    Sampling(2.0, 1.0, 2),
    Sampling(1.0, 1.0, 3, 0.2),
  ]
  logits_BV = jnp.broadcast_to(jnp.asarray(_logits(5, 1000)), (4, 1000))
  position_B = jnp.arange(4)
  together = _sample(Samplings.of(ways, range(4)), logits_BV, position_B).tolist()
  alone = [
    _sample(Samplings.of([way], [i]), logits_BV[:1], position_B[i : i + 1]).tolist()[0]
    for i, way in enumerate(ways)
  ]
  assert together == alone


@pytest.mark.parametrize(
  ('values', 'told'),
  [
    ({'temperature': -0.1}, 'temperature = -0.1: must be 0'),
    ({'temperature': float('nan')}, 'temperature = nan'),
    ({'temperature': float('inf')}, 'temperature = inf'),
    ({'top_p': 0.0}, 'top_p = 0.0: must be above 0 and at most 1'),
    ({'top_p': 1.5}, 'top_p = 1.5'),
    ({'min_p': 1.5}, 'min_p = 1.5: must be at least 0 and at most 1'),
    ({'seed': -1}, 'seed = -1: must be 0'),
    ({'seed': 2**32}, 'seed = 4294967296: must be 0'),
  ],
)
def test_values_that_cannot_work_are_named(values, told):
  with pytest.raises(ConfigError) as error:
    Sampling(**values)
  assert str(error.value).startswith(told)


def test_the_largest_seed_works():
  assert len(_draw(Sampling(1.0, 0.9, seed=2**32 - 1), _logits(0), 3)) == 3
