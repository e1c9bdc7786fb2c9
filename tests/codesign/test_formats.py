"""Number formats in NumPy against the kernels that use them, and against ml_dtypes."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dsv3_jax.codesign import formats
from dsv3_jax.kernels import logfmt, quantize


def _awkward() -> np.ndarray:
  """Rows of 300 numbers, a ragged last tile: usual ones, wide ones, sparse ones, one magnitude, zeros, tiny."""
  rng = np.random.default_rng(0)
  x_TD = rng.standard_normal((64, 300)).astype(np.float32)
  x_TD[8:16] *= np.exp2(rng.uniform(-40, 40, (8, 300))).astype(np.float32)
  x_TD[16:24] *= rng.random((8, 300)) < 0.1
  x_TD[24] = np.where(x_TD[24] > 0, 0.375, -0.375)
  x_TD[25] = 0
  x_TD[26] *= 1e-12
  x_TD[27] = formats.bf16(x_TD[27])
  x_TD[28, ::2] = 448 * 2.0**-9 * np.arange(150)  # multiples of half a step of E4M3
  return x_TD


X_TD = _awkward()


def test_bf16_and_the_grids_of_both_fp8_formats_are_ml_dtypes():
  np.testing.assert_array_equal(
    formats.bf16(X_TD), X_TD.astype(ml_dtypes.bfloat16).astype(np.float32)
  )
  for kind, dtype in ((formats.E4M3, jnp.float8_e4m3fn), (formats.E5M2, jnp.float8_e5m2)):
    largest = float(ml_dtypes.finfo(dtype).max)
    assert kind.largest == largest
    x = np.clip(X_TD, -largest, largest)
    np.testing.assert_array_equal(kind.round(x), x.astype(dtype).astype(np.float32))
    every = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    every = every[np.isfinite(every)]
    np.testing.assert_array_equal(kind.round(every), every)
  assert formats.E4M3.round(np.float32([500, -1e9])).tolist() == [448, -448]


def test_tiles_of_e4m3_are_the_kernel_s_bits():
  codes_TD, scale_TS = jax.jit(quantize.quantize_tiles)(X_TD)
  values_TD, own_TS = formats.scaled(X_TD, formats.E4M3, power_of_two=True)
  np.testing.assert_array_equal(own_TS, scale_TS)
  np.testing.assert_array_equal(values_TD, np.asarray(codes_TD).astype(np.float32))
  back = quantize.dequantize_tiles(codes_TD, scale_TS, jnp.float32)
  own = formats.rounded(X_TD, formats.E4M3, power_of_two=True)
  np.testing.assert_array_equal(own, back)
  # XLA divides by 448 to within the last bit.
  codes_TD, scale_TS = quantize.quantize_tiles(X_TD, power_of_two=False)
  values_TD, own_TS = formats.scaled(X_TD, formats.E4M3, power_of_two=False)
  np.testing.assert_allclose(own_TS, scale_TS, rtol=1.2e-7)
  assert (values_TD != np.asarray(codes_TD).astype(np.float32)).sum() <= 2


@pytest.mark.parametrize('bits', [8, 10])
def test_logfmt_is_the_kernel_s(bits):
  codes_TD, low_TS, high_TS = jax.jit(lambda x: logfmt.encode(x, bits))(X_TD)
  own_TD, own_low_TS, own_high_TS = formats.logfmt_encode(X_TD, bits)
  np.testing.assert_array_equal(own_low_TS, low_TS.astype(jnp.float32))
  np.testing.assert_array_equal(own_high_TS, high_TS.astype(jnp.float32))
  # A code may differ where both are equally near, and nowhere else.
  back = logfmt.decode(codes_TD, low_TS, high_TS, bits, jnp.float32)
  own = formats.logfmt_decode(own_TD, own_low_TS, own_high_TS, bits)
  differ = own_TD != np.asarray(codes_TD)
  assert differ.sum() <= 2
  np.testing.assert_allclose(np.abs(own - X_TD)[differ], np.abs(back - X_TD)[differ], rtol=1e-3)
  np.testing.assert_allclose(own[~differ], np.asarray(back)[~differ], rtol=5e-6)
