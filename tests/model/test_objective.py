"""The whole objective, values and gradients, against the oracle: every part of the model in its place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import parity
import pytest

from dsv3_jax import config, mesh
from dsv3_jax.training.objective import objective
from dsv3_jax.training.step import make_gradients

_MTP_WEIGHT = 0.3
_SMALL = {
  'model.vocab_size': 64,
  'model.remat': 'none',
  'objective.balance_alpha': 0.1,  # the balance loss must show
}
_CASES = {
  'v3': {},
  'v2': {
    'model.mla.q_rank': 0,
    'model.moe.scoring': 'softmax',
    'model.moe.normalize': False,
    'model.moe.route_scale': 16.0,
    'model.moe.num_shared': 2,
    'model.mtp_depth': 0,
    'objective.bias_speed': 0.0,
  },
  'yarn_two_mtp_depths_no_shared': {
    'model.max_length': 128,
    'model.rope.mscale': 0.5,
    'model.moe.num_shared': 0,
    'model.mtp_depth': 2,
  },
  'odd_sizes_one_group_no_dense_layers': {
    'model.num_dense_layers': 0,
    'model.num_layers': 2,
    'model.dim': 30,
    'model.mla.num_heads': 3,
    'model.mla.nope_dim': 5,
    'model.mla.rope_dim': 6,
    'model.mla.v_dim': 7,
    'model.mla.q_rank': 11,
    'model.mla.kv_rank': 9,
    'model.mla.block': 4,
    'model.moe.num_experts': 7,
    'model.moe.top_k': 3,
    'model.moe.expert_dim': 13,
    'model.moe.num_groups': 1,
    'model.moe.top_groups': 1,
  },
}


def _rows(length: int) -> np.ndarray:
  return np.random.default_rng(1).integers(0, 64, (2, length + 1), np.int32)


@functools.cache
def _program(case: str) -> tuple[config.Config, Any]:
  c = parity.small(_SMALL | _CASES[case])

  def run(params: Any, router_bias: Any, tokens_BX: jax.Array) -> Any:
    model = parity.layout(c).module(params, router_bias)
    return objective(c, model, tokens_BX, jnp.float32(_MTP_WEIGHT), jnp.int32(len(tokens_BX)))

  return c, parity.on_one_device(run)


@pytest.mark.parametrize('bias_shift', [0.0, -5.0], ids=['random_bias', 'strongly_negative_bias'])
@pytest.mark.parametrize('case', _CASES)
def test_objective_and_each_of_its_terms_equal_the_oracle(case, bias_shift):
  c, program = _program(case)
  state = parity.random_state(c)
  state['router_bias'] = jax.tree.map(lambda b: b + np.float32(bias_shift), state['router_bias'])
  rows = _rows(12)
  loss, terms = program(state['params'], state['router_bias'], rows)
  alpha = c.objective.balance_alpha
  expected = oracle.objective(c.model, parity.to_oracle(state), rows, _MTP_WEIGHT, alpha)

  got = {'loss': loss, 'ce': terms.ce, 'balance': terms.balance, 'mtp': list(terms.mtp_K)}
  counts = expected.pop('counts')
  parity.assert_close(got, expected)
  assert len(got['mtp']) == c.model.mtp_depth
  np.testing.assert_array_equal(np.concatenate(jax.tree.leaves(terms.counts)), counts)


def test_hidden_states_of_every_mtp_depth_predict_as_the_oracle():
  c, _ = _program('yarn_two_mtp_depths_no_shared')
  m, state, rows = c.model, parity.random_state(c), _rows(9)

  def run(params: Any, router_bias: Any, tokens_BL: jax.Array) -> Any:
    model = parity.layout(c).module(params, router_bias)
    embed_BLD = model.embed(m, tokens_BL)
    hiddens, _ = model.predict_further(m, model.hidden(m, embed_BLD)[0], embed_BLD)
    return [h_BLD @ model.head_DV[...] for h_BLD in hiddens]

  got = parity.on_one_device(run)(state['params'], state['router_bias'], rows[:, :-1])
  w = parity.to_oracle(state)
  for b, row in enumerate(rows):
    expected, _ = oracle.mtp(m, w, row, oracle.transformer(m, w, row[:-1])[1])
    for depth in (1, 2):  # whose last positions have nothing to predict
      parity.assert_close(got[depth - 1][b, :-depth], expected[depth - 1])


# ---- gradients -----------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def gradients():
  """Config, state, rows and the step's own gradients of a model with two MTP depths."""
  sizes = {'batch.size': 2, 'batch.start_size': 2, 'batch.micro_size': 2, 'mesh.zero': 0}
  c = parity.small(_SMALL | sizes | {'model.mtp_depth': 2, 'objective.mtp_weight': _MTP_WEIGHT})
  state, rows = parity.random_state(c), _rows(8)
  program = make_gradients(c, mesh.make_mesh(c.mesh))
  _, grads = program(state, jnp.asarray(rows[None]), jnp.int32(1))
  return c, state, rows, jax.tree.map(np.asarray, grads)


def _entries(gradient: np.ndarray) -> list[tuple[int, ...]]:
  """The two entries of largest gradient and the median of those that have one."""
  order = np.argsort(np.abs(gradient), axis=None)
  order = order[np.count_nonzero(gradient == 0) :]
  chosen = (order[-1], order[-2], order[len(order) // 2])
  return [tuple(map(int, np.unravel_index(flat, gradient.shape))) for flat in chosen]


def test_gradient_of_every_kind_of_weight_equals_central_differences_of_the_oracle(gradients):
  c, state, rows, grads = gradients
  weights = parity.to_oracle(state)
  alpha = c.objective.balance_alpha
  loss = lambda _: oracle.objective(c.model, weights, rows, _MTP_WEIGHT, alpha)['loss']
  got, expected = {}, {}
  for path, gradient in jax.tree_util.tree_leaves_with_path(grads):
    names = parity.path_names(path)
    for entry in _entries(gradient):
      x, index = parity.oracle_entry(weights, names, entry)
      key = f'{".".join(names)}{list(entry)}'
      got[key] = gradient[entry]
      expected[key] = oracle.numerical_gradient(loss, x, [index])[0]
  parity.assert_close(got, expected, 1e-3)


def test_every_mtp_parameter_of_every_depth_has_a_gradient(gradients):
  _, _, _, grads = gradients
  leaves = jax.tree_util.tree_leaves_with_path(grads['mtp'])
  without = [parity.path_names(p) for p, g in leaves for depth in (0, 1) if not np.any(g[depth])]
  assert not without, f'no gradient: {without}'


def test_router_bias_has_no_slot_in_the_gradients(gradients):
  _, state, _, grads = gradients
  assert jax.tree.structure(grads) == jax.tree.structure(state['params'])
  assert not any(
    'bias_E' in parity.path_names(p) for p, _ in jax.tree_util.tree_leaves_with_path(grads)
  )
  assert {
    parity.path_names(p)[-1] for p, _ in jax.tree_util.tree_leaves_with_path(state['router_bias'])
  } == {'bias_E'}
