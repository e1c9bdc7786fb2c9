"""Mosaic GPU kernels in the interpreter: products against float64 of the codes, quantisers bit for bit."""

import fp8_operands as fp8
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels import e5m6, hopper, logfmt
from dsv3_jax.kernels import hopper_gemm as hg
from dsv3_jax.kernels.fp8_matmul import fp8_matmul
from dsv3_jax.kernels.fp8_wgrad import fp8_wgrad
from dsv3_jax.kernels.grouped_matmul import grouped_matmul, masked_matmul
from dsv3_jax.kernels.grouped_wgrad import grouped_wgrad
from dsv3_jax.kernels.quantize import (
  quantize_blocks,
  quantize_tiles,
  quantize_tiles_transposed,
  requantize_transposed,
)
from dsv3_jax.kernels.swiglu_quantize import swiglu_backward, swiglu_quantize

needs_interpreter = pytest.mark.skipif(
  not hopper.AVAILABLE,
  reason='the interpreter of jax 0.10 cannot load what FP8 needs; jax 0.11 needs Python 3.12',
)


def _kernel(op, *arrays, **options):
  with hopper.interpreted():
    return jax.tree.map(np.asarray, op(*arrays, implementation='mosaic_gpu', **options))


def _codes(*shape, seed=0):
  return fp8.tile_codes(fp8.random(seed, *shape), power_of_two=False)


def _blocks(*shape):
  return fp8.block_codes(fp8.random(1, *shape))


def _assert_near(got, expected, limit=fp8.LIMIT['float32']):
  assert fp8.error(got, expected) < limit


@needs_interpreter
@pytest.mark.parametrize(
  ('M', 'N', 'K'),
  [(256, 256, 768), (130, 192, 256), (48, 128, 200), (8, 40, 64)],
  ids=['ring', 'wide', 'low', 'ragged'],
)
def test_a_product_is_that_of_float64(M, N, K):
  a, b = _codes(M, K), _blocks(N, K)
  got = _kernel(fp8_matmul, *a, *b, out_dtype=jnp.float32)
  _assert_near(got, fp8.tile_values(*a) @ fp8.block_values(*b).T)


@needs_interpreter
def test_bfloat16_is_rounded_once_and_zeros_and_nan_stay_what_and_where_they_are():
  a = _codes(64, 256)
  a_scale = a[1].at[3, 1].set(jnp.nan)
  a_codes = a[0].at[5].set(0)
  b = _blocks(128, 256)
  got = _kernel(fp8_matmul, a_codes, a_scale, *b, out_dtype=jnp.bfloat16).astype(np.float32)
  assert np.isnan(got[3]).all() and not got[5].any()
  expected = fp8.tile_values(a_codes, a[1]) @ fp8.block_values(*b).T
  keep = np.arange(64) != 3
  _assert_near(got[keep], expected[keep], fp8.LIMIT['bfloat16'])


@needs_interpreter
@pytest.mark.parametrize('accumulating', [False, True])
def test_a_gradient_of_weights_is_that_of_float64_and_is_added(accumulating):
  a, b = _codes(192, 384), _codes(130, 384, seed=1)
  added = fp8.random(2, 192, 130) if accumulating else None
  got = _kernel(fp8_wgrad, *a, *b, accumulate=added)
  expected = fp8.tile_values(*a) @ fp8.tile_values(*b).T
  _assert_near(got, expected + (np.asarray(added, np.float64) if accumulating else 0))


_SIZES = np.array([0, 130, 128, 0, 5], np.int32)  # 512 rows in blocks of 128; 640 are there
_STARTS = fp8.starts(list(_SIZES))


def _grouped():
  """Codes of rows in groups; what lies behind the last group is NaN."""
  codes, scale = fp8.tile_codes(fp8.grouped_rows(tuple(_SIZES), 640, 256), power_of_two=False)
  return codes.at[512:].set(jnp.nan), scale.at[512:].set(jnp.nan)


@needs_interpreter
def test_groups_are_multiplied_by_their_own_weights_and_what_is_behind_is_zero():
  a = _grouped()
  b = _blocks(5, 192, 256)
  got = _kernel(grouped_matmul, *a, *b, jnp.asarray(_SIZES), out_dtype=jnp.float32)
  a_SK, b_ENK = fp8.tile_values(*a), fp8.block_values(*b)
  expected = np.zeros((640, 192))
  for e, (start, size) in enumerate(zip(_STARTS, _SIZES, strict=True)):
    expected[start : start + size] = a_SK[start : start + size] @ b_ENK[e].T
  _assert_near(got, expected)


@needs_interpreter
@pytest.mark.parametrize('M', [48, 192])
def test_masked_rows_are_zero_whatever_they_hold(M):
  a_codes, a_scale = (x.reshape(4, M, -1) for x in _codes(4 * M, 256))
  b = _blocks(4, 128, 256)
  sizes = np.array([0, M, 17, M - 40], np.int32)
  beyond = jnp.arange(M)[None, :, None] >= jnp.asarray(sizes)[:, None, None]
  a_codes = jnp.where(beyond, jnp.array(jnp.nan, a_codes.dtype), a_codes)
  got = _kernel(masked_matmul, a_codes, a_scale, *b, jnp.asarray(sizes), out_dtype=jnp.float32)
  a_EMK = np.where(beyond, 0, fp8.tile_values(a_codes, a_scale))
  _assert_near(got, np.einsum('EMK,ENK->EMN', a_EMK, fp8.block_values(*b)))


@needs_interpreter
@pytest.mark.parametrize('accumulating', [False, True])
def test_gradients_of_experts_are_over_their_own_tokens(accumulating):
  a, b = _codes(64, 640), _codes(128, 640, seed=1)
  a = a[0].at[:, 512:].set(jnp.nan), a[1]
  added = fp8.random(2, 5, 64, 128) if accumulating else None
  got = _kernel(grouped_wgrad, *a, *b, jnp.asarray(_SIZES), accumulate=added)
  a_MS, b_NS = fp8.tile_values(*a), fp8.tile_values(*b)
  expected = np.zeros((5, 64, 128)) if added is None else np.array(added, np.float64)
  for e, (start, size) in enumerate(zip(_STARTS, _SIZES, strict=True)):
    own = slice(start, start + -(-size // 128) * 128)
    expected[e] += a_MS[:, own] @ b_NS[:, own].T
  _assert_near(got, expected)


def test_without_a_gpu_the_name_is_refused_with_the_reason():
  a, b = _codes(64, 128), _blocks(64, 128)
  why = 'is no Hopper GPU' if hopper.AVAILABLE else 'need jax 0.11 or newer'
  with pytest.raises(ValueError, match=f"'mosaic_gpu' cannot serve: .*{why}.*'xla'.* can"):
    fp8_matmul(*a, *b, implementation='mosaic_gpu')


def test_tilings_that_no_warpgroup_can_hold_are_refused():
  for rows, columns in ((96, 128), (64, 64), (128, 100)):
    with pytest.raises(ValueError, match='rows must be 64 or 128'):
      hg.Tiling(rows, columns)


# ---- element by element --------------------------------------------------------------------------


def _assert_same(got, expected):
  for x, y in zip(got, expected, strict=True):
    np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def _mixed(dtype):
  """Rows of all magnitudes; zeros, a NaN and an infinity."""
  x = np.random.default_rng(0).normal(size=(136, 200)) * np.logspace(-9, 6, 136)[:, None]
  x[3, 5], x[70, 150], x[9] = np.nan, np.inf, 0
  return jnp.asarray(x, dtype)


@needs_interpreter
@pytest.mark.parametrize('power_of_two', [True, False])
@pytest.mark.parametrize('op', [quantize_tiles, quantize_tiles_transposed, quantize_blocks])
def test_quantisers_give_the_bits_of_xla(op, power_of_two):
  for dtype in ('bfloat16', 'float32') if power_of_two else ('bfloat16',):
    x = _mixed(dtype)
    got = _kernel(op, x, power_of_two=power_of_two)
    _assert_same(got, op(x, power_of_two=power_of_two, implementation='xla'))


@needs_interpreter
def test_requantised_codes_have_the_bits_of_xla():
  codes = quantize_tiles(_mixed('bfloat16'))
  _assert_same(
    _kernel(requantize_transposed, *codes), requantize_transposed(*codes, implementation='xla')
  )


@needs_interpreter
@pytest.mark.parametrize('weighted', [True, False])
def test_swiglu_is_quantised_and_differentiated_as_by_xla(weighted):
  gate, up, d = (fp8.random(seed, 70, 200, dtype='bfloat16') for seed in range(3))
  weight = fp8.random(3, 70) if weighted else None
  # The exponential is each backend's own: a code may be the neighbour.
  got = fp8.tile_values(*_kernel(swiglu_quantize, gate, up, weight))
  expected = fp8.tile_values(*swiglu_quantize(gate, up, weight, implementation='xla'))
  assert fp8.error(got, expected) < 1e-3
  got = _kernel(swiglu_backward, gate, up, d, weight)
  expected = swiglu_backward(gate, up, d, weight, implementation='xla')
  limits = 'bfloat16', 'bfloat16', 'float32'
  for x, y, limit in zip(got, expected, limits, strict=True):
    assert (x is None and y is None) or fp8.error(x, fp8.f64(y)) < fp8.LIMIT[limit]


@needs_interpreter
def test_e5m6_has_the_bits_of_xla():
  x = _mixed('bfloat16')
  codes = _kernel(e5m6.encode, x)
  expected = e5m6.encode(x, implementation='xla')
  _assert_same(codes, expected)
  got = _kernel(e5m6.decode, *expected, 200, jnp.bfloat16)
  _assert_same([got], [e5m6.decode(*expected, 200, jnp.bfloat16, implementation='xla')])


@needs_interpreter
@pytest.mark.parametrize('bits', [8, 10])
def test_logfmt_gives_xla_s_range_its_codes_but_for_midpoints_and_its_numbers(bits):
  x = _mixed('bfloat16')
  codes, *ends = _kernel(logfmt.encode, x, bits)
  expected, *expected_ends = logfmt.encode(x, bits, implementation='xla')
  _assert_same(ends, expected_ends)
  finite = np.isfinite(np.repeat(fp8.f64(ends[0]), 128, axis=-1)[..., : x.shape[-1]])
  apart = np.abs(codes.astype(int) - np.asarray(expected, int))[finite]
  assert apart.max() <= 1 and apart.mean() < 1e-3
  got = _kernel(logfmt.decode, expected, *expected_ends, bits, jnp.float32)
  expected = logfmt.decode(expected, *expected_ends, bits, jnp.float32, implementation='xla')
  np.testing.assert_allclose(got, np.asarray(expected), rtol=4e-6)
