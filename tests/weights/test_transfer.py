"""Chunks out of a released checkpoint and back: FP8, copies, what is missing, bit by bit."""

import dataclasses

import ml_dtypes
import numpy as np
import oracle
import parity
import peers
import pytest

from dsv3_jax import config
from dsv3_jax.weights import fp8, hf_config, names, transfer

_BF16 = np.dtype(ml_dtypes.bfloat16)
# Larger than a block, and no multiple of one: edges are ragged, blocks straddle heads and halves.
_WIDE = config.Model(
  vocab_size=50, dim=160, ffn_dim=200, num_layers=2, num_dense_layers=1, mtp_depth=1,
  max_length=16, precision='fp32', remat='none',
  mla=config.Mla(3, 130, 140, 30, 10, 26, 16),
  moe=config.Moe(4, 1, 2, 136, 2, 1),
)  # fmt: skip


def _released(m, tensors, **more):
  values = hf_config.write(m) | more
  return transfer.Released(transfer.InMemory(tensors), hf_config.read(values))


def _plain(m, dtype=np.float32, seed=0):
  stored = peers.released(m, oracle.random_weights(m, np.random.default_rng(seed)))
  return {n: x if n.endswith('bias') else x.astype(dtype) for n, x in stored.items()}


def _as_fp8(m, tensors, power_of_two=False, stacked=False):
  """The same with every matrix that releases quantise as codes and scales."""
  out = dict(tensors)
  for name, (slot, *_) in names.tensor_slots(
    names.table(m, family='deepseek_v3', stacked_experts=stacked)
  ).items():
    if not slot.quantised:
      continue
    lead = slot.shape[:-2]
    parts = [fp8.quantise(tensors[name][i], power_of_two=power_of_two) for i in np.ndindex(lead)]
    codes, scales = (np.stack(x).reshape(lead + x[0].shape) for x in zip(*parts, strict=True))
    out[name], out[names.scale_name(slot)] = codes, scales
  return out


def _naive(codes, scale):
  """The definition: every value with the scale of its block."""
  of_each = np.kron(scale.astype(np.float32), np.ones((128, 128), np.float32))
  return codes.astype(np.float32) * of_each[: codes.shape[0], : codes.shape[1]]


# ---- import --------------------------------------------------------------------------------------


@pytest.mark.parametrize('power_of_two', [False, True])
def test_fp8_is_read_as_the_definition_says(power_of_two):
  stored = _as_fp8(_WIDE, _plain(_WIDE), power_of_two)
  if power_of_two:  # also in the dtype of its own
    stored = {n: x.astype(fp8.E8M0) if n.endswith(names.SCALE) else x for n, x in stored.items()}
  plain = {n: x for n, x in stored.items() if not n.endswith(names.SCALE)}
  for name, x in plain.items():
    if x.dtype == fp8.E4M3:
      plain[name] = _naive(x, stored[name + names.SCALE])
  got = peers.read_tree(_released(_WIDE, stored))
  parity.assert_same_bits(got, peers.read_tree(_released(_WIDE, plain)))


def test_stacked_fp8_is_read_expert_by_expert():
  plain = _plain(_WIDE)
  stacked = {n: x for n, x in plain.items() if '.experts.' not in n}
  for layer in (1, 2):
    at = f'model.layers.{layer}.mlp.experts.'
    part = lambda name, at=at: [plain[f'{at}{e}.{name}.weight'] for e in range(4)]
    both = zip(part('gate_proj'), part('up_proj'), strict=True)
    stacked[at + 'gate_up_proj'] = np.stack([np.concatenate(pair) for pair in both])
    stacked[at + 'down_proj'] = np.stack(part('down_proj'))
  got = peers.read_tree(_released(_WIDE, stacked))
  parity.assert_same_bits(got, peers.read_tree(_released(_WIDE, plain)))
  quantised = _as_fp8(_WIDE, stacked, stacked=True)
  back = dict(stacked)
  for name, x in quantised.items():
    if x.dtype == fp8.E4M3:
      scales = quantised[name + names.SCALE]
      each = [_naive(x[i], scales[i]) for i in np.ndindex(x.shape[:-2])]
      back[name] = np.stack(each).reshape(x.shape)
  assert quantised['model.layers.1.mlp.experts.gate_up_proj_scale_inv'].shape == (4, 3, 2)
  got = peers.read_tree(_released(_WIDE, quantised))
  parity.assert_same_bits(got, peers.read_tree(_released(_WIDE, back)))


def test_weights_are_read_in_the_dtype_that_is_asked_for_and_biases_in_float32():
  source = _released(_WIDE, _plain(_WIDE, _BF16))
  assert source.read(('params', 'embed_VD'), (), _BF16).dtype == _BF16
  for path, index, shape in names.chunks(_WIDE):
    x = source.read(path, index, _BF16)
    assert x.shape == shape
    assert x.dtype == (np.float32 if path[0] == 'router_bias' else _BF16)


def test_v2_has_router_biases_of_zero():
  m = peers.random_model(1, 'deepseek_v2')
  tree = peers.read_tree(_released(m, _plain(m)))
  bias_YE = tree['router_bias']['moe_layers']['ffn']['bias_E']
  assert bias_YE.shape == (m.num_layers - m.num_dense_layers, m.moe.num_experts)
  assert bias_YE.dtype == np.float32 and not bias_YE.any()


def test_a_model_whose_mtp_layers_are_not_stored_is_read_without_and_a_line_says_so():
  last = f'model.layers.{_WIDE.num_layers}.'
  stored = {n: x for n, x in _plain(_WIDE).items() if not n.startswith(last)}
  source = _released(_WIDE, stored)
  assert source.hf.model == dataclasses.replace(
    hf_config.read(hf_config.write(_WIDE)).model, mtp_depth=0
  )
  assert [n for n in source.hf.notes if 'no MTP layer is stored' in n]
  assert source.findings().lines == [] and 'mtp' not in peers.read_tree(source)['params']


# ---- what does not fit ---------------------------------------------------------------------------

_Q = 'model.layers.0.self_attn.q_a_proj.weight'


@pytest.mark.parametrize(
  ('change', 'line'),
  [
    ({'lm_head.weight': None}, 'missing lm_head.weight [50, 160]'),
    ({'model.layers.1.mlp.experts.3.up_proj.weight': None}, 'missing model.layers.1.mlp.experts.3.up_proj.weight [136, 160]'),
    ({'model.layers.2.enorm.weight': None}, 'missing model.layers.2.enorm.weight [160]'),
    ({'model.layers.9.enorm.weight': np.ones(3, np.float32)}, 'extra model.layers.9.enorm.weight [3]'),
    ({'model.norm.weight': np.ones(161, np.float32)}, 'misshaped model.norm.weight [161]: must be [160]'),
    ({_Q: np.ones((160, 130), np.float32)}, f'misshaped {_Q} [160, 130]: must be [130, 160]'),
    ({_Q: np.ones((130, 160), np.int8)}, f'mistyped {_Q} int8: must be float32 or bfloat16 or float16'),
    ({_Q: np.ones((130, 160), fp8.E4M3)}, f'missing {_Q}_scale_inv [2, 2]'),
    ({_Q + '_scale_inv': np.ones((2, 2), np.float32)}, f'mistyped {_Q} float32: must be float8_e4m3fn'),
    (
      {_Q: np.ones((130, 160), fp8.E4M3), _Q + '_scale_inv': np.ones((1, 2), np.float32)},
      f'misshaped {_Q}_scale_inv [1, 2]: must be [2, 2]',
    ),
    (
      {_Q: np.ones((130, 160), fp8.E4M3), _Q + '_scale_inv': np.ones((2, 2), _BF16)},
      f'mistyped {_Q}_scale_inv bfloat16: must be float32 or float8_e8m0fnu',
    ),
    (
      {'model.norm.weight': np.ones(160, fp8.E4M3)},
      'mistyped model.norm.weight float8_e4m3fn: must be float32 or bfloat16 or float16',
    ),
    (
      {'model.layers.1.mlp.gate.e_score_correction_bias': np.ones(4, _BF16)},
      'mistyped model.layers.1.mlp.gate.e_score_correction_bias bfloat16: must be float32',
    ),
  ],
)  # fmt: skip
def test_what_a_checkpoint_lacks_or_has_too_much_is_told_in_a_line(change, line):
  stored = {n: x for n, x in (_plain(_WIDE) | change).items() if x is not None}
  assert _released(_WIDE, stored).findings().lines == [line]


def test_copies_may_be_left_out_and_old_tables_of_frequencies_are_ignored():
  stored = _plain(_WIDE)
  del stored['model.layers.2.embed_tokens.weight'], stored['model.layers.2.shared_head.head.weight']
  stored['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(5, np.float32)
  source = _released(_WIDE, stored)
  source.compare_copies()
  assert source.findings().lines == []


@pytest.mark.parametrize(
  ('copy', 'main'),
  [
    ('model.layers.2.embed_tokens.weight', 'model.embed_tokens.weight'),
    ('model.layers.2.shared_head.head.weight', 'lm_head.weight'),
  ],
)
def test_a_copy_that_differs_from_its_original_is_refused(copy, main, monkeypatch):
  monkeypatch.setattr(transfer, '_COMPARED_ROWS', 16)
  stored = _plain(_WIDE)
  _released(_WIDE, stored).compare_copies()
  stored[copy] = stored[copy].copy()
  stored[copy][49, 159] += 1
  with pytest.raises(config.ConfigError, match=f'{copy}: differs from {main} in rows 48 to 49'):
    _released(_WIDE, stored).compare_copies()


@pytest.mark.parametrize('bad', [np.nan, np.inf, 0.0, -1.0])
def test_a_scale_that_cannot_be_is_refused_by_the_name_of_its_weight(bad):
  stored = _as_fp8(_WIDE, _plain(_WIDE))
  stored[_Q + '_scale_inv'][1, 1] = bad
  source = _released(_WIDE, stored)
  path, index = ('params', 'dense_layers', 'attn', 'q_down_DQ'), (0,)
  for read in (source.read, source.read_codes):
    with pytest.raises(config.ConfigError, match=f'^{_Q}: '):
      read(path, index)


# ---- export --------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [np.dtype(np.float32), _BF16])
def test_import_of_an_export_is_bit_identical(dtype):
  tree = peers.read_tree(_released(_WIDE, _plain(_WIDE, dtype)))
  export = transfer.Export(_WIDE, transfer.chunk_reader(tree), dtype=dtype)
  source = _released(_WIDE, dict(transfer.exported(export)))
  source.compare_copies()
  parity.assert_same_bits(peers.read_tree(source), tree)


@pytest.mark.parametrize('ue8m0', [False, True])
def test_import_of_an_fp8_export_of_fp8_weights_is_bit_identical(ue8m0):
  stored = _as_fp8(_WIDE, _plain(_WIDE), ue8m0)
  tree = peers.read_tree(_released(_WIDE, stored))
  export = transfer.Export(
    _WIDE, transfer.chunk_reader(tree), dtype=np.float32, fp8=True, ue8m0=ue8m0
  )
  written = dict(transfer.exported(export))
  assert written.keys() == stored.keys()
  assert {n: (x.dtype, x.shape) for n, x in written.items()} == {
    n: (x.dtype, x.shape) for n, x in stored.items()
  }
  parity.assert_same_bits(peers.read_tree(_released(_WIDE, written)), tree)
  assert hf_config.read(export.config).ue8m0 == ue8m0


def test_codes_that_are_kept_go_back_as_they_came():
  stored = _as_fp8(_WIDE, _plain(_WIDE))
  source = _released(_WIDE, stored)
  scales = {}

  def read(path, index):
    if not source.is_fp8(path, index):
      return source.read(path, index)
    codes, name, scale = source.read_codes(path, index)
    assert codes.dtype == fp8.E4M3
    np.testing.assert_array_equal(scales.setdefault(name, scale), scale)
    return codes

  tree = transfer.tree(source.hf.model, read)
  ways = {'read_scales': scales.__getitem__, 'dtype': np.float32}
  export = transfer.Export(_WIDE, transfer.chunk_reader(tree), fp8=True, **ways)
  written = dict(transfer.exported(export))
  assert written.keys() == stored.keys()
  for name, x in stored.items():
    assert written[name].tobytes() == x.tobytes(), name
  export = transfer.Export(_WIDE, transfer.chunk_reader(tree), **ways)
  values = peers.read_tree(_released(_WIDE, dict(transfer.exported(export))))
  parity.assert_same_bits(values, peers.read_tree(source))


def test_scales_may_be_asked_for_in_any_order():
  tree = peers.read_tree(_released(_WIDE, _plain(_WIDE)))
  make = lambda: transfer.Export(_WIDE, transfer.chunk_reader(tree), fp8=True)
  expected = dict(transfer.exported(make()))
  export = make()
  for name, x in sorted(expected.items(), reverse=True):
    assert export.read(name).tobytes() == x.tobytes(), name
    assert export.read(name).tobytes() == x.tobytes(), name
