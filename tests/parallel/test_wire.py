"""Rows on the wire: sizes, round trips, and what must not be lost or invented on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh
from dsv3_jax.kernels import logfmt, quantize
from dsv3_jax.parallel import wire

_EACH = pytest.mark.parametrize('form', wire.FORMATS)
_CODED = pytest.mark.parametrize('form', wire.FORMATS[2:])
_BOTH = pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
_DIMS = pytest.mark.parametrize('dim', [6, 128, 300])

_encode = jax.jit(wire.encode, static_argnames='form')
_decode = jax.jit(wire.decode, static_argnames=('form', 'dim', 'dtype'))


def _random(dim: int, dtype: str, rows: int = 16) -> jax.Array:
  rng = np.random.default_rng(dim)
  return jnp.asarray(rng.normal(size=(rows, dim)) * np.logspace(-9, 6, rows)[:, None], dtype)


def _round_trip(x_RD: jax.Array, form: str) -> np.ndarray:
  row_RX = _encode(x_RD, form=form)
  assert row_RX.dtype == {'plain': f'uint{8 * x_RD.itemsize}', 'bf16': 'uint16'}.get(form, 'uint8')
  assert row_RX.nbytes == len(x_RD) * wire.row_bytes(form, x_RD.shape[1], x_RD.dtype)
  out_RD = _decode(row_RX, form=form, dim=x_RD.shape[1], dtype=x_RD.dtype)
  assert out_RD.dtype == x_RD.dtype
  return np.asarray(out_RD, np.float64)


def test_a_row_of_the_published_model_has_the_published_bytes():
  sizes = {form: wire.row_bytes(form, 7168, jnp.bfloat16) for form in wire.FORMATS}
  assert sizes == {'plain': 14336, 'bf16': 14336, 'fp8': 7224, 'logfmt8': 7392, 'logfmt10': 9184}


@_DIMS
@_BOTH
def test_plain_rows_keep_every_bit(dtype, dim):
  x_RD = _random(dim, dtype).at[0, 0].set(jnp.nan).at[1, 0].set(-jnp.inf)
  np.testing.assert_array_equal(_round_trip(x_RD, 'plain'), np.asarray(x_RD, np.float64))


@_DIMS
@_BOTH
def test_fp8_rows_are_those_of_the_quantiser(dtype, dim):
  x_RD = _random(dim, dtype)
  quantised = quantize.quantize_tiles(x_RD, floor=quantize.SMALLEST_FLOOR)
  expected_RD = quantize.dequantize_tiles(*quantised, x_RD.dtype)
  np.testing.assert_array_equal(_round_trip(x_RD, 'fp8'), np.asarray(expected_RD, np.float64))


@_DIMS
@_BOTH
@pytest.mark.parametrize('bits', [8, 10])
def test_logfmt_rows_are_those_of_the_codec(bits, dtype, dim):
  x_RD = _random(dim, dtype)
  expected_RD = np.asarray(logfmt.decode(*logfmt.encode(x_RD, bits), bits, x_RD.dtype), np.float64)
  got_RD = _round_trip(x_RD, f'logfmt{bits}')
  same_RD = np.isclose(got_RD, expected_RD, rtol=1e-5, atol=0)
  assert np.mean(same_RD) > 0.98, 'two programs may round only midpoints differently'
  np.testing.assert_allclose(got_RD, expected_RD, rtol=0.5)


def test_all_codes_of_10_bits_cross_in_five_quarters_of_a_byte():
  codes_RD = jnp.asarray(np.random.default_rng(0).permutation(1024).reshape(4, 256), jnp.uint16)
  planes = wire._split_ten(codes_RD)
  assert [x.shape for x in planes] == [(4, 256), (4, 64)]
  np.testing.assert_array_equal(wire._join_ten(*planes), codes_RD)


@_BOTH
@pytest.mark.parametrize('form, limit', [('fp8', 2**-4), ('logfmt8', 0.06), ('logfmt10', 0.013)])
def test_gradients_of_1e_9_keep_their_precision(form, limit, dtype):
  x_RD = 1e-9 * np.random.default_rng(0).uniform(0.1, 1, size=(8, 256))
  x_RD = jnp.asarray(x_RD, dtype)
  np.testing.assert_allclose(_round_trip(x_RD, form), np.asarray(x_RD, np.float64), rtol=limit)


@_EACH
@_BOTH
@_DIMS
def test_a_row_of_zero_bytes_is_a_row_of_zeros(dim, dtype, form):
  rows_RX = jnp.zeros((3, wire.row_bytes(form, dim, dtype)), jnp.uint8)
  out_RD = np.asarray(_decode(rows_RX, form=form, dim=dim, dtype=dtype), np.float32)
  np.testing.assert_array_equal(out_RD.view(np.uint32), 0)
  assert not _round_trip(jnp.zeros((3, dim), dtype), form).any()


@_CODED
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_arrive_as_nan_and_spoil_only_their_tile(bad, form):
  x_RD = _random(300, 'bfloat16').at[2, 130].set(bad)
  expected_RD = np.zeros(x_RD.shape, bool)
  expected_RD[2, 128:256] = True
  np.testing.assert_array_equal(np.isnan(_round_trip(x_RD, form)), expected_RD)


@_BOTH
def test_an_fp8_row_crosses_again_without_loss(dtype):
  once_RD = _round_trip(_random(300, dtype), 'fp8')
  twice_RD = _round_trip(jnp.asarray(once_RD, dtype), 'fp8')
  np.testing.assert_array_equal(twice_RD, once_RD)


@pytest.mark.parametrize(('narrowest', 'word'), [(0, 'uint8'), (1, 'uint16'), (3, 'uint32')])
def test_parts_of_any_dtype_are_packed_in_words_of_the_narrowest(narrowest, word):
  rng = np.random.default_rng(0)
  parts = [
    jnp.asarray(rng.integers(0, 256, (5, 8)), jnp.uint8),
    jnp.asarray(rng.integers(-(2**15), 2**15, (5, 3)), jnp.int16),
    jnp.asarray(rng.normal(size=(5, 1)), jnp.bfloat16),
    jnp.asarray(rng.normal(size=(5, 2)), jnp.float32),
  ][narrowest:]
  row_RX = wire.pack(*parts)
  assert row_RX.dtype == word and row_RX.nbytes == sum(part.nbytes for part in parts)
  got = wire.unpack(row_RX, *((x.shape[1], x.dtype) for x in parts))
  for x, expected in zip(got, parts, strict=True):
    assert x.dtype == expected.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(expected))


@_EACH
def test_rows_cross_a_mesh_in_one_permute_with_replication_checked(form):
  x_RD = _random(300, 'bfloat16')
  device_mesh = mesh.make_mesh(config.Mesh(data=1, node=2, local=2))

  def exchange(x_rD):
    row_rX = jax.lax.ppermute(wire.encode(x_rD, form), 'node', [(0, 1), (1, 0)])
    return wire.decode(row_rX, form, x_rD.shape[1], x_rD.dtype)

  spec = P(mesh.TOKENS)
  there = jax.jit(jax.shard_map(exchange, mesh=device_mesh, in_specs=spec, out_specs=spec))
  assert there.lower(x_RD).as_text().count('collective_permute') == 1
  got_RD = np.roll(np.asarray(there(x_RD), np.float64), 8, axis=0)
  np.testing.assert_array_equal(got_RD, _round_trip(x_RD, form))


def test_bad_arguments_are_refused_by_name():
  with pytest.raises(ValueError, match="'fp4': must be one of plain, bf16, fp8, logfmt8, logfmt10"):
    wire.row_bytes('fp4', 128, jnp.bfloat16)
  with pytest.raises(ValueError, match="'fp4': must be one of"):
    wire.encode(jnp.ones((2, 128)), 'fp4')
  with pytest.raises(ValueError, match='rows of 100 bytes'):
    wire.decode(jnp.zeros((2, 100), jnp.uint8), 'fp8', 128, jnp.bfloat16)
