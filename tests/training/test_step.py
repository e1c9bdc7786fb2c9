"""One optimizer step on one device: what it updates, by which formula, for any split of the batch."""

import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import parity
import pytest
import runs

from dsv3_jax import config, mesh
from dsv3_jax.training import state as training_state
from dsv3_jax.training.optimizer import is_matrix
from dsv3_jax.training.step import make_gradients, make_step

pytestmark = pytest.mark.xdist_group('step')
_GOLDEN = pathlib.Path(__file__).parents[1] / 'goldens' / 'quick_step.json'


def _start(c: config.Config) -> training_state.State:
  return runs.place(c, parity.random_state(c))


def _gradients(c: config.Config) -> tuple[Any, Any]:
  """Loss and gradients of the 16 rows of the runs' first step, in the config's micro-batches."""
  rows_ABX = runs.rows(0).reshape(-1, c.batch.micro_size, 33)
  program = make_gradients(c, mesh.make_mesh(c.mesh))
  return runs.to_numpy(program(_start(c), jnp.asarray(rows_ABX), jnp.int32(len(rows_ABX))))


@functools.cache
def _of_one_big_batch() -> tuple[Any, Any]:
  """The same, nothing accumulated."""
  return _gradients(runs.configure(changes={'batch.start_size': 16, 'batch.micro_size': 16}))


# ---- what a step does ----------------------------------------------------------------------------


def test_step_clips_and_applies_adamw_to_the_gradients_as_the_oracle():
  first, c = runs.run(), runs.configure()
  loss, grads = _of_one_big_batch()
  parity.assert_close(first.metrics[0]['loss'], loss)
  leaves = jax.tree_util.tree_leaves_with_path(grads)
  norm = np.sqrt(sum(np.sum(np.float64(g) ** 2) for _, g in leaves))
  assert norm > c.optimizer.clip_norm
  parity.assert_close(first.metrics[0]['grad_norm'], norm)

  clipped = oracle.clip_gradients([np.float64(g) for _, g in leaves], c.optimizer.clip_norm)
  before = jax.tree.leaves(parity.random_state(c)['params'])
  after = [jax.tree.leaves(first.states[0][k]) for k in ('params', 'opt')]
  mus, nus = after[1][: len(leaves)], after[1][len(leaves) :]
  for i, (path, _) in enumerate(leaves):
    name = '.'.join(parity.path_names(path))
    expected, moments = oracle.adamw(
      c.optimizer, np.float64(before[i]), clipped[i], (0.0, 0.0), 1, 1e-3, is_matrix(path)
    )
    got = {name: (after[0][i], mus[i], nus[i])}
    parity.assert_close(got, {name: (expected, *moments)})


def test_average_of_the_weights_follows_its_formula():
  c, (one, two) = runs.configure(), runs.run().states
  decay = c.optimizer.ema_decay
  average = lambda e, p: decay * np.float64(e) + (1 - decay) * np.float64(p)
  start = parity.random_state(c)['params']
  parity.assert_close(one['ema'], jax.tree.map(average, start, one['params']), 1e-6)
  parity.assert_close(two['ema'], jax.tree.map(average, one['ema'], two['params']), 1e-6)


def test_router_biases_move_by_the_load_of_the_whole_batch():
  c, first = runs.configure(), runs.run()
  load_YE = first.metrics[0]['load']
  before = np.concatenate(jax.tree.leaves(parity.random_state(c)['router_bias']))
  after = np.concatenate(jax.tree.leaves(first.states[0]['router_bias']))
  expected = [oracle.update_bias(b, n, 1e-3) for b, n in zip(before, load_YE, strict=True)]
  np.testing.assert_allclose(after, expected, rtol=0, atol=2e-7)


def test_step_counts_updates_and_the_sequences_that_the_ramp_gave_it():
  one, two = runs.run().states
  assert (one['step'], one['sequences']) == (1, 16)
  assert (two['step'], two['sequences']) == (2, 24)
  assert runs.run().last['sequences'] == 8 * sum(runs.COUNTS)


def test_loss_is_the_sum_of_its_terms_and_mtp_weighs_less_late():
  c, seen, weights = runs.configure().objective, 0, []
  for count, m in zip(runs.COUNTS, runs.run().metrics, strict=True):
    weights.append(0.3 if seen < c.mtp_late_tokens else 0.1)
    total = m['ce'] + weights[-1] * m['mtp'] + 1e-4 * m['balance']
    parity.assert_close(m['loss'], total, 1e-6)
    seen += count * 8 * 32
  assert set(weights) == {0.3, 0.1}


def test_without_an_average_the_state_has_none_and_without_mtp_the_metrics_have_none():
  c = runs.configure(changes={'optimizer.ema_decay': 0.0, 'model.mtp_depth': 0})
  device_mesh = mesh.make_mesh(c.mesh)
  state = training_state.abstract(c, device_mesh)
  rows_ABX = jax.ShapeDtypeStruct((2, 8, 33), jnp.int32)
  new, metrics = jax.eval_shape(make_step(c, device_mesh), state, rows_ABX, jnp.int32(2))
  assert 'ema' not in state and 'ema' not in new
  assert metrics.keys() == {'loss', 'ce', 'balance', 'grad_norm', 'lr', 'load'}


def test_step_takes_over_the_memory_of_the_state_it_is_given():
  state = _start(runs.configure())
  runs.run().step(state, jnp.asarray(runs.rows(0)), jnp.int32(2))
  assert all(x.is_deleted() for x in jax.tree.leaves(state))


# ---- the batch, however it is cut ----------------------------------------------------------------


def test_gradients_accumulated_over_micro_batches_equal_those_of_one_big_batch():
  loss, grads = _of_one_big_batch()
  first = runs.run()
  shrunk = first.config.optimizer.clip_norm / first.metrics[0]['grad_norm']
  parity.assert_close(first.metrics[0]['loss'], loss)
  parity.assert_close(first.gradients, jax.tree.map(lambda g: g * shrunk, grads))


def test_a_smaller_batch_of_the_ramp_is_the_step_compiled_for_it_whatever_the_rest_holds():
  small = runs.configure(changes={'batch.size': 8})
  c, rows_ABX = runs.configure(), runs.rows(1)
  assert runs.COUNTS[1] == 1
  step = make_step(small, mesh.make_mesh(small.mesh))
  expected = runs.to_numpy(step(_start(small), jnp.asarray(rows_ABX[:1]), jnp.int32(1)))
  for garbage in (0, 255, -1, 2**31 - 1):
    rows_ABX[1:] = garbage
    got = runs.run().step(_start(c), jnp.asarray(rows_ABX), jnp.int32(1))
    parity.assert_close(runs.to_numpy(got), expected)


def test_the_ramp_of_the_batch_compiles_nothing_after_the_first_step():
  first, *later = runs.run().compilations
  assert first > 0, 'compilations are not seen at all: has JAX renamed the event?'
  assert set(runs.COUNTS[1:]) == {1, 2}
  assert not any(later), f'compilations per step: {[first, *later]}'


def test_learning_rate_of_the_metrics_is_the_schedule_at_the_sequences_seen():
  c = runs.configure().optimizer
  seen = 0
  for step, m in enumerate(runs.run().metrics):
    parity.assert_close(m['lr'], oracle.learning_rate(c, seen * 32, step))
    seen += 8 * runs.COUNTS[step]


# ---- other ways to the same step -----------------------------------------------------------------


@pytest.mark.parametrize('shape', [(1, 2, 2, 0)], ids=str)
def test_dense_dispatch_gives_the_loss_and_gradients_of_allgather(shape):
  dense = runs.configure(*shape, changes={'model.moe.dispatch.form': 'dense'})
  parity.assert_close(_gradients(dense), _of_one_big_batch())


@functools.cache
def _bf16(*shape: int) -> tuple[training_state.State, dict[str, np.ndarray]]:
  """State and metrics after one step in BF16, with a batch that does not ramp."""
  bf16 = {'model.precision': 'bf16', 'optimizer.moments': 'bf16', 'batch.start_size': 16}
  c = runs.configure(*shape, changes=bf16)
  step = make_step(c, mesh.make_mesh(c.mesh))
  return runs.to_numpy(step(_start(c), jnp.asarray(runs.rows(0)), jnp.int32(2)))


def _distance(got: training_state.State, expected: training_state.State) -> float:
  """Between the gradients that two first steps saw, over the length of the expected one."""
  flat = lambda s: np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(s['opt']['mu'])])
  return np.linalg.norm(flat(got) - flat(expected)) / np.linalg.norm(flat(expected))


def test_bf16_stays_near_fp32_and_keeps_weights_in_fp32_and_moments_in_bf16():
  state, metrics = _bf16(*runs.ONE_DEVICE)
  for name, dtype in (('params', 'float32'), ('ema', 'float32'), ('opt', 'bfloat16')):
    assert {x.dtype for x in jax.tree.leaves(state[name])} == {jnp.dtype(dtype)}, name
  for name in ('loss', 'ce', 'mtp', 'balance', 'grad_norm'):
    parity.assert_close(metrics[name], runs.run().metrics[0][name], parity.LIMIT['bfloat16'])
  # Rounding sends a few tokens to other experts, which moves their gradients far.
  assert _distance(state, runs.run().states[0]) < 0.25


def test_bf16_split_by_zero_3_over_a_mesh_stays_near_bf16_on_one_device():
  (state, metrics), (expected_state, expected) = _bf16(2, 2, 2, 3), _bf16(*runs.ONE_DEVICE)
  parity.assert_close({k: metrics[k] for k in expected}, expected, parity.LIMIT['bfloat16'])
  assert _distance(state, expected_state) < parity.LIMIT['bfloat16']


# ---- the first bits and the golden ---------------------------------------------------------------


@functools.cache
def _initial(*shape: int) -> training_state.State:
  c = runs.configure(*shape)
  return runs.to_numpy(training_state.init(c, mesh.make_mesh(c.mesh)))


@pytest.mark.parametrize('shape', [(2, 2, 2, 3)], ids=str)
def test_initial_state_has_the_same_bits_on_every_mesh(shape):
  parity.assert_same_bits(_initial(*shape), _initial(*runs.ONE_DEVICE))


def test_initial_weights_have_the_standard_deviation_of_the_config():
  c = runs.configure()
  for path, x in jax.tree_util.tree_leaves_with_path(_initial(*runs.ONE_DEVICE)['params']):
    if is_matrix(path):
      assert np.std(x) == pytest.approx(c.model.init_std, rel=0.15), parity.path_names(path)
    else:
      np.testing.assert_array_equal(x, 1)


def test_abstract_state_is_that_of_the_initial_one():
  c = runs.configure(2, 2, 2, 3)
  abstract = training_state.abstract(c, mesh.make_mesh(c.mesh))
  told = lambda x: (x.shape, x.dtype)
  assert jax.tree.map(told, abstract) == jax.tree.map(told, _initial(2, 2, 2, 3))


def test_three_steps_give_the_numbers_of_the_golden():
  c = runs.configure()
  state = runs.place(c, _initial(*runs.ONE_DEVICE))
  got: dict[str, list[float]] = {'loss': [], 'ce': [], 'mtp': [], 'grad_norm': []}
  for i in range(3):
    state, metrics = runs.run().step(state, jnp.asarray(runs.rows(i)), jnp.int32(runs.COUNTS[i]))
    for name, values in got.items():
      values.append(float(metrics[name]))
  if os.environ.get('UPDATE_GOLDEN') == '1':
    _GOLDEN.write_text(json.dumps(got, indent=2) + '\n')
  expected = json.loads(_GOLDEN.read_text())
  try:
    parity.assert_close(got, expected)
  except AssertionError as error:
    raise AssertionError(
      f'{error}\n'
      f'The first three steps no longer give the numbers of {_GOLDEN.name}. That is right only where '
      'the change at hand means to change the mathematics: the model, its initialisation, the '
      'objective, the optimizer, a schedule, or the configs of tests/runs.py. Then run this test with '
      'UPDATE_GOLDEN=1 and say in the commit why the numbers moved. A change of speed, memory, '
      'layout or parallelism must not move them: find out what it broke.'
    ) from None
