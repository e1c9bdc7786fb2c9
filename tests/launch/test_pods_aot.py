"""The proof of a pod, from the command line, with the compiler for H200s."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import shell

_HAS_GPU = importlib.util.find_spec('jax_cuda13_plugin') is not None
_HAS_TPU = importlib.util.find_spec('libtpu') is not None
pytestmark = [
  pytest.mark.skipif(not _HAS_GPU, reason='no GPU compiler here (extra [cuda])'),
  pytest.mark.xdist_group('pods_of_gpus'),
]
_AOT = [sys.executable, str(shell.ROOT / 'launch' / 'aot.py')]
_V3 = f'--config={shell.ROOT}/configs/deepseek_v3_671b.py:debug'


def _run(*arguments: str, target: str = 'h200:2x4') -> subprocess.CompletedProcess[str]:
  # Beside this process, which may have compiled for TPU before.
  environment = os.environ | {'PYTHONPATH': str(shell.ROOT), 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  command = [*_AOT, _V3, f'--target={target}', *arguments]
  return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope='module')
def pages(tmp_path_factory) -> dict[str, dict]:
  """Of all three programs, by name."""
  file = tmp_path_factory.mktemp('aot') / 'pages.json'
  ran = _run('--config.mesh.node=2', '--config.mesh.local=4', f'--json={file}')
  assert ran.returncode == 0, ran.stderr
  assert ran.stdout.count('a device needs') == 3
  return {page['program']: page for page in json.loads(file.read_text())['programs']}


def test_the_model_is_most_of_what_is_multiplied_and_never_more(pages):
  assert pages.keys() == {'train', 'prefill', 'decode'}
  for name, page in pages.items():
    assert 0.3 < page['model_flops'] / page['flops'] <= 1, name


def test_generation_exchanges_what_is_written(pages):
  for name in ('prefill', 'decode'):
    moved = [row for row in pages[name]['rows'] if row['kind'] == 'exchange']
    assert len(moved) == 2  # between nodes, and within
    for row in moved:
      assert row['compiled'] == pytest.approx(row['written'], rel=0.02)


@pytest.mark.parametrize(
  ('arguments', 'told'),
  [
    (['--config.mesh.node=2'], 'mesh = .* = 2 devices: h200:2x4 has 8'),
    (['--programs=train,serve'], '--programs = serve: must be of train, prefill, decode'),
    (
      ['--rows=3', '--config.model.dual_batch=True'],
      '--rows = 3: must be even: model.dual_batch halves the rows of each device',
    ),
    (['--options=fast'], '--options = fast: must be name=value'),
  ],
)
def test_what_cannot_be_compiled_gets_one_line(arguments, told):
  ran = _run(*arguments)
  assert ran.returncode == 2
  (line,) = ran.stderr.strip().splitlines()
  assert re.search(told, line)


@pytest.mark.skipif(not _HAS_TPU, reason='no TPU compiler here (extra [tpu])')
def test_a_program_that_the_compiler_gives_up_says_by_how_much_and_what_would_help():
  mesh = '--config.mesh.node=2', '--config.mesh.local=2'
  ran = _run('--programs=decode', '--rows=2000000', *mesh, target='v5p:2x2x1')
  assert ran.returncode == 1, ran.stderr
  given_up, helps = ran.stdout.strip().splitlines()
  assert re.search(r'decode on v5p:2x2x1: RESOURCE_EXHAUSTED: .* exceeds available', given_up)
  assert 'would help: fewer --rows' in helps
