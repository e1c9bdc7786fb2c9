"""Copies in row order, bit by bit, of every dtype and order of axes."""

import itertools

import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.weights import transpose

_DTYPES = [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float64, np.float16]


@pytest.mark.parametrize('dtype', _DTYPES)
def test_every_order_of_axes_gives_the_same_bits_as_numpy(dtype):
  rng = np.random.default_rng(0)
  nbytes = 6 * 130 * 37 * np.dtype(dtype).itemsize
  bits = rng.integers(0, 256, nbytes, np.uint8)  # NaNs and all
  x = bits.view(dtype).reshape(6, 130, 37)
  for order in itertools.permutations(range(3)):
    copy = transpose.contiguous(x.transpose(order))
    assert copy.flags.c_contiguous and copy.dtype == dtype
    assert copy.tobytes() == x.transpose(order).tobytes()


def test_an_array_in_row_order_is_not_copied():
  x = np.zeros((3, 4), np.float32)
  assert transpose.contiguous(x) is x


def test_parts_of_rows_are_copied_too():
  x = np.arange(60, dtype=np.uint8).reshape(6, 10).view(ml_dtypes.float8_e4m3fn)
  assert transpose.contiguous(x[:, 2:5]).tobytes() == x[:, 2:5].tobytes()
  assert transpose.contiguous(x[::2].T).tobytes() == x[::2].T.tobytes()


def test_without_a_cpu_backend_numpy_does_it(monkeypatch):
  monkeypatch.setattr(transpose, '_cpu', lambda: None)
  x = np.arange(12, dtype=np.float32).reshape(3, 4)
  assert transpose.contiguous(x.T).tobytes() == x.T.tobytes()
