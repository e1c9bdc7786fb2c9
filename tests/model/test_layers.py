"""RMSNorm, SwiGLU and the linear layer against the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import parity
import pytest

from dsv3_jax.model import layers
from dsv3_jax.precision import recipe


def _normal(*shape: int) -> np.ndarray:
  return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('dtype', parity.LIMIT)
def test_rms_norm_equals_the_oracle_and_keeps_the_dtype(dtype):
  x, weight_D = jnp.asarray(_normal(3, 5, 32), dtype), _normal(32)
  got = layers.rms_norm(x, jnp.asarray(weight_D), 1e-6)
  expected = oracle.rms_norm(np.float64(x), np.float64(weight_D), 1e-6)
  assert got.dtype == dtype
  parity.assert_close(got, expected, parity.LIMIT[dtype])


def test_ffn_equals_the_oracle():
  ffn = layers.Ffn(32, 24, 0.2, jax.random.key(0))
  w = {name: np.float64(getattr(ffn, name)[...]) for name in ('gate_DF', 'up_DF', 'down_FD')}
  x = _normal(2, 5, 32)
  parity.assert_close(ffn(parity.small().model, jnp.asarray(x)), oracle.swiglu(np.float64(x), **w))


def test_linear_contracts_the_last_dimensions_with_the_first():
  x, weight = _normal(2, 5, 3, 4), _normal(3, 4, 6, 7)
  got = recipe.linear('fp32', jnp.asarray(x), jnp.asarray(weight), contract=2)
  parity.assert_close(got, np.einsum('blnv,nvxy->blxy', np.float64(x), np.float64(weight)))


def test_linear_computes_in_the_dtype_of_its_input():
  x, weight = jnp.asarray(_normal(5, 32), jnp.bfloat16), _normal(32, 8)
  got = recipe.linear('bf16', x, jnp.asarray(weight))
  assert got.dtype == jnp.bfloat16
  parity.assert_close(got, np.float64(x) @ np.float64(weight), parity.LIMIT['bfloat16'])
