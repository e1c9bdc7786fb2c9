"""FP8 layers: values and gradients against float64 of the very operands that their GEMMs read."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import e5m6
from dsv3_jax.kernels.quantize import SMALLEST_FLOOR
from dsv3_jax.kernels.swiglu_quantize import swiglu_quantize
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
  """At every element, in units of the root mean square; what is expected to be zero is zero."""
  actual, expected = _f64(actual), _f64(expected)
  assert actual.shape == expected.shape, name
  size = np.sqrt(np.mean(expected**2)) if expected.size else 0
  assert np.max(np.abs(actual - expected), initial=0) <= _LIMIT * size, name


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
  # Products with inverses throughout, as the recipe: a division may go the other way by a last bit.
  scale = amax * np.float32(1 / 448)
  if power_of_two:
    mantissa, exponent = np.frexp(amax)
    scale = np.ldexp(np.float32(1), exponent - np.where(mantissa > 0.875, 8, 9))
  codes = np.clip(x * (np.float32(1) / scale), -448, 448).astype(jnp.float8_e4m3fn)
  return _f64(codes) * _f64(scale)


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


@dataclasses.dataclass(frozen=True, eq=False)
class _Recorder(Fp8):
  """Keeps what the GEMMs of a SwiGLU read, in the order of `fp8.swiglu` and `fp8.swiglu_gradients`."""

  products: list = dataclasses.field(default_factory=list)  # (codes of rows, result)
  gradients: list = dataclasses.field(default_factory=list)  # both operands' codes

  def matmul(self, a, b, sizes_E, out_dtype):
    out = super().matmul(a, b, sizes_E, out_dtype)
    self.products.append((a, out))
    return out

  def wgrad(self, a, b, sizes_E):
    self.gradients.append((a, b))
    return super().wgrad(a, b, sizes_E)


@functools.partial(jax.jit, static_argnums=0)
def _differentiated(layer, dy, *arrays):
  """`layer(formats, *arrays)` and its gradients, with what was recorded of them."""
  formats, acts = _Recorder(), []

  def kept(*arrays, **options):
    acts.append(swiglu_quantize(*arrays, **options))
    return acts[-1]

  with mock.patch.object(fp8, 'swiglu_quantize', kept):
    y, pull = jax.vjp(functools.partial(layer, formats), *arrays)
    got = y, *pull(dy)
  return got, (formats.products, formats.gradients, acts)


def _read(recorded, at: slice):
  """Numbers for the codes, of one expert's rows."""
  products, gradients, acts = recorded
  return (
    [(_values(*a)[at], np.asarray(out)[at]) for a, out in products],
    [[_values(*x)[:, at] for x in both] for both in gradients],
    [_values(*x)[at] for x in acts],
  )


def _values(codes, scale) -> np.ndarray:
  scale = np.repeat(_f64(scale), 128, axis=1)[:, : codes.shape[1]]
  return _f64(codes) * scale


def _assert_nearest(read: np.ndarray, exact: np.ndarray) -> np.ndarray:
  """Codes of float32 are those nearest to the exact numbers, or as near but for `_LIMIT` -> `read`.

  `exact` is scaled along its last axis; half a step is 2^-4 of the power of two below.
  """
  pad = np.pad(exact, ((0, 0), (0, -exact.shape[1] % 128))).reshape(len(exact), -1, 128)
  scale = np.repeat(np.max(np.abs(pad), axis=2) / 448, 128, axis=1)[:, : exact.shape[1]]
  magnitude = np.maximum(np.abs(exact), 2.0**-6 * scale)
  half = scale * 2.0 ** (np.floor(np.log2(magnitude / np.where(scale > 0, scale, 1))) - 4)
  size = np.sqrt(np.mean(exact**2)) if exact.size else 0
  assert np.all(np.abs(read - exact) <= half + _LIMIT * size)
  return read


def _expected(x, weight, gate, up, down, dy, power_of_two, read):
  """One expert on its own rows, in float64, on the very codes that its GEMMs read.

  Codes of computed numbers are taken as recorded, after each was seen to be the nearest: computed in
  float32 there and in float64 here, a few lie a step apart, and all behind them would differ.
  """
  products, gradients, (act, again) = read
  (_, g), (_, u), (act_read, _), (_, d), (dg_read, _), (du_read, _) = products
  (act_across, _), (x_across, dg_across), (_, du_across) = gradients
  x, gate, up, down = _along(x, power_of_two), _blocks(gate), _blocks(up), _blocks(down)
  _assert_near(g, x @ gate, 'gate')
  _assert_near(u, x @ up, 'up')
  _assert_nearest(act, _silu(_f64(g)) * u * weight[:, None])
  np.testing.assert_array_equal(act_read, act)
  y = act @ down
  g, u = _along(g), _along(u)  # as kept
  _assert_nearest(again, _silu(g) * u * weight[:, None])
  np.testing.assert_array_equal(act_across.T, _across(again))
  np.testing.assert_array_equal(x_across.T, _across(x))
  _assert_near(d, _along(dy) @ down.T, 'd')
  sigmoid = 1 / (1 + np.exp(-g))
  dweight = np.sum(d * _silu(g) * u, axis=1)
  scaled = d * weight[:, None]
  dg, du = scaled * u * (sigmoid + g * sigmoid * (1 - sigmoid)), scaled * _silu(g)
  dx = _assert_nearest(dg_read, dg) @ gate.T + _assert_nearest(du_read, du) @ up.T
  dgate = x_across @ _assert_nearest(dg_across, dg.T).T
  dup = x_across @ _assert_nearest(du_across, du.T).T
  return y, dx, dweight, dgate, dup, act_across @ _across(dy)


def test_ffn_multiplies_and_differentiates_what_was_quantised():
  x, dy = _normal(0, 300, 200), _normal(5, 300, 200)
  weights = [_normal(1, 200, 144, std=0.1), _normal(2, 200, 144, std=0.1), _normal(3, 144, 200)]
  (y, dx, *dweights), recorded = _differentiated(fp8.ffn, dy, x, *weights)
  expected = list(_expected(x, np.ones(300), *weights, dy, False, _read(recorded, slice(300))))
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


def _experts(formats, ids, x, weight, *weights):
  y, total = experts.expert_slots(formats, x, ids, weight, *weights)
  return total(y)


@pytest.mark.parametrize('load', _LOADS)
def test_experts_equal_one_expert_at_a_time_on_its_rows(load):
  ids = _LOADS[load]
  x, dy = _normal(0, 300, 200), _normal(5, 300, 200)
  weight = jnp.abs(_normal(6, 300, 2)) + 0.1
  weights = [_normal(1, _E, 200, 144, std=0.1), _normal(2, _E, 200, 144, std=0.1)]
  weights.append(_normal(3, _E, 144, 200))
  arrays = jnp.asarray(ids, jnp.int32), x, weight, *weights
  (y, _, *gradients), recorded = _differentiated(_experts, dy, *arrays)
  got = y, *gradients
  expected = [np.zeros(v.shape) for v in got]
  start = 0
  for e in range(_E):
    tokens, choices = np.nonzero(ids == e)
    order = np.argsort(tokens * 2 + choices)
    tokens, choices = tokens[order], choices[order]
    if not len(tokens):
      continue
    mine = np.asarray(weight)[tokens, choices]
    rows = np.asarray(x)[tokens], mine, *(np.asarray(w)[e] for w in weights), np.asarray(dy)[tokens]
    part = _expected(*rows, True, _read(recorded, slice(start, start + len(tokens))))
    start += -(-len(tokens) // 128) * 128
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
