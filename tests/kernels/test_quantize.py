"""The 1x128 quantiser against the oracle, bit for bit."""

import functools

import fp8_operands as fp8
import jax
import jax.numpy as jnp
import numpy as np
import oracle_precision as oracle
import parity
import pytest

from dsv3_jax.kernels import tiles
from dsv3_jax.kernels.quantize import (
  SMALLEST_FLOOR,
  dequantize_blocks,
  dequantize_tiles,
  quantize_tiles,
)

_DIMS = (1, 32, 127, 128, 129, 300, 512)


@functools.partial(jax.jit, static_argnames=('power_of_two', 'floor', 'implementation'))
def _quantize(x, **options):
  return quantize_tiles(x, **options)


_dequantize = jax.jit(dequantize_tiles, static_argnames='dtype')


def _random(dim: int, dtype: str, rows: int = 48) -> jax.Array:
  """Normal rows of magnitudes 1e-9 to 1e6; some elements 1e-4 smaller, some zero."""
  rng = np.random.default_rng(dim)
  x_XD = rng.normal(size=(rows, dim)) * np.logspace(-9, 6, rows)[:, None]
  x_XD *= rng.choice([1, 1e-4, 0], size=x_XD.shape, p=[0.8, 0.15, 0.05])
  return jnp.asarray(x_XD, dtype)


def _f64(x) -> np.ndarray:
  return np.asarray(x, np.float64)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('dim', _DIMS)
def test_power_of_two_codes_and_scales_are_the_oracle_s(dim, dtype):
  x_XD = _random(dim, dtype)
  codes_XD, scale_XS = _quantize(x_XD)
  expected_XD, expected_XS = oracle.quantize_rows(_f64(x_XD), power_of_two=True)
  assert codes_XD.dtype == jnp.float8_e4m3fn and scale_XS.dtype == jnp.float32
  np.testing.assert_array_equal(_f64(scale_XS), expected_XS)
  np.testing.assert_array_equal(_f64(codes_XD), expected_XD)


@pytest.mark.parametrize('dim', _DIMS)
def test_exact_scales_are_the_oracle_s_and_codes_the_nearest_to_the_quotient(dim):
  x_XD = _random(dim, 'float32')
  codes_XD, scale_XS = _quantize(x_XD, power_of_two=False)
  _, expected_XS = oracle.quantize_rows(_f64(x_XD))
  np.testing.assert_allclose(_f64(scale_XS), expected_XS, rtol=2**-23)
  spread_XD = np.repeat(np.asarray(scale_XS), tiles.TILE, axis=1)[:, :dim]
  quotient_XD = np.asarray(x_XD) / spread_XD  # in float32
  np.testing.assert_array_equal(_f64(codes_XD), oracle.round_e4m3(_f64(quotient_XD)))


@pytest.mark.parametrize('power_of_two', [True, False])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_integers_equal_the_backend_s_own_cast(dtype, power_of_two):
  x_XD = _random(300, dtype).at[3, 5].set(jnp.nan).at[7, 200].set(-jnp.inf)
  for floor in (1e-4, SMALLEST_FLOOR):
    options = {'power_of_two': power_of_two, 'floor': floor}
    expected = _quantize(x_XD, implementation='reference', **options)
    got = _quantize(x_XD, **options)
    parity.assert_same_bits([_f64(x) for x in got], [_f64(x) for x in expected])


def test_every_code_is_rounded_to_nearest_even_at_its_midpoints():
  grid = np.unique(np.abs(np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn).astype('f8')))
  grid = grid[np.isfinite(grid)]
  middle = (grid[1:] + grid[:-1]) / 2
  near = np.float32([middle, np.nextafter(np.float32(middle), 0), middle * (1 + 2**-20), grid[1:]])
  x_X = np.concatenate([near.ravel(), -near.ravel()]).astype(np.float32)
  x_XD = np.full((len(x_X), 2), 448, np.float32)  # the scale is 1
  x_XD[:, 0] = x_X
  codes_XD, scale_XS = _quantize(jnp.asarray(x_XD))
  assert (np.asarray(scale_XS) == 1).all()
  np.testing.assert_array_equal(_f64(codes_XD)[:, 0], oracle.round_e4m3(np.float64(x_X)))


def test_every_code_dequantises_to_its_value_and_nan_stays_nan():
  codes = np.arange(256, dtype=np.uint8).view(jnp.float8_e4m3fn)[None]
  got = _dequantize(jnp.asarray(codes), jnp.full((1, 2), 2.0**-100), dtype='float32')
  np.testing.assert_array_equal(_f64(got), codes.astype(np.float64) * 2.0**-100)


@pytest.mark.parametrize('exponent', [-30, -3, 0, 7, 100])
def test_a_scale_is_the_next_power_of_two_exactly_at_the_edge(exponent):
  edge = np.float32(448 * 2.0**exponent)
  amax = np.array([np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(np.inf))])
  _, scale_XS = _quantize(jnp.asarray(amax[:, None]), floor=SMALLEST_FLOOR)
  assert np.asarray(scale_XS)[:, 0].tolist() == [
    2.0**exponent,
    2.0**exponent,
    2.0 ** (exponent + 1),
  ]


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_quantised_numbers_are_quantised_again_without_loss(dtype):
  codes_XD, scale_XS = _quantize(_random(300, dtype))
  once_XD = _dequantize(codes_XD, scale_XS, dtype=dtype)
  twice_XD = _dequantize(*_quantize(once_XD), dtype=dtype)
  np.testing.assert_array_equal(_f64(twice_XD), _f64(once_XD))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('implementation', ['xla', 'reference'])
def test_a_tile_with_nan_or_infinity_becomes_nan_and_no_other_does(implementation, bad):
  x_XD = _random(300, 'float32').at[2, 130].set(bad)
  codes_XD, scale_XS = _quantize(x_XD, implementation=implementation)
  out_XD = np.asarray(_dequantize(codes_XD, scale_XS, dtype='float32'))
  expected_XD = np.zeros(out_XD.shape, bool)
  expected_XD[2, 128:256] = True
  np.testing.assert_array_equal(np.isnan(np.asarray(codes_XD, np.float32)), expected_XD)
  np.testing.assert_array_equal(np.isnan(out_XD), expected_XD)


def test_zeros_stay_zeros_and_the_floor_decides_what_is_too_small():
  x_XD = jnp.stack([jnp.zeros(130), jnp.full(130, 1e-10)])
  codes_XD, _ = _quantize(x_XD)
  assert not np.any(_f64(codes_XD)), '1e-10 lies below half a step at a floor of 1e-4'
  codes_XD, scale_XS = _quantize(x_XD, floor=SMALLEST_FLOOR)
  out_XD = np.asarray(_dequantize(codes_XD, scale_XS, dtype='float32'))
  assert not np.any(out_XD[0])
  np.testing.assert_allclose(out_XD[1], 1e-10, rtol=2**-4)


@pytest.mark.parametrize('power_of_two', [True, False])
def test_transposed_tiles_are_the_tiles_of_the_transposed_matrix(power_of_two):
  x_MK = _random(150, 'bfloat16', rows=300).at[5, 7].set(jnp.nan)
  for floor in (1e-4, SMALLEST_FLOOR):
    options = {'power_of_two': power_of_two, 'floor': floor}
    expected = fp8.tile_codes(x_MK.T, **options)
    for implementation in ('reference', 'xla'):
      got = fp8.transposed_codes(x_MK, implementation=implementation, **options)
      parity.assert_same_bits([_f64(x) for x in got], [_f64(x) for x in expected])


@pytest.mark.parametrize('power_of_two', [True, False])
def test_blocks_are_the_oracle_s_and_those_of_the_transposed_matrix_transposed(power_of_two):
  w_NK = _random(300, 'float32', rows=150)
  codes_NK, scale_nk = fp8.block_codes(w_NK, power_of_two=power_of_two)
  expected_NK, expected_nk = oracle.quantize_blocks(_f64(w_NK), power_of_two)
  np.testing.assert_allclose(_f64(scale_nk), expected_nk, rtol=2**-23)
  if power_of_two:
    np.testing.assert_array_equal(_f64(codes_NK), expected_NK)
  for other in (
    fp8.block_codes(w_NK, power_of_two=power_of_two, implementation='reference'),
    [x.T for x in fp8.block_codes(w_NK.T, power_of_two=power_of_two)],
    [x[1] for x in fp8.block_codes(jnp.stack([w_NK * 2, w_NK]), power_of_two=power_of_two)],
  ):
    parity.assert_same_bits([_f64(x) for x in other], [_f64(codes_NK), _f64(scale_nk)])
  value_NK = dequantize_blocks(codes_NK, scale_nk, jnp.float32)
  np.testing.assert_allclose(value_NK, fp8.block_values(codes_NK, scale_nk), rtol=2**-23)


def test_a_bad_element_makes_its_block_nan_and_no_other():
  w_NK = _random(300, 'float32', rows=150).at[140, 129].set(jnp.inf)
  for implementation in ('reference', 'xla'):
    codes_NK, scale_nk = fp8.block_codes(w_NK, implementation=implementation)
    assert np.isnan(scale_nk).tolist() == [[False] * 3, [False, True, False]]
    assert np.isnan(_f64(codes_NK)).sum() == 22 * 128


def test_requantised_tiles_are_those_of_the_dequantised_matrix():
  codes_MK, scale_MS = fp8.tile_codes(_random(150, 'float32', rows=300), power_of_two=False)
  expected = fp8.transposed_codes(_dequantize(codes_MK, scale_MS, dtype='float32'))
  for implementation in ('reference', 'xla'):
    got = fp8.requantized(codes_MK, scale_MS, implementation=implementation)
    parity.assert_same_bits([_f64(x) for x in got], [_f64(x) for x in expected])


def test_leading_dimensions_are_free():
  x_XD = _random(300, 'float32')
  flat = _quantize(x_XD)
  parity.assert_same_bits(
    [np.asarray(x) for x in _quantize(x_XD.reshape(2, 4, 6, 300))],
    [np.asarray(x).reshape(2, 4, 6, -1) for x in flat],
  )
  parity.assert_same_bits(list(_quantize(x_XD[5])), [x[5] for x in flat])


def test_bad_arguments_are_refused_by_name():
  x_XD = jnp.ones((2, 300))
  with pytest.raises(
    ValueError, match=r"implementation = 'cuda' cannot serve: .*; 'reference', 'xla'"
  ):
    quantize_tiles(x_XD, implementation='cuda')
  with pytest.raises(ValueError, match='float16: must be bfloat16 or float32'):
    quantize_tiles(x_XD.astype(jnp.float16))
  with pytest.raises(ValueError, match='floor = 1e-38: must be at least'):
    quantize_tiles(x_XD, floor=1e-38)
  codes_XD, scale_XS = quantize_tiles(x_XD)
  with pytest.raises(ValueError, match=r'must be float32\[2, 3\], one per 1x128'):
    dequantize_tiles(codes_XD, scale_XS[:, :2], jnp.float32)
