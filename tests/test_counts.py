"""Parameter counts and FLOPs against the published figures and against the model's own arrays."""

import dataclasses
import math
import pathlib

import jax
import pytest
from flax import nnx

from dsv3_jax import config, counts, flags
from dsv3_jax.model.layers import RouterBias
from dsv3_jax.model.transformer import Transformer

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
SHIPPED = sorted(path.name for path in CONFIGS.glob('*.py'))


def model(name):
  return config.freeze(flags.load(str(CONFIGS / name))).model


V3, V2, V2_LITE = (f'deepseek_{name}.py' for name in ('v3_671b', 'v2_236b', 'v2_16b'))


# ---- published figures ---------------------------------------------------------------------------


def test_parts_of_v3_are_the_published_ones():
  m = model(V3)
  assert counts.attention_parameters(m) == 187_105_280
  assert counts.ffn_parameters(m) == 396_361_728
  assert counts.expert_parameters(m) == 44_040_192
  assert counts.router_parameters(m) == 1_835_008
  assert counts.embedding_parameters(m) == 926_679_040


@pytest.mark.parametrize(
  ('name', 'parameters', 'active', 'with_embedding'),
  [
    (V3, 671_026_419_200, 36_624_596_992, 37_551_276_032),
    (V2, 235_741_434_880, 20_850_769_920, 21_375_057_920),
    (V2_LITE, 15_706_484_224, 2_451_308_544, 2_661_023_744),
  ],
)
def test_released_models_have_their_exact_parameter_counts(
  name, parameters, active, with_embedding
):
  m = model(name)
  assert counts.parameters(m) == parameters
  assert counts.active_parameters(m, embedding=False) == active
  assert counts.active_parameters(m, embedding=True) == with_embedding


def test_the_mtp_module_of_v3_has_its_exact_count_and_depth_multiplies_it():
  m = model(V3)
  assert counts.mtp_parameters(m) == counts.mtp_module_parameters(m) == 11_610_068_224
  assert counts.mtp_parameters(dataclasses.replace(m, mtp_depth=3)) == 3 * 11_610_068_224
  assert counts.mtp_parameters(dataclasses.replace(m, mtp_depth=0)) == 0


@pytest.mark.parametrize(
  ('name', 'causal', 'gflops'), [(V3, True, 249.81), (V3, False, 280.51), (V2, True, 155.01)]
)
def test_training_gflop_per_token_are_those_of_table_2(name, causal, gflops):
  flops = counts.training_flops_per_token(model(name), 4096, causal=causal)
  assert round(flops / 1e9, 2) == gflops


def test_one_step_of_v3_on_2048_h800_reaches_the_published_utilisation():
  flops = counts.training_flops_per_token(model(V3), 4096)
  tflops = flops * 15_360 * 4096 / 19.926 / 2048 / 1e12
  assert round(tflops, 1) == 385.1 and round(100 * tflops / 989, 2) == 38.94


# ---- the model's arrays --------------------------------------------------------------------------


def odd(**changes):
  """Small models whose sizes share no factor by accident."""
  moe = {k.removeprefix('moe_'): v for k, v in changes.items() if k.startswith('moe_')}
  mla = {k.removeprefix('mla_'): v for k, v in changes.items() if k.startswith('mla_')}
  rest = {k: v for k, v in changes.items() if not k.startswith(('moe_', 'mla_'))}
  sizes = {'vocab_size': 97, 'dim': 22, 'ffn_dim': 35, 'num_layers': 5, 'num_dense_layers': 2}
  heads = {'num_heads': 3, 'q_rank': 13, 'kv_rank': 11, 'nope_dim': 7, 'rope_dim': 2, 'v_dim': 5}
  experts = {'num_experts': 6, 'num_shared': 2, 'top_k': 2, 'expert_dim': 9}
  experts |= {'num_groups': 3, 'top_groups': 2}
  return config.Model(
    **sizes | rest, mla=config.Mla(**heads | mla), moe=config.Moe(**experts | moe)
  )


MODELS = {name: model(name) for name in SHIPPED} | {
  'odd': odd(),
  'no query latent': odd(mla_q_rank=0),
  'no shared experts': odd(moe_num_shared=0),
  'no dense layers': odd(num_dense_layers=0),
  'no MTP': odd(mtp_depth=0),
  'MTP of depth 2': odd(mtp_depth=2),
  'softmax': odd(moe_scoring='softmax'),
}


@pytest.mark.parametrize('name', MODELS)
def test_counts_are_the_sizes_of_the_model_s_arrays(name):
  m = MODELS[name]
  made = jax.eval_shape(lambda: Transformer(m, jax.random.key(0)))
  _, weights, biases = nnx.split(made, nnx.Param, RouterBias)
  weights, biases = nnx.to_pure_dict(weights), nnx.to_pure_dict(biases)
  arrays = dict(jax.tree_util.tree_leaves_with_path(weights))
  if m.moe.scoring == 'sigmoid':  # elsewhere the bias lies unused at 0
    arrays |= dict(jax.tree_util.tree_leaves_with_path(biases))
  mtp = sum(math.prod(x.shape) for path, x in arrays.items() if path[0].key == 'mtp')
  main = sum(math.prod(x.shape) for path, x in arrays.items() if path[0].key != 'mtp')
  assert counts.parameters(m) == main
  assert counts.mtp_parameters(m) == mtp


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('mtp', [False, True])
@pytest.mark.parametrize('causal', [False, True])
def test_flops_are_a_loop_over_all_matmuls_of_all_layers(name, mtp, causal):
  m, seq_len = MODELS[name], 48
  a, e = m.mla, m.moe
  matmuls, cores = [(m.dim, m.vocab_size)], 0

  def attention():
    heads = a.num_heads * (a.nope_dim + a.rope_dim)
    queries = [(m.dim, a.q_rank), (a.q_rank, heads)] if a.q_rank else [(m.dim, heads)]
    latents = [(m.dim, a.kv_rank), (m.dim, a.rope_dim)]
    ups = [(a.kv_rank, a.num_heads * a.nope_dim), (a.kv_rank, a.num_heads * a.v_dim)]
    matmuls.extend(queries + latents + ups + [(a.num_heads * a.v_dim, m.dim)])

  def swiglu(hidden):
    matmuls.extend([(m.dim, hidden), (m.dim, hidden), (hidden, m.dim)])

  def moe():
    for _ in range(e.top_k + e.num_shared):
      swiglu(e.expert_dim)

  for layer in range(m.num_layers):
    attention()
    cores += 1
    if layer < m.num_dense_layers:
      swiglu(m.ffn_dim)
    else:
      moe()
  for _ in range(m.mtp_depth if mtp else 0):
    matmuls.extend([(2 * m.dim, m.dim), (m.dim, m.vocab_size)])
    attention()
    moe()
    cores += 1
  keys = seq_len / 2 if causal else seq_len
  core = 2 * a.num_heads * keys * (a.nope_dim + a.rope_dim + a.v_dim)
  want = 3 * (sum(2 * rows * columns for rows, columns in matmuls) + cores * core)
  assert counts.training_flops_per_token(m, seq_len, causal=causal, mtp=mtp) == want


def test_where_every_expert_is_chosen_the_active_parameters_are_all_matrices():
  m = odd(moe_top_k=6, moe_top_groups=3)
  vectors = m.num_layers * counts.norm_parameters(m) + m.dim
  vectors += (m.num_layers - m.num_dense_layers) * counts.bias_parameters(m)
  assert counts.active_parameters(m, embedding=True) == counts.parameters(m) - vectors
