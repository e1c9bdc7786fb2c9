"""Blockwise causal attention against the one that materialises all scores."""

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from dsv3_jax.kernels import e5m6
from dsv3_jax.kernels.attention import causal_attention

_CASES = {  # length, block
  'length_not_divisible': (37, 16),
  'length_below_block': (9, 16),
  'length_is_block': (16, 16),
  'many_blocks': (64, 8),
  'blocks_of_one': (7, 1),
}


def _inputs(length: int, dtype: str = 'float32') -> tuple[jax.Array, ...]:
  """q, k, v and a cotangent; keys are wider than values."""
  rng = np.random.default_rng(length)
  normal = lambda width: jnp.asarray(rng.normal(size=(2, length, 3, width)), dtype)
  return normal(12), normal(12), normal(8), normal(8)


def _value_and_gradients(implementation: str, block: int, scale: float = 0.7):
  @jax.jit
  def run(q_BLNJ, k_BLNJ, v_BLNV, dout_BLNV):
    attend = lambda *qkv: causal_attention(
      *qkv, scale=scale, block=block, implementation=implementation
    )
    out_BLNV, vjp = jax.vjp(attend, q_BLNJ, k_BLNJ, v_BLNV)
    return dict(zip(('out', 'dq', 'dk', 'dv'), (out_BLNV, *vjp(dout_BLNV)), strict=True))

  return run


@pytest.mark.parametrize(('length', 'block'), _CASES.values(), ids=_CASES)
def test_blockwise_equals_reference_in_value_and_gradients(length, block):
  inputs = _inputs(length)
  got = _value_and_gradients('xla', block)(*inputs)
  parity.assert_close(got, _value_and_gradients('reference', block)(*inputs))


def test_blockwise_in_bf16_is_close_to_the_reference_in_fp32():
  inputs = _inputs(37, 'bfloat16')
  got = _value_and_gradients('xla', 16)(*inputs)
  assert {x.dtype for x in got.values()} == {jnp.dtype('bfloat16')}
  expected = _value_and_gradients('reference', 16)(*(x.astype(jnp.float32) for x in inputs))
  parity.assert_close(got, expected, parity.LIMIT['bfloat16'])


def test_scores_far_beyond_the_range_of_exp_stay_finite():
  inputs = _inputs(37)
  got = _value_and_gradients('xla', 16, scale=30.0)(*inputs)
  expected = _value_and_gradients('reference', 16, scale=30.0)(*inputs)
  # Scores of hundreds carry their rounding, about 1e-5, into the exponent.
  parity.assert_close(got, expected, 1e-4)


def test_no_position_sees_a_later_one():
  q, k, v, _ = _inputs(37)
  attend = jax.jit(lambda k, v: causal_attention(q, k, v, scale=0.7, block=16))
  spoilt = lambda x: x.at[:, 20:].set(1e6)
  np.testing.assert_array_equal(attend(k, v)[:, :20], attend(spoilt(k), spoilt(v))[:, :20])


def test_memory_at_length_4096_is_far_below_a_matrix_of_scores_per_head():
  length, heads = 4096, 4
  shape = lambda width: jax.ShapeDtypeStruct((1, length, heads, width), jnp.float32)

  def needed(implementation: str) -> int:
    attend = lambda q, k, v: jnp.sum(
      causal_attention(q, k, v, scale=1.0, implementation=implementation)
    )
    return parity.temporary_bytes(jax.grad(attend, (0, 1, 2)), shape(12), shape(12), shape(8))

  scores = heads * length * length * 4
  assert needed('reference') > scores, 'the yardstick itself needs all scores'
  assert needed('xla') < scores / 8


def test_unknown_implementation_is_refused_by_name():
  with pytest.raises(ValueError, match="implementation = 'cuda': must be 'xla' or 'reference'"):
    causal_attention(*_inputs(4)[:3], scale=1.0, implementation='cuda')


def test_an_output_kept_in_e5m6_is_what_comes_out_and_what_the_backward_reads():
  q, k, v, dout = _inputs(24)
  plain = lambda *args: causal_attention(*args, scale=0.3, block=8)
  kept = lambda *args: causal_attention(*args, scale=0.3, block=8, stored='e5m6')
  (out, pull), (expected, plain_pull) = jax.vjp(kept, q, k, v), jax.vjp(plain, q, k, v)
  rounded = e5m6.decode(*e5m6.encode(expected), expected.shape[-1], expected.dtype)
  np.testing.assert_array_equal(out, rounded)
  assert np.any(np.asarray(out) != np.asarray(expected))
  for got, plain_got in zip(pull(dout), plain_pull(dout), strict=True):
    parity.assert_close(got, plain_got, 2**-6)
  sizes = [x.dtype for x in jax.tree.leaves(pull)]
  assert jnp.uint8 in sizes
  with pytest.raises(ValueError, match="stored = 'e4m3': must be 'plain' or 'e5m6'"):
    causal_attention(q, k, v, scale=0.3, stored='e4m3')
