"""config.json of every release says the sizes of the papers; what cannot be computed is refused."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import peers
import pytest

from dsv3_jax import config, counts, flags
from dsv3_jax.weights import hf_config

_CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
_YARN = {
  'beta_fast': 32, 'beta_slow': 1, 'factor': 40, 'mscale': 1.0, 'mscale_all_dim': 1.0,
  'original_max_position_embeddings': 4096, 'type': 'yarn',
}  # fmt: skip
_COMMON = {
  'attention_bias': False, 'attention_dropout': 0.0, 'aux_loss_alpha': 0.001, 'hidden_act': 'silu',
  'initializer_range': 0.02, 'kv_lora_rank': 512, 'max_position_embeddings': 163_840,
  'moe_layer_freq': 1, 'pretraining_tp': 1, 'qk_nope_head_dim': 128, 'qk_rope_head_dim': 64,
  'rms_norm_eps': 1e-6, 'rope_theta': 10_000, 'seq_aux': True, 'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16', 'transformers_version': '4.33.1', 'use_cache': True, 'v_head_dim': 128,
}  # fmt: skip
_V3 = _COMMON | {
  'architectures': ['DeepseekV3ForCausalLM'], 'model_type': 'deepseek_v3', 'bos_token_id': 0,
  'eos_token_id': 1, 'ep_size': 1, 'first_k_dense_replace': 3, 'hidden_size': 7168,
  'intermediate_size': 18_432, 'moe_intermediate_size': 2048, 'n_group': 8, 'n_routed_experts': 256,
  'n_shared_experts': 1, 'norm_topk_prob': True, 'num_attention_heads': 128,
  'num_experts_per_tok': 8, 'num_hidden_layers': 61, 'num_key_value_heads': 128,
  'num_nextn_predict_layers': 1, 'q_lora_rank': 1536, 'rope_scaling': _YARN,
  'routed_scaling_factor': 2.5, 'scoring_func': 'sigmoid', 'topk_group': 4,
  'topk_method': 'noaux_tc', 'vocab_size': 129_280,
  'quantization_config': {
    'activation_scheme': 'dynamic', 'fmt': 'e4m3', 'quant_method': 'fp8',
    'weight_block_size': [128, 128],
  },
}  # fmt: skip
_V2 = _COMMON | {
  'architectures': ['DeepseekV2ForCausalLM'], 'model_type': 'deepseek_v2', 'bos_token_id': 100_000,
  'first_k_dense_replace': 1, 'hidden_size': 5120, 'intermediate_size': 12_288,
  'moe_intermediate_size': 1536, 'n_group': 8, 'n_routed_experts': 160, 'n_shared_experts': 2,
  'norm_topk_prob': False, 'num_attention_heads': 128, 'num_experts_per_tok': 6,
  'num_hidden_layers': 60, 'num_key_value_heads': 128, 'q_lora_rank': 1536,
  'rope_scaling': _YARN | {'mscale': 0.707, 'mscale_all_dim': 0.707},
  'routed_scaling_factor': 16.0, 'scoring_func': 'softmax', 'topk_group': 3,
  'topk_method': 'group_limited_greedy', 'vocab_size': 102_400,
}  # fmt: skip
_V2_LITE = _V2 | {
  'hidden_size': 2048, 'intermediate_size': 10_944, 'moe_intermediate_size': 1408, 'n_group': 1,
  'n_routed_experts': 64, 'num_attention_heads': 16, 'num_hidden_layers': 27,
  'num_key_value_heads': 16, 'q_lora_rank': None, 'routed_scaling_factor': 1.0, 'topk_group': 1,
  'topk_method': 'greedy',
}  # fmt: skip


# ---- the releases --------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('values', 'file', 'parameters'),
  [
    (_V3, 'deepseek_v3_671b', 671_026_419_200),
    (_V2, 'deepseek_v2_236b', 235_741_434_880),
    (_V2_LITE, 'deepseek_v2_16b', 15_706_484_224),
  ],
)
def test_a_released_config_is_the_model_of_our_config_file(values, file, parameters):
  hf = hf_config.read(values)
  ours = config.freeze(flags.load(f'{_CONFIGS}/{file}.py')).model
  # Releases are set up for long sequences and say another deviation of the initialisation.
  same = {'max_length': hf.model.max_length, 'init_std': hf.model.init_std, 'rope': hf.model.rope}
  assert hf.model == dataclasses.replace(ours, **same)
  assert (hf.model.max_length, hf.model.init_std) == (163_840, 0.02)
  assert dataclasses.replace(ours.rope, mscale=1.0, mscale_all_dim=1.0) == config.Rope()
  assert hf.model.rope.mscale == values['rope_scaling']['mscale']
  assert hf.notes == () and hf.interleaved and hf.family == values['model_type']
  assert counts.parameters(hf.model) == parameters


def test_fp8_and_the_form_of_its_scales_are_told():
  quantised = _V3['quantization_config']
  assert (hf_config.read(_V3).fp8, hf_config.read(_V3).ue8m0) == (True, False)
  v31 = hf_config.read(_V3 | {'quantization_config': quantised | {'scale_fmt': 'ue8m0'}})
  assert (v31.fp8, v31.ue8m0) == (True, True)
  assert not hf_config.read(_V3 | {'quantization_config': None}).fp8


def test_rope_parameters_say_the_same_as_rope_scaling():
  old = hf_config.read(_V3)
  new = {k: v for k, v in _V3.items() if k not in ('rope_scaling', 'rope_theta')}
  together = {'rope_type': 'yarn', 'rope_theta': 10_000.0} | _YARN
  assert hf_config.read(new | {'rope_parameters': together}) == old
  del together['type'], together['rope_theta']
  assert hf_config.read(new | {'rope_theta': 10_000.0, 'rope_parameters': together}) == old
  assert hf_config.read(_V3 | {'rope_parameters': together}) == old
  extras = {'attention_factor': 1.0, 'truncate': True, 'partial_rotary_factor': 1.0}
  assert hf_config.read(_V3 | {'rope_parameters': together | extras}) == old


def test_without_yarn_the_frequencies_are_plain_whatever_the_length():
  for plain in ({'rope_scaling': None}, {'rope_scaling': {'rope_type': 'default'}}):
    m = hf_config.read(_V3 | plain).model
    assert m.max_length == 163_840 <= m.rope.original_length
  short = hf_config.read(_V3 | {'rope_scaling': None, 'max_position_embeddings': 2048}).model
  assert short.max_length == 2048 <= short.rope.original_length


@pytest.mark.parametrize(
  ('values', 'key', 'ours', 'paper'),
  [
    (_V3, 'num_nextn_predict_layers', 'mtp_depth', 1),
    (_V3, 'rms_norm_eps', 'norm_eps', 1e-6),
    (_V3, 'initializer_range', 'init_std', 0.006),
    (_V3, 'n_group', 'moe.num_groups', 8),
    (_V3, 'topk_group', 'moe.top_groups', 4),
    (_V3, 'norm_topk_prob', 'moe.normalize', True),
    (_V3, 'routed_scaling_factor', 'moe.route_scale', 2.5),
    (_V3, 'scoring_func', 'moe.scoring', 'sigmoid'),
    (_V3, 'topk_method', 'moe.num_groups', 8),
    (_V3, 'rope_theta', 'rope.theta', 10_000.0),
    (_V2, 'scoring_func', 'moe.scoring', 'softmax'),
    (_V2, 'topk_method', 'moe.top_groups', 3),
    (_V2, 'routed_scaling_factor', 'moe.route_scale', 16.0),
    (_V2, 'norm_topk_prob', 'moe.normalize', False),
    (_V2_LITE, 'topk_method', 'moe.num_groups', 1),
  ],
)
def test_a_key_that_is_left_out_takes_the_value_of_the_paper_and_a_line_says_so(
  values, key, ours, paper
):
  hf = hf_config.read({k: v for k, v in values.items() if k != key})
  assert config.flatten(hf.model)[ours] == paper
  assert len(hf.notes) == 1
  assert re.fullmatch(rf'config\.json: {key}: not there; taken from the paper: \S+', hf.notes[0])


def test_a_key_left_out_of_yarn_takes_the_value_of_the_paper_of_its_family():
  for values, mscale in ((_V3, 1.0), (_V2, 0.707)):
    left = {k: v for k, v in values['rope_scaling'].items() if not k.startswith('mscale')}
    hf = hf_config.read(values | {'rope_scaling': left})
    assert hf.model.rope.mscale == hf.model.rope.mscale_all_dim == mscale
    assert [note.split(': ')[1] for note in hf.notes] == ['mscale', 'mscale_all_dim']


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model_type': 'llama'}, 'model_type = \'llama\': must be "deepseek_v3" or "deepseek_v2"'),
    ({'hidden_act': 'gelu'}, 'hidden_act = \'gelu\': must be "silu"'),
    ({'attention_bias': True}, 'attention_bias = True: must be false or null'),
    ({'tie_word_embeddings': True}, 'tie_word_embeddings = True: must be false or null'),
    ({'moe_layer_freq': 2}, 'moe_layer_freq = 2: must be 1'),
    ({'num_key_value_heads': 8}, 'num_key_value_heads = 8: must equal num_attention_heads = 128'),
    ({'scoring_func': 'softmax'}, 'scoring_func = \'softmax\': must be "sigmoid"'),
    ({'topk_method': 'greedy'}, 'topk_method = \'greedy\': must be "noaux_tc"'),
    ({'hidden_size': '7168'}, "hidden_size = '7168': must be a whole number"),
    ({'hidden_size': True}, 'hidden_size = True: must be a whole number'),
    ({'hidden_size': None}, 'hidden_size = None: must be a whole number'),
    ({'hidden_size': 0}, 'hidden_size = 0: must be positive'),
    ({'hidden_size': -1}, 'hidden_size = -1: must be from 0'),
    ({'hidden_size': 10**30}, 'hidden_size = 1000000000000000000000000000000: must be from 0'),
    ({'rms_norm_eps': float('inf')}, 'rms_norm_eps = inf: must be a finite number'),
    ({'rope_theta': 10**400}, 'rope_theta = inf: must be a finite number'),
    ({'norm_topk_prob': 1}, 'norm_topk_prob = 1: must be true or false'),
    ({'n_group': 7}, 'n_routed_experts = 256: must be a multiple of n_group = 7'),
    ({'topk_group': 9}, 'topk_group = 9: must be at most n_group = 8'),
    ({'num_experts_per_tok': 129}, 'num_experts_per_tok = 129: must be at most 128'),
    ({'first_k_dense_replace': 61}, 'first_k_dense_replace = 61: must be below num_hidden_layers'),
    ({'qk_rope_head_dim': 63}, 'qk_rope_head_dim = 63: must be even'),
    ({'num_hidden_layers': 10**6}, 'num_hidden_layers = 1000000: must be at most'),
    ({'rope_interleave': 'yes'}, "rope_interleave = 'yes': must be true or false"),
    ({'rope_scaling': [1]}, r'rope_scaling = \[1\]: must be an object or null'),
    ({'rope_scaling': {'type': 'linear', 'factor': 2}}, "rope_type = 'linear': must be 'yarn'"),
    ({'rope_scaling': _YARN | {'rope_type': 'default'}}, "rope_scaling.type = 'yarn': must be"),
    ({'rope_scaling': _YARN | {'mscale': 0}}, 'mscale = 0.0, mscale_all_dim = 1.0: must both'),
    (
      {'rope_scaling': _YARN | {'mscale': 0.5, 'mscale_all_dim': 0}},
      'mscale = 0.5, mscale_all_dim',
    ),
    ({'rope_scaling': _YARN | {'attention_factor': 1.1}}, 'attention_factor = 1.1: must be 1.0'),
    ({'rope_scaling': _YARN | {'truncate': False}}, 'truncate = False: must be true'),
    ({'rope_scaling': _YARN | {'factor': '40'}}, "factor = '40': must be a number"),
    ({'rope_parameters': {'rope_theta': 5e5}}, 'rope_theta = 10000: must be 500000.0'),
    ({'max_position_embeddings': 4096}, 'max_position_embeddings = 4096: must be above original'),
    ({'quantization_config': {'quant_method': 'gptq'}}, 'quant_method = \'gptq\': must be "fp8"'),
    ({'quantization_config': 8}, 'quantization_config = 8: must be an object'),
    (
      {'quantization_config': {'quant_method': 'fp8', 'weight_block_size': [64, 64]}},
      r'weight_block_size = \[64, 64\]: must be \[128, 128\]',
    ),
    (
      {'rope_scaling': _YARN | {'original_max_position_embeddings': 3}},
      'original_max_position_embeddings = 3: must be larger',
    ),
  ],
)
def test_a_value_that_cannot_be_is_refused_with_its_key_and_what_is_right(change, message):
  with pytest.raises(config.ConfigError, match=f'^config.json: .*{message}') as raised:
    hf_config.read(_V3 | change)
  assert '\n' not in str(raised.value)
  assert 'model.' not in str(raised.value)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'norm_topk_prob': True}, 'norm_topk_prob = True: must be false'),
    ({'topk_method': 'noaux_tc'}, 'topk_method = \'noaux_tc\': must be "greedy" or'),
    ({'num_nextn_predict_layers': 1}, 'num_nextn_predict_layers = 1: must be 0'),
  ],
)
def test_what_v2_does_not_have_is_refused(change, message):
  with pytest.raises(config.ConfigError, match=message):
    hf_config.read(_V2 | change)


@pytest.mark.parametrize('key', ['hidden_size', 'num_hidden_layers', 'q_lora_rank', 'model_type'])
def test_a_key_that_gives_shapes_must_be_there(key):
  with pytest.raises(config.ConfigError, match=f'config.json: {key}'):
    hf_config.read({k: v for k, v in _V3.items() if k != key})


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{"model_type": "deepseek_v3", "model_type": "deepseek_v2"}', "'model_type' is there twice"),
    ('{"model_type": ', 'not JSON'),
    ('[1, 2]', 'holds list, must hold a JSON object'),
    ('{"rms_norm_eps": NaN}', 'NaN is no number of JSON'),
    ('[' * 100_000, 'not JSON'),
    ('\xff', 'not JSON'),
  ],
)
def test_a_file_that_is_no_json_object_is_refused_by_its_name(text, message, tmp_path):
  (tmp_path / 'config.json').write_text(text, 'latin-1')
  with pytest.raises(config.ConfigError, match=f'config.json: .*{message}'):
    hf_config.read(tmp_path)


def test_a_folder_without_a_config_is_refused(tmp_path):
  with pytest.raises(config.ConfigError, match=r'config.json: cannot be read: No such file'):
    hf_config.read(tmp_path)


_JUNK = (
  None, True, False, 0, 1, -1, 7, 10**9, 10**400, 0.0, -0.5, 1e-320, 1e308, float('inf'), '', 'yarn', '7',
  [], [128], {}, {'type': 'yarn'}, {'rope_type': []}, {'quant_method': 'fp8', 'fmt': []},
)  # fmt: skip


def test_values_at_random_give_a_model_or_one_clear_line_per_fault():
  rng = np.random.default_rng(0)
  read = 0
  for _ in range(2000):
    values = dict((_V3, _V2, _V2_LITE)[rng.integers(3)])
    values['rope_scaling'] = dict(values['rope_scaling'])
    where = values['rope_scaling'] if rng.integers(3) == 0 else values
    for key in rng.choice([*where, 'attention_factor', 'truncate', 'rope_parameters'], 2):
      where[str(key)] = _JUNK[rng.integers(len(_JUNK))]
    if rng.integers(4) == 0:
      del where[str(key)]
    try:
      m = hf_config.read(values).model
    except config.ConfigError as error:
      assert all(line.startswith('config.json: ') for line in str(error).splitlines())
      assert len(str(error)) < 1000
    else:
      read += 1
      assert isinstance(m, config.Model)
  assert 100 < read < 1900


# ---- writing -------------------------------------------------------------------------------------


@pytest.mark.parametrize('family', hf_config.FAMILIES)
@pytest.mark.parametrize('seed', range(7))
def test_what_is_written_reads_as_the_same_model(family, seed, tmp_path):
  m = peers.random_model(seed, family)
  (tmp_path / 'config.json').write_text(json.dumps(hf_config.write(m, fp8=True, ue8m0=True)))
  hf = hf_config.read(tmp_path)
  yarn = m.max_length > m.rope.original_length
  rope = m.rope if yarn else dataclasses.replace(hf.model.rope, theta=m.rope.theta)
  assert peers.as_computed(hf.model) == dataclasses.replace(m, rope=rope)
  assert (hf.model.max_length > hf.model.rope.original_length) == yarn
  assert (hf.family, hf.fp8, hf.ue8m0, hf.notes) == (family, True, True, ())


@pytest.mark.parametrize(
  ('values', 'skipped'),
  [(_V3, {'ep_size'}), (_V2, set()), (_V2_LITE, set())],
)
def test_a_released_config_is_written_back_as_it_was(values, skipped):
  hf = hf_config.read(values)
  written = hf_config.write(hf.model, fp8=hf.fp8)
  skipped |= {'aux_loss_alpha', 'bos_token_id', 'eos_token_id', 'pretraining_tp', 'seq_aux'}
  for key in values.keys() - skipped - {'transformers_version'}:
    assert written[key] == values[key], key


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'normalize': True}, 'model.moe.normalize = True: must be False'),
    ({'num_shared': 0}, 'model.moe.num_shared = 0: must be positive'),
  ],
)
def test_a_model_that_no_release_computes_is_not_exported(change, message):
  m = peers.random_model(0, 'deepseek_v2')
  with pytest.raises(config.ConfigError, match=message):
    hf_config.write(dataclasses.replace(m, moe=dataclasses.replace(m.moe, **change)))


def test_v2_with_mtp_and_scales_that_readers_take_differently_are_not_exported():
  m = peers.random_model(0, 'deepseek_v2')
  with pytest.raises(config.ConfigError, match=r'model.mtp_depth = 1: must be 0'):
    hf_config.write(dataclasses.replace(m, mtp_depth=1))
  m = dataclasses.replace(m, max_length=64, rope=dataclasses.replace(m.rope, mscale=0.0))
  with pytest.raises(config.ConfigError, match=r'model.rope.mscale = 0.0'):
    hf_config.write(m)
