"""Sweeps: points as data, and a run of them that is killed, goes on, and does each point once."""

import collections
import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest
import shell

from dsv3_jax import config, flags, hyper
from dsv3_jax.config import ConfigError

SWEEPS = sorted((shell.ROOT / 'configs' / 'sweeps').glob('*.py'))
_RATES = [1e-3, 2e-3, 3e-3, 4e-3]


def test_points_are_products_zips_and_chains_of_what_is_swept():
  a, b = hyper.sweep('a', [1, 2]), hyper.sweep('b', [3, 4])
  assert hyper.product([a, b]) == [{'a': x, 'b': y} for x in (1, 2) for y in (3, 4)]
  assert hyper.zipit([a, b]) == [{'a': 1, 'b': 3}, {'a': 2, 'b': 4}]
  assert hyper.chainit([a, hyper.fixed('b', 5)]) == [{'a': 1}, {'a': 2}, {'b': 5}]
  with pytest.raises(ConfigError, match='sweeps of 2, 1 points'):
    hyper.zipit([a, hyper.fixed('b', 5)])
  with pytest.raises(ConfigError, match='a: is swept twice'):
    hyper.product([a, a])


def test_runs_are_named_by_what_differs_and_every_fault_of_a_point_is_told():
  points = hyper.product([
    hyper.sweep('model.moe.num_experts', [16, 32]), hyper.fixed('run.seed', 1)
  ])  # fmt: skip
  runs = hyper.runs(config.Config(), points)
  assert [run.name for run in runs] == ['num_experts=16', 'num_experts=32']
  assert [run.config.model.moe.num_experts for run in runs] == [16, 32]
  with pytest.raises(ConfigError, match=r'objective\.bias_sped: no such key; did you mean'):
    hyper.runs(config.Config(), hyper.sweep('objective.bias_sped', [1.0]))
  with pytest.raises(ConfigError, match=r'point 1 \(top_k=900\): model\.moe\.top_k = 900'):
    hyper.runs(config.Config(), hyper.sweep('model.moe.top_k', [8, 900]))
  with pytest.raises(ConfigError, match='is there twice'):
    hyper.runs(config.Config(), hyper.sweep('run.seed', [1, 1]))


@pytest.mark.parametrize('path', SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_that_ship_hold_points_that_can_run(path):
  runs = hyper.runs(config.freeze(flags.load(str(path))), flags.load_hyper(str(path), hyper))
  assert len(runs) >= 4


# ---- the program ---------------------------------------------------------------------------------


def _command(
  folder: pathlib.Path, *options: str, seeds: str = '[2, 3]', path: str = os.environ['PATH']
) -> subprocess.Popen[str]:
  source = folder / 'sweep.py'
  source.write_text(f"""
from dsv3_jax import config
def get_config(arg=''):
  return config.debug(config.default())
def get_hyper(h):
  return h.product([h.sweep('optimizer.peak_lr', {_RATES}), h.sweep('run.seed', {seeds})])
""")
  command = [sys.executable, str(shell.ROOT / 'launch' / 'sweep.py'), f'--config={source}']
  modules = os.pathsep.join([str(shell.ROOT), str(pathlib.Path(__file__).parent)])
  return subprocess.Popen(
    [*command, f'--workdir={folder}/points', '--program=stub', '--at_once=2', *options],
    env=os.environ | {'PYTHONPATH': modules, 'PATH': path},
    cwd=shell.ROOT,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def test_a_sweep_killed_in_the_middle_and_run_again_loses_no_point_and_finishes_none_twice(
  tmp_path,
):
  points = tmp_path / 'points'
  sweep = _command(tmp_path)
  shell.wait_until((points / 'ended').exists, sweep)
  shell.kill(sweep)  # its points go on, with nobody to wait for them
  ended = shell.end(_command(tmp_path))
  if ended.code == 1:  # seeds of 3 fail at first, and those of the killed sweep were tried already
    assert 'failed with 1: see' in ended.out
    ended = shell.end(_command(tmp_path))
  assert ended.code == 0, ended
  finished = collections.Counter((points / 'ended').read_text().split())
  assert len(finished) == 8 and set(finished.values()) == {1}
  starts = collections.Counter((points / 'started').read_text().split())
  for name, count in starts.items():
    assert count == (2 if 'seed=3' in name else 1), starts
  table = json.loads((points / 'sweep.json').read_text())
  assert [row['bits_per_byte'] for row in table] == [10 * r for r in _RATES for _ in range(2)]
  assert (points / 'sweep.png').stat().st_size > 0


_SBATCH = """#!/bin/bash
# Takes what it is given to be an array, and runs its tasks as Slurm would.
printf '%s\\n' "$@" > "$(dirname "$0")/given"
tasks=${1#--array=}
for task in ${tasks%%\\%*}; do
  for one in ${task//,/ }; do
    SLURM_ARRAY_TASK_ID=$one SLURM_SUBMIT_DIR=$PWD bash "${@:2}" || exit
  done
done
"""


def test_slurm_gets_the_unfinished_points_and_its_tasks_run_them(tmp_path):
  (tmp_path / 'python').write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
  (tmp_path / 'python').chmod(0o755)
  path = os.pathsep.join([str(tmp_path), os.environ['PATH']])
  submit = functools.partial(_command, tmp_path, seeds='[2]', path=path)
  missing = shell.end(submit('--slurm'))
  assert missing.code == 2
  assert shell.one_line(missing.err, '--slurm: there is no sbatch here')
  (tmp_path / 'sbatch').write_text(_SBATCH)
  (tmp_path / 'sbatch').chmod(0o755)
  assert shell.end(submit('--point=1')).code == 0
  ended = shell.end(submit('--slurm', '--config.run.log_every=7'))
  assert ended.code == 0, ended
  array, script, *arguments = (tmp_path / 'given').read_text().splitlines()
  # Another value of the config makes other points: none of them is finished.
  assert array == '--array=0,1,2,3%2' and pathlib.Path(script).name == 'slurm_sweep.sbatch'
  assert arguments == [
    f'--config={tmp_path}/sweep.py', f'--workdir={tmp_path}/points', '--program=stub',
    '--config.run.log_every=7',
  ]  # fmt: skip
  finished = (tmp_path / 'points' / 'ended').read_text().split()
  assert collections.Counter(finished) == {
    'peak_lr=0.001': 1, 'peak_lr=0.002': 2, 'peak_lr=0.003': 1, 'peak_lr=0.004': 1
  }  # fmt: skip
  again = shell.end(submit('--slurm', '--config.run.log_every=7'))
  assert again.code == 0 and again.out == 'all points are finished\n'


def test_a_dry_run_prints_the_points_and_finds_a_key_that_no_config_has(tmp_path):
  ended = shell.end(_command(tmp_path, '--dry_run'))
  assert ended.code == 0 and len(ended.out.splitlines()) == 8
  (tmp_path / 'bad.py').write_text("""
from dsv3_jax import config
def get_config(arg=''):
  return config.debug(config.default())
def get_hyper(h):
  return h.sweep('objective.bias_sped', [1.0])
""")
  program = str(shell.ROOT / 'launch' / 'sweep.py')
  ran = subprocess.run(
    [sys.executable, program, f'--config={tmp_path}/bad.py', '--dry_run'],
    env=os.environ | {'PYTHONPATH': str(shell.ROOT)},
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 2
  assert shell.one_line(ran.stderr, r'objective\.bias_sped: no such key; did you mean')
