"""The benchmark against transformers, without torch: what it gives the peer, and what it measures."""

import functools
import importlib.util
import sys
import time

import jax
import numpy as np
import pytest

from dsv3_jax import config, counts, mesh
from dsv3_jax.config import ConfigError
from dsv3_jax.training import bench_transformers as bench
from dsv3_jax.training import state


def small(case='base', **model):
  values = config.debug(config.default())
  values.model.update(model)
  return bench.adapt(values, case)


@functools.cache
def weights():
  """A small config, its state, and the same weights in the peer's words."""
  c = small()
  made = state.init(c, mesh.make_mesh(c.mesh))
  named = bench.peer_weights(c.model, made['params'], made['router_bias'])
  return c, jax.tree.map(np.asarray, made), named


# ---- the same model ------------------------------------------------------------------------------


@pytest.mark.parametrize('case', bench.CASES)
def test_every_case_keeps_the_tokens_of_a_step_and_drops_what_the_peer_lacks(case):
  plain, c = config.freeze(config.debug(config.default())), small(case)
  assert c.batch.size * c.batch.seq_len == plain.batch.size * plain.batch.seq_len
  assert c.batch.micro_size == c.batch.start_size == c.batch.size
  assert c.model.mtp_depth == c.optimizer.ema_decay == c.objective.bias_speed == 0
  assert c.model.precision == c.optimizer.moments == 'fp32'
  assert c.model.dim == (48 if case == 'wide' else 32)
  assert c.batch.seq_len == (64 if case == 'long' else 32)


def test_the_peer_gets_each_of_our_weights_once():
  c, made, named = weights()
  assert sum(w.size for w in named.values()) == counts.parameters(c.model)
  flat = lambda arrays: np.sort(np.concatenate([np.ravel(x) for x in arrays]))
  ours = jax.tree.leaves((made['params'], made['router_bias']))
  np.testing.assert_array_equal(flat(named.values()), flat(ours))


def test_the_peer_s_matrices_give_the_same_products_as_ours():
  c, made, named = weights()
  a, size = c.model.mla, np.random.default_rng(0).standard_normal
  dense, moe = (
    jax.tree.map(lambda x: x[0], made['params'][s]) for s in ('dense_layers', 'moe_layers')
  )
  peer = lambda layer, name, x: named[f'model.layers.{layer}.{name}'] @ x

  latent_C, x_D, x_F = size(a.kv_rank), size(c.model.dim), size(c.model.moe.expert_dim)
  kv_NJ = peer(0, 'self_attn.kv_b_proj.weight', latent_C).reshape(a.num_heads, -1)
  keys_NH = np.einsum('C,CNH->NH', latent_C, dense['attn']['k_up_CNH'])
  values_NV = np.einsum('C,CNV->NV', latent_C, dense['attn']['v_up_CNV'])
  np.testing.assert_allclose(kv_NJ[:, : a.nope_dim], keys_NH, rtol=1e-6)
  np.testing.assert_allclose(kv_NJ[:, a.nope_dim :], values_NV, rtol=1e-6)

  down_X = peer(0, 'self_attn.kv_a_proj_with_mqa.weight', x_D)
  np.testing.assert_allclose(down_X[a.kv_rank :], x_D @ dense['attn']['k_rope_DR'], rtol=1e-6)

  x_NV = size((a.num_heads, a.v_dim))
  out_D = np.einsum('NV,NVD->D', x_NV, dense['attn']['out_NVD'])
  np.testing.assert_allclose(peer(0, 'self_attn.o_proj.weight', x_NV.ravel()), out_D, rtol=1e-6)

  first = c.model.num_dense_layers
  for e in range(c.model.moe.num_experts):
    into = named[f'model.layers.{first}.mlp.experts.gate_up_proj'][e] @ x_D
    want = [x_D @ moe['ffn'][name][e] for name in ('gate_EDF', 'up_EDF')]
    np.testing.assert_allclose(into, np.concatenate(want), rtol=1e-6)
    out = named[f'model.layers.{first}.mlp.experts.down_proj'][e] @ x_F
    np.testing.assert_allclose(out, x_F @ moe['ffn']['down_EFD'][e], rtol=1e-6)


def test_a_model_without_query_latent_has_one_query_matrix():
  m = small().model
  c = small(mla={**vars(m.mla), 'q_rank': 0})
  made = state.init(c, mesh.make_mesh(c.mesh))
  named = bench.peer_weights(c.model, made['params'], made['router_bias'])
  assert bench.peer_sizes(c.model)['q_lora_rank'] is None
  rows = m.mla.num_heads * (m.mla.nope_dim + m.mla.rope_dim)
  assert named['model.layers.0.self_attn.q_proj.weight'].shape == (rows, m.dim)
  assert not any('q_a' in name or 'q_b' in name for name in named)


@pytest.mark.parametrize(('key', 'value'), [('scoring', 'softmax'), ('num_shared', 0)])
def test_a_model_that_the_peer_does_not_know_is_refused_by_its_key(key, value):
  values = config.debug(config.default())
  values.model.moe[key] = value
  with pytest.raises(ConfigError, match=f'model.moe.{key} = {value!r}: the peer'):
    bench.peer_sizes(bench.adapt(values, 'base').model)


def test_yarn_is_on_for_the_peer_exactly_where_the_model_is_longer_than_the_original():
  assert bench.peer_sizes(small().model)['rope_parameters']['rope_type'] == 'default'
  rope = bench.peer_sizes(small(max_length=128).model)['rope_parameters']
  assert rope['rope_type'] == 'yarn' and rope['original_max_position_embeddings'] == 64


# ---- the same work -------------------------------------------------------------------------------


def test_both_sides_step_in_turn_on_the_same_rows_at_the_same_rates():
  c, calls = small(), []

  def side(name):
    step = lambda rows, rate: calls.append((name, rows.tobytes(), rows.shape, rate)) or 0.0
    return bench.Side(name, 0, step, lambda: 1.0, lambda: None)

  sides = [side('a'), side('b')]
  bench.measure(c, sides, 4)
  assert ''.join(call[0] for call in calls) == 'aaabbbaaabbbab'
  given = {name: [call[1:] for call in calls if call[0] == name] for name in 'ab'}
  assert given['a'] == given['b'] and len(set(given['a'])) == len(given['a']) == 7
  assert all(shape == (c.batch.size, c.batch.seq_len + 1) for _, shape, _ in given['a'])
  assert all(len(s.seconds) == len(s.matmul_seconds) == len(s.loads) == 7 for s in sides)


def test_figures_are_those_of_the_timed_steps_alone():
  side = bench.Side('x', 0, lambda *_: 0.0, lambda: 0.0, lambda: None)
  side.seconds.extend([9.0, 9.0, 9.0, 4.0, 2.0, 5.0])
  side.matmul_seconds.extend([9.0, 9.0, 9.0, 0.25, 0.125, 0.5])
  side.losses.extend([8.0, 7.0, 6.0, 5.0, 4.0, 3.0])
  side.faults.extend([99, 99, 99, 1, 0, 0])
  side.loads.extend([9.0, 9.0, 9.0, 1.0, 2.0, 3.0])
  f = side.figures(tokens=100, flops_per_token=1e6)
  assert (f['step_s_best'], f['step_s_median']) == (2.0, 4.0)
  assert (f['tokens_per_s_best'], f['flops_per_s_best']) == (50.0, 5e7)
  assert f['of_matmul_best'] == pytest.approx(5e7 / (2 * 2048**3 / 0.125))
  assert f['of_matmul_median'] == pytest.approx(2.5e7 / (2 * 2048**3 / 0.25))
  assert (f['faults_per_step'], f['load']) == (0, 2.0)
  assert (f['first_loss'], f['last_loss']) == (8.0, 3.0)


def test_our_side_is_the_train_step_and_learns():
  c = small()
  device_mesh = mesh.make_mesh(c.mesh)
  side = bench.make_ours(c, device_mesh, state.init(c, device_mesh))
  rows_BX = np.zeros((c.batch.size, c.batch.seq_len + 1), np.int32)
  start = time.perf_counter()
  for _ in range(4):
    side.run(rows_BX, 0.0)
  assert sum(side.seconds + side.matmul_seconds) < time.perf_counter() - start
  assert side.losses[0] == pytest.approx(np.log(c.model.vocab_size), rel=0.01)
  assert side.losses[-1] < side.losses[0] - 0.1
  assert side.parameters + bench_biases(c) == counts.parameters(c.model)
  assert side.loads[0] > 1


def bench_biases(c):
  return (c.model.num_layers - c.model.num_dense_layers) * counts.bias_parameters(c.model)


# ---- what is missing -----------------------------------------------------------------------------


def test_without_torch_one_line_says_what_to_install(monkeypatch, capsys):
  monkeypatch.setattr(sys, 'argv', ['bench'])
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  assert bench.main() == 2
  told = capsys.readouterr().err
  assert told == "torch, transformers: not installed; install the extra: pip install '.[parity]'\n"
