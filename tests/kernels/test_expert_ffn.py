"""Grouped experts against every expert on every token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

from dsv3_jax.kernels.expert_ffn import expert_ffn, xla

_D, _F, _E = 16, 24, 6
_NAMES = ('y', 'dx', 'dweight', 'dgate', 'dup', 'ddown')


def _uniform(tokens: int) -> np.ndarray:
  rng = np.random.default_rng(0)
  return np.stack([rng.permutation(_E)[:2] for _ in range(tokens)])


def _sizes(first: list[int], second: list[int]) -> np.ndarray:
  """Ids of 640 tokens: `first[e]` of them choose e first, `second[e]` second; entry E is nobody."""
  return np.stack([np.repeat(np.arange(_E + 1), n) for n in (first, second)], 1)


def _some_absent(tokens: int) -> np.ndarray:
  ids_TK = _uniform(tokens)
  return np.where(np.random.default_rng(1).uniform(size=ids_TK.shape) < 0.4, _E, ids_TK)


# Loads of 640 tokens with 2 choices, 1,280 slots: both block sizes, 512 and 128, have work.
_LOADS = {
  'uniform': _uniform(640),
  'all_on_one': _sizes([0, 0, 640, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 640]),
  'all_on_the_first_and_the_last': _sizes([640, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 640, 0]),
  'at_block_borders': _sizes([0, 512, 128, 0, 0, 0, 0], [0, 0, 0, 0, 640, 0, 0]),
  'one_beside_block_borders': _sizes([511, 129, 0, 0, 0, 0, 0], [0, 0, 513, 0, 1, 126, 0]),
  'some_choices_absent': _some_absent(640),
  'nobody_here': np.full((640, 2), _E),
}


def _inputs(tokens: int, dtype: str = 'float32') -> tuple[jax.Array, ...]:
  """x, weights, gate, up, down, and a cotangent."""
  rng = np.random.default_rng(tokens)
  normal = lambda std, *shape: jnp.asarray(rng.normal(0, std, shape), dtype)
  x_TD, dy_TD = normal(1, tokens, _D), normal(1, tokens, _D)
  weight_TK = jnp.asarray(rng.uniform(0.1, 2, (tokens, 2)), jnp.float32)
  into = lambda: normal(_D**-0.5, _E, _D, _F)
  return x_TD, weight_TK, into(), into(), normal(_F**-0.5, _E, _F, _D), dy_TD


def _program(implementation: str):
  @jax.jit
  def run(ids_TK, x_TD, weight_TK, gate_EDF, up_EDF, down_EFD, dy_TD):
    ffn = lambda x_TD, weight_TK, *experts: expert_ffn(
      x_TD, ids_TK, weight_TK, *experts, implementation=implementation
    )
    y_TD, vjp = jax.vjp(ffn, x_TD, weight_TK, gate_EDF, up_EDF, down_EFD)
    return dict(zip(_NAMES, (y_TD, *vjp(dy_TD)), strict=True))

  return lambda ids_TK, inputs: run(jnp.asarray(ids_TK, jnp.int32), *inputs)


_grouped = _program('xla')
_reference = _program('reference')


@functools.cache
def _grouped_over_garbage():
  """The grouped program with NaN wherever it takes memory as it finds it."""
  taken = []

  def garbage(shape, dtype):
    taken.append(shape)
    return jnp.full(shape, jnp.nan, dtype)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(xla.lax, 'empty', garbage)
    program = _program('xla')
    program(_LOADS['uniform'], _inputs(640))
  assert taken, 'nothing takes memory as it finds it: this test has lost its object'
  return program


@pytest.mark.parametrize('ids_TK', _LOADS.values(), ids=_LOADS)
def test_grouped_equals_reference_in_value_and_gradients(ids_TK):
  inputs = _inputs(640)
  parity.assert_close(_grouped(ids_TK, inputs), _reference(ids_TK, inputs))


@pytest.mark.parametrize('ids_TK', _LOADS.values(), ids=_LOADS)
def test_garbage_in_unused_slots_changes_no_bit(ids_TK):
  inputs = _inputs(640)
  parity.assert_same_bits(_grouped_over_garbage()(ids_TK, inputs), _grouped(ids_TK, inputs))


@pytest.mark.parametrize('tokens', [1, 50, 64, 65])
def test_grouped_equals_reference_with_fewer_slots_than_a_block(tokens):
  inputs, ids_TK = _inputs(tokens), _some_absent(tokens)
  parity.assert_close(_grouped(ids_TK, inputs), _reference(ids_TK, inputs))


def _value(implementation, ids_TK, inputs):
  run = jax.jit(functools.partial(expert_ffn, implementation=implementation))
  return run(inputs[0], jnp.asarray(ids_TK, jnp.int32), *inputs[1:-1])


@pytest.mark.parametrize('implementation', ['packed', 'each'])
@pytest.mark.parametrize('ids_TK', [*map(_some_absent, (1, 16, 65)), *_LOADS.values()])
def test_those_for_few_rows_equal_reference_whatever_the_load(implementation, ids_TK):
  inputs = _inputs(len(ids_TK))
  y_TD = _value(implementation, ids_TK, inputs)
  parity.assert_close(y_TD, _value('reference', ids_TK, inputs))


def test_packed_gives_a_row_the_same_bits_whatever_else_is_there():
  inputs, ids_TK = _inputs(48), _some_absent(48)
  y_TD = _value('packed', ids_TK, inputs)
  crowded_TK = np.where(np.arange(48)[:, None] < 24, ids_TK, ids_TK[:1])
  crowded_TD = _value('packed', crowded_TK, inputs)
  np.testing.assert_array_equal(y_TD[:24], crowded_TD[:24])


@pytest.mark.parametrize(
  ('tokens', 'expected'), [(1, 'each'), (_E // 2, 'packed'), (128, 'packed'), (129, 'xla')]
)
def test_fastest_is_one_of_them_by_the_rows(tokens, expected):
  inputs, ids_TK = _inputs(tokens), _some_absent(tokens)
  fastest_TD = _value('fastest', ids_TK, inputs)
  np.testing.assert_array_equal(fastest_TD, _value(expected, ids_TK, inputs))


@pytest.mark.parametrize('load', ['uniform', 'one_beside_block_borders', 'some_choices_absent'])
def test_grouped_in_bf16_is_close_to_the_reference_in_fp32(load):
  inputs = _inputs(640, 'bfloat16')
  got = _grouped(_LOADS[load], inputs)
  assert {k: x.dtype.name for k, x in got.items()} == {
    k: 'float32' if k == 'dweight' else 'bfloat16' for k in _NAMES
  }
  expected = _reference(_LOADS[load], [x.astype(jnp.float32) for x in inputs])
  parity.assert_close(got, expected, parity.LIMIT['bfloat16'])


def test_absent_choices_give_nothing_and_get_no_gradient():
  inputs = _inputs(640)
  got = _grouped(_LOADS['nobody_here'], inputs)
  assert not any(np.any(x) for x in got.values())
  got = _grouped(_LOADS['some_choices_absent'], inputs)
  assert not np.any(np.asarray(got['dweight'])[_LOADS['some_choices_absent'] == _E])


def test_unknown_implementation_is_refused_by_name():
  x_TD, weight_TK, *experts, _ = _inputs(2)
  ids_TK = jnp.zeros((2, 2), jnp.int32)
  with pytest.raises(ValueError, match="implementation = 'cuda': must be 'xla'"):
    expert_ffn(x_TD, ids_TK, weight_TK, *experts, implementation='cuda')
