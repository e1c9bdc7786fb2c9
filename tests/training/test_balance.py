"""Router biases against the oracle."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from dsv3_jax.training import balance


def _tree(make):
  return {
    'moe_layers': {'ffn': {'bias_E': make(3)}},
    'mtp': {'block': {'ffn': {'bias_E': make(1)}}},
  }


@pytest.mark.parametrize('speed', [1e-3, 0.0])
def test_biases_move_by_the_sign_of_the_mean_minus_the_load_as_in_the_oracle(speed):
  rng = np.random.default_rng(0)
  bias = _tree(lambda layers: rng.normal(size=(layers, 8)).astype(np.float32))
  counts = _tree(lambda layers: rng.integers(0, 5, (layers, 8), np.int32))
  got = balance.update_bias(bias, counts, jnp.float32(speed))
  for at in (
    lambda t: t['moe_layers']['ffn']['bias_E'],
    lambda t: t['mtp']['block']['ffn']['bias_E'],
  ):
    for got_E, bias_E, counts_E in zip(at(got), at(bias), at(counts), strict=True):
      expected_E = oracle.update_bias(np.float64(bias_E), counts_E, speed)
      np.testing.assert_allclose(got_E, expected_E, rtol=0, atol=2e-7)


def test_an_expert_exactly_at_the_mean_stays():
  counts_YE = np.array([[3, 3, 3], [2, 3, 4], [100_000_001, 100_000_002, 100_000_003]], np.int32)
  moved_YE = balance.update_bias(np.zeros((3, 3), np.float32), counts_YE, jnp.float32(1))
  np.testing.assert_array_equal(moved_YE, [[0, 0, 0], [1, 0, -1], [1, 0, -1]])


def test_relative_load_is_one_everywhere_when_even_and_sums_to_the_experts():
  even_YE = np.full((3, 8), 40, np.int32)
  np.testing.assert_array_equal(balance.relative_load({'layers': even_YE}), np.ones((3, 8)))
  load_YE = balance.relative_load(
    _tree(lambda layers: np.arange(8 * layers, dtype=np.int32).reshape(-1, 8))
  )
  assert load_YE.shape == (4, 8)
  np.testing.assert_allclose(np.sum(load_YE, axis=1), 8, rtol=1e-6)
