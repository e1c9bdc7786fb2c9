"""AdamW and clipping against the oracle over several steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import parity
import pytest

from dsv3_jax import config
from dsv3_jax.training import optimizer

_CONFIG = config.Optimizer(moments='fp32', weight_decay=0.3)
_SHAPES = {  # stacked or not, the letters say which are matrices
  'layers': {'gate_EDF': (2, 3, 4, 5), 'norm_D': (2, 4), 'k_rope_DR': (2, 4, 6)},
  'embed_VD': (7, 4),
  'final_norm_D': (4,),
}
_MATRICES = {'gate_EDF', 'k_rope_DR', 'embed_VD'}


def _random(rng: np.random.Generator, scale: float = 1.0) -> dict:
  """A tree of the shapes above."""
  make = lambda shape: rng.normal(0, scale, shape).astype(np.float32)
  return {
    name: {k: make(v) for k, v in x.items()} if isinstance(x, dict) else make(x)
    for name, x in _SHAPES.items()
  }


def _flat(tree: dict) -> dict:
  """{name: array}"""
  layers = {k: v for x in tree.values() if isinstance(x, dict) for k, v in x.items()}
  return layers | {k: v for k, v in tree.items() if not isinstance(v, dict)}


def _expected(c: config.Optimizer, params: dict, grads: list[dict], rates: list[float]) -> dict:
  """What the oracle makes of them, moments in float64 throughout."""
  expected = {}
  for name, x in _flat(params).items():
    x, moments = np.float64(x), (0.0, 0.0)
    for step, (grad, rate) in enumerate(zip(grads, rates, strict=True), start=1):
      g = np.float64(_flat(grad)[name])
      x, moments = oracle.adamw(c, x, g, moments, step, rate, decay=name in _MATRICES)
    expected[name] = (x, *moments)
  return expected


def _run(
  c: config.Optimizer, params: dict, grads: list[dict], rates: list[float]
) -> tuple[dict, dict]:
  opt = optimizer.init(c, params)
  for step, (grad, rate) in enumerate(zip(grads, rates, strict=True)):
    params, opt = optimizer.update(c, grad, opt, params, jnp.uint32(step), jnp.float32(rate))
  return params, opt


@pytest.mark.parametrize(
  'changes', [{}, {'weight_decay': 0.0}, {'beta1': 0.5, 'eps': 0.1}], ids=str
)
def test_adamw_equals_the_oracle_over_several_steps(changes):
  c = dataclasses.replace(_CONFIG, **changes)
  rng, rates = np.random.default_rng(0), [1e-2, 3e-2, 0.0, 1e-2, 2e-2]
  params = _random(rng)
  grads = [_random(rng, scale) for scale in (1, 1e-3, 10, 1, 1)]
  got, opt = _run(c, params, grads, rates)
  got = {k: (x, _flat(opt['mu'])[k], _flat(opt['nu'])[k]) for k, x in _flat(got).items()}
  parity.assert_close(got, _expected(c, params, grads, rates))


def test_moments_in_bf16_are_rounded_between_steps_and_only_there():
  c = dataclasses.replace(_CONFIG, moments='bf16')
  rng = np.random.default_rng(0)
  params, grads = _random(rng), [_random(rng), _random(rng)]
  got, opt = _run(c, params, grads, [1e-2, 1e-2])
  expected = {}
  for name, x in _flat(params).items():
    x, moments = np.float64(x), (0.0, 0.0)
    for step, grad in enumerate(grads, start=1):
      g = np.float64(_flat(grad)[name])
      x, moments = oracle.adamw(c, x, g, moments, step, 1e-2, decay=name in _MATRICES)
      moments = tuple(np.float64(np.asarray(m, jnp.bfloat16)) for m in moments)
    expected[name] = x
  assert {m.dtype for moments in opt.values() for m in _flat(moments).values()} == {
    jnp.dtype('bfloat16')
  }
  parity.assert_close(_flat(got), expected)


def test_decay_pulls_matrices_and_leaves_norms_alone():
  params = _random(np.random.default_rng(0))
  zeros = {
    k: {n: 0 * x for n, x in v.items()} if isinstance(v, dict) else 0 * v for k, v in params.items()
  }
  got, _ = _run(_CONFIG, params, [zeros], [0.1])
  for name, x in _flat(params).items():
    expected = x * np.float32(1 - 0.1 * 0.3) if name in _MATRICES else x
    np.testing.assert_allclose(_flat(got)[name], expected, rtol=1e-6, err_msg=name)


def test_every_weight_of_the_model_is_a_matrix_but_norms():
  params = parity.layout(parity.small()).params
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  vectors = {parity.path_names(p)[-1] for p in paths if not optimizer.is_matrix(p)}
  assert vectors == {
    'attn_norm_D', 'ffn_norm_D', 'final_norm_D', 'q_norm_Q', 'kv_norm_C',
    'embed_norm_D', 'hidden_norm_D', 'out_norm_D',
  }  # fmt: skip


@pytest.mark.parametrize('scale', [1e-4, 1.0, 100.0])
def test_clipping_equals_the_oracle_above_and_below_the_norm(scale):
  grads = _random(np.random.default_rng(0), scale)
  arrays = {name: np.float64(g) for name, g in _flat(grads).items()}
  norm = np.sqrt(sum(np.sum(g**2) for g in arrays.values()))
  got = _flat(optimizer.clip(_CONFIG, grads, jnp.float32(norm)))
  expected = oracle.clip_gradients(list(arrays.values()), _CONFIG.clip_norm)
  parity.assert_close(got, dict(zip(arrays, expected, strict=True)))
