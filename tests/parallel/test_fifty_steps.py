"""Fifty steps on meshes that spread experts in other ways: router biases are the same bits everywhere."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import runs

from dsv3_jax import config, mesh
from dsv3_jax.parallel import plan
from dsv3_jax.training.state import State
from dsv3_jax.training.step import make_step

_STEPS, _MICRO_BATCHES = 50, 2
_ON = {  # data, node, local
  (1, 2, 4): 'two_hop',
  (2, 2, 2): 'two_hop',
  (1, 1, 8): 'flat',
  (8, 1, 1): 'auto',
}
_SIZES = {  # each token keeps one group of four experts and chooses two of them
  'model.num_dense_layers': 0,
  'model.num_layers': 2,
  'model.mtp_depth': 0,
  'model.moe.num_experts': 16,
  'model.moe.num_groups': 4,
  'model.moe.top_groups': 1,
  'batch.start_size': 16,
}


def _on(*shapes: tuple[int, ...]) -> pytest.MarkDecorator:
  """A test on each shape; all tests of a shape run in one worker, which steps through it once."""
  group = lambda shape: pytest.mark.xdist_group('fifty_' + '_'.join(map(str, shape)))
  each = [pytest.param(shape, marks=group(shape), id=str(shape)) for shape in shapes]
  return pytest.mark.parametrize('shape', each)


@dataclasses.dataclass(frozen=True)
class _Run:
  config: config.Config
  metrics: list[dict[str, np.ndarray]]
  last: State


@functools.cache
def _run(*shape: int, form: str = 'auto') -> _Run:
  c = runs.configure(*shape, changes=_SIZES | {'model.moe.dispatch.form': form})
  step = make_step(c, mesh.make_mesh(c.mesh))
  state, metrics = runs.place(c, parity.random_state(c)), []
  rng = np.random.default_rng(0)
  for _ in range(_STEPS):
    # Few words, some of them far more frequent: routing has something to balance.
    words_ABX = rng.geometric(0.03, (_MICRO_BATCHES, c.batch.micro_size, c.batch.seq_len + 1))
    rows_ABX = (words_ABX % c.model.vocab_size).astype(np.int32)
    state, values = step(state, jnp.asarray(rows_ABX), jnp.int32(_MICRO_BATCHES))
    metrics.append(runs.to_numpy(values))
  return _Run(c, metrics, state)


def _spread(shape: tuple[int, ...]) -> _Run:
  return _run(*shape, form=_ON[shape])


@_on(*_ON)
def test_after_50_steps_router_biases_have_the_same_bits_on_every_device_and_mesh(shape):
  expected = runs.to_numpy(_run(1, 1, 1).last['router_bias'])
  start = parity.random_state(_run(1, 1, 1).config)['router_bias']
  steps_moved = lambda bias, before: np.abs(np.round((bias - before) / 1e-3))
  for bias, expected_bias, before in zip(
    *map(jax.tree.leaves, (_spread(shape).last['router_bias'], expected, start)), strict=True
  ):
    moved = steps_moved(expected_bias, before)
    assert moved.max() > 20 and len(np.unique(moved)) > 5, 'the biases hardly moved'
    assert len(bias.addressable_shards) == np.prod(shape)
    for shard in bias.addressable_shards:
      np.testing.assert_array_equal(shard.data, expected_bias, f'on {shard.device}')


@_on(*_ON)
def test_the_loss_of_all_50_steps_is_that_of_one_device(shape):
  losses = lambda run: [step['loss'] for step in run.metrics]
  parity.assert_close(losses(_spread(shape)), losses(_run(1, 1, 1)))


@_on(*(shape for shape in _ON if shape != (8, 1, 1)))
def test_a_token_visits_no_more_nodes_than_it_keeps_groups_and_no_more_devices_than_it_has_experts(
  shape,
):
  _, node, local = shape
  experts = _spread(shape).config.model.moe
  for step in _spread(shape).metrics:
    nodes, devices = float(step['nodes_per_token']), float(step['devices_per_token'])
    assert 1 <= nodes <= min(experts.top_groups, node)
    assert nodes <= devices <= min(experts.top_k, node * local)
    assert step['rounds'] >= 1


@_on(*(shape for shape in _ON if shape != (8, 1, 1)))
def test_bytes_are_those_of_the_plan_times_rounds_and_dispatches(shape):
  data, node, local = shape
  c = _spread(shape).config
  tokens = c.batch.micro_size * c.batch.seq_len // (data * node * local)
  planned = plan.make(c.model.moe, _ON[shape], tokens, node, local)
  there, back = (
    planned.bytes(c.model.dim, 'float32'),
    planned.bytes(c.model.dim, 'float32', backward=True),
  )
  assert (there['node'] > 0, there['local'] > 0) == (node > 1, local > 1)
  for step in _spread(shape).metrics:
    rounds = step['rounds'] * _MICRO_BATCHES * len(step['load'])
    for axis in ('node', 'local'):
      np.testing.assert_allclose(step[f'{axis}_bytes'], rounds * (there[axis] + back[axis]), 1e-6)


def test_on_8_devices_that_all_have_every_expert_nothing_is_said_of_traffic():
  assert not {'nodes_per_token', 'rounds', 'node_bytes'} & _spread((8, 1, 1)).metrics[0].keys()
