"""The oracle against hand-worked examples, published numbers and a second way to the same value."""

import dataclasses
import math

import ml_dtypes
import numpy as np
import oracle
import oracle_precision as precision
import pytest

from dsv3_jax import config

V3 = config.Model()
SMALL = config.freeze(config.debug(config.default())).model
YARN = dataclasses.replace(
  SMALL, max_length=1280, rope=dataclasses.replace(SMALL.rope, original_length=32, mscale=0.5)
)
PLAIN_QUERY = dataclasses.replace(SMALL, mla=dataclasses.replace(SMALL.mla, q_rank=0))
TWO_DEPTHS = dataclasses.replace(SMALL, mtp_depth=2)
EIGHT = config.Moe(num_experts=8, top_k=2, num_groups=4, top_groups=1)  # 4 groups of 2


def rng() -> np.random.Generator:
  return np.random.default_rng(0)


def v3_long(**rope: float) -> config.Model:
  return dataclasses.replace(V3, max_length=163_840, rope=dataclasses.replace(V3.rope, **rope))


def choose(cfg: config.Moe, affinity_E: list[float], bias: float | list[float] = 0.0):
  """Routes one token whose affinities are given."""
  a_E = np.array(affinity_E)
  logits_E = np.log(a_E / (1 - a_E)) if cfg.scoring == 'sigmoid' else np.log(a_E)
  bias_E = np.broadcast_to(np.asarray(bias, float), a_E.shape)
  ids_TK, weights_TK, affinity_TE = oracle.route(cfg, logits_E[None], np.eye(len(a_E)), bias_E)
  np.testing.assert_allclose(affinity_TE[0], a_E, rtol=1e-12)
  return ids_TK[0].tolist(), weights_TK[0]


# ---- rotary embedding ----------------------------------------------------------------------------


def test_yarn_of_v3_blends_between_pairs_10_and_23():
  assert oracle.yarn_range(v3_long()) == (10, 23)
  ratio = oracle.yarn_frequencies(v3_long()) / oracle.yarn_frequencies(V3)
  np.testing.assert_allclose(ratio[:11], 1)
  np.testing.assert_allclose(ratio[23:], 1 / 40)
  np.testing.assert_allclose(ratio[11], 12 / 13 + 1 / 13 / 40)


def test_yarn_softmax_scale_of_v3_is_the_published_one():
  assert oracle.yarn_mscale(v3_long(), 1.0) == pytest.approx(1.3688879, abs=5e-8)
  assert oracle.softmax_scale(v3_long()) == pytest.approx(0.13523378, abs=5e-9)


def test_yarn_softmax_scale_of_v2_is_the_published_one():
  cfg = v3_long(mscale=0.707, mscale_all_dim=0.707)
  assert oracle.yarn_mscale(cfg, 0.707) == pytest.approx(1.2608038, abs=5e-8)
  assert oracle.softmax_scale(cfg) * math.sqrt(192) == pytest.approx(1.5896262, abs=5e-8)


def test_without_mscale_all_dim_yarn_scales_the_rotation_but_not_the_softmax():
  cfg = v3_long(mscale=1.0, mscale_all_dim=0.0)
  assert oracle.softmax_scale(cfg) == 192**-0.5
  rotated = oracle.rope(cfg, np.ones(64), 7)
  assert np.linalg.norm(rotated) == pytest.approx(8 * 1.3688879, rel=1e-7)


def test_yarn_is_off_at_the_original_length():
  assert oracle.softmax_scale(V3) == pytest.approx(0.07216878, abs=5e-9)
  np.testing.assert_allclose(oracle.yarn_frequencies(V3)[[0, 16]], [1, 0.01])


def test_rope_multiplies_adjacent_pairs_as_complex_numbers():
  x_R = rng().normal(size=(3, 64))
  turn = np.exp(1j * 5 * oracle.yarn_frequencies(V3))
  want = x_R.view(np.complex128) * turn
  np.testing.assert_allclose(oracle.rope(V3, x_R, 5), want.view(np.float64), atol=1e-12)


def test_rope_scores_depend_on_distance_alone():
  q_R, k_R = rng().normal(size=(2, 64))
  near = oracle.rope(V3, q_R, 9) @ oracle.rope(V3, k_R, 4)
  assert oracle.rope(V3, q_R, 105) @ oracle.rope(V3, k_R, 100) == pytest.approx(near, rel=1e-12)


# ---- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize('cfg', [SMALL, YARN, PLAIN_QUERY], ids=['v3', 'yarn', 'plain_query'])
def test_absorbed_attention_step_by_step_equals_expanded(cfg):
  w = oracle.random_weights(cfg, rng())['moe_layers'][0]['attn']
  x_LD = rng().normal(size=(7, cfg.dim))
  latent_MC, k_rope_MR = np.zeros((0, cfg.mla.kv_rank)), np.zeros((0, cfg.mla.rope_dim))
  steps = []
  for x_D in x_LD:
    out_D, latent_MC, k_rope_MR = oracle.mla_absorbed(cfg, w, x_D, latent_MC, k_rope_MR)
    steps.append(out_D)
  np.testing.assert_allclose(steps, oracle.mla(cfg, w, x_LD), rtol=1e-10, atol=1e-12)
  assert latent_MC.shape[1] + k_rope_MR.shape[1] == cfg.mla.kv_rank + cfg.mla.rope_dim


def test_expanded_attention_equals_masked_matrices_over_all_positions_at_once():
  w = oracle.random_weights(YARN, rng())['moe_layers'][0]['attn']
  x_LD = rng().normal(size=(7, YARN.dim))
  H, R = YARN.mla.nope_dim, YARN.mla.rope_dim
  turn_LR = np.exp(1j * np.outer(np.arange(7), oracle.yarn_frequencies(YARN)))
  turn_LR *= (0.05 * math.log(40) + 1) / (0.1 * math.log(40) + 1)  # mscale 0.5, mscale_all_dim 1
  latent_LC = oracle.rms_norm(x_LD @ w['kv_down_DC'], w['kv_norm_C'], YARN.norm_eps)
  q_LQ = oracle.rms_norm(x_LD @ w['q_down_DQ'], w['q_norm_Q'], YARN.norm_eps)
  q_LNJ = np.einsum('LQ,QNJ->LNJ', q_LQ, w['q_up_QNJ'])
  q_rope_LNR = np.ascontiguousarray(q_LNJ[..., H:]).view(np.complex128) * turn_LR[:, None]
  k_rope_MR = (x_LD @ w['k_rope_DR']).view(np.complex128) * turn_LR
  score_NLM = np.einsum('LNH,MC,CNH->NLM', q_LNJ[..., :H], latent_LC, w['k_up_CNH'])
  score_NLM += np.einsum('LNR,MR->NLM', q_rope_LNR, k_rope_MR.conj()).real
  score_NLM *= (0.1 * math.log(40) + 1) ** 2 / math.sqrt(H + R)
  p_NLM = np.exp(score_NLM) * np.tri(7)
  p_NLM /= p_NLM.sum(axis=2, keepdims=True)
  want = np.einsum('NLM,MC,CNV,NVD->LD', p_NLM, latent_LC, w['v_up_CNV'], w['out_NVD'])
  np.testing.assert_allclose(oracle.mla(YARN, w, x_LD), want, rtol=1e-9, atol=1e-12)


def test_first_token_attends_to_its_own_value_only():
  w = oracle.random_weights(SMALL, rng())['moe_layers'][0]['attn']
  x_LD = rng().normal(size=(3, SMALL.dim))
  c_C, _ = oracle.mla_latent(SMALL, w, x_LD[0], 0)
  want_D = np.einsum('C,CNV,NVD->D', c_C, w['v_up_CNV'], w['out_NVD'])
  np.testing.assert_allclose(oracle.mla(SMALL, w, x_LD)[0], want_D, rtol=1e-10)


# ---- experts -------------------------------------------------------------------------------------


def test_sigmoid_groups_rank_by_their_two_best_and_softmax_groups_by_their_best():
  affinity_E = [0.20, 0.01, 0.15, 0.14, 0.12, 0.13, 0.15, 0.10]
  ids, weights = choose(EIGHT, affinity_E)
  assert ids == [2, 3]
  np.testing.assert_allclose(weights, [2.5 * 15 / 29, 2.5 * 14 / 29])
  v2 = dataclasses.replace(EIGHT, scoring='softmax', normalize=False, route_scale=16.0)
  ids, weights = choose(v2, affinity_E)
  assert ids == [0, 1]
  np.testing.assert_allclose(weights, [16 * 0.20, 16 * 0.01])


def test_masked_experts_lose_although_every_kept_score_is_negative():
  affinity_E = [0.9, 0.8, 0.1, 0.1, 0.5, 0.6, 0.2, 0.3]
  ids, weights = choose(EIGHT, affinity_E, bias=-2.0)  # kept scores -1.1, -1.2; a 0 would win
  assert ids == [0, 1]
  np.testing.assert_allclose(weights, [2.5 * 9 / 17, 2.5 * 8 / 17])


def test_bias_moves_the_choice_and_not_the_weight():
  cfg = dataclasses.replace(EIGHT, num_groups=1)
  affinity_E = [0.9, 0.8, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1]
  assert choose(cfg, affinity_E)[0] == [0, 1]
  ids, weights = choose(cfg, affinity_E, bias=[0, 0, 0, 0.85, 0, 0, 0, 0])
  assert ids == [3, 0]  # 0.95 before 0.9
  np.testing.assert_allclose(weights, [2.5 * 0.1, 2.5 * 0.9])


def test_bias_moves_the_kept_groups():
  affinity_E = [0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.2, 0.3]
  ids, weights = choose(EIGHT, affinity_E, bias=[0, 0, 0, 0, 0, 0, 1, 1])
  assert ids == [7, 6]
  np.testing.assert_allclose(weights, [2.5 * 0.6, 2.5 * 0.4])


def test_normalize_false_keeps_the_raw_sigmoid_affinities():
  cfg = dataclasses.replace(EIGHT, normalize=False)
  _, weights = choose(cfg, [0.9, 0.8, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
  np.testing.assert_allclose(weights, [2.5 * 0.9, 2.5 * 0.8])


def test_softmax_rule_ignores_the_bias():
  cfg = dataclasses.replace(EIGHT, scoring='softmax')
  ids, _ = choose(cfg, [0.3, 0.2] + [0.5 / 6] * 6, bias=[0] * 7 + [9])
  assert ids == [0, 1]


def test_equal_scores_go_to_the_lower_index():
  cfg = dataclasses.replace(EIGHT, top_groups=2, top_k=4)
  assert choose(cfg, [0.5] * 8)[0] == [0, 1, 2, 3]


def test_moe_of_identical_experts_is_one_expert_times_the_route_scale():
  cfg = dataclasses.replace(SMALL.moe, num_shared=0)
  w = oracle.random_weights(SMALL, rng())['moe_layers'][0]['ffn']
  for name in ('gate_EDF', 'up_EDF', 'down_EFD'):
    w[name][:] = w[name][0]
  x_TD = rng().normal(size=(5, SMALL.dim))
  one = oracle.swiglu(x_TD, w['gate_EDF'][0], w['up_EDF'][0], w['down_EFD'][0])
  np.testing.assert_allclose(oracle.moe(cfg, w, x_TD)[0], cfg.route_scale * one, rtol=1e-10)
  shared = oracle.moe(SMALL.moe, w, x_TD)[0] - oracle.moe(cfg, w, x_TD)[0]
  np.testing.assert_allclose(shared, oracle.swiglu(x_TD, **w['shared']), rtol=1e-9, atol=1e-12)


def test_balance_loss_of_a_hand_worked_sequence():
  # shares .4 .2 .1 .3 and .1 .2 .3 .4; chosen {0, 3} and {3, 2}; f = 1 0 1 2, P = .25 .2 .2 .35
  affinity_TE = np.array([[0.8, 0.4, 0.2, 0.6], [0.1, 0.2, 0.3, 0.4]])
  assert oracle.balance_loss(affinity_TE, top_k=2) == pytest.approx(1.15)


def test_balance_loss_is_one_when_every_expert_is_equally_loaded():
  affinity_TE = 0.1 + 0.8 * np.eye(8)
  assert oracle.balance_loss(affinity_TE, top_k=1) == pytest.approx(1.0)


def test_bias_falls_for_overloaded_experts_and_rests_at_the_mean():
  bias_E = oracle.update_bias(np.zeros(4), np.array([4, 2, 0, 2]), gamma=0.001)
  np.testing.assert_allclose(bias_E, [-0.001, 0, 0.001, 0])


# ---- model and objective -------------------------------------------------------------------------


def test_logits_see_no_later_token():
  w = oracle.random_weights(TWO_DEPTHS, rng())
  row = np.arange(9) * 7
  changed = row.copy()
  changed[5] += 1
  one, hidden_LD, _ = oracle.transformer(TWO_DEPTHS, w, row[:8])
  other, other_LD, _ = oracle.transformer(TWO_DEPTHS, w, changed[:8])
  np.testing.assert_array_equal(one[:5], other[:5])
  assert np.all(np.any(one[5:] != other[5:], axis=1))
  depths, _ = oracle.mtp(TWO_DEPTHS, w, row, hidden_LD)
  other_depths, _ = oracle.mtp(TWO_DEPTHS, w, changed, other_LD)
  for k, (one, other) in enumerate(zip(depths, other_depths, strict=True), start=1):
    assert one.shape == (8 - k, SMALL.vocab_size)
    np.testing.assert_array_equal(one[: 5 - k], other[: 5 - k])  # row i sees row[i + k]
    assert np.all(np.any(one[5 - k :] != other[5 - k :], axis=1))


def test_mtp_projection_takes_the_embedding_first():
  w = oracle.random_weights(SMALL, rng())
  row, D = np.arange(6), SMALL.dim
  _, hidden_LD, _ = oracle.transformer(SMALL, w, row[:5])
  w['mtp'][0]['proj_DD'][:D] = 0  # only the hidden state is left
  alone, _ = oracle.mtp(SMALL, w, row, hidden_LD)
  no_embedding, _ = oracle.mtp(SMALL, w, row[::-1], hidden_LD)
  np.testing.assert_array_equal(alone[0], no_embedding[0])


def test_uniform_predictions_cost_log_vocabulary_and_mtp_divides_by_the_full_length():
  w = oracle.random_weights(TWO_DEPTHS, rng())
  w['head_DV'][:] = 0
  tokens = rng().integers(0, SMALL.vocab_size, (2, 7))
  got = oracle.objective(TWO_DEPTHS, w, tokens, mtp_weight=0.3, balance_alpha=0.0)
  log_V = math.log(SMALL.vocab_size)
  assert got['ce'] == pytest.approx(log_V)
  np.testing.assert_allclose(got['mtp'], [5 / 6 * log_V, 4 / 6 * log_V])
  assert got['loss'] == pytest.approx(log_V + 0.3 / 2 * (5 / 6 + 4 / 6) * log_V)


def test_objective_sums_its_parts_and_counts_every_choice():
  w = oracle.random_weights(TWO_DEPTHS, rng())
  tokens = rng().integers(0, SMALL.vocab_size, (3, 6))
  got = oracle.objective(TWO_DEPTHS, w, tokens, mtp_weight=0.3, balance_alpha=0.01)
  want = got['ce'] + 0.15 * sum(got['mtp']) + 0.01 * got['balance']
  assert got['loss'] == pytest.approx(want)
  K = SMALL.moe.top_k
  assert [c.sum() for c in got['counts']] == [3 * 5 * K, 3 * 5 * K, 3 * 4 * K, 3 * 3 * K]
  rows = [oracle.objective(TWO_DEPTHS, w, tokens[b : b + 1], 0.3, 0.01) for b in range(3)]
  assert got['loss'] == pytest.approx(np.mean([r['loss'] for r in rows]))
  assert got['balance'] == pytest.approx(np.mean([r['balance'] for r in rows]))


def test_numerical_gradient_of_cross_entropy_is_softmax_minus_one_hot():
  logits_LV = rng().normal(size=(2, 5))
  before = logits_LV.copy()
  indices = list(np.ndindex(2, 5))
  got = oracle.numerical_gradient(
    lambda x: oracle.cross_entropy(x, np.array([3, 0])).sum(), logits_LV, indices
  )
  want = np.array([oracle.softmax(x) for x in logits_LV]) - np.eye(5)[[3, 0]]
  np.testing.assert_allclose(got, want.ravel(), atol=1e-9)
  np.testing.assert_array_equal(logits_LV, before)


def test_random_weights_are_exact_in_float32():
  head_DV = oracle.random_weights(SMALL, rng())['head_DV']
  assert head_DV.dtype == np.float64
  np.testing.assert_array_equal(head_DV, head_DV.astype(np.float32))


# ---- optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('tokens', 'step', 'rate'),
  [
    (0, 0, 0.0),
    (1e9, 1000, 1.1e-4),
    (9.9e12, 9999, 2.2e-4),
    (10e12, 9999, 2.2e-4),
    (10.43e12, 9999, 2.1515459e-4),
    (12.15e12, 9999, 1.21e-4),
    (14.3e12, 9999, 2.2e-5),
    (14.632e12, 9999, 2.2e-5),
    (14.634e12, 9999, 7.3e-6),
  ],
)
def test_learning_rate_passes_through_the_four_phases(tokens, step, rate):
  assert oracle.learning_rate(config.Optimizer(), tokens, step) == pytest.approx(rate)


def test_first_adamw_step_moves_by_the_rate_and_decays_matrices_only():
  cfg = config.Optimizer()
  param, grad, zero = np.array([[2.0, -4.0]]), np.array([[0.5, -3.0]]), np.zeros((1, 2))
  got, (first, second) = oracle.adamw(cfg, param, grad, (zero, zero), 1, 0.01, decay=True)
  np.testing.assert_allclose(got, [[2 - 0.01 * (1 + 0.2), -4 + 0.01 * (1 + 0.4)]], rtol=1e-9)
  np.testing.assert_allclose(first, 0.1 * grad)
  np.testing.assert_allclose(second, 0.05 * grad**2)
  got, _ = oracle.adamw(cfg, param, grad, (zero, zero), 1, 0.01, decay=False)
  np.testing.assert_allclose(got, [[1.99, -3.99]], rtol=1e-9)


def test_clipping_scales_all_gradients_together():
  got = oracle.clip_gradients([np.array([3.0]), np.array([[4.0]])], clip_norm=1.0)
  np.testing.assert_allclose([got[0][0], got[1][0, 0]], [0.6, 0.8])
  assert oracle.clip_gradients([np.array([0.5])], clip_norm=1.0)[0] == 0.5


# ---- FP8 -----------------------------------------------------------------------------------------


def test_e4m3_rounding_agrees_with_ml_dtypes_on_every_value_and_midpoint():
  grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
  grid = np.sort(grid[np.isfinite(grid)])
  middle = (grid[1:] + grid[:-1]) / 2
  x = np.concatenate([grid, middle, middle * (1 + 2**-20), middle * (1 - 2**-20)])
  want = x.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
  np.testing.assert_array_equal(precision.round_e4m3(x), want)


def test_e4m3_saturates_where_a_plain_cast_gives_nan():
  assert np.isnan(np.float32(1000).astype(ml_dtypes.float8_e4m3fn).astype(np.float64))
  got = precision.round_e4m3(np.array([449.0, 1000.0, -1e9, np.inf]))
  assert got.tolist() == [448, 448, -448, 448]


def test_e4m3_rounds_once():
  assert precision.round_e4m3(np.array([1.0625, 1.0625 + 2**-40])).tolist() == [1.0, 1.125]


@pytest.mark.parametrize('shape', [(1536, 7168), (576, 7168), (200, 300)])
def test_weight_scales_cover_ragged_edges(shape):
  w_XY = rng().normal(size=shape)
  q_XY, scale = precision.quantize_blocks(w_XY)
  assert scale.shape == (math.ceil(shape[0] / 128), math.ceil(shape[1] / 128))
  corner = w_XY[(shape[0] - 1) // 128 * 128 :, (shape[1] - 1) // 128 * 128 :]
  assert scale[-1, -1] == np.max(np.abs(corner)) / 448
  assert np.max(np.abs(q_XY)) == 448


@pytest.mark.parametrize('power_of_two', [False, True])
def test_quantised_activations_return_within_half_a_step(power_of_two):
  x_XY = rng().normal(size=(4, 300)) * np.exp(rng().normal(size=(4, 1)))
  q_XY, scale = precision.quantize_rows(x_XY, power_of_two)
  assert scale.shape == (4, 3)
  back = precision.dequantize(q_XY, scale, (1, 128))
  smallest = np.repeat(scale, 128, axis=1)[:, :300] * 2**-10  # half a subnormal step
  assert np.all(np.abs(back - x_XY) <= np.maximum(np.abs(x_XY) / 16, smallest) * (1 + 1e-12))


def test_power_of_two_scale_is_the_next_one_at_or_above():
  tile = np.array([[448.0]])
  assert precision.fp8_scale(tile, True) == 1.0
  assert precision.fp8_scale(tile * 1.001, True) == 2.0
  assert precision.fp8_scale(tile / 2, True) == 0.5
  assert precision.fp8_scale(np.zeros((1, 128)), False) == 1e-4 / 448


def test_fp8_matmul_equals_the_product_of_the_dequantised_operands():
  x_TK, w_KN = rng().normal(size=(3, 300)), rng().normal(size=(300, 140))
  x = precision.dequantize(*precision.quantize_rows(x_TK), (1, 128))
  w = precision.dequantize(*precision.quantize_blocks(w_KN), (128, 128))
  np.testing.assert_allclose(precision.fp8_matmul(x_TK, w_KN), x @ w, rtol=1e-10, atol=1e-10)


# ---- LogFMT --------------------------------------------------------------------------------------


def test_logfmt_keeps_zero_smallest_and_largest_and_reserves_code_0():
  x_H = np.array([0.0, 0.25, -4.0, 1.0])
  negative, code, low, step = precision.logfmt_encode(x_H, bits=4)  # 7 non-zero codes, 6 steps
  assert code.tolist() == [0, 1, 7, 4]
  assert negative.tolist() == [False, False, True, False]
  assert (low, step) == pytest.approx((math.log(0.25), math.log(16) / 6))
  np.testing.assert_allclose(precision.logfmt_decode(negative, code, low, step, 4), x_H)


def test_logfmt_boundary_is_the_arithmetic_mean_and_not_the_geometric_one():
  # 1 and 64 put the codes on 1, 2, 4, ...; the geometric means would be 1.41 and 2.83
  x_H = np.array([1.0, 64.0, 1.49, 1.51, 2.99, 3.01])
  _, code_H, _, _ = precision.logfmt_encode(x_H, bits=4)
  assert code_H.tolist() == [1, 7, 1, 2, 2, 3]


def test_logfmt_agrees_with_the_closed_form_of_the_boundary():
  x_H = np.exp(2 * rng().normal(size=128))
  _, code_H, _, _ = precision.logfmt_encode(x_H, bits=8)
  low = np.log2(x_H).min()
  step = (np.log2(x_H).max() - low) / 126
  shift = np.log2((1 + 2**step) / 2) / step
  inner = (code_H > 1) & (code_H < 127)  # at the ends the closed form sits on its own boundary
  want_H = np.floor((np.log2(x_H) - low) / step + 2 - shift)
  np.testing.assert_array_equal(code_H[inner], want_H[inner])


def test_logfmt_range_is_32_octaves_and_what_lies_far_below_becomes_zero():
  x_H = np.array([1.0, 2.0**-32 * 0.6, 2.0**-32 * 0.4, 2.0**-60])
  _, code_H, low, _ = precision.logfmt_encode(x_H, bits=8)
  assert low == pytest.approx(-32 * math.log(2))
  assert code_H.tolist() == [127, 1, 0, 0]


def test_logfmt_of_zeros_and_of_one_magnitude():
  assert not precision.logfmt_round_trip(np.zeros((2, 200)), bits=8).any()
  same = np.array([[3.0, -3.0, 0.0]])
  np.testing.assert_allclose(precision.logfmt_round_trip(same, bits=8), same)


def test_logfmt_8_beats_e4m3_and_logfmt_10_beats_logfmt_8():
  x_XY = rng().normal(size=(4, 256))
  e4m3 = precision.dequantize(*precision.quantize_rows(x_XY), (1, 128))
  eight, ten = (precision.logfmt_round_trip(x_XY, bits) for bits in (8, 10))
  error = [np.linalg.norm(x_XY - y) for y in (e4m3, eight, ten)]
  assert error[0] > 1.2 * error[1] > 3 * error[2]
