"""The name table: every released tensor is a part of our tree and back, nothing twice, nothing left out."""

import collections
import dataclasses
import re

import jax
import ml_dtypes
import numpy as np
import oracle
import peers
import pytest

from dsv3_jax import config
from dsv3_jax.mesh import path_names
from dsv3_jax.model import rope
from dsv3_jax.training import state
from dsv3_jax.weights import names, transfer

_V3 = config.Model()
_V2_LITE = config.Model(
  vocab_size=102_400, dim=2048, ffn_dim=10_944, num_layers=27, num_dense_layers=1, mtp_depth=0,
  mla=config.Mla(num_heads=16, q_rank=0),
  moe=config.Moe(64, 2, 6, 1408, 1, 1, 'softmax', False, 1.0),
)  # fmt: skip
_V2 = dataclasses.replace(
  _V2_LITE, dim=5120, ffn_dim=12_288, num_layers=60, mla=config.Mla(),
  moe=config.Moe(160, 2, 6, 1536, 8, 3, 'softmax', False, 16.0),
)  # fmt: skip


# ---- the released V3, all of it ------------------------------------------------------------------


def _blocks(shape):
  return tuple(-(-n // 128) for n in shape)


def _released_v3():
  """{name: shape} of the 91,991 tensors, from the published rules and shapes and not from our table."""
  D, V, tensors = 7168, 129_280, {}

  def quantised(name, *shape):
    tensors[f'{name}.weight'] = shape
    tensors[f'{name}.weight_scale_inv'] = _blocks(shape)

  def swiglu(prefix, F):
    quantised(prefix + 'gate_proj', F, D)
    quantised(prefix + 'up_proj', F, D)
    quantised(prefix + 'down_proj', D, F)

  def layer(i):
    at = f'model.layers.{i}.'
    tensors[at + 'input_layernorm.weight'] = (D,)
    tensors[at + 'post_attention_layernorm.weight'] = (D,)
    quantised(at + 'self_attn.q_a_proj', 1536, D)
    tensors[at + 'self_attn.q_a_layernorm.weight'] = (1536,)
    quantised(at + 'self_attn.q_b_proj', 24_576, 1536)
    quantised(at + 'self_attn.kv_a_proj_with_mqa', 576, D)
    tensors[at + 'self_attn.kv_a_layernorm.weight'] = (512,)
    quantised(at + 'self_attn.kv_b_proj', 32_768, 512)
    quantised(at + 'self_attn.o_proj', D, 16_384)
    if i < 3:
      return swiglu(at + 'mlp.', 18_432)
    tensors[at + 'mlp.gate.weight'] = (256, D)
    tensors[at + 'mlp.gate.e_score_correction_bias'] = (256,)
    swiglu(at + 'mlp.shared_experts.', 2048)
    for e in range(256):
      swiglu(f'{at}mlp.experts.{e}.', 2048)
    return None

  for name in ('model.embed_tokens', 'lm_head'):
    tensors[f'{name}.weight'] = (V, D)
  tensors['model.norm.weight'] = (D,)
  for i in range(62):
    layer(i)
  at = 'model.layers.61.'
  for name in ('enorm', 'hnorm', 'shared_head.norm'):
    tensors[f'{at}{name}.weight'] = (D,)
  tensors[at + 'eh_proj.weight'] = (D, 2 * D)
  for name in ('embed_tokens', 'shared_head.head'):
    tensors[f'{at}{name}.weight'] = (V, D)
  return tensors


def test_the_table_of_v3_has_exactly_the_91_991_released_tensors_in_their_shapes():
  released = _released_v3()
  assert len(released) == 91_991
  tensors = {}
  for name, (slot, *_) in names.tensor_slots(names.table(_V3, family='deepseek_v3')).items():
    tensors[name] = slot.shape
    if slot.quantised:
      tensors[names.scale_name(slot)] = names.scale_shape(slot)
  assert tensors == released
  assert released['model.layers.3.self_attn.kv_a_proj_with_mqa.weight_scale_inv'] == (5, 56)


def _leaves(m):
  """{path: shape} of the tree that training makes."""
  layout = state.layout(config.Config(model=m))
  tree = {'params': layout.params, 'router_bias': layout.router_bias}
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path_names(path): x.shape for path, x in flat}


@pytest.mark.parametrize(
  ('m', 'family', 'tensors'),
  [
    # 17 (15 without a query latent) per dense layer and 11 beside the experts' of a MoE layer, 3 more.
    (_V3, 'deepseek_v3', 3 + 3 * 12 + 59 * (9 + 2 + 3 * 257) + 6),
    (_V2, 'deepseek_v2', 3 + 1 * 12 + 59 * (9 + 1 + 3 * 161)),
    (_V2_LITE, 'deepseek_v2', 3 + 1 * 10 + 26 * (7 + 1 + 3 * 65)),
  ],
)
@pytest.mark.parametrize('stacked', [False, True])
def test_the_table_covers_our_whole_tree_exactly_once(m, family, tensors, stacked):
  table = names.table(m, family=family, stacked_experts=stacked)
  leaves = _leaves(m)
  if family == 'deepseek_v2':  # it has no such biases: ours are zero
    leaves = {path: shape for path, shape in leaves.items() if path[0] == 'params'}
  chunks = collections.defaultdict(dict)
  for slot in table:
    if slot.copy_of is None:
      assert slot.index not in chunks[slot.path], slot
      chunks[slot.path][slot.index] = slot
  assert chunks.keys() == leaves.keys()
  for path, of_leaf in chunks.items():
    lead = len(next(iter(of_leaf)))
    assert of_leaf.keys() == set(np.ndindex(leaves[path][:lead])), path
    assert {slot.ours_shape for slot in of_leaf.values()} == {leaves[path][lead:]}, path
  by_name = names.tensor_slots(table)
  routed = 3 * m.moe.num_experts if not stacked else 2
  assert len(by_name) == tensors - (m.num_layers - m.num_dense_layers + m.mtp_depth) * (
    3 * m.moe.num_experts - routed
  )
  for name, slots in by_name.items():
    sizes = sum(int(np.prod(slot.ours_shape)) for slot in slots)
    assert sizes == int(np.prod(slots[0].shape)), name
    assert len({(slot.shape, slot.quantised, slot.f32, slot.copy_of) for slot in slots}) == 1, name


def test_copies_are_the_embedding_and_the_head_of_the_mtp_layer_and_nothing_else():
  copies = {s.name: s.copy_of for s in names.table(_V3, family='deepseek_v3') if s.copy_of}
  assert copies == {
    'model.layers.61.embed_tokens.weight': 'model.embed_tokens.weight',
    'model.layers.61.shared_head.head.weight': 'lm_head.weight',
  }


def test_chunks_are_those_of_the_table_of_v3_for_every_family():
  for family in ('deepseek_v3', 'deepseek_v2'):
    m = peers.random_model(1, family)
    listed = {(path, index): shape for path, index, shape in names.chunks(m)}
    slots = names.chunk_slots(names.table(m, family=family))
    assert {key: slot.ours_shape for key, slot in slots.items()}.items() <= listed.items()
    rest = [path for path, _ in listed.keys() - slots.keys()]
    assert set(rest) <= {('router_bias', 'moe_layers', 'ffn', 'bias_E')}
    assert bool(rest) == (family == 'deepseek_v2')
  assert sum(1 for _ in names.chunks(_V3)) == 46_305


# ---- values, on small models ---------------------------------------------------------------------


def _model(seed, family):
  m = peers.random_model(seed, family)
  return dataclasses.replace(m, mtp_depth=1 + seed % 2 if family == 'deepseek_v3' else 0)


@pytest.mark.parametrize(
  ('family', 'seed'), [('deepseek_v3', 0), ('deepseek_v3', 1), ('deepseek_v2', 3)]
)
@pytest.mark.parametrize(
  'dtype', [np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.uint8]
)
@pytest.mark.parametrize('stacked', [False, True])
def test_putting_back_what_was_taken_gives_every_tensor_again_in_any_dtype(
  family, seed, dtype, stacked
):
  m, rng = _model(seed, family), np.random.default_rng(seed)
  for interleaved in (True, False):
    table = names.table(m, family=family, stacked_experts=stacked, interleaved=interleaved)
    for name, slots in names.tensor_slots(table).items():
      # Bytes, so that every bit pattern is tried, NaNs too.
      raw = rng.integers(0, 256, (*slots[0].shape, np.dtype(dtype).itemsize), np.uint8)
      tensor = raw.view(dtype).reshape(slots[0].shape)
      back, seen = np.zeros_like(tensor), np.zeros(tensor.shape, np.uint8)
      for slot in slots:
        ours = slot.to_ours(tensor[slot.part])
        assert (ours.dtype, ours.shape) == (np.dtype(dtype), slot.ours_shape), name
        slot.put(ours, back[slot.part])
        slot.put(np.ones(ours.shape, np.uint8), counted := np.zeros(slot.part_shape, np.uint8))
        seen[slot.part] += counted
        if slot.whole:
          assert slot.to_hf(ours).tobytes() == tensor[slot.part].tobytes(), name
      assert back.tobytes() == tensor.tobytes(), name
      assert np.all(seen == 1), name


@pytest.mark.parametrize(
  ('family', 'seed'),
  [('deepseek_v3', s) for s in range(4)] + [('deepseek_v2', 0), ('deepseek_v2', 2)],
)
def test_the_table_says_what_the_published_layout_says(family, seed):
  m = _model(seed, family)
  w = oracle.random_weights(m, np.random.default_rng(seed))
  expected = peers.released(m, w)
  tree = peers.random_tree(m, seed)
  export = transfer.Export(m, transfer.chunk_reader(tree), dtype=np.float32)
  written = dict(transfer.exported(export))
  assert written.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(written[name], x, err_msg=name)


def test_halves_are_turned_into_pairs_that_rotate_the_same():
  R, m = 6, peers.random_model(1, 'deepseek_v3')
  m = dataclasses.replace(m, mla=dataclasses.replace(m.mla, rope_dim=R))
  pairs, halves = (
    {(s.path, s.index): s for s in names.table(m, family='deepseek_v3', interleaved=how)}
    for how in (True, False)
  )
  rng = np.random.default_rng(0)
  changed = set()
  for key, slot in halves.items():
    tensor = rng.normal(size=slot.part_shape).astype(np.float32)
    got, plain = slot.to_ours(tensor), pairs[key].to_ours(tensor)
    if np.array_equal(got, plain):
      continue
    changed.add(key[0][-1])
    # theirs: dimension j turns with j + R/2; ours: 2j with 2j + 1. Dimensions without position stay.
    fixed = plain.shape[-1] - R
    np.testing.assert_array_equal(got[..., :fixed], plain[..., :fixed])
    theirs, ours = plain[..., fixed:], got[..., fixed:]
    np.testing.assert_array_equal(ours[..., 0::2], theirs[..., : R // 2])
    np.testing.assert_array_equal(ours[..., 1::2], theirs[..., R // 2 :])
    angle = np.linspace(0.1, 1, R // 2, dtype=np.float32)
    cos, sin = (f(angle).reshape((1,) * (ours.ndim - 1) + (-1,)) for f in (np.cos, np.sin))
    one, two = theirs[..., : R // 2], theirs[..., R // 2 :]
    turned = np.asarray(rope.rotate(jax.numpy.asarray(ours), cos, sin))
    np.testing.assert_allclose(turned[..., 0::2], one * cos - two * sin, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(turned[..., 1::2], two * cos + one * sin, rtol=1e-5, atol=1e-6)
  assert changed == ({'q_up_QNJ', 'k_rope_DR'} if m.mla.q_rank else {'q_DNJ', 'k_rope_DR'})


def test_a_wrong_shape_is_refused_by_the_name_of_the_tensor():
  slot = names.table(_V3, family='deepseek_v3')[0]
  message = re.escape('model.embed_tokens.weight: shape [2, 3]; must be [129280, 7168]')
  with pytest.raises(config.ConfigError, match=message):
    slot.to_ours(np.zeros((2, 3)))
  with pytest.raises(config.ConfigError, match=re.escape('params/embed_VD: shape [2, 3]; must be')):
    slot.put(np.zeros((2, 3)), np.zeros((1, 1)))


# ---- what a folder holds -------------------------------------------------------------------------


@pytest.mark.parametrize('stacked', [False, True])
def test_the_form_of_the_experts_and_the_mtp_modules_are_told_by_the_names(stacked):
  m = _model(1, 'deepseek_v3')
  for mtp in (False, True):
    table = names.table(m, family='deepseek_v3', stacked_experts=stacked, mtp=mtp)
    stored = {slot.name for slot in table}
    assert names.stored_stacked(stored) == stacked
    assert names.stored_mtp_depth(stored, m.num_layers) == (m.mtp_depth if mtp else 0)


def test_names_that_only_look_like_layers_are_no_mtp_modules():
  stored = ['model.layers.x.a', 'layers.5.a', 'model.layers.6.a', f'model.layers.{"9" * 5000}.a']
  assert names.stored_mtp_depth(stored, 5) == 0
  assert names.stored_mtp_depth([*stored, 'model.layers.5.a'], 5) == 2
