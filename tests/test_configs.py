"""The shipped configs: each loads, freezes, shrinks, and its docstring tells commands that work."""

import ast
import pathlib
import re
import shlex

import pytest
from absl import flags as absl_flags

from dsv3_jax import config, counts, flags

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(path.name for path in (ROOT / 'configs').glob('*.py'))


def load(name, arg=''):
  return flags.load(f'{ROOT}/configs/{name}' + (f':{arg}' if arg else ''))


def parse(arguments):
  """Config, what was given, and the values of all flags."""
  values, argv = absl_flags.FlagValues(), ['program', *arguments]
  absl_flags.DEFINE_string('workdir', None, 'Where to write.', values)
  flags.define(argv, values)
  return *flags.parse(argv, values), values


def docstring(name):
  return ast.get_docstring(ast.parse((ROOT / 'configs' / name).read_text(encoding='utf-8')))


def commands(name):
  """Arguments of each command in the docstring."""
  text = docstring(name).replace('\\\n', ' ')
  return [shlex.split(line)[3:] for line in re.findall(r'^ +(python -m .*)$', text, re.M)]


@pytest.mark.parametrize('arg', ['', 'debug'])
@pytest.mark.parametrize('name', FILES)
def test_every_config_freezes_and_so_does_its_debug_form(name, arg):
  c = config.freeze(load(name, arg))
  assert config.from_json(config.to_json(c)) == c


@pytest.mark.parametrize('name', FILES)
def test_every_call_returns_a_config_of_its_own(name):
  c, module_s_other = load(name), load(name)
  c.model.num_layers += 1
  assert module_s_other.model.num_layers == c.model.num_layers - 1


@pytest.mark.parametrize('name', FILES)
def test_an_unknown_argument_is_refused_with_the_known_one(name):
  with pytest.raises(config.ConfigError, match=r"unknown argument 'tiny'.* 'debug'"):
    load(name, 'tiny')


def kind(m):
  """What a debug form keeps of a model."""
  return (
    m.mtp_depth, m.mla.q_rank > 0, m.moe.scoring, m.moe.normalize, m.moe.num_shared,
    m.moe.num_groups > 1, m.num_dense_layers > 0, m.max_length > m.rope.original_length,
  )  # fmt: skip


@pytest.mark.parametrize('name', FILES)
def test_debug_is_small_short_and_of_the_same_kind(name):
  whole, small = config.freeze(load(name)), config.freeze(load(name, 'debug'))
  assert counts.parameters(small.model) < 1e6
  assert small.run.total_tokens / (small.batch.size * small.batch.seq_len) == 20
  assert kind(small.model) == kind(whole.model)


@pytest.mark.parametrize('name', FILES)
def test_the_docstring_tells_commands_that_parse_and_freeze(name):
  assert commands(name)
  for arguments in commands(name):
    _, given, values = parse([a.replace('=configs/', f'={ROOT}/configs/') for a in arguments])
    assert values.workdir
    assert pathlib.Path(given.file.partition(':')[0]).name == name


def test_v3_is_the_default():
  assert config.freeze(load('deepseek_v3_671b.py')) == config.Config()


@pytest.mark.parametrize(
  ('name', 'figures'),
  [
    ('deepseek_v3_671b.py', ['671,026,419,200', '11,610,068,224', '249.8 GFLOP']),
    ('deepseek_v2_236b.py', ['235,741,434,880', '155.0 GFLOP']),
    ('deepseek_v2_16b.py', ['15,706,484,224', '16.4 GFLOP']),
  ],
)
def test_figures_that_follow_from_a_config_stand_in_its_docstring(name, figures):
  m = config.freeze(load(name)).model
  told = [f'{counts.parameters(m):,}', f'{counts.mtp_parameters(m):,}']
  told += [f'{counts.training_flops_per_token(m, 4096) / 1e9:.1f} GFLOP']
  assert set(figures) <= set(told)
  assert all(figure in docstring(name) for figure in figures)


def test_the_quickstart_squeezes_the_report_s_phases_in_proportion():
  c, full = config.freeze(load('quickstart.py')), config.Config()
  share = c.run.total_tokens / full.run.total_tokens
  for key in ('optimizer.constant_tokens', 'optimizer.decay_tokens', 'optimizer.end_tokens',
              'objective.mtp_late_tokens', 'objective.bias_stop_tokens'):  # fmt: skip
    assert config.flatten(c)[key] == pytest.approx(share * config.flatten(full)[key], abs=500)


def test_the_ablation_in_v2_lite_s_docstring_is_a_sigmoid_router_with_bias():
  text = docstring('deepseek_v2_16b.py')
  (line,) = re.findall(r'^ +(--config.*)$', text.replace('\\\n', ' '), re.M)
  c, _, _ = parse([f'--config={ROOT}/configs/deepseek_v2_16b.py', *line.split()])
  assert c.model.moe.scoring == 'sigmoid' and c.model.moe.normalize
  assert c.objective.bias_speed == 1e-3
