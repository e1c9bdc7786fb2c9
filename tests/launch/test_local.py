"""Training as several real processes: what one process computes, through losses, stops and restarts."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import shell

# Runs of one folder are started once, and compiled once.
pytestmark = pytest.mark.xdist_group('launch')
_STEPS, _SAVE_EVERY = 20, 4
_CHANGES = (
  'mesh.node=2', 'mesh.local=2', 'mesh.zero=3',
  f'run.total_tokens={_STEPS * 8 * 32}', f'checkpoint.every_steps={_SAVE_EVERY}',
)  # fmt: skip
_LOCAL = [sys.executable, str(shell.ROOT / 'launch' / 'local.py')]


@pytest.fixture(scope='module')
def runs(tmp_path_factory) -> shell.Programs:
  return shell.Programs(tmp_path_factory.mktemp('processes'))


def _start(
  runs: shell.Programs, folder: pathlib.Path, processes: int, *options: str
) -> subprocess.Popen[str]:
  """Training on four devices, split over so many processes."""
  sizes = ['--processes', str(processes), '--devices-per-process', str(4 // processes)]
  train = [sys.executable, '-m', 'dsv3_jax.train', *runs.flags(*_CHANGES), f'--workdir={folder}']
  return subprocess.Popen(
    [*_LOCAL, *sizes, *options, '--', *train],
    cwd=shell.ROOT,
    env=os.environ | {'PYTHONPATH': str(shell.ROOT)},
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


@pytest.fixture(scope='module')
def two(runs) -> pathlib.Path:
  """The run of two processes that nothing interrupts."""
  ended = shell.end(_start(runs, runs.root / 'two', 2))
  assert ended.code == 0, ended
  assert ended.out.count('continues') == 0 and ended.out.count('report:') == 1
  return runs.root / 'two'


def _processes(launcher: subprocess.Popen[str]) -> list[int]:
  """Process ids of the launcher's processes, in their order."""
  children = pathlib.Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children')
  return [int(pid) for pid in children.read_text().split()]


def _is_over(pid: int) -> bool:
  """Also of one whose parent has not asked for its code yet."""
  try:
    return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[0] == 'Z'
  except FileNotFoundError:
    return True


def _until_saved(launcher: subprocess.Popen[str], folder: pathlib.Path, step: int) -> None:
  shell.wait_until(lambda: max(shell.steps(folder), default=0) >= step, launcher)
  assert launcher.poll() is None, shell.end(launcher)


def test_processes_give_the_losses_of_one(runs, two):
  ended = shell.end(_start(runs, runs.root / 'one', 1))
  assert ended.code == 0, ended
  ours, theirs = shell.record(two), shell.record(runs.root / 'one')
  assert [line['step'] for line in ours] == list(range(1, _STEPS + 1))
  for key in ('loss', 'ce', 'mtp', 'balance'):
    values = ([line[key] for line in lines] for lines in (ours, theirs))
    np.testing.assert_allclose(*values, rtol=1e-6, err_msg=key)


def test_a_run_that_loses_a_process_and_is_stopped_by_a_signal_to_one_ends_as_an_undisturbed_one(
  runs, two
):
  folder = runs.root / 'disturbed'
  launcher = _start(runs, folder, 2, '--restarts=1')
  _until_saved(launcher, folder, _SAVE_EVERY)
  # As on a pod, where nobody ends the survivors: they must by themselves.
  launcher.send_signal(signal.SIGSTOP)
  survivor, lost = _processes(launcher)
  os.kill(lost, signal.SIGKILL)
  until = time.monotonic() + 60
  while not _is_over(survivor):
    assert time.monotonic() < until
    time.sleep(0.1)
  saved = shell.steps(folder)[-1]
  launcher.send_signal(signal.SIGCONT)
  # Started again: a signal to one of the new processes stops both behind the same step.
  _until_saved(launcher, folder, saved + 1)
  os.kill(_processes(launcher)[1], signal.SIGTERM)
  ended = shell.end(launcher)
  assert ended.code == 0, ended
  assert 'of 2 ended with' in ended.err and 'starts all again (1 of 1)' in ended.err
  assert 'continues from checkpoint' in ended.out and 'stopped by a signal' in ended.out
  assert shell.steps(folder)[-1] < _STEPS
  assert shell.end(_start(runs, folder, 2)).code == 0
  shell.assert_same_run(folder, two, _STEPS)


@pytest.mark.parametrize(
  ('args', 'told'),
  [
    (['--processes=0', '--', 'true'], r'--processes = 0: must be at least 1'),
    (['--devices-per-process=0', '--', 'true'], r'--devices-per-process = 0: must be at least 1'),
    ([], r'no command: give it behind --'),
  ],
)
def test_what_cannot_be_started_is_told_in_one_line(args, told):
  environment = os.environ | {'PYTHONPATH': str(shell.ROOT)}
  ran = subprocess.run([*_LOCAL, *args], capture_output=True, text=True, env=environment)
  assert ran.returncode == 2 and shell.one_line(ran.stderr, told), ran


@pytest.mark.parametrize(
  ('given', 'told'),
  [
    ({'JAX_NUM_PROCESSES': 'two', 'JAX_PROCESS_ID': '0'}, "JAX_NUM_PROCESSES = 'two': must be"),
    ({'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '2'}, 'JAX_PROCESS_ID = 2: must be below'),
    ({'JAX_NUM_PROCESSES': '2', 'JAX_PROCESS_ID': '0'}, "ADDRESS = '': must be HOST:PORT"),
  ],
)
def test_an_environment_that_names_no_process_is_told(given, told, monkeypatch):
  from dsv3_jax import config, processes

  for name, value in given.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(config.ConfigError, match=told):
    processes.join()
