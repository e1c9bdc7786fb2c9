"""The FP8 recipe in the whole model: what is kept, where it runs, how it trains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import runs

from dsv3_jax import config, counts, mesh
from dsv3_jax.model import transformer
from dsv3_jax.model.transformer import Block
from dsv3_jax.precision import recipe
from dsv3_jax.training.step import make_gradients

_SMALL = {'model.mtp_depth': 0, 'model.num_layers': 2, 'batch.size': 8, 'batch.start_size': 8}


@functools.cache
def _gradients(precision: str, *shape: int, **changes: object):
  """Loss and gradients of 8 rows; changes of the model by name."""
  changes = {f'model.{name}': value for name, value in changes.items()}
  c = runs.configure(*shape, changes=_SMALL | changes | {'model.precision': precision})
  program = make_gradients(c, mesh.make_mesh(c.mesh))
  state = runs.place(c, parity.random_state(c))
  return runs.to_numpy(program(state, jnp.asarray(runs.rows(0)[:1]), jnp.int32(1)))


def _distances(got, expected) -> dict[str, float]:
  """Of every weight's gradient from the expected one, over that one's length."""
  length = lambda x: float(np.linalg.norm(np.float64(x)))
  pairs = zip(parity.named_leaves(got), parity.named_leaves(expected), strict=True)
  return {name: length(g - e) / length(e) for (name, g), (_, e) in pairs}


def test_fp8_stays_near_fp32_with_gradients_in_fp32():
  (loss, grads), (expected, expected_grads) = _gradients('fp8'), _gradients('fp32')
  parity.assert_close(loss, expected, 1e-3)
  assert {x.dtype for x in jax.tree.leaves(grads)} == {np.dtype('float32')}
  distances = _distances(grads, expected_grads)
  assert 0.01 < np.median(list(distances.values())) < 0.25, distances
  assert max(distances.values()) < 0.6, distances


def test_fp8_out_of_step_on_a_mesh_with_latents_recomputed_trains_as_on_one_device():
  loss, grads = _gradients('fp8', 1, 2, 2, 3, remat='latents', dual_batch=True)
  expected, expected_grads = _gradients('fp8')
  parity.assert_close(loss, expected, 1e-5)
  # Tiles of 128 tokens end elsewhere, so codes for gradients of weights are others: half a step of E4M3
  # is 2^-4 of a number. Fused otherwise, BF16 rounds otherwise, and some codes move with it.
  distances = _distances(grads, expected_grads)
  assert max(distances.values()) < 0.12, distances
  assert np.median(list(distances.values())) < 2**-4


_TOKENS = 96


def _kept(precision: str) -> tuple[config.Model, list[jax.ShapeDtypeStruct]]:
  """A dense block under remat = 'latents' on 96 tokens: what its backward keeps beside weights."""
  sizes = {'model.dim': 128, 'model.ffn_dim': 256, 'model.mla.v_dim': 128}
  changes = {'model.precision': precision, 'model.remat': 'latents'} | sizes
  c = runs.configure(changes=changes).model
  block = Block(c, jax.random.key(0), dense=True)
  x_BLD = jax.ShapeDtypeStruct((2, _TOKENS // 2, 128), recipe.compute_dtype(precision))

  def run(block: Block, x_BLD: jax.Array) -> jax.Array:
    return block(c, x_BLD, jnp.ones((2, _TOKENS // 2), bool))[0]

  run = transformer.remat(c, run, scanned=True)
  pull = jax.eval_shape(lambda *args: jax.vjp(run, *args)[1], block, x_BLD)
  weights = {x.shape for x in jax.tree.leaves(block)}
  of_tokens = lambda x: x.size >= _TOKENS and x.shape not in weights
  one_layer = dataclasses.replace(c, num_layers=1, num_dense_layers=1, mtp_depth=0)
  return one_layer, [x for x in jax.tree.leaves(pull) if of_tokens(x)]


@pytest.mark.parametrize('precision', ['fp8', 'bf16', 'fp32'])
def test_a_block_keeps_the_bytes_that_the_counts_say_and_under_fp8_codes(precision):
  c, kept = _kept(precision)
  size = lambda xs: sum(x.size * x.dtype.itemsize for x in xs)
  in_fp8, total = counts.kept_bytes(c)
  assert size(kept) == _TOKENS * total
  codes = [x for x in kept if x.dtype in (jnp.float8_e4m3fn, jnp.uint8)]
  if precision != 'fp8':
    assert not codes and not in_fp8
    return
  # Attention's output of 2 heads in 12 bits, SwiGLU's two inputs in 8.
  assert sorted((x.dtype.name, x.shape[-1]) for x in codes) == [
    ('float8_e4m3fn', 256), ('float8_e4m3fn', 256), ('uint8', 192),
  ]  # fmt: skip
  scales = 4 * _TOKENS * (2 + 2 + 2)
  assert size(codes) + scales == _TOKENS * in_fp8


def test_without_remat_no_input_of_a_linear_layer_is_kept_but_in_codes():
  c = dataclasses.replace(_kept('fp8')[0], remat='none')
  x_TK = jax.ShapeDtypeStruct((_TOKENS, 128), jnp.bfloat16)
  w_KN = jax.ShapeDtypeStruct((128, 160), jnp.float32)
  for stored, kept in (('e4m3', jnp.float8_e4m3fn), ('e5m6', jnp.uint8)):
    run = functools.partial(recipe.linear, c.precision, stored=stored)
    pull = jax.eval_shape(lambda *args, run=run: jax.vjp(run, *args)[1], x_TK, w_KN)
    dtypes = {x.dtype for x in jax.tree.leaves(pull) if x.size >= _TOKENS * 100}
    assert dtypes == {jnp.dtype(kept), jnp.dtype(jnp.float8_e4m3fn)}, stored


def test_the_share_of_flops_is_exact_and_the_banner_tells_it():
  m = dataclasses.replace(config.Model(), precision='fp8')
  heads = 128 * 192
  attention = 7168 * (1536 + 576) + 1536 * heads + 512 * 128 * 256 + 128 * 128 * 7168
  linear = 62 * attention + 3 * 3 * 7168 * 18432 + 59 * 9 * 3 * 7168 * 2048
  outside = 2 * 7168 * 129280 + 2 * 7168**2 + 59 * 7168 * 256  # heads, projection, routers
  core = 62 * 128 * (192 + 128) * 4096 / 2
  assert counts.fp8_flops_share(m, 4096) == pytest.approx(linear / (linear + outside + core))
  assert counts.fp8_flops_share(config.Model(), 4096) == 0
  told = counts.describe_precision(m, 4096)
  assert told.startswith(
    'precision: fp8; 83.3 % of matmul FLOPs in FP8, and 65.3 % of the 5,987,520'
  )
  assert counts.describe_precision(config.Model(), 4096) == 'precision: bf16'


@pytest.mark.parametrize('name', [n for n in recipe.RECIPES if n.startswith('fp8_')])
def test_variants_differ_by_their_format_and_are_still_near(name):
  x_TK, w_KN, dy_TN = (
    jnp.asarray(np.random.default_rng(i).normal(size=shape), jnp.float32)
    for i, shape in enumerate([(256, 256), (256, 128), (256, 128)])
  )
  # Rows of very different sizes, as gradients have: a scale for 128 of them costs the small ones.
  dy_TN = dy_TN * jnp.logspace(-12, 0, 256)[:, None]

  @functools.partial(jax.jit, static_argnums=0)
  def run(name):
    y, pull = jax.vjp(functools.partial(recipe.linear, name), x_TK, w_KN)
    return y, *pull(dy_TN)

  row = lambda x: np.linalg.norm(np.float64(x), axis=1)
  (y, dx, dw), (y8, dx8, dw8) = run(name), run('fp8')
  exact = np.float64(dy_TN) @ np.float64(w_KN).T
  error = np.max(row(dx - exact) / row(exact))
  error8 = np.max(row(dx8 - exact) / row(exact))
  if name == 'fp8_sums_fp22':
    assert 1e-5 < np.linalg.norm(y - y8) / np.linalg.norm(y8) < 1e-2
  else:
    np.testing.assert_array_equal(y, y8)
    assert error > 1.3 * error8
  assert np.linalg.norm(dw - dw8) < 0.2 * np.linalg.norm(dw8)
