"""The train step on many meshes against one device: nothing but speed and memory may change."""

import re

import jax
import numpy as np
import parity
import pytest
import runs
from runs import run

_SHAPES = [  # data, node, local, ZeRO; from which size on by permutes; capacity, 0.6 for several rounds
  (8, 1, 1, 0),
  (8, 1, 1, 1),
  (2, 2, 2, 0),
  (2, 2, 2, 1),
  (2, 2, 2, 3, 0, 0.6),
  (1, 2, 4, 1),
  (4, 2, 1, 3),
  (1, 1, 8, 3),
  (2, 2, 2, 3, 1),
]


def _on(*shapes: tuple[int, ...]) -> pytest.MarkDecorator:
  """A test on each shape; all tests of a shape run in one worker, which steps through it once."""
  group = lambda shape: pytest.mark.xdist_group('mesh_' + '_'.join(map(str, shape)))
  each = [pytest.param(shape, marks=group(shape), id=str(shape)) for shape in shapes]
  return pytest.mark.parametrize('shape', each)


_EACH = _on(*_SHAPES)


@_EACH
def test_loss_and_all_metrics_of_20_steps_equal_one_device(shape):
  # Where tokens went is told only where experts are spread.
  of_one = [step.keys() for step in run().metrics]
  shared = [
    {k: step[k] for k in keys} for step, keys in zip(run(*shape).metrics, of_one, strict=True)
  ]
  parity.assert_close(shared, run().metrics)


@_on(*(shape for shape in _SHAPES if len(shape) == 6))
def test_small_buffers_take_several_rounds(shape):
  assert min(step['rounds'] for step in run(*shape).metrics) > 1


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


def _stored_parts(name: str, shape: tuple[int, ...]) -> int:
  """Over how many devices one array of the state is split; the suffix of its name says what it is."""
  data, node, local, zero, *_ = shape
  letters = name.rpartition('_')[2]
  if len(letters) == 1:  # norms weigh nothing
    return 1
  if zero:
    return data * node * local
  return node * local if letters in ('EDF', 'EFD') else 1


@_EACH
def test_every_device_stores_only_its_part_of_each_matrix(shape):
  state, wrong = run(*shape).last, []
  for path, x in jax.tree_util.tree_leaves_with_path(
    {k: state[k] for k in ('params', 'opt', 'ema')}
  ):
    names = parity.path_names(path)
    expected = x.size // _stored_parts(names[-1], shape)
    stored = {shard.data.size for shard in x.addressable_shards}
    if stored != {expected}:
      wrong.append(f'  {".".join(names)}: {stored}, expected {expected} of {x.size}')
  assert not wrong, 'elements per device:\n' + '\n'.join(wrong)


def _largest(hlo: str, collective: str) -> int:
  """Elements of the largest array that a collective of the program yields; 0 without any."""
  results = re.findall(rf'= (.*?) {collective}(?:-start)?\(', hlo)
  shapes = re.findall(r'\w+\[([\d,]*)\]', ' '.join(results))
  return max((int(np.prod([int(n) for n in s.split(',') if n])) for s in shapes), default=0)


def _smallest_matrix() -> int:
  leaves = jax.tree_util.tree_leaves_with_path(run().states[0]['params'])
  letters = lambda path: parity.path_names(path)[-1].rpartition('_')[2]
  return min(x.size for path, x in leaves if len(letters(path)) > 1)


@_on((8, 1, 1, 1))
def test_zero_1_sums_no_matrix_on_every_device_but_scatters_sums_and_gathers_weights(shape):
  hlo = runs.hlo(*shape)
  assert 0 < _largest(hlo, 'all-reduce') < _smallest_matrix()
  assert _largest(hlo, 'all-gather') >= 256 * 32  # the embedding
  assert _largest(hlo, 'reduce-scatter') >= 256 * 32 / 8


@_on((8, 1, 1, 0))
def test_without_zero_gradients_are_summed_on_every_device_and_no_weight_is_gathered(shape):
  hlo = runs.hlo(*shape)
  assert _largest(hlo, 'all-reduce') >= 256 * 32
  assert _largest(hlo, 'all-gather') == 0
