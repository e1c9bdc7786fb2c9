"""Command lines of the programs: a config file, overrides of its keys, one line for every mistake.

  python -m dsv3_jax.PROGRAM --config=configs/x.py:ARG --config.model.num_layers=4

A program defines its other flags with absl and ends with `flags.run(main)`. What is wrong with the
command line or the config is told on stderr, a line for each fault that names key, value and what
would be right, and the program exits with code 2 before anything is compiled or written. The same
holds for every ConfigError that `main` raises later: a mesh with too few devices, a missing corpus.
"""

import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from dsv3_jax import config
from dsv3_jax.config import ConfigError

flags.disclaim_key_flags()  # --config is shown by --help of the program that calls `run`


@dataclasses.dataclass(frozen=True)
class Given:
  """What the command line said about the config: names the run, and is logged."""

  file: str  # 'configs/quickstart.py:debug'
  overrides: tuple[str, ...]  # ('model.num_layers=4',), in the order given

  @property
  def name(self) -> str:
    """'quickstart-debug-model.num_layers=4': a name for the run, safe as a file name."""
    file, _, arg = self.file.partition(':')
    parts = [os.path.basename(file).removesuffix('.py'), arg, *self.overrides]
    return re.sub(r'[^\w.=+-]+', '_', '-'.join(part for part in parts if part))


def run(main: Callable[[config.Config, Given], int | None]) -> None:
  """Reads `sys.argv`, calls `main(config, given)` and exits with what it returns."""

  def guarded(args: tuple[config.Config, Given]) -> int | None:
    try:
      return main(*args)
    except ConfigError as error:
      _quit(error)

  def parsed(argv: list[str]) -> tuple[config.Config, Given]:
    try:
      return parse(argv)
    except (ConfigError, flags.Error) as error:
      _quit(error)

  define(sys.argv)
  app.run(guarded, flags_parser=parsed)


def define(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines `--config`, whose overrides are looked for in `argv`."""
  told = 'Config file: PATH, or PATH:debug for its small form.'
  config_flags.DEFINE_config_file('config', None, told, flag_values, sys_argv=argv)
  flag_values['config'].parser = _ConfigFile()


def parse(
  argv: list[str], flag_values: flags.FlagValues = flags.FLAGS
) -> tuple[config.Config, Given]:
  """The checked config of a command line, program name first; raises ConfigError or flags.Error."""
  flag = flag_values['config']
  argv = flag_values.read_flags_from_files(argv, force_gnu=False)
  files = [arg for arg in argv[1:] if re.match(r'--?config(=|$)', arg)]
  overrides = [arg for arg in argv[1:] if re.match(r'--?(no)?config\.', arg)]
  for arg in overrides:
    config.check_key(arg.partition('=')[0].partition('.')[2], arg)
  # Overrides without a file would be unknown flags to absl.
  rest = [] if overrides and not files else flag_values(argv)[1:]
  if rest:
    raise ConfigError(f'{rest[0]}: not a flag; flags look like --name=value')
  if flag.value is None:
    raise ConfigError('--config: no config file given; for example --config=configs/quickstart.py')
  values = config_flags.get_override_values(flag)
  overrides = tuple(f'{key}={value}' for key, value in values.items())
  return config.freeze(flag.value), Given(config_flags.get_config_filename(flag), overrides)


def _quit(error: Exception) -> None:
  print(error, file=sys.stderr)
  sys.exit(2)


# ---- config files --------------------------------------------------------------------------------


def load(path: str) -> ml_collections.ConfigDict:
  """`get_config(ARG)` of the file 'PATH:ARG', or `get_config()` of 'PATH'; raises ConfigError."""
  path, colon, arg = path.partition(':')
  get_config = _names(path).get('get_config')
  if not callable(get_config):
    raise ConfigError(f"{path}: has no function get_config(arg='') that returns the config")
  values = _call(path, lambda: get_config(*([arg] if colon else [])))
  if not isinstance(values, ml_collections.ConfigDict):
    told = f'returns {type(values).__name__}, must return an ml_collections.ConfigDict'
    raise ConfigError(f'{path}: get_config {told}')
  return values


def load_hyper(path: str, h: Any) -> Any:
  """What `get_hyper(h)` of the file 'PATH' or 'PATH:ARG' returns; raises ConfigError."""
  path = path.partition(':')[0]
  get_hyper = _names(path).get('get_hyper')
  if not callable(get_hyper):
    raise ConfigError(f'{path}: has no function get_hyper(h) that returns the points of a sweep')
  return _call(path, lambda: get_hyper(h))


def _names(path: str) -> dict[str, Any]:
  """What a config file defines."""
  if not os.path.isfile(path):
    raise ConfigError(f'{path}: no such file; must be a Python file with get_config(arg)')
  with open(path, 'rb') as file:
    source = file.read()
  # Not imported: a bytecode cache takes two versions of one second for the same.
  names = {'__name__': 'config', '__file__': path}
  _call(path, lambda: exec(compile(source, path, 'exec'), names))
  return names


def _call(path: str, function: Callable[[], Any]) -> Any:
  """Runs the user's code; what it raises becomes one line that names the file's line."""
  try:
    return function()
  except ConfigError:
    raise
  except SyntaxError as error:
    where = ':'.join(str(part) for part in (error.filename or path, error.lineno) if part)
    raise ConfigError(f'{where}: {error.msg}') from error
  except Exception as error:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    where = ':'.join([path, *map(str, lines[-1:])])
    told = ' '.join(str(error.args[0] if error.args else error).split())
    # A locked ConfigDict lists all its fields; what it takes the key for comes last.
    told = re.sub(r'Other fields present: ".*"', '', told)
    raise ConfigError(f'{where}: {type(error).__name__}: {told}') from error


class _ConfigFile(flags.ArgumentParser):
  def parse(self, argument: str) -> ml_collections.ConfigDict:
    return load(argument)


# ---- values --------------------------------------------------------------------------------------


def _saying(parser: type[flags.ArgumentParser], right: str) -> flags.ArgumentParser:
  """A parser whose error says what would be right."""

  class Parser(parser):
    def parse(self, argument: Any) -> Any:
      try:
        return super().parse(argument)
      except (TypeError, ValueError):
        raise ValueError(right) from None

  return Parser()


for _kind, _parser, _right in (
  (int, flags.IntegerParser, 'must be a whole number'),
  (float, flags.FloatParser, 'must be a number'),
  (bool, flags.BooleanParser, 'must be true or false'),
):
  config_flags.register_flag_parser_for_type(_kind, _saying(_parser, _right))
