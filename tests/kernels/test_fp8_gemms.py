"""FP8 matmuls, dense and grouped, against float64 of the very same quantised operands."""

import functools

import fp8_operands as fp8
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.kernels.fp8_matmul import fp8_matmul
from dsv3_jax.kernels.fp8_wgrad import fp8_wgrad
from dsv3_jax.kernels.grouped_matmul import (
  aligned_slots,
  aligned_starts,
  grouped_matmul,
  masked_matmul,
)
from dsv3_jax.kernels.grouped_wgrad import grouped_wgrad

_BOTH = pytest.mark.parametrize('implementation', ['reference', 'xla'])
_SIZES = (130, 0, 1, 640, 128)  # groups: ragged, empty, one row, many blocks, one whole block
_SLOTS, _K, _N = 1280, 200, 144  # one block of slots behind the last group


def _operands(m: int, n: int, k: int, positive: bool = False):
  a = fp8.tile_codes(fp8.random(0, m, k, positive=positive), power_of_two=False)
  b = fp8.block_codes(fp8.random(1, n, k, positive=positive))
  return a, b


@_BOTH
@pytest.mark.parametrize('positive', [False, True])
@pytest.mark.parametrize('shape', [(100, 130, 300), (64, 48, 4096)])
def test_matmul_equals_float64_of_its_operands(implementation, positive, shape):
  a, b = _operands(*shape, positive)
  expected = fp8.tile_values(*a) @ fp8.block_values(*b).T
  got = fp8_matmul(*a, *b, out_dtype=jnp.float32, implementation=implementation)
  assert fp8.error(got, expected) < fp8.LIMIT['float32']
  got = fp8_matmul(*a, *b, implementation=implementation)
  assert got.dtype == jnp.bfloat16 and fp8.error(got, expected) < fp8.LIMIT['bfloat16']


@_BOTH
def test_wgrad_equals_float64_of_its_operands_and_accumulates(implementation):
  a = fp8.transposed_codes(fp8.random(0, 300, 100))
  b = fp8.transposed_codes(fp8.random(1, 300, 60), power_of_two=False)
  expected = fp8.tile_values(*a) @ fp8.tile_values(*b).T
  got = fp8_wgrad(*a, *b, implementation=implementation)
  assert got.dtype == jnp.float32 and fp8.error(got, expected) < fp8.LIMIT['float32']
  before = fp8.random(2, 100, 60)
  got = fp8_wgrad(*a, *b, accumulate=before, implementation=implementation)
  assert fp8.error(got, expected + fp8.f64(before)) < fp8.LIMIT['float32']


@functools.cache
def _groups():
  a = fp8.tile_codes(jnp.asarray(fp8.grouped_rows(_SIZES, _SLOTS, _K)))
  b = fp8.block_codes(fp8.random(1, len(_SIZES), _N, _K))
  a_SK, b_ENK = fp8.tile_values(*a), fp8.block_values(*b)
  expected_SN = np.zeros((_SLOTS, _N))
  for e, (start, size) in enumerate(zip(fp8.starts(_SIZES), _SIZES, strict=True)):
    expected_SN[start : start + size] = a_SK[start : start + size] @ b_ENK[e].T
  return a, b, expected_SN


@_BOTH
def test_grouped_matmul_equals_float64_of_each_group_and_reads_nothing_behind_the_last(
  implementation,
):
  (codes_SK, scale_SS), b, expected_SN = _groups()
  sizes_E = jnp.asarray(_SIZES, jnp.int32)
  assert aligned_starts(sizes_E).tolist() == fp8.starts(_SIZES)
  scale_SS = scale_SS.at[-128:].set(jnp.nan)
  got = grouped_matmul(
    codes_SK, scale_SS, *b, sizes_E, out_dtype=jnp.float32, implementation=implementation
  )
  assert fp8.error(got, expected_SN) < fp8.LIMIT['float32']


@_BOTH
def test_masked_matmul_equals_float64_of_each_expert_s_rows(implementation):
  sizes = (130, 0, 1, 5, 150)
  a = fp8.tile_codes(fp8.random(0, 5, 150, _K))
  _, b, _ = _groups()
  expected = fp8.tile_values(*a) @ fp8.block_values(*b).swapaxes(1, 2)
  for e, size in enumerate(sizes):
    expected[e, size:] = 0
  got = masked_matmul(
    *a, *b, jnp.asarray(sizes, jnp.int32), out_dtype=jnp.float32, implementation=implementation
  )
  assert fp8.error(got, expected) < fp8.LIMIT['float32']


@_BOTH
def test_grouped_wgrad_equals_float64_of_each_group_and_accumulates(implementation):
  x_SK, y_SN = (fp8.grouped_rows(_SIZES, _SLOTS, dim, dim) for dim in (_K, _N))
  a, b = fp8.transposed_codes(jnp.asarray(x_SK)), fp8.transposed_codes(jnp.asarray(y_SN))
  expected = np.zeros((len(_SIZES), _K, _N))
  for e, (start, size) in enumerate(zip(fp8.starts(_SIZES), _SIZES, strict=True)):
    cut = lambda q, at=np.s_[:, start : start + size]: fp8.tile_values(*q)[at]
    expected[e] = cut(a) @ cut(b).T
  sizes_E = jnp.asarray(_SIZES, jnp.int32)
  scale = a[1].at[:, -1].set(jnp.nan)  # of no group
  got = grouped_wgrad(a[0], scale, *b, sizes_E, implementation=implementation)
  assert fp8.error(got, expected) < fp8.LIMIT['float32']
  assert not np.any(got[1]), 'an empty group'
  before = fp8.random(2, *got.shape)
  got = grouped_wgrad(*a, *b, sizes_E, accumulate=before, implementation=implementation)
  assert fp8.error(got, expected + fp8.f64(before)) < fp8.LIMIT['float32']


def test_slots_serve_every_split_of_the_rows():
  rng = np.random.default_rng(0)
  for rows, groups in ((1, 8), (7, 3), (300, 4), (129, 1), (1024, 8)):
    slots = aligned_slots(rows, groups)
    worst = 0
    for _ in range(200):
      sizes = np.bincount(rng.integers(0, groups, rows), minlength=groups)
      worst = max(worst, 128 * int(sum(-(-sizes // 128))))
    few = np.bincount(np.arange(rows) % groups, minlength=groups)
    assert worst <= slots and 128 * int(sum(-(-few // 128))) <= slots


@_BOTH
def test_a_bad_tile_makes_its_rows_nan_and_zeros_give_zeros(implementation):
  x = fp8.random(0, 6, 200).at[1, 150].set(jnp.inf).at[2].set(0)
  a, b = fp8.tile_codes(x), fp8.block_codes(fp8.random(1, 130, 200))
  got = np.asarray(fp8_matmul(*a, *b, implementation=implementation), np.float32)
  assert np.isnan(got[1]).all() and not np.isnan(np.delete(got, 1, 0)).any()
  assert not got[2].any()
  b = fp8.block_codes(fp8.random(1, 130, 200).at[129, 0].set(jnp.nan))
  got = np.asarray(fp8_matmul(*a, *b, implementation=implementation), np.float32)
  assert np.isnan(got[:, 128:]).all() and not np.isnan(got[[0, 2], :128]).any()


def test_what_cannot_be_served_is_refused_with_what_can():
  a, b = _operands(4, 8, 130)
  with pytest.raises(ValueError, match=r"'cuda' cannot serve: .*; 'reference', 'xla'.* can"):
    fp8_matmul(*a, *b, implementation='cuda')
  with pytest.raises(ValueError, match=r'a_scale float32\[4, 1\].*: must be float32\[4, 2\]'):
    fp8_matmul(a[0], a[1][:, :1], *b)
  with pytest.raises(ValueError, match=r'b of int8: must be float8_e4m3fn'):
    fp8_matmul(*a, b[0].astype(jnp.int8), b[1])
  with pytest.raises(ValueError, match='have 130 and 100: must be equal'):
    fp8_matmul(*a, b[0][:, :100], b[1][:, :1])
  with pytest.raises(ValueError, match='out_dtype = float16'):
    fp8_matmul(*a, *b, out_dtype=jnp.float16)
  sizes = jnp.array([3], jnp.int32)
  with pytest.raises(ValueError, match='S = 4: must be a multiple of 128'):
    grouped_matmul(*a, b[0][None], b[1][None], sizes)
  with pytest.raises(ValueError, match=r'group_sizes int32\[1\]: must be int32\[2\]'):
    grouped_matmul(
      *fp8.tile_codes(jnp.zeros((128, 130))), *fp8.block_codes(jnp.zeros((2, 8, 130))), sizes
    )
  t = fp8.transposed_codes(jnp.zeros((64, 3)))
  with pytest.raises(ValueError, match=r'accumulate float32\[3\]: must be float32\[3, 3\]'):
    fp8_wgrad(*t, *t, accumulate=jnp.zeros(3))
