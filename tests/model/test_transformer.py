"""How the stacks run changes nothing: scanned or unrolled, with any remat; and what remat saves."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from dsv3_jax.model import transformer
from dsv3_jax.training.objective import objective

# Large enough that activations outweigh gradients, small enough to run in a moment.
_SIZES = {
  'model.num_layers': 3,
  'model.num_dense_layers': 0,
  'model.mtp_depth': 0,
  'model.max_length': 256,
  'model.rope.original_length': 256,
  'model.mla.block': 64,
  'batch.seq_len': 256,
}


def _unrolled(c: Any, name: str, layers: Any, x_BLD: jax.Array, valid_BL: jax.Array, unshard: Any):
  """What the scan over a stack means."""
  routings = []
  for i in range(len(jax.tree.leaves(layers)[0])):
    layer = unshard(name, jax.tree.map(lambda x, i=i: x[i], layers))
    x_BLD, routing = layer(c, x_BLD, valid_BL)
    routings.append(routing)
  return x_BLD, jax.tree.map(lambda *xs: jnp.stack(xs), *routings)


@functools.cache
def _run(how: str) -> tuple[Any, int]:
  """Loss, terms and gradients, and the bytes of temporaries of the program that made them."""
  c = parity.small(_SIZES | {'model.remat': 'none' if how == 'unrolled' else how})

  def loss(params: Any, router_bias: Any, tokens_BX: jax.Array) -> Any:
    model = parity.layout(c).module(params, router_bias)
    return objective(c, model, tokens_BX, jnp.float32(0), jnp.int32(len(tokens_BX)))

  state = parity.random_state(c)
  rows = np.random.default_rng(1).integers(0, 512, (2, 257), np.int32)
  arguments = (state['params'], state['router_bias'], rows)
  with pytest.MonkeyPatch.context() as patch:
    if how == 'unrolled':
      patch.setattr(transformer, '_scan', _unrolled)
    lowered = parity.on_one_device(jax.value_and_grad(loss, has_aux=True)).lower(*arguments)
  program = lowered.compile()
  (value, terms), grads = program(*arguments)
  terms = dataclasses.asdict(terms)
  return {'loss': value, **terms, 'grads': grads}, program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize('how', ['latents', 'block'])
@pytest.mark.xdist_group('remat')
def test_remat_gives_the_loss_and_gradients_of_no_remat(how):
  parity.assert_close(_run(how)[0], _run('none')[0], 1e-6)


@pytest.mark.xdist_group('remat')
def test_scan_gives_the_loss_counts_and_gradients_of_a_loop_over_layers():
  parity.assert_close(_run('none')[0], _run('unrolled')[0], 1e-6)


@pytest.mark.xdist_group('remat')
def test_memory_falls_from_no_remat_to_latents_to_block():
  none, latents, block = (_run(how)[1] for how in ('none', 'latents', 'block'))
  told = f'none {none:,}, latents {latents:,}, block {block:,} bytes'
  assert none > 1.2 * latents, told
  assert latents > 1.2 * block, told


@pytest.mark.parametrize(
  ('changes', 'apart'),
  [({}, {'False'}), ({'model.unroll': 3}, {'True'}), ({'model.mtp_depth': 1}, {'False', 'True'})],
  ids=['scanned', 'unrolled', 'mtp'],
)
def test_outside_a_loop_of_its_own_recomputation_is_kept_apart_from_the_first(changes, apart):
  # By the trace: XLA:CPU drops the barriers, and what they save shows on accelerators alone.
  c = parity.small(_SIZES | changes | {'model.remat': 'block'})

  def loss(params: Any, router_bias: Any, tokens_BX: jax.Array) -> Any:
    model = parity.layout(c).module(params, router_bias)
    return objective(c, model, tokens_BX, jnp.float32(0.3), jnp.int32(2))[0]

  at, rows = parity.layout(c), jax.ShapeDtypeStruct((2, 257), jnp.int32)
  jaxpr = parity.on_one_device(loss).trace(at.params, at.router_bias, rows).jaxpr
  assert set(re.findall(r'prevent_cse=(\w+)', str(jaxpr))) == apart
