"""Kernels for TPU, interpreted: GEMMs against float64 of their operands, codes bit for bit."""

import functools

import fp8_operands as fp8
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from dsv3_jax.kernels import e5m6, logfmt, tpu_gemm
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

TPU = 'pallas_tpu'
_SIZES = (130, 0, 1, 256)  # ragged, empty, one row, whole blocks
_SLOTS = 768  # one block of 128 behind the last group


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Several blocks along every axis, steps and chunks of the contracted one, at sizes of a test."""
  for name, value in {'_ROWS': 128, '_COLUMNS': 128, '_STEP': 512, '_UNROLLED': 2}.items():
    monkeypatch.setattr(tpu_gemm, name, value)
  tpu_gemm._split.cache_clear()
  yield
  tpu_gemm._split.cache_clear()


def same_bits(got, expected):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(fp8.f64(a), fp8.f64(b))


@pytest.mark.parametrize('positive', [False, True])
def test_matmul_with_ragged_edges_equals_float64_of_its_operands(positive):
  a = fp8.tile_codes(fp8.random(0, 150, 900, positive=positive), power_of_two=False)
  b = fp8.block_codes(fp8.random(1, 200, 900, positive=positive))
  expected = fp8.tile_values(*a) @ fp8.block_values(*b).T
  got = fp8_matmul(*a, *b, out_dtype=jnp.float32, implementation=TPU)
  assert fp8.error(got, expected) < fp8.LIMIT['float32']


def test_wgrad_equals_float64_of_its_operands_and_accumulates():
  a = fp8.transposed_codes(fp8.random(0, 700, 100))
  b = fp8.transposed_codes(fp8.random(1, 700, 200), power_of_two=False)
  expected = fp8.tile_values(*a) @ fp8.tile_values(*b).T
  assert fp8.error(fp8_wgrad(*a, *b, implementation=TPU), expected) < fp8.LIMIT['float32']
  before = fp8.random(2, 100, 200)
  got = fp8_wgrad(*a, *b, accumulate=before, implementation=TPU)
  assert fp8.error(got, expected + fp8.f64(before)) < fp8.LIMIT['float32']


def test_a_bad_tile_makes_its_rows_nan_and_zeros_give_zeros():
  x = fp8.random(0, 6, 200).at[1, 150].set(jnp.inf).at[2].set(0)
  a, b = fp8.tile_codes(x), fp8.block_codes(fp8.random(1, 130, 200).at[129, 0].set(jnp.nan))
  got = np.asarray(fp8_matmul(*a, *b, implementation=TPU), np.float32)
  assert np.isnan(got[1]).all() and np.isnan(got[:, 128:]).all()
  assert not np.isnan(got[[0, 2, 3], :128]).any() and not got[2, :128].any()


@functools.cache
def _groups():
  a = fp8.tile_codes(jnp.asarray(fp8.grouped_rows(_SIZES, _SLOTS, 300)))
  b = fp8.block_codes(fp8.random(1, len(_SIZES), 144, 300))
  return a, b, jnp.asarray(_SIZES, jnp.int32)


@pytest.mark.parametrize('whole', [8192, 128])
def test_grouped_matmul_equals_float64_of_each_group_and_reads_nothing_behind_the_last(
  whole, monkeypatch
):
  monkeypatch.setattr(tpu_gemm, '_WHOLE', whole)
  (codes_SK, scale_SS), b, sizes_E = _groups()
  a_SK, b_ENK = fp8.tile_values(codes_SK, scale_SS), fp8.block_values(*b)
  expected_SN = np.zeros((_SLOTS, 144))
  for e, (start, size) in enumerate(zip(fp8.starts(_SIZES), _SIZES, strict=True)):
    expected_SN[start : start + size] = a_SK[start : start + size] @ b_ENK[e].T
  scale_SS = scale_SS.at[-128:].set(jnp.nan)
  got = grouped_matmul(codes_SK, scale_SS, *b, sizes_E, out_dtype=jnp.float32, implementation=TPU)
  assert fp8.error(got, expected_SN) < fp8.LIMIT['float32']


def test_masked_matmul_equals_float64_of_each_expert_s_rows():
  sizes = (130, 0, 1, 150)
  a, (_, b, _) = fp8.tile_codes(fp8.random(0, 4, 150, 300)), _groups()
  expected = fp8.tile_values(*a) @ fp8.block_values(*b).swapaxes(1, 2)
  for e, size in enumerate(sizes):
    expected[e, size:] = 0
  sizes_E = jnp.asarray(sizes, jnp.int32)
  got = masked_matmul(*a, *b, sizes_E, out_dtype=jnp.float32, implementation=TPU)
  assert fp8.error(got, expected) < fp8.LIMIT['float32']


@pytest.mark.parametrize('sizes', [_SIZES, (0, 0, 3, 0), (0, 0, 0, 0)])
def test_grouped_wgrad_equals_float64_of_each_group_and_accumulates(sizes):
  x_SK, y_SN = (fp8.grouped_rows(sizes, _SLOTS, dim, dim) for dim in (300, 144))
  a, b = fp8.transposed_codes(jnp.asarray(x_SK)), fp8.transposed_codes(jnp.asarray(y_SN))
  expected = np.zeros((len(sizes), 300, 144))
  for e, (start, size) in enumerate(zip(fp8.starts(sizes), sizes, strict=True)):
    cut = lambda q, at=np.s_[:, start : start + size]: fp8.tile_values(*q)[at]
    expected[e] = cut(a) @ cut(b).T
  sizes_E = jnp.asarray(sizes, jnp.int32)
  scale = a[1].at[:, -1].set(jnp.nan)  # of no group
  got = grouped_wgrad(a[0], scale, *b, sizes_E, implementation=TPU)
  assert fp8.error(got, expected) < fp8.LIMIT['float32']
  before = fp8.random(2, *got.shape)
  got = grouped_wgrad(*a, *b, sizes_E, accumulate=before, implementation=TPU)
  assert fp8.error(got, expected + fp8.f64(before)) < fp8.LIMIT['float32']


def _wild(rows: int, dim: int, dtype: str) -> jax.Array:
  """Rows of magnitudes 1e-9 to 1e6, with zeros, a row of zeros, NaN and infinity."""
  x = fp8.f64(fp8.random(0, rows, dim)) * np.logspace(-9, 6, rows)[:, None]
  x[:, ::7] = 0
  x[5], x[9, 3], x[11, 200] = 0, np.nan, -np.inf
  return jnp.asarray(x, dtype)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
@pytest.mark.parametrize('power_of_two', [True, False])
def test_quantisers_give_the_reference_s_bits(dtype, power_of_two):
  x = _wild(150, 300, dtype)
  options = {'power_of_two': power_of_two, 'floor': 1e-4}
  both = lambda f, *a: [f(*a, **options, implementation=i) for i in (TPU, 'reference')]
  same_bits(*both(quantize_tiles, x.reshape(2, 75, 300)))
  same_bits(*both(quantize_blocks, jnp.stack([x, x[::-1]])))
  same_bits(*both(quantize_tiles_transposed, x))
  same_bits(*both(requantize_transposed, *fp8.tile_codes(x)))


@pytest.mark.parametrize('weighted', [False, True])
def test_swiglu_and_its_gradient_are_those_of_xla(weighted):
  gate, up, d = (fp8.random(i, 150, 300) for i in range(3))
  gate = gate.at[3, 7].set(jnp.nan).at[4].set(0)
  weight = fp8.random(3, 150) if weighted else None
  got, expected = (
    jax.jit(functools.partial(swiglu_quantize, implementation=i))(gate, up, weight)
    for i in (TPU, 'xla')
  )
  same_bits(got, expected)
  got, expected = (swiglu_backward(gate, up, d, weight, implementation=i) for i in (TPU, 'xla'))
  for a, b in zip(got, expected, strict=True):
    assert (a is None) == (b is None)
    if a is not None:
      np.testing.assert_allclose(fp8.f64(a), fp8.f64(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_e5m6_gives_the_reference_s_bytes_and_numbers(dtype):
  x = _wild(40, 512, dtype).reshape(2, 20, 512)
  got, expected = (e5m6.encode(x, implementation=i) for i in (TPU, 'reference'))
  same_bits(got, expected)
  same_bits(*(e5m6.decode(*got, 512, dtype, implementation=i) for i in (TPU, 'reference')))
  with pytest.raises(ValueError, match=r"'pallas_tpu' cannot serve: .* multiple of 256; .*'xla'"):
    e5m6.encode(x[..., :300], implementation=TPU)


@pytest.mark.parametrize('bits', [8, 10])
def test_logfmt_gives_xla_s_range_its_codes_but_for_midpoints_and_its_numbers(bits):
  x = _wild(40, 300, 'float32').reshape(2, 20, 300)
  got, expected = (logfmt.encode(x, bits, implementation=i) for i in (TPU, 'xla'))
  same_bits(got[1:], expected[1:])
  apart = np.abs(np.asarray(got[0], int) - np.asarray(expected[0], int))
  finite = np.isfinite(np.repeat(fp8.f64(got[1]), 128, axis=-1)[..., :300])
  assert apart[finite].max() <= 1 and apart[finite].mean() < 1e-3
  got, expected = (logfmt.decode(*got, bits, 'float32', implementation=i) for i in (TPU, 'xla'))
  # Exponents of up to 22 are rounded to float32 before the power.
  np.testing.assert_allclose(fp8.f64(got), fp8.f64(expected), rtol=4e-6)


def test_kernels_run_under_replication_checking():
  mesh = jax.make_mesh((2,), ('x',), axis_types=(AxisType.Auto,))
  x, w = fp8.random(0, 64, 256), fp8.random(1, 128, 256)

  def device(x_MK, w_NK):
    a = quantize_tiles(x_MK, implementation=TPU)
    b = quantize_blocks(w_NK, implementation=TPU)
    return fp8_matmul(*a, *b, out_dtype=jnp.float32, implementation=TPU)

  each = jax.shard_map(device, mesh=mesh, in_specs=(P('x'), P()), out_specs=P('x'))
  expected = fp8.tile_values(*fp8.tile_codes(x)) @ fp8.block_values(*fp8.block_codes(w)).T
  assert fp8.error(jax.jit(each)(x, w), expected) < fp8.LIMIT['float32']
