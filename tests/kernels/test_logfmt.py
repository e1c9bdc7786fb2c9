"""LogFMT against the oracle with the same range, its error bound, and its unbiased rounding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle_precision as oracle
import pytest

from dsv3_jax.kernels.logfmt import decode, encode

_BITS = (3, 4, 8, 10, 16)
_encode = jax.jit(encode, static_argnames='bits')
_decode = jax.jit(decode, static_argnames=('bits', 'dtype'))


def _round_trip(x_XD: jax.Array, bits: int, dtype: str = 'float32') -> np.ndarray:
  return np.asarray(_decode(*_encode(x_XD, bits=bits), bits=bits, dtype=dtype), np.float64)


def _random(dim: int, dtype: str, rows: int = 16) -> jax.Array:
  """Normal rows of magnitudes 1e-9 to 1e6; some elements 1e-4 smaller, some far below, some zero."""
  rng = np.random.default_rng(dim)
  x_XD = rng.normal(size=(rows, dim)) * np.logspace(-9, 6, rows)[:, None]
  x_XD *= rng.choice([1, 1e-4, 1e-12, 0], size=x_XD.shape, p=[0.8, 0.14, 0.01, 0.05])
  return jnp.asarray(x_XD, dtype)


def _range_of(x_XD: jax.Array, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(low, high, step in octaves) of the tile of each element [X, D], float64."""
  _, *ends = _encode(x_XD, bits=bits)
  spread = lambda x_XS: np.repeat(np.asarray(x_XS, 'f8'), 128, axis=1)[:, : x_XD.shape[1]]
  low_XD, high_XD = map(spread, ends)
  some_XD = low_XD > 0
  ratio_XD = np.where(some_XD, high_XD, 1) / np.where(some_XD, low_XD, 1)
  return low_XD, high_XD, np.log2(ratio_XD) / (2 ** (bits - 1) - 2)


@functools.cache
def _oracle_codes(bits: int) -> tuple[jax.Array, np.ndarray, np.ndarray]:
  """(x, signs, codes) of tiles whose ends are numbers of bfloat16: their range is ours."""
  rng = np.random.default_rng(bits)
  x_XD = rng.normal(size=(6, 128)) * np.logspace(-9, 6, 6)[:, None]
  x_XD[:, ::7] *= 1e-3
  x_XD[:, ::31] = 0
  x_XD = np.array(x_XD, np.float32)
  for row in x_XD:
    for at in (np.argmin(np.where(row == 0, np.inf, abs(row))), np.argmax(abs(row))):
      row[at] = np.float32(row[at].astype(jnp.bfloat16))
    low, high = abs(row[row != 0]).min(), abs(row).max()
    assert {float(np.float32(jnp.bfloat16(x))) for x in (low, high)} == {float(low), float(high)}
  coded = [oracle.logfmt_encode(row.astype(np.float64), bits) for row in x_XD]
  return jnp.asarray(x_XD), np.stack([c[0] for c in coded]), np.stack([c[1] for c in coded])


@pytest.mark.parametrize('bits', [3, 4, 8, 10])
def test_codes_are_the_oracle_s(bits):
  x_XD, negative_XD, expected_XD = _oracle_codes(bits)
  codes_XD = np.asarray(_encode(x_XD, bits=bits)[0]).astype(int)
  np.testing.assert_array_equal(codes_XD >> (bits - 1), negative_XD)
  apart_XD = abs((codes_XD & (2 ** (bits - 1) - 1)) - expected_XD)
  assert apart_XD.max() <= 1
  assert apart_XD.mean() <= 2e-3, 'only at midpoints may float32 decide otherwise'


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('dim', [1, 128, 300])
@pytest.mark.parametrize('bits', _BITS)
def test_error_is_half_the_distance_of_two_codes_at_most(bits, dim, dtype):
  x_XD = _random(dim, dtype)
  low_XD, high_XD, step_XD = _range_of(x_XD, bits)
  out_XD, x_XD = _round_trip(x_XD, bits), np.asarray(x_XD, np.float64)
  inside_XD = abs(x_XD) >= low_XD
  assert (abs(x_XD) <= high_XD).all()
  bound_XD = abs(x_XD) * (np.tanh(step_XD * math.log(2) / 2) + 3e-6)
  assert (abs(out_XD - x_XD)[inside_XD] <= bound_XD[inside_XD]).all()
  below_XD = ~inside_XD & (x_XD != 0)
  assert (low_XD[below_XD] == high_XD[below_XD] * 2.0**-32).all(), 'only the clamp may cut'
  assert (abs(out_XD - x_XD)[below_XD] <= low_XD[below_XD] / 2).all()
  assert not out_XD[x_XD == 0].any()


@pytest.mark.parametrize('bits', _BITS)
def test_the_range_is_rounded_outwards_and_numbers_of_bf16_keep_it(bits):
  x_XD = jnp.asarray(np.random.default_rng(0).normal(size=(32, 128)), jnp.float32)
  magnitude_XD = np.abs(np.asarray(x_XD))
  _, low_XS, high_XS = _encode(x_XD, bits=bits)
  low_X, high_X = (np.asarray(x_XS, np.float32)[:, 0] for x_XS in (low_XS, high_XS))
  smallest_X, largest_X = magnitude_XD.min(1), magnitude_XD.max(1)
  assert (smallest_X * (1 - 2**-7) < low_X).all() and (low_X <= smallest_X).all()
  assert (largest_X <= high_X).all() and (high_X < largest_X * (1 + 2**-7)).all()
  x_XD = x_XD.astype(jnp.bfloat16)
  out_XD = _round_trip(x_XD, bits, 'bfloat16')
  magnitude_XD, out_XD = np.abs(np.asarray(x_XD, 'f8')), np.abs(out_XD)
  np.testing.assert_array_equal(out_XD.max(1), magnitude_XD.max(1))
  np.testing.assert_array_equal(out_XD.min(1), magnitude_XD.min(1))


def test_rounding_is_unbiased_in_linear_space():
  bits = 5  # coarse: 14 steps, so that a biased rule shows
  rng = np.random.default_rng(0)
  x_XD = rng.uniform(1, 16, size=(8000, 128))
  x_XD[:, 0], x_XD[:, 1] = 1, 16
  step = 4 / (2 ** (bits - 1) - 2)
  inner = np.s_[:, 2:]
  error = lambda out_XD: float(np.mean((out_XD - x_XD)[inner]) / np.mean(x_XD))
  by_logarithm = 2 ** (np.rint(np.log2(x_XD) / step) * step)  # boundary at the geometric mean
  assert abs(error(by_logarithm)) > 1e-3, 'this test could not see a bias'
  assert abs(error(_round_trip(jnp.asarray(x_XD, jnp.float32), bits))) < 3e-4


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('bits', _BITS)
def test_zeros_and_a_single_magnitude_survive(bits, dtype):
  x_XD = np.zeros((4, 200))
  x_XD[1] = 0.3
  x_XD[2, ::3] = -7e-9
  x_XD[3, 150] = 1e6
  x_XD = jnp.asarray(x_XD, dtype)
  expected_XD = np.asarray(x_XD, np.float64)
  # From float32 the range is one bfloat16 wide.
  limit = 0 if dtype == 'bfloat16' else 2**-7 / (2 ** (bits - 1) - 2)
  np.testing.assert_allclose(_round_trip(x_XD, bits), expected_XD, rtol=limit)


def test_below_the_smallest_normal_number_there_is_zero():
  x_XD = np.full((1, 128), 1e-30, np.float32)
  x_XD[0, 5] = 1e-39
  out_XD = _round_trip(jnp.asarray(x_XD), 10)
  assert out_XD[0, 5] == 0
  np.testing.assert_allclose(np.delete(out_XD, 5, 1), np.delete(x_XD, 5, 1), rtol=1e-4)


@pytest.mark.parametrize('scale', [2e-37, 3.3e38])
def test_the_ends_of_float32_are_served(scale):
  x_XD = np.float32(np.linspace(0.1, 1, 128)[None] * scale)
  step = math.log2(10.2) / 510
  np.testing.assert_allclose(_round_trip(jnp.asarray(x_XD), 10), x_XD, rtol=step)


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_tile_with_nan_or_infinity_becomes_nan_and_no_other_does(bad):
  x_XD = _random(300, 'float32').at[2, 130].set(bad)
  expected_XD = np.zeros(x_XD.shape, bool)
  expected_XD[2, 128:256] = True
  np.testing.assert_array_equal(np.isnan(_round_trip(x_XD, 10)), expected_XD)


def test_leading_dimensions_are_free():
  x_XD = _random(300, 'float32')
  flat_XD = _round_trip(x_XD, 8)
  np.testing.assert_array_equal(_round_trip(x_XD.reshape(2, 8, 300), 8).reshape(16, 300), flat_XD)
  np.testing.assert_array_equal(_round_trip(x_XD[3], 8), flat_XD[3])


def test_bad_arguments_are_refused_by_name():
  x_XD = jnp.ones((2, 300))
  with pytest.raises(ValueError, match=r"'cuda' cannot serve: .*; 'xla', 'pallas_tpu' can"):
    encode(x_XD, 8, implementation='cuda')
  for bits in (2, 17):
    with pytest.raises(ValueError, match=f'bits = {bits}: LogFMT has 3 to 16'):
      encode(x_XD, bits)
  with pytest.raises(ValueError, match='float16: must be bfloat16 or float32'):
    encode(x_XD.astype(jnp.float16), 8)
  codes_XD, low_XS, high_XS = encode(x_XD, 8)
  with pytest.raises(ValueError, match=r'high \(2, 2\) .* must be \(2, 3\)'):
    decode(codes_XD, low_XS, high_XS[:, :2], 8, jnp.float32)
