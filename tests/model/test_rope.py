"""Rotary embedding and YaRN against the oracle and the published numbers."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from parity import LIMIT, assert_close

from dsv3_jax import config
from dsv3_jax.model import rope


def _long(**changes: float) -> config.Model:
  return config.Model(max_length=163_840, rope=config.Rope(**changes))


_CASES = {
  'off': config.Model(),
  'v3': _long(),
  'v2': _long(mscale=0.707, mscale_all_dim=0.707),
  'unequal_mscales': _long(mscale=1.0, mscale_all_dim=0.3),
  'softmax_left_alone': _long(mscale=0.5, mscale_all_dim=0.0),
  'factor_1': _long(factor=1.0),
  'narrow': config.Model(
    max_length=128, rope=config.Rope(original_length=64), mla=config.Mla(rope_dim=4)
  ),
  'ramp_of_zero_width': config.Model(max_length=8, rope=config.Rope(original_length=2)),
}
_EACH = pytest.mark.parametrize('c', _CASES.values(), ids=_CASES)


@_EACH
def test_frequencies_equal_the_oracle(c):
  np.testing.assert_allclose(rope.frequencies(c), oracle.yarn_frequencies(c), rtol=1e-12)


@_EACH
def test_softmax_scale_equals_the_oracle(c):
  assert rope.softmax_scale(c) == pytest.approx(oracle.softmax_scale(c), rel=1e-12)


@_EACH
def test_rotation_by_the_table_equals_the_oracle(c):
  x_LNR = np.random.default_rng(0).normal(size=(12, 3, c.mla.rope_dim)).astype(np.float32)
  cos_LR, sin_LR = rope.table(c, jnp.arange(12))
  rotated_LNR = rope.rotate(jnp.asarray(x_LNR), cos_LR[:, None], sin_LR[:, None])
  expected_LNR = [oracle.rope(c, x_NR.astype(np.float64), t) for t, x_NR in enumerate(x_LNR)]
  assert_close(rotated_LNR, np.array(expected_LNR))


def test_rotation_in_bf16_rounds_only_its_result():
  c = _CASES['v3']
  x_LR = jnp.asarray(np.random.default_rng(0).normal(size=(12, c.mla.rope_dim)), jnp.bfloat16)
  table = rope.table(c, jnp.arange(12))
  rotated_LR = rope.rotate(x_LR, *table)
  assert rotated_LR.dtype == jnp.bfloat16
  expected_LR = rope.rotate(x_LR.astype(jnp.float32), *table).astype(jnp.bfloat16)
  assert jnp.array_equal(rotated_LR, expected_LR)


def test_table_is_made_for_any_shape_of_positions():
  c = _CASES['v3']
  positions_BL = jnp.array([[5, 0, 7], [1, 1, 2]])
  cos_BLR, sin_BLR = rope.table(c, positions_BL)
  cos_LR, sin_LR = rope.table(c, jnp.arange(8))
  assert_close((cos_BLR, sin_BLR), (cos_LR[positions_BL], sin_LR[positions_BL]), LIMIT['float32'])


def test_yarn_of_v3_has_the_published_range_and_softmax_scale():
  assert rope.yarn_range(_CASES['v3']) == (10, 23)
  assert rope.softmax_scale(_CASES['v3']) == pytest.approx(0.13523378, abs=5e-9)
