"""Command lines: what reaches a program, and the one line that every mistake gets."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags as absl_flags

from dsv3_jax import config, flags

ROOT = pathlib.Path(__file__).parents[1]
DEBUG = f'--config={ROOT}/configs/debug.py'


def parse(*arguments):
  values = absl_flags.FlagValues()
  absl_flags.DEFINE_string('workdir', None, 'Where to write.', values)
  argv = ['program', *arguments]
  flags.define(argv, values)
  return flags.parse(argv, values)


def fault(*arguments):
  with pytest.raises((config.ConfigError, absl_flags.Error)) as caught:
    parse(*arguments)
  return str(caught.value)


@pytest.fixture
def file(tmp_path):
  """Writes a config file and returns the argument that reads it, and its path."""

  def write(text, name='mine.py'):
    path = tmp_path / name
    path.write_text(text)
    return f'--config={path}', str(path)

  return write


# ---- what works ----------------------------------------------------------------------------------


def test_without_overrides_the_config_is_the_file_s():
  c, given = parse(DEBUG)
  assert c == config.freeze(flags.load(f'{ROOT}/configs/debug.py'))
  assert given.file.endswith('configs/debug.py') and given.overrides == () and given.name == 'debug'


def test_overrides_change_the_config_and_are_told_in_their_order():
  c, given = parse(
    DEBUG, '--config.run.seed=7', '--config.model.moe.top_k', '1', '--workdir=w',
    '--noconfig.model.moe.normalize', '--config.run.total_tokens=64', '--config.data.corpus=7',
  )  # fmt: skip
  assert (c.run.seed, c.model.moe.top_k, c.model.moe.normalize) == (7, 1, False)
  assert c.run.total_tokens == 64.0 and c.data.corpus == '7'
  assert given.overrides == (
    'run.seed=7', 'model.moe.top_k=1', 'model.moe.normalize=False', 'run.total_tokens=64.0',
    'data.corpus=7',
  )  # fmt: skip


def test_the_last_override_of_a_key_counts():
  c, given = parse(DEBUG, '--config.run.seed=1', '--config.run.seed=2')
  assert c.run.seed == 2 and given.overrides == ('run.seed=2',)


def test_flags_in_a_file_are_the_same_as_on_the_line(tmp_path):
  (tmp_path / 'flags').write_text(f'{DEBUG}\n--config.run.seed=3\n')
  assert parse(f'--flagfile={tmp_path}/flags')[0].run.seed == 3


def test_the_name_of_a_run_is_file_argument_and_overrides_fit_for_a_path():
  given = flags.Given('configs/quickstart.py:debug', ('run.seed=3', 'data.corpus=/a b/c'))
  assert given.name == 'quickstart-debug-run.seed=3-data.corpus=_a_b_c'
  assert '/' not in given.name and ' ' not in given.name


# ---- keys and values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('argument', 'told'),
  [
    ('--config.model.numlayers=4', 'no such key; did you mean model.num_layers?'),
    ('--config.numlayers=4', 'no such key; did you mean model.num_layers?'),
    ('-config.model.moe.topk=4', 'no such key; did you mean model.moe.top_k?'),
    ('--noconfig.model.moe.normalise', 'no such key; did you mean model.moe.normalize?'),
    ('--config.batch.size.x=4', 'no such key'),
    ('--config.batch=3', 'a group of keys; set one of them, such as batch.seq_len'),
  ],
)
def test_an_unknown_key_is_one_line_with_the_argument_and_a_hint(argument, told):
  line = fault(DEBUG, argument)
  assert line.startswith(f'{argument}: {told}') and '\n' not in line


@pytest.mark.parametrize(
  ('argument', 'told'),
  [
    ('--config.batch.size=abc', 'must be a whole number'),
    ('--config.batch.size=1.5', 'must be a whole number'),
    ('--config.batch.size=1e3', 'must be a whole number'),
    ('--config.batch.size=', 'must be a whole number'),
    ('--config.optimizer.eps=tiny', 'must be a number'),
    ('--config.model.moe.normalize=3', 'must be true or false'),
  ],
)
def test_a_mistyped_value_is_one_line_with_key_value_and_what_is_right(argument, told):
  assert fault(DEBUG, argument) == f'flag {argument}: {told}'


@pytest.mark.parametrize(
  ('argument', 'told'),
  [
    ('--config.batch.size=12', 'batch.size = 12: must be a multiple of batch.micro_size = 8'),
    ('--config.batch.size=-8', 'batch.size = -8: must be positive'),
    ('--config.optimizer.eps=nan', 'optimizer.eps = nan: must be a finite number'),
    ('--config.run.total_tokens=inf', 'run.total_tokens = inf: must be a finite number'),
    ('--config.model.remat=all', "model.remat = 'all': must be one of 'none', 'block', 'latents'"),
  ],
)
def test_a_value_that_cannot_work_is_one_line_of_the_config_s(argument, told):
  assert fault(DEBUG, argument) == told


# ---- files ---------------------------------------------------------------------------------------


def test_no_config_file_is_told_with_an_example():
  told = '--config: no config file given; for example --config=configs/quickstart.py'
  assert fault() == fault('--workdir=w') == fault('--config.run.seed=1') == told


def test_an_override_before_the_file_is_refused():
  assert '--config.run.seed=1' in fault('--config.run.seed=1', DEBUG)


def test_words_that_are_no_flags_are_refused():
  assert fault(DEBUG, 'configs/x.py') == 'configs/x.py: not a flag; flags look like --name=value'


def test_an_unknown_flag_is_told_with_the_one_that_is_meant():
  assert "'workdri'" in fault(DEBUG, '--workdri=w') and 'workdir' in fault(DEBUG, '--workdri=w')


def test_a_file_that_does_not_exist_is_told(tmp_path):
  told = 'no such file; must be a Python file with get_config(arg)'
  assert fault(f'--config={tmp_path}/no.py', '--config.run.seed=1').endswith(f'/no.py: {told}')
  assert fault(f'--config={tmp_path}').endswith(told)


def test_an_argument_that_the_config_does_not_know_is_told_with_the_known_one():
  assert fault(DEBUG + ':big').endswith(
    "debug.py:big: unknown argument 'big'; the only one known is 'debug'"
  )


@pytest.mark.parametrize(
  ('text', 'told'),
  [
    ('x = 1', ": has no function get_config(arg='') that returns the config"),
    ('get_config = 1', ": has no function get_config(arg='') that returns the config"),
    ('def get_config(arg=""): pass', ': get_config returns NoneType, must return an ml_coll'),
    ('def get_config(arg=""):\n  return }', ':2: '),
    ('import no_such_module', ":1: ModuleNotFoundError: No module named 'no_such_module'"),
    ('def get_config():\n  return 1 / 0', ':2: ZeroDivisionError: division by zero'),
  ],
)
def test_a_file_that_cannot_be_read_is_one_line_with_its_path_and_line(file, text, told):
  argument, path = file(text)
  line = fault(argument)
  assert path + told in line and '\n' not in line


def test_a_file_that_takes_no_argument_is_one_line(file):
  argument, path = file('def get_config():\n  return 1')
  line = fault(argument + ':debug')
  assert line.startswith(f'flag {argument}:debug: {path}: TypeError: ') and '\n' not in line


@pytest.mark.parametrize(
  ('change', 'told'),
  [
    ('c.model.numlayers = 4', '"numlayers" does not exist'),
    ('c.batch.size = "abc"', "Could not override field 'size'"),
    ('c.batch.size = 1.5', "Could not override field 'size'"),
  ],
)
def test_a_mistake_inside_a_config_file_is_one_line_with_its_line_number(file, change, told):
  text = 'from dsv3_jax import config\ndef get_config(arg=""):\n  c = config.default()\n'
  argument, path = file(f'{text}  {change}\n  return c\n')
  line = fault(argument)
  assert (
    f'{path}:4: ' in line
    and told in line
    and '\n' not in line
    and len(line) < 300 + 3 * len(str(path))
  )


def test_a_relative_path_has_its_line_number_too(file, tmp_path, monkeypatch):
  file('def get_config(arg=""):\n  return 1 / 0')
  monkeypatch.chdir(tmp_path)
  assert fault('--config=mine.py').endswith(' mine.py:2: ZeroDivisionError: division by zero')


def test_a_file_of_another_kind_is_refused(file, tmp_path):
  argument, path = file('{}', 'config.json')
  assert fault(argument).endswith(
    f"{path}: has no function get_config(arg='') that returns the config"
  )
  (tmp_path / 'binary').write_bytes(b'\0\xff')
  line = fault(f'--config={tmp_path}/binary')
  assert f'{tmp_path}/binary:' in line and '\n' not in line


def test_a_file_read_again_after_a_change_is_the_new_one(file):
  text = 'from dsv3_jax import config\ndef get_config():\n  c = config.debug(config.default())\n'
  for seed in range(3):
    argument, _ = file(f'{text}  c.run.seed = {seed}\n  return c\n')
    assert parse(argument)[0].run.seed == seed


# ---- as a program --------------------------------------------------------------------------------

PROGRAM = """
from absl import flags as absl_flags
from dsv3_jax import config, flags

_WORKDIR = absl_flags.DEFINE_string('workdir', None, 'Where to write.')

def main(c, given):
  if c.run.seed == 9:
    raise config.ConfigError('mesh = 9 devices: only 1 is here')
  print(c.run.seed, given.overrides, _WORKDIR.value)
  return 5 if c.run.seed == 5 else None

if __name__ == '__main__':
  flags.run(main)
"""


@pytest.fixture
def program(tmp_path):
  (tmp_path / 'program.py').write_text(PROGRAM)

  def call(*arguments):
    return subprocess.run(
      [sys.executable, str(tmp_path / 'program.py'), *arguments],
      capture_output=True, text=True, check=False, env=os.environ | {'PYTHONPATH': str(ROOT)},
    )  # fmt: skip

  return call


def test_run_gives_main_the_config_and_exits_with_what_it_returns(program):
  ran = program(DEBUG, '--config.run.seed=4', '--workdir=w')
  assert (ran.returncode, ran.stdout, ran.stderr) == (0, "4 ('run.seed=4',) w\n", '')
  assert program(DEBUG, '--config.run.seed=5').returncode == 5


@pytest.mark.parametrize(
  ('arguments', 'lines'),
  [
    (['--config.model.numlayers=4'], 1),
    (['--config.batch.size=12', '--config.model.mla.rope_dim=5'], 2),
    (['--config.batch.size=abc'], 1),
    (['--workdri=w'], 1),
    (['--config.run.seed=9'], 1),  # raised by main
  ],
)
def test_mistakes_are_lines_on_stderr_and_exit_code_2(program, arguments, lines):
  ran = program(DEBUG, *arguments)
  assert ran.returncode == 2 and ran.stdout == '' and ran.stderr.count('\n') == lines
  assert 'Traceback' not in ran.stderr


def test_help_tells_of_the_config_and_of_the_program_s_own_flags(program):
  out = program('--help').stdout
  assert '--config:' in out and '--workdir:' in out
