"""What a config refuses, and how it says so."""

import dataclasses
import functools
import json

import ml_collections
import pytest
from ml_collections import config_dict

from dsv3_jax import config, limits
from dsv3_jax.config import ConfigError


def small():
  return config.debug(config.default())


def changed(key, value):
  """A small config with one value set behind the back of the ConfigDict's own type check."""
  c = small()
  *groups, name = key.split('.')
  inner = c
  for group in groups:
    inner = inner[group]
  with c.unlocked(), c.ignore_type():
    inner[name] = value
  return c


def message(c):
  with pytest.raises(ConfigError) as caught:
    config.freeze(c)
  return str(caught.value)


# ---- there and back ------------------------------------------------------------------------------


def test_default_freezes_to_the_dataclasses_of_the_report():
  assert config.freeze(config.default()) == config.Config()


def test_json_gives_the_same_config_back():
  c = config.freeze(small())
  assert config.from_json(config.to_json(c)) == c != config.Config()


def test_freeze_is_hashable_and_equal_for_equal_values():
  assert hash(config.freeze(small())) == hash(config.freeze(small()))
  assert hash(config.freeze(small())) != hash(config.freeze(config.default()))


def test_freeze_is_independent_of_later_changes_to_the_config_dict():
  c = small()
  frozen = config.freeze(c)
  before = config.to_json(frozen)
  c.model.moe.top_k = 1
  c.model.num_layers = 7
  assert config.to_json(frozen) == before
  with pytest.raises(dataclasses.FrozenInstanceError):
    frozen.model.num_layers = 7


def test_differences_name_each_leaf_that_differs():
  a, b = config.freeze(small()), config.freeze(changed('model.moe.top_k', 1))
  assert config.differences(a, b) == ['model.moe.top_k: 2 -> 1']
  assert config.differences(a, a) == []


def test_whole_numbers_become_floats_where_floats_are_wanted():
  assert config.freeze(changed('run.total_tokens', 640)).run.total_tokens == 640.0


# ---- debug and variant ---------------------------------------------------------------------------


def test_debug_of_debug_changes_nothing():
  assert config.freeze(config.debug(small())) == config.freeze(small())


def test_debug_keeps_the_kind_of_the_model():
  c = config.default()
  c.model.mla.q_rank = 0
  c.model.moe.update(num_groups=1, top_groups=1, scoring='softmax', normalize=False, num_shared=2)
  c.objective.bias_speed = 0.0
  c.model.update(mtp_depth=2, num_dense_layers=0, max_length=131_072)
  m = config.freeze(config.debug(c)).model
  assert m.mla.q_rank == 0 and m.mtp_depth == 2 and m.num_dense_layers == 0
  assert m.moe.num_groups == 1 and m.moe.num_shared == 2 and m.moe.scoring == 'softmax'
  assert m.max_length > m.rope.original_length  # YaRN stays on
  assert (
    config.freeze(small()).model.max_length == config.freeze(small()).model.rope.original_length
  )


def test_variant_gives_the_config_its_debug_form_or_an_error_with_the_known_ones():
  assert config.freeze(config.variant(config.default(), '')) == config.Config()
  assert config.freeze(config.variant(config.default(), 'debug')) == config.freeze(small())
  with pytest.raises(ConfigError, match=r"^unknown argument 'big'; the only one known is 'debug'$"):
    config.variant(config.default(), 'big')


# ---- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('key', 'meant'),
  [
    ('model.numlayers', 'model.num_layers'),
    ('model.moe.num_expert', 'model.moe.num_experts'),
    ('batchsize', 'batch.size'),
    ('model.num_experts', 'model.moe.num_experts'),
    ('optimizer.bias_speed', 'objective.bias_speed'),
    ('modle.dim', 'model.dim'),
    ('modle', 'model'),
  ],
)
def test_an_unknown_key_is_named_with_the_one_that_is_meant(key, meant):
  with pytest.raises(ConfigError) as caught:
    config.check_key(key, f'{key} = 1')
  assert str(caught.value) == f'{key} = 1: no such key; did you mean {meant}?'


def test_an_unknown_key_like_no_other_gets_the_known_ones():
  with pytest.raises(ConfigError) as caught:
    config.check_key('mesh.xyzzy', 'mesh.xyzzy = 1')
  known = 'data, local, node, pipe, zero, zero_permutes'
  assert str(caught.value) == f'mesh.xyzzy = 1: no such key; known here: {known}'


def test_freeze_refuses_an_unknown_key():
  assert message(changed('model.moe.topk', 3)) == (
    'model.moe.topk = 3: no such key; did you mean model.moe.top_k?'
  )


def test_a_group_is_no_value_and_a_value_no_group():
  with pytest.raises(
    ConfigError, match=r'^batch: a group of keys; set one of them, such as batch.'
  ):
    config.check_key('batch', 'batch')
  assert message(changed('mesh', 8)) == (
    'mesh = 8: must be a group of keys: pipe, data, node, local, zero, zero_permutes'
  )
  told = message(changed('batch.size', ml_collections.ConfigDict({'a': 1})))
  assert told.startswith('batch.size = ') and 'must be a whole number, not ConfigDict' in told


def test_json_that_is_no_object_is_refused():
  with pytest.raises(ConfigError, match='not a JSON object'):
    config.from_json('[1]')


# ---- types and ranges ----------------------------------------------------------------------------

FLAT = config.flatten(config.freeze(small()))
KEYS = {kind: [k for k, v in FLAT.items() if type(v) is kind] for kind in (int, float, str, bool)}


@pytest.mark.parametrize('key', FLAT)
def test_a_value_of_another_type_is_refused_by_its_key(key):
  wrong = 3 if type(FLAT[key]) in (str, bool) else 'abc'
  told = message(changed(key, wrong))
  assert told.startswith(f'{key} = {wrong!r}: must be ') and f'not {type(wrong).__name__}' in told


@pytest.mark.parametrize('key', KEYS[int])
def test_a_fraction_is_refused_where_a_whole_number_is_wanted(key):
  assert message(changed(key, 1.5)) == f'{key} = 1.5: must be a whole number, not float'


@pytest.mark.parametrize('key', KEYS[int] + KEYS[float])
def test_a_truth_value_is_no_number(key):
  values = json.loads(config.to_json(config.freeze(small())))
  *groups, name = key.split('.')
  functools.reduce(dict.__getitem__, groups, values)[name] = True
  with pytest.raises(ConfigError) as caught:
    config.from_json(json.dumps(values))
  assert str(caught.value).startswith(f'{key} = True: must be a')


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
@pytest.mark.parametrize('key', KEYS[float])
def test_numbers_that_are_not_finite_are_refused(key, value):
  assert message(changed(key, value)) == f'{key} = {value}: must be a finite number'


@pytest.mark.parametrize('key', [k for k in KEYS[int] + KEYS[float] if k != 'mesh.zero'])
def test_negative_numbers_are_refused(key):
  told = message(changed(key, type(FLAT[key])(-1)))
  assert told.startswith(f'{key} = -1') and told.count('\n') == 0
  assert told.endswith(': must be positive') or told.endswith(': must not be negative')


@pytest.mark.parametrize('key', KEYS[str])
def test_an_empty_string_is_refused_unless_it_has_a_meaning(key):
  if key in ('data.tokenizer', 'data.cache_dir', 'run.prompt', 'run.init_from'):
    config.freeze(changed(key, ''))
  else:
    assert message(changed(key, '')).startswith(f"{key} = '': must ")


def test_a_required_value_that_was_not_given_is_named():
  c = small().unlock()  # a locked ConfigDict cannot hold one
  with c.ignore_type():
    c.batch.size = config_dict.required_placeholder(int)
  assert message(c) == 'batch.size: has no value, and the config file requires one'


def test_a_placeholder_that_was_filled_counts_as_its_value():
  c = small().unlock()
  with c.ignore_type():
    c.batch.size = config_dict.required_placeholder(int)
    c.batch.size = 16
  assert config.freeze(c).batch.size == 16


# ---- what does not go together -------------------------------------------------------------------


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    ({'model.precision': 'fp16'}, "model.precision = 'fp16': must be one of 'bf16', 'fp32'"),
    ({'model.remat': 'all'}, "model.remat = 'all': must be one of 'none', 'block', 'latents'"),
    ({'model.moe.scoring': 'top'}, "model.moe.scoring = 'top': must be one of"),
    ({'model.moe.dispatch.form': 'a2a'}, "model.moe.dispatch.form = 'a2a': must be one of 'auto'"),
    (
      {'model.moe.dispatch.payload': 'fp4'},
      "payload = 'fp4': must be one of 'fp8', 'bf16', 'plain'",
    ),
    ({'model.moe.dispatch.combine': 'fp8'}, "combine = 'fp8': must be one of 'bf16', 'logfmt8'"),
    ({'model.moe.dispatch.capacity': 0.0}, 'model.moe.dispatch.capacity = 0.0: must be positive'),
    (
      {'model.moe.dispatch.form': 'allgather', 'model.moe.dispatch.combine': 'logfmt8'},
      "combine = 'logfmt8': must be 'bf16' or 'plain': allgather sums on the way",
    ),
    (
      {'model.moe.dispatch.form': 'two_hop', 'mesh.node': 8},
      'model.moe.num_groups = 4: must be a multiple of mesh.node = 8: two_hop wants whole groups',
    ),
    (
      {
        'model.moe.dispatch.form': 'two_hop',
        'model.moe.top_groups': 3,
        'mesh.node': 2,
      },
      'model.moe.top_groups = 3: must be at most mesh.node = 2: two_hop would limit no token',
    ),
    ({'mesh.node': 2, 'mesh.local': 8}, 'model.moe.num_experts = 8: must be a multiple of 16 = '),
    ({'optimizer.moments': 'fp8'}, "optimizer.moments = 'fp8': must be one of 'bf16', 'fp32'"),
    ({'mesh.zero': 2}, 'mesh.zero = 2: must be one of 0, 1, 3'),
    ({'mesh.zero': -1}, 'mesh.zero = -1: must be one of 0, 1, 3'),
    (
      {'mesh.zero': 1, 'mesh.zero_permutes': 1},
      'mesh.zero_permutes = 1: must be 0 with mesh.zero = 1',
    ),
    (
      {'mesh.zero': 3, 'mesh.zero_permutes': 1, 'mesh.data': 3},
      'mesh.data = 3: must be a power of two with mesh.zero_permutes',
    ),
    ({'optimizer.beta1': 1.0}, 'optimizer.beta1 = 1.0: must be below 1'),
    ({'optimizer.beta2': 1.0}, 'optimizer.beta2 = 1.0: must be below 1'),
    ({'optimizer.ema_decay': 1.0}, 'optimizer.ema_decay = 1.0: must be below 1'),
    ({'data.heldout': 1.0}, 'data.heldout = 1.0: must be below 1'),
    (
      {'model.moe.scoring': 'softmax'},
      'objective.bias_speed = 0.001: must be 0: softmax routing has no bias to move',
    ),
    ({'data.fim_rate': 1.1}, 'data.fim_rate = 1.1: must be at most 1'),
    ({'run.seed': 2**32}, 'run.seed = 4294967296: must be below 2**32'),
    ({'model.num_dense_layers': 3}, 'must be below model.num_layers = 3'),
    ({'model.mla.rope_dim': 5}, 'model.mla.rope_dim = 5: must be even'),
    ({'model.rope.theta': 1.0}, 'model.rope.theta = 1.0: must be above 1'),
    ({'model.rope.factor': 0.5}, 'model.rope.factor = 0.5: must be at least 1'),
    ({'model.rope.beta_fast': 1.0}, 'must be above model.rope.beta_slow = 1.0'),
    ({'model.moe.num_experts': 10}, 'must be a multiple of model.moe.num_groups = 4'),
    ({'model.moe.top_groups': 5}, 'must be at most model.moe.num_groups = 4'),
    ({'model.moe.top_k': 5}, 'model.moe.top_k = 5: must be at most 4: so many experts are in'),
    ({'model.moe.num_groups': 8}, 'model.moe.num_groups = 8: must be at most 4, two experts'),
    ({'batch.seq_len': 65}, 'batch.seq_len = 65: must be at most model.max_length = 64'),
    ({'model.mtp_depth': 32}, 'model.mtp_depth = 32: must be below batch.seq_len = 32'),
    ({'batch.size': 12}, 'batch.size = 12: must be a multiple of batch.micro_size = 8'),
    ({'batch.start_size': 16}, 'batch.start_size = 16: must be at most batch.size = 8'),
    ({'batch.start_size': 4}, 'batch.start_size = 4: must be a multiple of batch.micro_size = 8'),
    (
      {'mesh.data': 3},
      'batch.micro_size = 8: must be a multiple of 3 = mesh.data * mesh.node * mesh.local',
    ),
    (
      {'mesh.node': 4, 'mesh.local': 4, 'batch.micro_size': 16, 'batch.size': 16},
      'model.moe.num_experts = 8: must be a multiple of 16 = mesh.node * mesh.local',
    ),
    (
      {'mesh.pipe': 3, 'batch.micro_size': 1},
      'mesh.pipe = 3: must be 1 or even (2 or 4): micro-batches enter at both ends',
    ),
    (
      {'mesh.pipe': 6, 'batch.size': 16, 'batch.micro_size': 1},
      'mesh.pipe = 6: must be at most 4: model.num_layers + model.mtp_depth = 4 blocks',
    ),
    (
      {'mesh.pipe': 4, 'model.mtp_depth': 2, 'batch.micro_size': 1},
      'mesh.pipe = 4: must be at most 2: the last stage has all MTP modules',
    ),
    (
      {'mesh.pipe': 4},
      'batch.micro_size = 8: must be 1: mesh.pipe = 4 wants an even number of at least 8 '
      'micro-batches, not 1',
    ),
    (
      {'mesh.pipe': 2, 'pipeline.executor': 'mpmd', 'pipeline.weight_part': 'at_once'},
      "pipeline.weight_part = 'at_once': must be 'deferred' with pipeline.executor='mpmd'",
    ),
    (
      {'mesh.pipe': 2, 'mesh.data': 4},
      'batch.micro_size = 8: must divide a larger batch.size, at least 16: mesh.pipe = 2 wants an '
      'even number of at least 4 micro-batches, not 1',
    ),
    (
      {'mesh.pipe': 2, 'mesh.zero': 3, 'batch.micro_size': 2},
      'mesh.zero = 3: must be 1 with mesh.pipe > 1: stages are gathered from a split state',
    ),
    (
      {'mesh.pipe': 2, 'model.dual_batch': True, 'batch.micro_size': 2},
      'model.dual_batch = True: must be False with mesh.pipe > 1, where forward and backward overlap',
    ),
    (
      {'optimizer.end_lr': 1.0},
      'optimizer.end_lr = 1.0: must be at most optimizer.peak_lr = 0.003',
    ),
    (
      {'run.total_tokens': 1e12},
      'run.total_tokens = 1000000000000.0: must be at most 137438953216',
    ),
  ],
)
def test_what_cannot_work_is_one_line_with_key_value_and_what_would_be_right(changes, told):
  values = config.flatten(config.freeze(small())) | changes
  c = small()
  with c.ignore_type():
    c.update_from_flattened_dict(values)
  lines = [line for line in message(c).split('\n') if told in line]
  assert len(lines) == 1
  assert lines[0].partition(' = ')[0] in FLAT


def test_all_faults_are_told_at_once():
  c = small()
  c.batch.size = 12
  c.model.mla.rope_dim = 5
  keys = [line.partition(' = ')[0] for line in message(c).split('\n')]
  assert keys == ['model.mla.rope_dim', 'batch.size']


def test_choices_and_exceptions_name_keys_that_exist():
  listed = set(limits._CHOICES) | limits._MAY_BE_ZERO | limits._MAY_BE_EMPTY
  assert listed | set(limits._BELOW_ONE) <= set(FLAT)
