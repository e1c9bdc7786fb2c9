"""Router, balance loss and the layer of experts against the oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import parity
import pytest

from dsv3_jax import config
from dsv3_jax.model import moe

_V3 = config.Moe(num_experts=12, top_k=3, num_groups=4, top_groups=2, expert_dim=8)
_V2 = {'scoring': 'softmax', 'normalize': False, 'route_scale': 16.0}
_RULES = {
  'v3': {},
  'v3_without_groups': {'num_groups': 1, 'top_groups': 1},
  'v3_all_groups_kept': {'top_groups': 4},
  'v3_not_normalised': {'normalize': False},
  'v2': _V2,
  'v2_without_groups': _V2 | {'num_groups': 1, 'top_groups': 1},
  'v2_groups_of_one': _V2 | {'num_groups': 12, 'top_groups': 5},
  'v2_normalised': _V2 | {'normalize': True},
}
_BIASES = {'none': (0.0, 0.0), 'random': (0.0, 0.3), 'strongly_negative': (-5.0, 0.3)}


def _changed(**changes) -> config.Moe:
  return config.Moe(**(vars(_V3) | changes))


def _tokens(*shape: int) -> np.ndarray:
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


@functools.cache
def _route(c: config.Moe):
  return jax.jit(functools.partial(moe.route, c))


@pytest.mark.parametrize('bias', _BIASES.values(), ids=_BIASES)
@pytest.mark.parametrize('rule', _RULES.values(), ids=_RULES)
def test_gate_chooses_and_weights_as_the_oracle(rule, bias):
  c = _changed(**rule)
  x_TD = _tokens(64, 16)
  rng = np.random.default_rng(2)
  router_DE = rng.normal(0, 0.25, (16, 12)).astype(np.float32)
  bias_E = rng.normal(*bias, 12).astype(np.float32)
  ids_TK, weight_TK, affinity_TE = _route(c)(x_TD, router_DE, bias_E)
  expected = oracle.route(c, *(a.astype(np.float64) for a in (x_TD, router_DE, bias_E)))
  np.testing.assert_array_equal(ids_TK, expected[0])
  parity.assert_close((weight_TK, affinity_TE), expected[1:])


def test_experts_of_dropped_groups_stay_out_however_negative_the_kept_scores_are():
  c = _changed(top_groups=1)
  bias_E = np.full(12, -9.0, np.float32)
  ids_TK = np.asarray(_route(c)(_tokens(64, 16), _tokens(16, 12), bias_E)[0])
  assert np.all(ids_TK // 3 == ids_TK[:, :1] // 3), 'a token has experts of two groups'


def test_bias_selects_but_does_not_weigh():
  c = _changed(num_groups=1, top_groups=1, normalize=False, route_scale=1.0)
  bias_E = np.zeros(12, np.float32)
  bias_E[7] = 2.0  # above any sigmoid
  ids_TK, weight_TK, affinity_TE = _route(c)(_tokens(64, 16), _tokens(16, 12), bias_E)
  assert np.all(ids_TK[:, 0] == 7)
  np.testing.assert_array_equal(weight_TK[:, 0], affinity_TE[:, 7])


def test_selection_has_no_gradient_and_weights_have():
  run = lambda bias_E, router_DE: jnp.sum(_route(_V3)(_tokens(8, 16), router_DE, bias_E)[1][:, 0])
  dbias_E, drouter_DE = jax.grad(run, (0, 1))(jnp.zeros(12), jnp.asarray(_tokens(16, 12)))
  assert not np.any(dbias_E)
  assert np.any(drouter_DE)


def test_balance_loss_sums_the_oracle_over_sequences_and_skips_invalid_tokens():
  affinity_BLE = np.random.default_rng(3).uniform(0.01, 1, (3, 10, 12)).astype(np.float32)
  valid_BL = np.broadcast_to(np.arange(10) < 8, (3, 10))
  got = jax.jit(functools.partial(moe.balance_loss, _V3))(affinity_BLE, valid_BL)
  expected = sum(oracle.balance_loss(a_LE.astype(np.float64), 3) for a_LE in affinity_BLE[:, :8])
  parity.assert_close(got, expected)


def test_balance_loss_of_even_affinities_is_one_a_sequence():
  affinity_BLE = np.eye(12, dtype=np.float32)[None] + np.roll(np.eye(12, dtype=np.float32), 1, 1)
  c = _changed(top_k=2)
  got = moe.balance_loss(c, jnp.asarray(affinity_BLE), jnp.ones((1, 12), bool))
  assert float(got) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize('seed', range(3))
def test_tokens_of_v3_need_3_97_nodes_and_7_5_devices_on_average_and_never_a_fifth_node(seed):
  c = config.Moe()
  affinity_TE = jnp.asarray(np.random.default_rng(seed).normal(size=(4096, 256)), jnp.float32)
  ids_TK, _, _ = _route(c)(affinity_TE, jnp.eye(256), jnp.zeros(256))
  members = lambda experts: [len(set(token)) for token in np.asarray(ids_TK) // experts]
  nodes, devices = members(32), members(4)  # 8 nodes of 8 devices
  assert max(nodes) == 4
  assert np.mean(nodes) == pytest.approx(3.97, abs=0.02)
  assert np.mean(devices) == pytest.approx(7.5, abs=0.05)


_LAYERS = {
  'one_shared': {},
  'no_shared': {'model.moe.num_shared': 0},
  'two_shared': {'model.moe.num_shared': 2},
  'v2': {f'model.moe.{k}': v for k, v in _V2.items()} | {'objective.bias_speed': 0.0},
  'every_expert_on_every_token': {'model.moe.dispatch.form': 'dense'},
}


@pytest.mark.parametrize('changes', _LAYERS.values(), ids=_LAYERS)
def test_layer_equals_the_oracle_and_counts_only_valid_tokens(changes):
  c = parity.small(changes | {'model.num_layers': 2, 'model.mtp_depth': 0})
  state = parity.random_state(c)
  ffn = parity.layout(c).module(state['params'], state['router_bias']).moe_layers.ffn
  ffn = jax.tree.map(lambda x: jnp.asarray(x[0]), ffn)
  x_BLD = _tokens(2, 9, c.model.dim)
  valid_BL = np.broadcast_to(np.arange(9) < 7, (2, 9))
  run = parity.on_one_device(lambda ffn, x_BLD, valid_BL: ffn(c.model, x_BLD, valid_BL))
  y_BLD, routing = run(ffn, x_BLD, valid_BL)

  w = parity.to_oracle(state)['moe_layers'][0]['ffn']
  counts_E = np.zeros(c.model.moe.num_experts, int)
  for y_LD, x_LD in zip(y_BLD, x_BLD.astype(np.float64), strict=True):
    expected_LD, ids_LK, _ = oracle.moe(c.model.moe, w, x_LD)
    parity.assert_close(y_LD, expected_LD)
    counts_E += oracle.expert_counts(ids_LK[:7], len(counts_E))
  np.testing.assert_array_equal(routing.counts_E, counts_E)
