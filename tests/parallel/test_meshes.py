"""The train step on many meshes against one device: nothing but speed and memory may change."""

import re

import jax
import numpy as np
import parity
import pytest
import runs
from runs import run

_SHAPES = [  # data, node, local, ZeRO
  (8, 1, 1, 0),
  (8, 1, 1, 1),
  (2, 2, 2, 0),
  (2, 2, 2, 1),
  (2, 2, 2, 3),
  (1, 2, 4, 1),
  (4, 2, 1, 3),
  (1, 1, 8, 3),
]


def _each(shapes):
  group = lambda shape: pytest.mark.xdist_group('mesh_' + '_'.join(map(str, shape)))
  return pytest.mark.parametrize(
    'shape', [pytest.param(s, marks=group(s)) for s in shapes], ids=str
  )


_EACH = _each(_SHAPES)


@_EACH
def test_loss_and_all_metrics_of_20_steps_equal_one_device(shape):
  parity.assert_close(run(*shape).metrics, run().metrics)


@_EACH
def test_gradient_of_every_weight_equals_one_device(shape):
  parity.assert_close(run(*shape).gradients, run().gradients)


@_EACH
def test_after_20_steps_router_biases_have_the_same_bits_on_every_device_and_mesh(shape):
  expected = runs.to_numpy(run().last['router_bias'])
  assert all(len(np.unique(bias)) > 5 for bias in jax.tree.leaves(expected)), 'they did not move'
  for bias, expected_bias in zip(
    jax.tree.leaves(run(*shape).last['router_bias']), jax.tree.leaves(expected), strict=True
  ):
    assert len(bias.addressable_shards) == np.prod(shape[:3])
    for shard in bias.addressable_shards:
      np.testing.assert_array_equal(shard.data, expected_bias, f'on {shard.device}')


@_EACH
def test_after_20_steps_weights_and_moments_are_those_of_one_device(shape):
  parity.assert_close(run(*shape).last, runs.to_numpy(run().last), 1e-4)


@_EACH
def test_every_device_stores_only_its_part_of_each_matrix(shape):
  data, node, local, zero = shape
  state, whole = run(*shape).last, []
  for name in ('params', 'opt', 'ema'):
    for path, x in jax.tree_util.tree_leaves_with_path(state[name]):
      names = parity.path_names(path)
      ways = (
        data * node * local
        if zero
        else node * local
        if 'EDF' in names[-1] or 'EFD' in names[-1]
        else 1
      )
      ways = ways if len(names[-1].rpartition('_')[2]) > 1 else 1  # norms weigh nothing
      stored = {shard.data.size * ways for shard in x.addressable_shards}
      whole += [] if stored == {x.size} else [f'{name}.{".".join(names)}: {stored} of {x.size}']
  assert not whole, (
    f'stored size times {data * node * local} devices should be the size:\n' + '\n'.join(whole)
  )


def _largest(hlo: str, collective: str) -> int:
  """Elements of the largest array that a collective of the program yields; 0 without any."""
  results = re.findall(rf'= (.*?) {collective}(?:-start)?\(', hlo)
  shapes = re.findall(r'\w+\[([\d,]*)\]', ' '.join(results))
  return max((int(np.prod([int(n) for n in s.split(',') if n])) for s in shapes), default=0)


def _smallest_matrix() -> int:
  leaves = jax.tree_util.tree_leaves_with_path(run().states[0]['params'])
  letters = lambda path: parity.path_names(path)[-1].rpartition('_')[2]
  return min(x.size for path, x in leaves if len(letters(path)) > 1)


@pytest.mark.parametrize(
  'shape', [pytest.param((8, 1, 1, 1), marks=pytest.mark.xdist_group('mesh_8_1_1_1'))]
)
def test_zero_1_sums_no_matrix_on_every_device_but_scatters_sums_and_gathers_weights(shape):
  hlo = runs.hlo(*shape)
  assert 0 < _largest(hlo, 'all-reduce') < _smallest_matrix()
  assert _largest(hlo, 'all-gather') >= 256 * 32  # the embedding
  assert _largest(hlo, 'reduce-scatter') >= 256 * 32 / 8


@pytest.mark.parametrize(
  'shape', [pytest.param((8, 1, 1, 0), marks=pytest.mark.xdist_group('mesh_8_1_1_0'))]
)
def test_without_zero_gradients_are_summed_on_every_device_and_no_weight_is_gathered(shape):
  hlo = runs.hlo(*shape)
  assert _largest(hlo, 'all-reduce') >= 256 * 32
  assert _largest(hlo, 'all-gather') == 0
