"""FP8 blocks: codes and scales become the defined values exactly, and values come back as themselves."""

import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.weights import fp8
from dsv3_jax.weights.shards import FormatError

# 576, 7168 and 129280 in small: ragged below, at the right, at both, at neither; less than one block.
_SHAPES = [(576, 200), (200, 576), (72, 130), (256, 384), (1, 1), (129, 1), (5, 1300), (320, 128)]
_DTYPES = [np.float32, ml_dtypes.bfloat16, np.float16]


def _value(code):
  """The number that an E4M3 code stands for, from its bits: sign, 4 of exponent, 3 of fraction."""
  sign, exponent, fraction = code >> 7, (code >> 3) & 15, code & 7
  if exponent == 15 and fraction == 7:
    return math.nan
  small = fraction / 8 * 2.0**-6
  value = (1 + fraction / 8) * 2.0 ** (exponent - 7) if exponent else small
  return -value if sign else value


def _codes(shape, seed=0):
  """Codes of every kind but NaN."""
  codes = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
  codes[(codes & 127) == 127] = 1
  return codes.view(fp8.E4M3)


def _scales(shape, seed=0, power_of_two=False):
  """Scales of a block each, of many sizes."""
  exponent = np.random.default_rng(seed).uniform(-14, 3, fp8.scale_shape(shape))
  return np.exp2(np.round(exponent) if power_of_two else exponent).astype(np.float32)


def _naive(w_XY, scale_xy, dtype, block=128):
  out = np.empty(w_XY.shape, dtype)
  for i, row in enumerate(w_XY.view(np.uint8).tolist()):
    for j, code in enumerate(row):
      out[i, j] = np.float32(_value(code)) * np.float32(scale_xy[i // block, j // block])
  return out


def _weights(shape, dtype, seed=0):
  """Blocks of very different size, one of zeros among them."""
  rng = np.random.default_rng(seed)
  w = (
    rng.standard_normal(shape)
    * np.exp2(rng.uniform(-6, 6, (-(-shape[0] // 64), 1))).repeat(64, axis=0)[: shape[0]]
  )
  w[:128, :128] = 0
  return w.astype(dtype)


def _assert_same_bits(actual, expected):
  assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
  assert actual.tobytes() == expected.tobytes()


# ---- codes to values -----------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', _DTYPES)
@pytest.mark.parametrize('shape', _SHAPES)
def test_dequantised_values_are_those_of_the_definition_to_the_bit(shape, dtype):
  w, scale = _codes(shape), _scales(shape)
  _assert_same_bits(fp8.dequantise(w, scale, dtype=dtype), _naive(w, scale, dtype))


def test_every_code_times_one_is_its_value():
  codes = np.array([c for c in range(256) if c & 127 != 127], np.uint8).view(fp8.E4M3)[None]
  values = fp8.dequantise(codes, np.ones((1, 2), np.float32))
  assert values[0].tolist() == [_value(c) for c in codes.view(np.uint8)[0].tolist()]
  assert np.signbit(values[0, 127]) and values[0, 127] == 0  # minus zero


@pytest.mark.parametrize('shape', _SHAPES)
def test_scales_of_e8m0_are_the_powers_of_two_that_they_stand_for(shape):
  w, scale = _codes(shape), _scales(shape, power_of_two=True)
  codes = (np.log2(scale) + 127).astype(np.uint8).view(fp8.E8M0)
  for dtype in _DTYPES:
    _assert_same_bits(fp8.dequantise(w, codes, dtype=dtype), fp8.dequantise(w, scale, dtype=dtype))


@pytest.mark.parametrize('block', [1, 7, 32, 200])
def test_blocks_may_have_another_size(block):
  w = _codes((65, 90))
  scale = np.exp2(np.random.default_rng(1).uniform(-9, 3, fp8.scale_shape(w.shape, block)))
  scale = scale.astype(np.float32)
  _assert_same_bits(fp8.dequantise(w, scale, block), _naive(w, scale, np.float32, block))
  values = fp8.dequantise(*fp8.quantise(_weights((65, 90), np.float32), block), block)
  assert values.shape == (65, 90)


def test_matrices_that_are_transposed_or_cut_out_are_as_good():
  whole = _codes((400, 700))
  for w in (whole.T, whole[3:300:2, 5:600]):
    scale = _scales(w.shape)
    _assert_same_bits(fp8.dequantise(w, scale), fp8.dequantise(w.copy(), scale))
  values = _weights((400, 700), np.float32)
  for part in (values.T, values[3:300:2, 5:600]):
    for ours, theirs in zip(fp8.quantise(part), fp8.quantise(part.copy()), strict=True):
      _assert_same_bits(ours, theirs)


# ---- values to codes -----------------------------------------------------------------------------


def _nearest(x, scale):
  """Indices of the codes nearest to x / scale, of two equally near the one with an even fraction."""
  magnitudes = np.array([_value(c) for c in range(127)])
  quotient = (np.abs(x) / scale).astype(np.float64)  # as float32 has it: that is what is rounded
  above = np.clip(np.searchsorted(magnitudes, quotient), 1, 126)
  low, high = magnitudes[above - 1], magnitudes[above]
  up = (quotient - low > high - quotient) | ((quotient - low == high - quotient) & (above % 2 == 0))
  return np.where(up, above, above - 1)


@pytest.mark.parametrize('power_of_two', [False, True])
@pytest.mark.parametrize('dtype', _DTYPES)
@pytest.mark.parametrize('shape', _SHAPES)
def test_codes_and_scales_are_those_of_the_rule(shape, dtype, power_of_two):
  w_XY = _weights(shape, dtype)
  codes, scale = fp8.quantise(w_XY, power_of_two=power_of_two)
  assert (codes.dtype, scale.dtype) == (fp8.E4M3, np.float32)
  assert scale.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
  for i in range(scale.shape[0]):
    for j in range(scale.shape[1]):
      at = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
      block = w_XY[at].astype(np.float32)
      amax = max(float(np.abs(block).max()), float(np.float32(1e-4)))
      expected = np.float32(amax) / np.float32(448)
      if power_of_two:
        expected = np.float32(2.0 ** math.ceil(math.log2(float(expected))))
      assert scale[i, j] == expected
      signs, magnitudes = np.signbit(block), _nearest(block, scale[i, j])
      np.testing.assert_array_equal(codes[at].view(np.uint8), magnitudes + 128 * signs)


def test_codes_are_nearest_to_even_over_the_whole_range_of_values():
  magnitudes = np.array([_value(c) for c in range(127)], np.float32)
  halves = (magnitudes[1:] + magnitudes[:-1]) / 2  # exact
  near = [np.nextafter(halves, np.float32(0)), halves, np.nextafter(halves, np.float32(1e9))]
  x = np.concatenate([magnitudes, *near, np.geomspace(1e-9, 448, 5000, dtype=np.float32)])
  x = np.concatenate([x, -x])
  for row in np.array_split(x, -(-x.size // 127)):
    row = np.append(row, np.float32(448))[None]  # for a scale of 1
    codes, scale = fp8.quantise(row)
    assert scale == 1
    np.testing.assert_array_equal(codes.view(np.uint8), row.astype(fp8.E4M3).view(np.uint8))


@pytest.mark.parametrize('power_of_two', [False, True])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_what_went_through_fp8_once_goes_through_it_unchanged(dtype, power_of_two):
  for seed in range(20):
    codes, scale = fp8.quantise(_weights((300, 700), dtype, seed), power_of_two=power_of_two)
    values = fp8.dequantise(codes, scale, dtype=dtype)
    again, scale_again = fp8.quantise(values, power_of_two=power_of_two)
    _assert_same_bits(fp8.dequantise(again, scale_again, dtype=dtype), values)
    if not power_of_two:  # there a maximum rounded down to 224 of 448 asks for half the scale
      np.testing.assert_array_equal(again.view(np.uint8), codes.view(np.uint8))
    if dtype == np.float32 and not power_of_two:
      _assert_same_bits(scale_again, scale)
    third, scale_third = fp8.quantise(
      fp8.dequantise(again, scale_again, dtype=dtype), power_of_two=power_of_two
    )
    _assert_same_bits(third, again)
    _assert_same_bits(scale_third, scale_again)


def test_scales_of_every_float32_in_a_binade_come_back_from_their_largest_value():
  for first in range(0, 2**23, 2**20):  # every mantissa; the exponent changes nothing
    amax = (np.arange(first, first + 2**20, dtype=np.uint32) | 0x3F800000).view(np.float32)
    scale = amax / np.float32(448)
    np.testing.assert_array_equal(scale * np.float32(448) / np.float32(448), scale)


def test_an_error_is_at_most_half_a_step_of_the_block():
  w = _weights((256, 256), np.float32)
  codes, scale = fp8.quantise(w)
  error = np.abs(fp8.dequantise(codes, scale) - w)
  step = np.maximum(np.abs(w) / 16, 2.0**-10 * scale.repeat(128, 0).repeat(128, 1))
  assert (error <= step * (1 + 1e-6)).all()


def test_a_block_of_zeros_has_a_scale_and_comes_back_as_zeros():
  codes, scale = fp8.quantise(np.zeros((130, 5), np.float32))
  assert (scale == np.float32(1e-4) / np.float32(448)).all()
  assert not fp8.dequantise(codes, scale).any()


# ---- bad input -----------------------------------------------------------------------------------


def _with(array, at, value):
  array = array.copy()
  array[at] = value
  return array


_SCALE = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
  'scale, why',
  [
    *[
      (_with(_SCALE, (1, 2), bad), f'{bad} in block [1, 2]; must be finite and above 0')
      for bad in (np.nan, np.inf, -np.inf, 0.0, -1.0)
    ],
    (np.full((2, 3), 255, np.uint8).view(fp8.E8M0), 'nan in block [0, 0]'),
    (_SCALE[:1], 'shape [1, 3]; must be [2, 3], one for each block of 128x128'),
    (_SCALE.T, 'shape [3, 2]; must be [2, 3]'),
    (_SCALE[0], 'shape [3]'),
    (np.ones((), np.float32), 'shape []'),
    (_SCALE.astype(np.float64), 'float64; must be float32 or float8_e8m0fnu'),
    (_SCALE.astype(np.uint8), 'uint8; must be'),
    (_with(_SCALE, (0, 0), 1e36), '1e+36 gives values that float32 cannot hold'),
  ],
)
def test_scales_that_cannot_be_are_refused(scale, why):
  with pytest.raises(FormatError) as error:
    fp8.dequantise(_codes((200, 300)), scale)
  assert why in str(error.value) and '[200, 300]' in str(error.value)


def test_scales_that_overflow_the_wanted_dtype_are_refused():
  codes, scale = _codes((1, 1)), np.full((1, 1), 200, np.float32)
  with pytest.raises(FormatError, match='float16 cannot hold'):
    fp8.dequantise(codes, scale, dtype=np.float16)
  assert np.isfinite(fp8.dequantise(codes, scale, dtype=ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.parametrize('code', [0x7F, 0xFF])
def test_codes_of_nan_are_refused(code):
  codes = _codes((200, 300))
  codes.view(np.uint8)[150, 290] = code
  with pytest.raises(FormatError, match='holds NaN in rows 128 to 199'):
    fp8.dequantise(codes, _SCALE)


@pytest.mark.parametrize('w', [_codes((4,)), _codes((2, 2, 2)), _codes((4, 4)).view(np.uint8)])
def test_codes_that_are_no_matrix_of_e4m3_are_refused(w):
  with pytest.raises(FormatError, match='must be a matrix of float8_e4m3fn'):
    fp8.dequantise(w, np.ones((1, 1), np.float32))


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize('dtype', _DTYPES)
def test_weights_that_are_not_finite_are_refused(dtype, bad):
  with pytest.raises(FormatError, match='rows 128 to 199 are not finite'):
    fp8.quantise(_with(_weights((200, 300), dtype), (130, 299), bad))


@pytest.mark.parametrize('w', [np.zeros((4, 4), np.int32), np.zeros(4, np.float32)])
def test_what_has_no_blocks_is_refused(w):
  with pytest.raises(FormatError, match='only a matrix of floating point has blocks'):
    fp8.quantise(w)


# ---- memory --------------------------------------------------------------------------------------


def test_beside_input_and_result_little_memory_is_held():
  codes, scale = _codes((1024, 4000)), _scales((1024, 4000))
  fp8.dequantise(codes[:1], scale[:1])  # the table
  tracemalloc.start()
  values = fp8.dequantise(codes, scale, dtype=ml_dtypes.bfloat16)
  of_values = tracemalloc.get_traced_memory()[1]
  tracemalloc.reset_peak()
  fp8.quantise(values)
  of_codes = tracemalloc.get_traced_memory()[1] - values.nbytes
  tracemalloc.stop()
  assert of_values < values.nbytes + 4 * 2**20
  assert of_codes < codes.nbytes + 4 * 2**20
