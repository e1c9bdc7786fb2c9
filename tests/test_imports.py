"""Imports point one way: from programs down to the model, then to kernels, at last to config."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted((ROOT / 'dsv3_jax').rglob('*.py'))
CONFIGS = sorted((ROOT / 'configs').rglob('*.py'))

# Each part of dsv3_jax, from the bottom up, and the parts it may import besides itself.
BASE = {'compat', 'config', 'mesh'}
OPS = {'kernels', 'precision'}
MODEL = BASE | OPS | {'parallel'}
RUNS = MODEL | {'model', 'counts', 'data', 'runtime', 'flags', 'console'}
PARTS = {
  'compat': set(),
  'runtime': set(),
  'schema': set(),
  'limits': {'schema'},
  'config': {'schema', 'limits'},
  'counts': {'config'},
  'console': {'config'},
  'flags': {'config'},
  'hyper': {'config'},
  'mesh': {'compat', 'config'},
  'processes': {'config'},
  'kernels': {'compat'},
  'precision': BASE | {'kernels'},
  'parallel': BASE | OPS,
  'data': {'config'},
  'dispatching': MODEL | {'runtime', 'console'},
  'model': MODEL,
  'weights': MODEL | {'model', 'console'},
  'codesign': {'config', 'counts', 'parallel', 'console', 'flags'},
  'training': RUNS | {'weights'},
  'inference': RUNS | {'weights'},
  'serving': RUNS | {'inference'},
  'posttraining': RUNS | {'weights', 'training', 'inference'},
  'conversion': RUNS | {'weights', 'training'},
  'measuring': RUNS | {'weights', 'training', 'inference'},
}
# Files of a package that no other part imports, and that may themselves import more than it.
PROGRAM_FILES = {
  f'weights/{name}.py': 'conversion'
  for name in ('convert', 'bench_convert', 'importing', 'exporting', 'inspecting', 'trained')
} | {
  name: 'dispatching' for name in ('parallel/bench_dispatch.py', 'parallel/pipeline/__main__.py')
}
PROGRAM_FILES |= {f'inference/{name}.py': 'measuring' for name in ('bench', 'bench_peer')}
PROGRAMS = PARTS.keys() | {'report'}  # of the programs, only the report is called by others
PACKAGES = {path.name for path in (ROOT / 'dsv3_jax').iterdir() if path.is_dir()} - {'__pycache__'}


def imports(path):
  """Dotted names of everything a file imports, wherever in it; 'a.b' for `from a import b`."""
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}:{node.lineno}: relative imports hide where they point'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def part(path):
  """'model' for dsv3_jax/model/mla.py, 'mesh' for dsv3_jax/mesh.py."""
  inside = path.relative_to(ROOT / 'dsv3_jax')
  return PROGRAM_FILES.get(inside.as_posix(), inside.parts[0].removesuffix('.py'))


def named(path):
  return str(path.relative_to(ROOT))


def packages(path):
  return {name.partition('.')[0] for name in imports(path)}


@pytest.mark.parametrize('path', FILES, ids=named)
def test_imports_point_one_way(path):
  here = part(path)
  inside = {name.split('.')[1] for name in imports(path) if name.startswith('dsv3_jax.')} - {here}
  assert here in PARTS or here not in PACKAGES, f'say in PARTS what {here} may import'
  below = PARTS.get(here, PROGRAMS)
  assert inside <= below, f'{here} may not import {sorted(inside - below)}'


def test_no_part_imports_the_program_of_another():
  programs = {
    name.removesuffix('.py').replace('/', '.'): owner for name, owner in PROGRAM_FILES.items()
  }
  for path in FILES:
    inside = {name.removeprefix('dsv3_jax.') for name in imports(path)} & programs.keys()
    assert all(programs[name] == part(path) for name in inside), path


def test_the_table_of_parts_itself_points_one_way():
  order = list(PARTS)
  for i, here in enumerate(order):
    assert PARTS[here] <= set(order[:i]), here


@pytest.mark.parametrize('path', FILES, ids=named)
def test_nothing_in_the_package_imports_configs_or_launch_or_tests(path):
  assert not packages(path) & {'configs', 'launch', 'tests'}


@pytest.mark.parametrize('path', [p for p in FILES if part(p) == 'kernels'], ids=named)
def test_kernels_import_only_jax_numpy_einops_and_compat(path):
  allowed = {'jax', 'numpy', 'einops', 'dsv3_jax'} | sys.stdlib_module_names
  assert packages(path) <= allowed
  inside = {name.split('.')[1] for name in imports(path) if name.startswith('dsv3_jax')}
  assert inside <= {'kernels', 'compat'}


def test_only_the_checkpoints_and_what_waits_for_all_processes_import_orbax():
  found = [named(path) for path in FILES if 'orbax' in packages(path)]
  training = [f'dsv3_jax/training/{name}.py' for name in ('checkpoint', 'orbax_repairs')]
  assert found == ['dsv3_jax/processes.py', *training]


WITHOUT_JAX = {'config', 'counts', 'flags', 'hyper', 'data', 'report', 'codesign'}


@pytest.mark.parametrize('path', [p for p in FILES if part(p) in WITHOUT_JAX], ids=named)
def test_configs_counts_data_and_the_report_import_no_jax(path):
  assert not packages(path) & {'jax', 'flax', 'optax', 'orbax'}


@pytest.mark.parametrize('path', CONFIGS, ids=named)
def test_configs_import_the_config_and_no_other_part(path):
  inside = {name for name in imports(path) if name.startswith('dsv3_jax')}
  assert inside <= {'dsv3_jax.config'}
  assert packages(path) <= {'dsv3_jax', 'ml_collections'} | sys.stdlib_module_names


def test_reading_every_config_and_counting_leaves_jax_unimported():
  code = 'import sys; from dsv3_jax import config, counts, flags\n'
  code += 'for path in sys.argv[1:]:\n'
  code += '  counts.parameters(config.freeze(flags.load(path)).model)\n'
  code += 'sys.exit("jax" in sys.modules)'
  ran = subprocess.run([sys.executable, '-c', code, *map(str, CONFIGS)], cwd=ROOT, check=False)
  assert CONFIGS and ran.returncode == 0
