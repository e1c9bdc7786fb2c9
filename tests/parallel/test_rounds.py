"""Rounds: which tokens go together, by counts alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh
from dsv3_jax.mesh import EXPERTS, TOKENS
from dsv3_jax.parallel import plan, rounds
from dsv3_jax.parallel.rounds import Bound

_MESH = config.Mesh(1, 2, 2, 2)
_T = 100  # of a device: chunks of two tokens


def _on_mesh(f, *operands):
  """f of each device's part, stacked over devices."""
  device_mesh = mesh.make_mesh(_MESH)
  specs = P(TOKENS)
  return jax.jit(jax.shard_map(f, mesh=device_mesh, in_specs=specs, out_specs=specs))(*operands)


def _all_rounds(run, bound, x_TD, ids_TK, weight_TK, weights):
  plan = rounds.plan([bound], _T)
  first_TD = run(x_TD, plan.live(ids_TK, 0, plan.first_end), weight_TK, weights)
  return rounds.further(run, plan, first_TD, x_TD, ids_TK, weight_TK, weights)


def _rounds_of_all_tokens(count_tX: np.ndarray, meets: tuple[str, ...], limit: int):
  """Asserts that all rounds together send every token of every device once; how many there were."""

  def run(x_TD, ids_TK, weight_TK, weights):
    del weight_TK, weights
    return jnp.where(ids_TK >= 0, x_TD, 0)

  def device(count_TX, x_TD):
    ids_TK = jnp.zeros((_T, 1), jnp.int32)
    y_TD, number = _all_rounds(
      run, Bound(count_TX, meets, limit), x_TD, ids_TK, jnp.ones((_T, 1)), ()
    )
    return y_TD, lax.pcast(number[None], TOKENS, to='varying')

  x_tD = np.arange(8 * _T, dtype=np.float32)[:, None] ** 2
  y_tD, numbers = _on_mesh(device, jnp.asarray(count_tX), jnp.asarray(x_tD))
  np.testing.assert_array_equal(y_tD, x_tD)
  assert len(set(numbers.tolist())) == 1
  return int(numbers[0])


def test_every_token_goes_exactly_once_however_many_rounds():
  rng = np.random.default_rng(0)
  count_tX = rng.integers(0, 2, (8 * _T, 3))
  numbers = [_rounds_of_all_tokens(count_tX, (), limit) for limit in (4, 7, 40, 1000)]
  assert numbers == sorted(numbers, reverse=True) and numbers[0] > 10 and numbers[-1] == 1


def test_the_device_with_most_to_send_says_how_many_rounds():
  count_tX = np.zeros((8 * _T, 1), int)
  assert _rounds_of_all_tokens(count_tX, (), 10) == 1
  count_tX[3 * _T : 4 * _T] = 1  # one device of eight
  assert _rounds_of_all_tokens(count_tX, (), 10) == 10
  assert _rounds_of_all_tokens(count_tX, (), _T) == 1


@pytest.mark.parametrize(
  ('meets', 'expected'), [((), 10), (('node',), 25), (('local',), 25), (EXPERTS, 50)]
)
def test_counts_meet_over_the_devices_that_share_a_buffer(meets, expected):
  # Two devices that share 10 slots send 4 tokens each: a chunk of two is not cut.
  assert _rounds_of_all_tokens(np.ones((8 * _T, 1), int), meets, 10) == expected


def test_rounds_are_as_long_as_they_can_be():
  count_tX = np.zeros((8 * _T, 1), int)
  count_tX[:_T] = np.array([1] * 10 + [0] * 80 + [1] * 10)[:, None]
  assert _rounds_of_all_tokens(count_tX, (), 10) == 2


def test_gradients_are_replayed_exactly_once_per_round():
  def run(x_TD, ids_TK, weight_TK, weights):
    return jnp.where(ids_TK >= 0, x_TD * weight_TK * weights, 0)

  def device(x_TD, weight_TK):
    count_TX = jnp.ones((_T, 1), jnp.int32)

    def f(x_TD, weight_TK, weights):
      ids_TK = jnp.zeros((_T, 1), jnp.int32)
      return _all_rounds(run, Bound(count_TX, (), 16), x_TD, ids_TK, weight_TK, weights)

    weights = lax.pcast(jnp.float32(3), TOKENS, to='varying')
    y_TD, pull, number = jax.vjp(f, x_TD, weight_TK, weights, has_aux=True)
    dx_TD, dweight_TK, dweights = pull(jnp.ones_like(y_TD))
    return dx_TD, dweight_TK, dweights[None], lax.pcast(number[None], TOKENS, to='varying')

  rng = np.random.default_rng(0)
  x, w = (rng.integers(1, 9, (8 * _T, 1)).astype(np.float32) for _ in range(2))
  dx, dw, dweights, numbers = _on_mesh(device, jnp.asarray(x), jnp.asarray(w))
  assert int(numbers[0]) == 7
  np.testing.assert_array_equal(dx, 3 * w)
  np.testing.assert_array_equal(dw, 3 * x)
  np.testing.assert_array_equal(dweights, (x * w).reshape(8, _T).sum(1))


# ---- sizes ---------------------------------------------------------------------------------------


def test_capacity_is_the_factor_over_the_expected_and_five_deviations_of_few():
  assert rounds.capacity(2048, 1.25, 64, 4096) == 2560
  assert rounds.capacity(16, 1.25, 1, 128) == 36
  assert rounds.capacity(16, 0.5, 1, 128) == 8
  assert rounds.capacity(16, 0.01, 2, 128) == 2  # one chunk always fits
  assert rounds.capacity(100, 1.25, 1, 120) == 120  # what all tokens need


def _v3(form: str, **of_dispatch) -> plan.Plan:
  c = config.Moe(dispatch=config.Dispatch(form, **of_dispatch))
  return plan.make(c, form, 4096, 8, 8)


def test_v3_on_64_devices_sends_130_mb_a_layer_between_nodes_where_flat_bf16_sends_515():
  two_hop = _v3('two_hop', combine='bf16')
  assert two_hop.node_rows == 2560
  out = 7168 + 56 + 8 * 2 + 8 * 4  # codes, exponents, ids, weights
  back = 2 * 7168
  assert two_hop.bytes(7168, 'bfloat16')['node'] == 7 * 2560 * (out + back)
  assert 7 * 2560 * out == 130_314_240
  flat = _v3('flat', payload='bf16', combine='bf16')
  assert flat.device_rows == 640
  assert flat.bytes(7168, 'bfloat16')['node'] == 56 * 640 * (2 * back + 48)


def test_buffers_of_v3_stay_far_below_the_worst_case():
  p = _v3('two_hop')
  received, worst = p.local * p.device_rows, p.devices * p.tokens
  assert (received, worst) == (40_960, 262_144)
  assert p.choices == 40_960
