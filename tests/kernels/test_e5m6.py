"""E5M6: twelve bits, 1x128, powers of two."""

import functools

import fp8_operands as fp8
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from dsv3_jax.kernels import e5m6

_encode = jax.jit(e5m6.encode, static_argnames='implementation')


@functools.partial(jax.jit, static_argnames=('dim', 'dtype', 'implementation'))
def _decode(codes, scale, dim, dtype='float32', implementation=None):
  return e5m6.decode(codes, scale, dim, dtype, implementation=implementation)


def _random(dim: int) -> jax.Array:
  x = fp8.random(dim, 50, dim) * jnp.asarray(np.logspace(-9, 6, 50)[:, None], jnp.float32)
  return x.at[3, 5].set(jnp.nan).at[7, dim - 1].set(-jnp.inf).at[9].set(0)


@pytest.mark.parametrize('dim', [100, 300, 512])
def test_both_implementations_give_the_same_bits_in_three_bytes_for_two_codes(dim):
  x = _random(dim)
  codes, scale = _encode(x)
  parity.assert_same_bits((codes, scale), _encode(x, implementation='reference'))
  assert codes.shape == (50, e5m6.row_bytes(dim)) and e5m6.row_bytes(512) == 768
  values = _decode(codes, scale, dim)
  parity.assert_same_bits(values, _decode(codes, scale, dim, implementation='reference'))
  finite = np.isfinite(np.asarray(scale)).repeat(128, 1)[:, :dim]
  np.testing.assert_array_equal(np.isnan(values), ~finite)
  got, x = fp8.f64(values)[finite], fp8.f64(x)[finite]
  assert np.all(np.abs(got - x) <= 2.0**-7 * np.abs(x)), 'down to 2^-29 of the largest'
  assert np.max(np.abs(got - x) / np.maximum(np.abs(x), 1e-30)) > 2.0**-7.1, '6 bits of mantissa'


def test_stored_numbers_are_exact_in_bfloat16_and_stored_again_without_loss():
  codes, scale = _encode(_random(300))
  values = _decode(codes, scale, 300)
  parity.assert_same_bits(fp8.f64(_decode(codes, scale, 300, 'bfloat16')), fp8.f64(values))
  again = _decode(*_encode(values), 300)
  parity.assert_same_bits(again, values)


def test_rounding_is_to_nearest_even_down_to_the_subnormals():
  half = np.arange(0, 0x7C00, dtype=np.uint16).view(np.float16)[: 0x7BF0 + 1].astype(np.float32)
  x = np.stack([half, np.full_like(half, 65024)], 1)  # the scale is 1
  x[:, 0] = np.minimum(x[:, 0], 65024)
  codes, scale = _encode(jnp.asarray(x))
  assert (np.asarray(scale) == 1).all()
  bits = np.arange(0, 0x7BF1, dtype=np.int64)
  expected = ((bits + 7 + ((bits >> 4) & 1)) >> 4 << 4).astype(np.uint16).view(np.float16)
  expected = np.minimum(expected.astype(np.float64), 65024)
  np.testing.assert_array_equal(fp8.f64(_decode(codes, scale, 2))[:, 0], expected)


def test_bad_arguments_are_refused_by_name():
  codes, scale = _encode(jnp.ones((2, 300)))
  with pytest.raises(ValueError, match='int32: must be bfloat16 or float32'):
    e5m6.encode(jnp.ones((2, 300), jnp.int32))
  with pytest.raises(ValueError, match='must be uint8 with 364 bytes a row'):
    e5m6.decode(codes, scale, 236, jnp.float32)
  with pytest.raises(ValueError, match=r'scale \(2, 2\): must be \(2, 3\)'):
    e5m6.decode(codes, scale[:, :2], 300, jnp.float32)
