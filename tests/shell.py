"""The programs as a user starts them: processes, on a folder of text that is made up here."""

import dataclasses
import functools
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from dsv3_jax import config, mesh
from dsv3_jax.training import metrics, state, workdir
from dsv3_jax.training.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 36
SAVE_EVERY = 6
_TIMEOUT_S = 300  # of a machine that has other things to do; a run takes about ten
_WORDS = ['def', 'return', 'self', 'value', 'for', 'in', 'range', 'None', 'True', 'import']
_ENDS = [' ', '\n', '(', ') ', '    ', '= 12345 ', '\n\n', 'é ', '日本 ']


@dataclasses.dataclass(frozen=True)
class Ended:
  """What is left of a process."""

  code: int
  out: str
  err: str


class Programs:
  """Training runs of the debug config below one folder, of `STEPS` steps unless told otherwise."""

  def __init__(self, root: pathlib.Path) -> None:
    self.root = root
    rng = random.Random(0)
    (root / 'corpus').mkdir()
    for i in range(40):
      words = [rng.choice(_WORDS) + rng.choice(_ENDS) for _ in range(rng.randrange(1, 200))]
      (root / 'corpus' / f'{i:02}.txt').write_bytes(f'{i} {"".join(words)}'.encode())

  def flags(self, *overrides: str) -> list[str]:
    """Of `dsv3_jax.train`, all but --workdir; `overrides` as 'run.seed=1'."""
    default = [
      f'data.corpus={self.root}/corpus', f'data.cache_dir={self.root}/cache', 'data.heldout=0.2',
      f'run.total_tokens={STEPS * 8 * 32}', 'run.eval_every=15', f'checkpoint.every_steps={SAVE_EVERY}',
      # Nothing is rounded on its way to experts: a mesh computes what one device does.
      'model.moe.dispatch.payload=plain', 'model.moe.dispatch.combine=plain',
      'model.moe.dispatch.capacity=8',  # one round, for programs of half the size
    ]  # fmt: skip
    of_config = [f'--config.{override}' for override in [*default, *overrides]]
    return [f'--config={ROOT}/configs/quickstart.py:debug', *of_config]

  def start(self, program: str, *args: Any, file_kib: int | None = None) -> subprocess.Popen[str]:
    """Starts `dsv3_jax.<program>`; a limit on the size of its files stands in for a full disk."""
    command = [sys.executable, '-m', f'dsv3_jax.{program}', *map(str, args)]
    if file_kib is not None:
      # Writes no compiled program: JAX would warn that one does not fit.
      never = 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=inf'
      command = ['bash', '-c', f'ulimit -f {file_kib}; {never} exec "$@"', 'bash', *command]
    return subprocess.Popen(
      command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )

  def run(self, program: str, *args: Any, file_kib: int | None = None) -> Ended:
    return end(self.start(program, *args, file_kib=file_kib))

  def train(self, folder: pathlib.Path, *overrides: str, file_kib: int | None = None) -> Ended:
    return self.run('train', *self.flags(*overrides), f'--workdir={folder}', file_kib=file_kib)

  def start_training(self, folder: pathlib.Path, *overrides: str) -> subprocess.Popen[str]:
    """Returns after the first step."""
    process = self.start('train', *self.flags(*overrides), f'--workdir={folder}')
    for line in process.stdout:
      if line.startswith('step '):
        return process
    raise AssertionError(end(process))

  @functools.cached_property
  def finished(self) -> tuple[pathlib.Path, Ended]:
    """The run that nothing interrupts."""
    ended = self.train(self.root / 'finished')
    assert ended.code == 0, ended
    return self.root / 'finished', ended

  @functools.cached_property
  def stopped(self) -> tuple[pathlib.Path, Ended]:
    """The same run, stopped by SIGTERM in its first steps."""
    process = self.start_training(self.root / 'stopped')
    process.send_signal(signal.SIGTERM)
    return self.root / 'stopped', end(process)

  def copy_of(self, run: tuple[pathlib.Path, Ended], to: pathlib.Path) -> pathlib.Path:
    return shutil.copytree(run[0], to)


@functools.cache
def programs(base: pathlib.Path) -> Programs:
  """One for all test files of a session; they are one xdist group, so that its runs run once."""
  (base / 'programs').mkdir()
  return Programs(base / 'programs')


def end(process: subprocess.Popen[str]) -> Ended:
  try:
    out, err = process.communicate(timeout=_TIMEOUT_S)
  finally:
    process.kill()
  return Ended(process.returncode, out, err)


def kill(process: subprocess.Popen[str]) -> None:
  process.kill()
  process.communicate()


def wait_until(holds: Any, process: subprocess.Popen[str]) -> None:
  while not holds() and process.poll() is None:
    time.sleep(0.001)


# ---- what a run leaves ---------------------------------------------------------------------------


def steps(folder: pathlib.Path) -> list[int]:
  """Of its checkpoints, oldest first."""
  names = [path.name for path in folder.glob(f'{workdir.CHECKPOINTS}/*')]
  return sorted(int(name) for name in names if name.isdigit())


def cut(folder: pathlib.Path, at: Iterable[int]) -> None:
  """Truncates the array data of these checkpoints."""
  for step in at:
    chunks = (folder / workdir.CHECKPOINTS / str(step)).glob('state/ocdbt.process_*/d/*')
    largest = max(chunks, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def record(folder: pathlib.Path) -> list[dict[str, Any]]:
  """metrics.jsonl without what clocks say."""
  clocks = ('tokens_per_s', 'flops_per_s')
  return [{k: v for k, v in line.items() if k not in clocks} for line in metrics.read(folder)]


def final(folder: pathlib.Path, step: int | None = None) -> tuple[dict[str, np.ndarray], dict]:
  """Every array of the newest checkpoint, by name, and the position in the data."""
  c = config.from_json((folder / workdir.CONFIG).read_text())
  c = dataclasses.replace(c, mesh=config.Mesh(zero=0))
  with Checkpointer(folder / workdir.CHECKPOINTS, c.checkpoint) as checkpointer:
    restored = checkpointer.restore(state.abstract(c, mesh.make_mesh(c.mesh)), step=step)
  flat, _ = jax.tree_util.tree_flatten_with_path(restored.state)
  return {jax.tree_util.keystr(path): np.asarray(x) for path, x in flat}, restored.data_state


def assert_same_run(folder: pathlib.Path, other: pathlib.Path, steps: int = STEPS) -> None:
  """The same record, step for step, and at the end the same bits in every array."""
  assert [line['step'] for line in record(folder)] == list(range(1, steps + 1))
  assert record(folder) == record(other)
  (ours, our_data), (theirs, their_data) = final(folder), final(other)
  assert ours.keys() == theirs.keys() and our_data == their_data
  differ = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
  assert not differ


def one_line(text: str, pattern: str) -> bool:
  """Whether stderr is a single line and matches."""
  return text.count('\n') == 1 and re.search(pattern, text) is not None
