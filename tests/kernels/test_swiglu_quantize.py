"""SwiGLU in FP8: the reference is the formula, its gradient JAX's."""

import fp8_operands as fp8
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from dsv3_jax.kernels.swiglu_quantize import swiglu_backward, swiglu_quantize

_quantize = jax.jit(swiglu_quantize, static_argnames=('power_of_two', 'implementation'))
_backward = jax.jit(swiglu_backward, static_argnames='implementation')


def _inputs(dtype: str):
  gate, up, d = (fp8.random(seed, 40, 300, dtype=dtype) for seed in range(3))
  return gate * 3, up, d, jnp.abs(fp8.random(3, 40))


@pytest.mark.parametrize('power_of_two', [True, False])
@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_codes_are_those_of_the_formula_quantised(dtype, power_of_two):
  gate, up, _, weight = _inputs(dtype)
  for w in (weight, None):
    codes, scale = _quantize(gate, up, w, power_of_two=power_of_two)
    reference = _quantize(gate, up, w, power_of_two=power_of_two, implementation='reference')
    parity.assert_same_bits([fp8.f64(codes), fp8.f64(scale)], [fp8.f64(x) for x in reference])
    exact = fp8.f64(gate) / (1 + np.exp(-fp8.f64(gate))) * fp8.f64(up)
    exact = exact if w is None else exact * fp8.f64(w)[:, None]
    assert fp8.error(fp8.tile_values(codes, scale), exact) < 0.04


@pytest.mark.parametrize('dtype', ['bfloat16', 'float32'])
def test_gradients_are_those_of_the_formula(dtype):
  gate, up, d, weight = _inputs(dtype)
  for w in (weight, None):
    got = _backward(gate, up, d, w)
    expected = _backward(gate, up, d, w, implementation='reference')
    assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
      assert fp8.error(g, fp8.f64(e)) < (1e-6 if dtype == 'float32' else 4e-3)


def test_a_bad_input_makes_its_tile_nan_and_zeros_give_zeros():
  gate, up, _, _ = _inputs('float32')
  gate = gate.at[1, 200].set(jnp.inf).at[2].set(0)
  codes, scale = _quantize(gate, up)
  assert np.isnan(fp8.f64(codes)[1, 128:256]).all() and np.isnan(np.asarray(scale)).sum() == 1
  assert not fp8.f64(codes)[2].any()


def test_bad_arguments_are_refused_by_name():
  gate, up, d, weight = _inputs('float32')
  with pytest.raises(ValueError, match=r'up float32\[40, 10\]: must be as gate'):
    swiglu_quantize(gate, up[:, :10])
  with pytest.raises(ValueError, match=r'weight float32\[3\]: must be float32\[40\]'):
    swiglu_quantize(gate, up, weight[:3])
  with pytest.raises(ValueError, match=r'gradient \(40, 10\): must be \(40, 300\)'):
    swiglu_backward(gate, up, d[:, :10])
  with pytest.raises(ValueError, match='floor = 1e-38'):
    swiglu_quantize(gate, up, floor=1e-38)
