"""Two halves of a device's rows, out of step, compute what all of them together do."""

import collections
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import runs

from dsv3_jax import mesh
from dsv3_jax.config import ConfigError
from dsv3_jax.training import state as training_state
from dsv3_jax.training.step import make_gradients, make_step

pytestmark = pytest.mark.xdist_group('dual')
_MESH = (2, 2, 2)
_DUAL = {'model.dual_batch': True}
# One micro-batch of 16 rows: two on each device of eight.
_WHOLE_BATCH = {'batch.start_size': 16, 'batch.micro_size': 16}


@functools.cache
def _step(shape: tuple[int, ...], changes: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
  """Terms and load of one step, router biases after it, and its gradients, clipped."""
  c = runs.configure(*shape, changes=dict(changes))
  rows_ABX = runs.rows(0).reshape(-1, c.batch.micro_size, 33)
  step = make_step(c, mesh.make_mesh(c.mesh))
  state = runs.place(c, parity.random_state(c))
  state, metrics = runs.to_numpy(step(state, jnp.asarray(rows_ABX), jnp.int32(len(rows_ABX))))
  terms = {k: metrics[k] for k in ('loss', 'ce', 'mtp', 'balance', 'load')}
  return terms | {'bias': state['router_bias'], 'gradients': state['opt']['mu']}


def _assert_same(shape: tuple[int, ...], changes: dict[str, Any], like: dict[str, Any]) -> None:
  """A dual step with `changes` equals a single one with `like`; counts and biases to the bit."""
  dual, single = _step(shape, tuple((_DUAL | changes).items())), _step(shape, tuple(like.items()))
  apart = lambda step: {k: x for k, x in step.items() if k != 'gradients'}
  parity.assert_close(apart(dual), apart(single), 1e-6)
  # Summed over rows in another order, as over two micro-batches, which moves them as far.
  parity.assert_close(dual['gradients'], single['gradients'], 5e-6)
  for exact in ('load', 'bias'):
    parity.assert_same_bits(dual[exact], single[exact])
  assert np.any(dual['load']) and any(np.any(g) for g in jax.tree.leaves(dual['gradients']))


@pytest.mark.parametrize('remat', ['none', 'latents'])
def test_loss_gradients_counts_and_biases_are_those_of_undivided_rows(remat):
  _assert_same(runs.ONE_DEVICE, {'model.remat': remat}, {})


def test_they_are_with_two_mtp_modules_unrolled_layers_and_remat_by_block():
  changes = {'model.mtp_depth': 2, 'model.unroll': 2, 'model.remat': 'block'}
  changes |= {'model.num_layers': 2, 'model.num_dense_layers': 0}
  _assert_same(runs.ONE_DEVICE, changes, changes)


@pytest.mark.parametrize('zero', [1, 3])
def test_they_are_on_a_mesh(zero):
  _assert_same((*_MESH, zero), _WHOLE_BATCH, _WHOLE_BATCH)


def _trace(shape: tuple[int, ...], changes: dict[str, Any]) -> str:
  """The jaxpr of loss and gradients."""
  c = runs.configure(*shape, changes=_WHOLE_BATCH | changes)
  device_mesh = mesh.make_mesh(c.mesh)
  state = training_state.abstract(c, device_mesh)
  rows_ABX = jax.ShapeDtypeStruct((1, 16, 33), jnp.int32)
  return str(make_gradients(c, device_mesh).trace(state, rows_ABX, jnp.int32(1)).jaxpr)


def test_with_zero_3_weights_are_gathered_once_for_both_halves_and_gradients_scattered_once():
  # Weights move over `data` and more; tokens stay within an expert group, (node, local).
  moved = lambda trace: collections.Counter(
    re.findall(r"(all_gather\w*|reduce_scatter)\[[^\]]*axis_name=\('data'", trace)
  )
  single, dual = (moved(_trace((*_MESH, 3), changes)) for changes in ({}, _DUAL))
  assert dual == single
  assert len(single) == 2, f'not seen at all: {single}'


def test_barriers_hold_the_halves_apart_and_there_are_none_without_halves():
  # By the trace: XLA:CPU drops them. What they are for shows in tests/parallel/test_pods_overlap.py.
  barriers = lambda changes: _trace((*_MESH, 1), changes).count('= optimization_barrier')
  assert (
    barriers(_DUAL) - barriers({}) >= 2 * 2 * 8
  )  # eight columns, forward and back, layers and MTP


def test_rows_that_cannot_be_halved_are_refused_by_the_config_and_by_the_model():
  with pytest.raises(ConfigError) as error:
    runs.configure(*_MESH, 1, changes=_DUAL)
  assert str(error.value) == (
    'batch.micro_size = 8: must be a multiple of 16: model.dual_batch halves the rows of each device'
  )
  c = runs.configure(changes=_DUAL)
  at = parity.layout(c)

  def hidden(params: Any, router_bias: Any, tokens_BL: jax.Array) -> Any:
    model = at.module(params, router_bias)
    return model.hidden(c.model, model.embed(c.model, tokens_BL))[0]

  tokens_BL = jax.ShapeDtypeStruct((3, 32), jnp.int32)
  with pytest.raises(ConfigError) as error:
    parity.on_one_device(hidden).trace(at.params, at.router_bias, tokens_BL)
  assert str(error.value) == (
    'model.dual_batch = True: cannot halve 3 rows per device; give each device an even number of '
    'them, or set it to False'
  )
