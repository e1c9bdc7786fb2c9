"""FP8 layers: values and gradients against float64 of the very operands that their GEMMs read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import e5m6
from dsv3_jax.kernels.quantize import SMALLEST_FLOOR
from dsv3_jax.precision import experts, fp8
from dsv3_jax.precision.formats import Fp8

_FORMATS = Fp8()
_LIMIT = 1e-5


def _normal(seed: int, *shape: int, std: float = 1.0) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).normal(0, std, shape), jnp.float32)


def _error(actual, expected) -> float:
  actual, expected = _f64(actual), _f64(expected)
  assert actual.shape == expected.shape
  wrong = np.linalg.norm(actual - expected)
  return float(wrong / np.linalg.norm(expected)) if np.any(expected) else float(wrong)


def _assert_near(actual, expected, name: str = '') -> None:
  """Where codes are made of computed numbers, float32 here and float64 there, few are a step apart.

  One such code touches a row or a column of a result; most elements must agree.
  """
  assert _error(actual, expected) < 0.01, name
  actual, expected = _f64(actual), _f64(expected)
  if np.any(expected):
    wrong = np.abs(actual - expected) / np.sqrt(np.mean(expected**2))
    assert np.median(wrong) < _LIMIT, name


def _f64(x) -> np.ndarray:
  return np.asarray(x, np.float64)


def _along(x, power_of_two: bool = False) -> np.ndarray:
  """What a GEMM reads of x scaled along its last axis, by tiles of 128; float64."""
  x = np.asarray(x, np.float32)
  x_XSH = np.pad(x, ((0, 0), (0, -x.shape[1] % 128))).reshape(len(x), -1, 128)
  return _quantised(x_XSH, (2,), power_of_two).reshape(len(x), -1)[:, : x.shape[1]]


def _across(x, power_of_two: bool = False) -> np.ndarray:
  """The same along its first."""
  return _along(np.asarray(x).T, power_of_two).T


def _blocks(w) -> np.ndarray:
  w, (rows, columns) = np.asarray(w), w.shape
  w = np.pad(w, ((0, -rows % 128), (0, -columns % 128)))
  blocks = w.reshape(len(w) // 128, 128, -1, 128)
  return _quantised(blocks, (1, 3), False).reshape(w.shape)[:rows, :columns]


def _quantised(x: np.ndarray, axes: tuple[int, ...], power_of_two: bool) -> np.ndarray:
  amax = np.maximum(np.max(np.abs(x), axis=axes, keepdims=True), np.float32(SMALLEST_FLOOR))
  scale = (amax / np.float32(448)).astype(np.float32)
  if power_of_two:
    mantissa, exponent = np.frexp(amax)
    scale = np.ldexp(np.float32(1), exponent - np.where(mantissa > 0.875, 8, 9))
  return _f64(np.clip(x / scale, -448, 448).astype(jnp.float8_e4m3fn)) * _f64(scale)


@functools.partial(jax.jit, static_argnames='stored')
def _linear(x, w, dy, stored):
  y, pull = jax.vjp(functools.partial(fp8.linear, _FORMATS, stored=stored), x, w)
  return y, *pull(dy)


@pytest.mark.parametrize('stored', ['e4m3', 'e5m6'])
def test_linear_multiplies_and_differentiates_what_was_quantised(stored):
  x, w, dy = _normal(0, 300, 200), _normal(1, 200, 130), _normal(2, 300, 130, std=1e-7)
  y, dx, dw = _linear(x, w, dy, stored=stored)
  assert _error(y, _along(x, stored == 'e5m6') @ _blocks(w)) < _LIMIT
  assert _error(dx, _along(dy) @ _blocks(w).T) < _LIMIT
  if stored == 'e5m6':
    kept = _across(e5m6.decode(*e5m6.encode(x), 200, jnp.float32), power_of_two=True)
  else:
    kept = _across(_along(x))
  assert dw.dtype == jnp.float32 and _error(dw, kept.T @ _across(dy)) < _LIMIT
  # And all of it is near what is not quantised at all.
  exact = _f64(x) @ _f64(w), _f64(dy) @ _f64(w).T, _f64(x).T @ _f64(dy)
  assert all(1e-3 < _error(*pair) < 0.06 for pair in zip((y, dx, dw), exact, strict=True))


# ---- SwiGLU --------------------------------------------------------------------------------------


def _silu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-x))


def _expected(x, weight, gate, up, down, dy, power_of_two):
  """One expert on its own rows, in float64 between the quantisations; float32 where codes are made."""
  f32 = lambda v: np.asarray(v, np.float32)
  x, gate, up, down = _along(x, power_of_two), _blocks(gate), _blocks(up), _blocks(down)
  g, u = f32(x @ gate), f32(x @ up)
  y = _along(f32(_silu(_f64(g)) * u * weight[:, None])) @ down
  g, u = _along(g), _along(u)  # as kept
  act = _along(f32(_silu(g) * u * weight[:, None]))
  d = f32(_along(dy) @ down.T)
  sigmoid = 1 / (1 + np.exp(-g))
  dweight = np.sum(d * _silu(g) * u, axis=1)
  scaled = d * weight[:, None]
  dg = f32(scaled * u * (sigmoid + g * sigmoid * (1 - sigmoid)))
  du = f32(scaled * _silu(g))
  dx = _along(dg) @ gate.T + _along(du) @ up.T
  into = _across(x).T
  return y, dx, dweight, into @ _across(dg), into @ _across(du), _across(act).T @ _across(dy)


@jax.jit
def _ffn(dy, *arrays):
  y, pull = jax.vjp(functools.partial(fp8.ffn, _FORMATS), *arrays)
  return y, *pull(dy)


def test_ffn_multiplies_and_differentiates_what_was_quantised():
  x, dy = _normal(0, 300, 200), _normal(5, 300, 200)
  weights = [_normal(1, 200, 144, std=0.1), _normal(2, 200, 144, std=0.1), _normal(3, 144, 200)]
  y, dx, *dweights = _ffn(dy, x, *weights)
  expected = list(_expected(x, np.ones(300), *weights, dy, power_of_two=False))
  del expected[2]
  for got, e in zip((y, dx, *dweights), expected, strict=True):
    _assert_near(got, e)
  assert [d.dtype for d in dweights] == [jnp.float32] * 3


_E = 6
_LOADS = {
  'ragged': np.stack([np.random.default_rng(t).permutation(_E)[:2] for t in range(300)]),
  'one': np.stack([np.full(300, 2), np.full(300, _E)], 1),
  'some_absent': np.where(np.arange(600).reshape(300, 2) % 3 == 0, _E, np.arange(600).reshape(300, 2) % 5),
  'nobody': np.full((300, 2), _E),
}  # fmt: skip


@jax.jit
def _experts(ids, x, weight, dy, *weights):
  def run(x, weight, *weights):
    y, total = experts.expert_slots(_FORMATS, x, ids, weight, *weights)
    return total(y)

  y, pull = jax.vjp(run, x, weight, *weights)
  return y, *pull(dy)


@pytest.mark.parametrize('load', _LOADS)
def test_experts_equal_one_expert_at_a_time_on_its_rows(load):
  ids = _LOADS[load]
  x, dy = _normal(0, 300, 200), _normal(5, 300, 200)
  weight = jnp.abs(_normal(6, 300, 2)) + 0.1
  weights = [_normal(1, _E, 200, 144, std=0.1), _normal(2, _E, 200, 144, std=0.1)]
  weights.append(_normal(3, _E, 144, 200))
  got = _experts(jnp.asarray(ids, jnp.int32), x, weight, dy, *weights)
  expected = [np.zeros(v.shape) for v in got]
  for e in range(_E):
    tokens, choices = np.nonzero(ids == e)
    order = np.argsort(tokens * 2 + choices)
    tokens, choices = tokens[order], choices[order]
    if not len(tokens):
      continue
    mine = np.asarray(weight)[tokens, choices]
    rows = np.asarray(x)[tokens], mine, *(np.asarray(w)[e] for w in weights), np.asarray(dy)[tokens]
    part = _expected(*rows, power_of_two=True)
    np.add.at(expected[0], tokens, part[0])
    np.add.at(expected[1], tokens, part[1])
    expected[2][tokens, choices] = part[2]
    for i in (3, 4, 5):
      expected[i][e] = part[i]
  for name, g, e in zip(
    ('y', 'dx', 'dweight', 'dgate', 'dup', 'ddown'), got, expected, strict=True
  ):
    _assert_near(g, e, name)
  if load in ('one', 'nobody'):
    assert not np.any(got[3][0]), 'an expert without a token'
