"""The same logits and gradients as other implementations, from the same checkpoint folders.

Against transformers' DeepseekV3ForCausalLM and DeepseekV2ForCausalLM, live where torch and transformers
are installed (the extra [parity]), recorded everywhere; against the NumPy oracle for MTP, which
transformers leaves out. Inputs avoid three places where transformers departs from the papers:
- its V2 gives masked experts a score of 0 instead of -inf, and so could choose one if fewer experts were
  kept than chosen; a config that asks for that is refused anyway;
- its V2 never normalises the chosen weights, whatever `norm_topk_prob` says: true is refused;
- its V3 adds 1e-20 to the sum of chosen weights: below the last bit of any sum that occurs.
"""

import dataclasses
import importlib.util
import json
import os
import shutil

import numpy as np
import oracle
import parity
import peers
import pytest

from dsv3_jax import config
from dsv3_jax.weights import hf_config, names, transfer

# Each config is drawn: together they have groups or none, queries with and without a latent, YaRN with
# two unlike mscales and no YaRN, odd head sizes, 0 to 2 dense layers, 1 to 3 shared experts.
_CASES = [(family, seed) for family in hf_config.FAMILIES for seed in range(7)]
_LIMIT = 1e-4

live = pytest.mark.skipif(
  importlib.util.find_spec('torch') is None or importlib.util.find_spec('transformers') is None,
  reason='wants torch and transformers: the extra [parity]',
)
# What torch and transformers warn about while they import and run is theirs.
pytestmark = [
  pytest.mark.filterwarnings('ignore::DeprecationWarning'),
  pytest.mark.filterwarnings('ignore::FutureWarning'),
  pytest.mark.filterwarnings('ignore::UserWarning'),
]


def test_the_random_configs_have_everything_that_is_to_be_compared():
  models = [peers.random_model(seed, family) for family, seed in _CASES]
  assert len(models) >= 12
  for family in hf_config.FAMILIES:
    of_family = [m for m, (f, _) in zip(models, _CASES, strict=True) if f == family]
    assert {m.num_dense_layers for m in of_family} == {0, 1, 2}
    assert {m.moe.num_shared for m in of_family} == {1, 2, 3}
    assert {m.moe.num_groups > 1 for m in of_family} == {False, True}
    assert {m.mla.q_rank > 0 for m in of_family} == {False, True}
    yarn = [m.max_length > m.rope.original_length for m in of_family]
    assert set(yarn) == {False, True}
    assert any(
      on and m.rope.mscale != m.rope.mscale_all_dim for on, m in zip(yarn, of_family, strict=True)
    )
    assert any(m.mla.v_dim % 2 for m in of_family)


# ---- transformers, live --------------------------------------------------------------------------


@live
@pytest.mark.parametrize(('family', 'seed'), _CASES)
def test_logits_are_those_of_transformers_in_both_directions(family, seed, tmp_path):
  m = peers.random_model(seed, family)
  tokens_BL = peers.tokens(m, seed)
  for weights in (seed, seed + 100):
    # Theirs: saved by transformers, imported here.
    model = peers.peer(hf_config.write(m, dtype='float32'))
    peers.randomise(model, weights)
    theirs = tmp_path / f'theirs{weights}'
    model.save_pretrained(theirs, max_shard_size='50KB')
    source = transfer.open_released(theirs)
    computed = peers.as_computed(source.hf.model)
    got = peers.logits(computed, peers.read_tree(source), tokens_BL)[0]
    parity.assert_close(got, peers.peer_logits(model, tokens_BL), _LIMIT)
    # Ours: exported here, loaded by transformers.
    tree = peers.random_tree(m, weights)
    export = transfer.Export(m, transfer.chunk_reader(tree), dtype=np.float32)
    ours = peers.save(export, tmp_path / f'ours{weights}')
    model, info = peers.load_peer(ours, export.config['architectures'][0])
    assert not info['unexpected_keys']
    got = peers.logits(m, tree, tokens_BL)[0]
    parity.assert_close(got, peers.peer_logits(model, tokens_BL), _LIMIT)


@live
def test_stacked_experts_of_transformers_give_the_same_tree_as_one_by_one(tmp_path):
  m = peers.random_model(2, 'deepseek_v3')
  model = peers.peer(hf_config.write(m, dtype='float32'))
  peers.randomise(model, 0)
  model.save_pretrained(tmp_path / 'single')
  model.save_pretrained(tmp_path / 'stacked', save_original_format=False)
  single, stacked = (transfer.open_released(tmp_path / name) for name in ('single', 'stacked'))
  assert not names.stored_stacked(single.tensors.tensors)
  assert names.stored_stacked(stacked.tensors.tensors)
  parity.assert_same_bits(peers.read_tree(stacked), peers.read_tree(single))


@live
def test_rotary_dimensions_kept_as_halves_are_read_as_pairs(tmp_path):
  m = peers.random_model(1, 'deepseek_v3')
  m = dataclasses.replace(m, mla=dataclasses.replace(m.mla, rope_dim=6))
  model = peers.peer(hf_config.write(m, dtype='float32') | {'rope_interleave': False})
  peers.randomise(model, 0)
  model.save_pretrained(tmp_path)
  source = transfer.open_released(tmp_path)
  assert not source.hf.interleaved
  tokens_BL = peers.tokens(m)
  got = peers.logits(peers.as_computed(source.hf.model), peers.read_tree(source), tokens_BL)[0]
  parity.assert_close(got, peers.peer_logits(model, tokens_BL), _LIMIT)


@live
@pytest.mark.skipif(
  importlib.util.find_spec('accelerate') is None,
  reason='transformers wants accelerate to read FP8',
)
@pytest.mark.parametrize('ue8m0', [False, True])
def test_transformers_reads_our_fp8_and_leaves_our_mtp_layer_alone(ue8m0, tmp_path):
  import transformers

  # Several blocks each way, and no ragged one: transformers divides a matrix into equal blocks when it
  # dequantises. The 576 rows of V3's own `kv_a_proj_with_mqa` it refuses; a width of 246, which two
  # equal blocks divide, it reads with the wrong scales.
  m = peers.random_model(1, 'deepseek_v3')
  mla = config.Mla(4, 128, 118, 54, 10, 10, 16)
  m = dataclasses.replace(m, dim=256, ffn_dim=128, mtp_depth=1, mla=mla)
  read = transfer.chunk_reader(peers.random_tree(m, 0))
  export = transfer.Export(m, read, dtype=np.float32, fp8=True, ue8m0=ue8m0)
  folder = peers.save(export, tmp_path / 'ours')
  how = transformers.FineGrainedFP8Config(dequantize=True)  # the CPU has no matmul of FP8
  model, info = peers.load_peer(folder, 'DeepseekV3ForCausalLM', quantization_config=how)
  assert info['unexpected_keys']
  assert all(k.startswith(f'model.layers.{m.num_layers}.') for k in info['unexpected_keys'])
  tree = peers.read_tree(transfer.open_released(folder))
  got = peers.logits(m, tree, peers.tokens(m))[0]
  parity.assert_close(got, peers.peer_logits(model, peers.tokens(m)), _LIMIT)


@live
def test_gradients_of_the_loss_are_those_of_transformers():
  import torch

  m = peers.random_model(2, 'deepseek_v3')
  model = peers.peer(hf_config.write(m, dtype='float32'))
  peers.randomise(model, 0)
  tokens_BL = peers.tokens(m)
  rows = torch.from_numpy(tokens_BL).long()
  model(rows, labels=rows, use_cache=False).loss.backward()
  table = names.table(m, family='deepseek_v3', stacked_experts=True)
  state = {name: x.detach().numpy() for name, x in model.state_dict().items()}
  grads = {name: x.grad.numpy() for name, x in model.named_parameters() if x.grad is not None}
  biases = {slot.name: state[slot.name] for slot in table if slot.f32}
  assert grads.keys() | biases.keys() == {slot.name for slot in table}
  hf = hf_config.HfModel(m, 'deepseek_v3')
  read = lambda x: peers.read_tree(transfer.Released(transfer.InMemory(x), hf))
  expected = read(grads | biases)['params']
  parity.assert_close(peers.cross_entropy_gradients(m, read(state), tokens_BL), expected, 1e-3)


# ---- transformers, recorded ----------------------------------------------------------------------


@live
@pytest.mark.parametrize('name', peers.RECORDED)
def test_what_is_recorded_is_what_transformers_computes(name):
  family, seed = peers.RECORDED[name]
  folder, m = peers.FIXTURES / name, peers.random_model(seed, family)
  if os.environ.get('UPDATE_GOLDEN') == '1':
    shutil.rmtree(folder, ignore_errors=True)
    model, tokens_BL = peers.peer(hf_config.write(m, dtype='float32')), peers.tokens(m, seed)
    peers.randomise(model, seed)
    model.save_pretrained(folder, max_shard_size='80KB')
    (folder / 'generation_config.json').unlink()
    logits_BLV = peers.peer_logits(model, tokens_BL)
    np.savez_compressed(folder / 'logits.npz', tokens_BL=tokens_BL, logits_BLV=logits_BLV)
  model, _ = peers.load_peer(folder, hf_config.write(m)['architectures'][0])
  recorded = np.load(folder / 'logits.npz')
  try:
    parity.assert_close(peers.peer_logits(model, recorded['tokens_BL']), recorded['logits_BLV'])
  except AssertionError as error:
    raise AssertionError(
      f'{error}\nThis transformers computes other logits than the one that recorded {name}. If it is '
      'right and the record is not, run this test with UPDATE_GOLDEN=1 and say in the commit why.'
    ) from None


@pytest.mark.parametrize('name', peers.RECORDED)
def test_logits_are_those_recorded_from_transformers(name):
  source = transfer.open_released(peers.FIXTURES / name)
  recorded = np.load(peers.FIXTURES / name / 'logits.npz')
  m = peers.as_computed(source.hf.model)
  got = peers.logits(m, peers.read_tree(source), recorded['tokens_BL'])[0]
  parity.assert_close(got, recorded['logits_BLV'], _LIMIT)


@pytest.mark.parametrize('name', peers.RECORDED)
def test_the_export_of_an_import_is_what_transformers_wrote(name):
  source = transfer.open_released(peers.FIXTURES / name)
  export = transfer.Export(source.hf.model, source.read, dtype=np.float32)
  written = dict(transfer.exported(export))
  assert written.keys() == source.tensors.tensors.keys()
  for tensor, x in written.items():
    np.testing.assert_array_equal(x, source.tensors.read(tensor), err_msg=tensor)
  theirs = json.loads((peers.FIXTURES / name / 'config.json').read_text())
  for key in export.config.keys() & theirs.keys() - {'torch_dtype', 'rope_scaling'}:
    assert export.config[key] == theirs[key], key


# ---- MTP, which transformers leaves out ----------------------------------------------------------


@pytest.mark.parametrize('seed', [0, 1])
def test_mtp_logits_of_the_released_order_are_the_oracle_s(seed):
  m = dataclasses.replace(peers.random_model(1 + seed, 'deepseek_v3'), mtp_depth=1 + seed)
  w = oracle.random_weights(m, np.random.default_rng(seed))
  tensors = transfer.InMemory(peers.released(m, w))
  source = transfer.Released(tensors, hf_config.read(hf_config.write(m)))
  source.compare_copies()
  tokens_BL = peers.tokens(m, seed)
  main, further = peers.logits(
    peers.as_computed(source.hf.model), peers.read_tree(source), tokens_BL
  )
  assert len(further) == 1 + seed
  for b, row in enumerate(tokens_BL):
    want, hidden_LD, _ = oracle.transformer(m, w, row)
    parity.assert_close(main[b], want, 1e-5)
    # The oracle's rows have one token more than its inputs: a target, which no logit depends on.
    wants, _ = oracle.mtp(m, w, np.append(row, 0), hidden_LD)
    for got, want in zip(further, wants, strict=True):
      parity.assert_close(got[b, : len(want)], want, 1e-5)


def test_the_other_order_of_the_mtp_projection_gives_other_logits():
  m = dataclasses.replace(peers.random_model(1, 'deepseek_v3'), mtp_depth=1)
  stored = peers.released(m, oracle.random_weights(m, np.random.default_rng(0)))
  name = f'model.layers.{m.num_layers}.eh_proj.weight'
  swapped = stored | {name: np.roll(stored[name], m.dim, axis=1)}
  hf = hf_config.read(hf_config.write(m))
  trees = [peers.read_tree(transfer.Released(transfer.InMemory(x), hf)) for x in (stored, swapped)]
  got, other = (peers.logits(peers.as_computed(hf.model), tree, peers.tokens(m)) for tree in trees)
  parity.assert_same_bits(other[0], got[0])
  assert parity.relative_error(other[1][0], got[1][0]) > 0.1
