"""Chunked head and cross entropy against all logits at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import parity
import pytest

from dsv3_jax.kernels.cross_entropy import cross_entropy

_CASES = {  # tokens, chunk
  'chunks_divide': (48, 16),
  'chunks_do_not_divide': (37, 16),
  'fewer_tokens_than_a_chunk': (5, 16),
  'chunks_of_one': (3, 1),
}


def _inputs(tokens: int, dtype: str = 'float32', vocab: int = 50) -> tuple[jax.Array, ...]:
  rng = np.random.default_rng(tokens)
  h_TD = jnp.asarray(rng.normal(size=(tokens, 8)), dtype)
  head_DV = jnp.asarray(rng.normal(size=(8, vocab)), dtype)
  target_T = jnp.asarray(rng.integers(0, vocab, tokens), jnp.int32)
  weight_T = jnp.asarray(rng.uniform(size=tokens) * (rng.uniform(size=tokens) < 0.7), jnp.float32)
  return h_TD, head_DV, target_T, weight_T


def _loss(implementation: str, chunk: int):
  return functools.partial(cross_entropy, chunk=chunk, implementation=implementation)


def _value_and_gradients(implementation: str, chunk: int, *inputs: jax.Array):
  # Twice the loss, so that a backward which forgets its cotangent shows.
  twice = lambda *args: 2 * _loss(implementation, chunk)(*args)
  value, (dh_TD, dhead_DV) = jax.jit(jax.value_and_grad(twice, (0, 1)))(*inputs)
  return {'value': value, 'dh': dh_TD, 'dhead': dhead_DV}


@pytest.mark.parametrize(('tokens', 'chunk'), _CASES.values(), ids=_CASES)
def test_chunked_equals_reference_in_value_and_gradients(tokens, chunk):
  inputs = _inputs(tokens)
  got = _value_and_gradients('xla', chunk, *inputs)
  parity.assert_close(got, _value_and_gradients('reference', chunk, *inputs))


def test_value_without_a_gradient_equals_the_oracle():
  h_TD, head_DV, target_T, weight_T = _inputs(37)
  loss_T = oracle.cross_entropy(np.float64(h_TD) @ np.float64(head_DV), np.asarray(target_T))
  expected = np.sum(np.float64(weight_T) * loss_T)
  parity.assert_close(jax.jit(_loss('xla', 16))(h_TD, head_DV, target_T, weight_T), expected)


def test_tokens_of_weight_zero_give_nothing_and_get_no_gradient():
  h_TD, head_DV, target_T, weight_T = _inputs(37)
  got = _value_and_gradients('xla', 16, h_TD, head_DV, target_T, weight_T)
  kept = np.asarray(weight_T) > 0
  assert 0 < kept.sum() < 37
  assert not np.any(np.asarray(got['dh'])[~kept])
  few = (h_TD[kept], head_DV, target_T[kept], weight_T[kept])
  expected = _value_and_gradients('reference', 16, *few)
  parity.assert_close(got | {'dh': got['dh'][kept]}, expected)
  nothing = _value_and_gradients('xla', 16, h_TD, head_DV, target_T, jnp.zeros(37))
  assert not any(np.any(x) for x in nothing.values())


def test_chunked_in_bf16_is_close_to_the_reference_in_fp32():
  h_TD, head_DV, target_T, weight_T = _inputs(37, 'bfloat16')
  got = _value_and_gradients('xla', 16, h_TD, head_DV, target_T, weight_T)
  assert (got['dh'].dtype, got['dhead'].dtype) == (jnp.bfloat16, jnp.bfloat16)
  whole = (h_TD.astype(jnp.float32), head_DV.astype(jnp.float32), target_T, weight_T)
  expected = _value_and_gradients('reference', 16, *whole)
  parity.assert_close(got, expected, parity.LIMIT['bfloat16'])


def test_memory_is_below_a_matrix_of_logits():
  tokens, width, vocab = 8192, 8, 4096
  shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)
  shapes = shape(jnp.float32, tokens, width), shape(jnp.float32, width, vocab)
  shapes += shape(jnp.int32, tokens), shape(jnp.float32, tokens)
  needed = lambda how: parity.temporary_bytes(jax.value_and_grad(_loss(how, 1024), (0, 1)), *shapes)
  logits = tokens * vocab * 4
  assert needed('reference') >= logits, 'the yardstick itself needs all logits'
  assert needed('xla') < logits / 2


def test_unknown_implementation_is_refused_by_name():
  with pytest.raises(ValueError, match="implementation = 'cuda': must be 'xla' or 'reference'"):
    cross_entropy(*_inputs(4), implementation='cuda')
