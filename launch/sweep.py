"""Runs the points of a sweep: `get_hyper(h)` of a config, here or as a Slurm array.

  python launch/sweep.py --config=configs/sweeps/balance.py --workdir=/tmp/balance --dry_run
  python launch/sweep.py --config=configs/sweeps/balance.py --workdir=/tmp/balance --at_once=2
  python launch/sweep.py --config=configs/sweeps/balance.py --workdir=/shared/balance --slurm

The same command again goes on: finished points are skipped, interrupted ones continue from their
checkpoints, failed ones are tried again. A point is finished when its folder holds its own config and the
evaluation that training ends with. A lock on each folder, held by the training process itself, keeps a
second sweep off a point that still runs, even after the first sweep was killed: it is waited for.

Ends with a table of `--metric` (of the evaluation, or the last value in the record) over what was swept,
`sweep.json` and `sweep.png` in the folder. SIGTERM and Ctrl-C stop all points, which save.
"""

import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import IO, Any

import matplotlib
from absl import flags as absl_flags
from rich.progress import MofNCompleteColumn, TextColumn

from dsv3_jax import config, console, flags, hyper, runtime
from dsv3_jax.config import ConfigError

_WORKDIR = absl_flags.DEFINE_string(
  'workdir', None, 'folder of the sweep; a folder in it per point'
)
_DRY = absl_flags.DEFINE_bool('dry_run', False, 'print the points, checked, and run none')
_AT_ONCE = absl_flags.DEFINE_integer(
  'at_once', 1, 'points that run at the same time', lower_bound=1
)
_METRIC = absl_flags.DEFINE_string('metric', 'bits_per_byte', 'what the table and the plot show')
_POINT = absl_flags.DEFINE_integer('point', None, 'run this one alone, as tasks of an array do')
_SLURM = absl_flags.DEFINE_bool('slurm', False, 'submit the unfinished points as an array')
_PROGRAM = absl_flags.DEFINE_string('program', 'dsv3_jax.train', 'module that runs a point')
_SCRIPT = pathlib.Path(__file__).parent / 'slurm_sweep.sbatch'
_POLL_S = 0.2


def main(c: config.Config, given: flags.Given) -> int:
  runs = hyper.runs(c, flags.load_hyper(given.file, hyper))
  if _DRY.value:
    for number, run in enumerate(runs):
      print(f'{number:4}  {run.name:<40}  {" ".join(_overrides(run, given))}')
    return 0
  if not _WORKDIR.value:
    raise ConfigError('--workdir: is missing; wants a folder for the points')
  folder = pathlib.Path(_WORKDIR.value)
  folder.mkdir(parents=True, exist_ok=True)
  if _POINT.value is not None:
    if not 0 <= _POINT.value < len(runs):
      raise ConfigError(
        f'--point = {_POINT.value}: must be below {len(runs)}, the number of points'
      )
    return _run([runs[_POINT.value]], folder, given)
  if _SLURM.value:
    return _submit(runs, folder, given)
  code = _run(runs, folder, given)
  _tell(runs, folder)
  return code


# ---- points --------------------------------------------------------------------------------------


def _overrides(run: hyper.Run, given: flags.Given) -> list[str]:
  swept = [f'{key}={value}' for key, value in run.point.items()]
  return [f'--config.{text}' for text in (*given.overrides, *swept)]


def _evaluation(run: hyper.Run, folder: pathlib.Path) -> dict[str, Any] | None:
  """What a finished point ended with."""
  try:
    own = config.from_json((folder / run.name / 'config.json').read_text())
    found = json.loads((folder / run.name / 'evaluation.json').read_text())
  except (OSError, ValueError, ConfigError):
    return None
  return found if own == run.config else None


def _start(run: hyper.Run, folder: pathlib.Path, given: flags.Given) -> subprocess.Popen | None:
  """The point's process, or None while another one has the folder."""
  own = folder / run.name
  own.mkdir(exist_ok=True)
  with open(own / '.lock', 'w') as lock, open(own / 'log.txt', 'a') as log:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return None
    command = [sys.executable, '-m', _PROGRAM.value, f'--config={given.file}', f'--workdir={own}']
    # The lock goes along with the open file, and falls when the process ends, however it does.
    return subprocess.Popen(
      [*command, *_overrides(run, given)],
      stdout=log,
      stderr=log,
      pass_fds=[lock.fileno()],
      start_new_session=True,
    )


def _run(runs: list[hyper.Run], folder: pathlib.Path, given: flags.Given) -> int:
  """Runs what is not finished, so many at once -> 0 when all are, 1 when some failed, 130 if stopped."""
  asked: list[int] = []
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda got, frame: asked.append(got))
  waiting = list(runs)
  active: dict[str, tuple[hyper.Run, subprocess.Popen]] = {}
  failed: dict[str, int] = {}
  with _Display(runs) as display:
    while (waiting and not asked) or active:
      for run in list(waiting):
        if asked or len(active) >= _AT_ONCE.value:
          break
        # Asked again before each start: another sweep may have finished it meanwhile.
        done = _evaluation(run, folder) is not None
        process = None if done else _start(run, folder, given)
        if done or process:
          waiting.remove(run)
          display.finished(run, 'is finished') if done else display.started(run)
        if process:
          active[run.name] = run, process
      for name, (run, process) in list(active.items()):
        code = process.poll()
        if code is None:
          display.progressed(run, folder)
          continue
        del active[name]
        if code == 0 and _evaluation(run, folder) is not None:
          display.finished(run, 'finished')
        elif not asked:
          failed[name] = code
          display.finished(run, f'failed with {code}: see {folder / name / "log.txt"}')
      for _, process in active.values():
        if asked:
          process.send_signal(signal.SIGTERM)
      if asked and active:
        for _, process in active.values():
          process.wait()
      time.sleep(_POLL_S)
  if asked:
    print('sweep: stopped; the same command goes on', file=sys.stderr)
    return 130
  return 1 if failed else 0


class _Display:
  """One bar over all points on a terminal; elsewhere a line for every point that starts or ends."""

  def __init__(self, runs: list[hyper.Run], stream: IO[str] = sys.stdout) -> None:
    self._bar = console.bar(stream, TextColumn('points'), MofNCompleteColumn())
    self._total, self._done, self._steps = len(runs), 0, {}
    self._task = self._bar.add_task('', total=len(runs), figures='') if self._bar else None

  def __enter__(self) -> '_Display':
    if self._bar:
      self._bar.start()
    return self

  def __exit__(self, *exception: object) -> None:
    if self._bar:
      self._bar.stop()

  def started(self, run: hyper.Run) -> None:
    self._say(f'{run.name}: starts')

  def finished(self, run: hyper.Run, what: str) -> None:
    self._done += 1
    self._steps.pop(run.name, None)
    self._say(f'{run.name}: {what} ({self._done} of {self._total})')
    if self._bar:
      self._bar.update(self._task, completed=self._done)

  def progressed(self, run: hyper.Run, folder: pathlib.Path) -> None:
    if not self._bar:
      return
    try:
      with open(folder / run.name / 'metrics.jsonl', 'rb') as file:
        file.seek(max(os.fstat(file.fileno()).st_size - 65_536, 0))
        line = json.loads(file.read().splitlines()[-1])
    except (OSError, ValueError, IndexError):
      return
    self._steps[run.name] = f'{run.name} step {line["step"]} loss {line["loss"]:.3f}'
    self._bar.update(self._task, figures=' | '.join(self._steps.values()))

  def _say(self, line: str) -> None:
    self._bar.console.print(line) if self._bar else print(line, flush=True)


def _submit(runs: list[hyper.Run], folder: pathlib.Path, given: flags.Given) -> int:
  left = [number for number, run in enumerate(runs) if _evaluation(run, folder) is None]
  if not left:
    print('all points are finished')
    return 0
  array = f'--array={",".join(map(str, left))}%{_AT_ONCE.value}'
  again = [f'--config={given.file}', f'--workdir={folder}', f'--program={_PROGRAM.value}']
  again += [f'--config.{text}' for text in given.overrides]
  try:
    return subprocess.call(['sbatch', array, str(_SCRIPT), *again])
  except FileNotFoundError:
    raise ConfigError('--slurm: there is no sbatch here; submit from a login node') from None


# ---- what came out -------------------------------------------------------------------------------


def _value(run: hyper.Run, folder: pathlib.Path) -> float | None:
  found = _evaluation(run, folder)
  if found is None:
    return None
  if _METRIC.value in found:
    return found[_METRIC.value]
  lines = (folder / run.name / 'metrics.jsonl').read_text().splitlines()
  values = [line[_METRIC.value] for line in map(json.loads, lines) if _METRIC.value in line]
  if not values:
    raise ConfigError(
      f'--metric = {_METRIC.value}: neither evaluation.json nor metrics.jsonl has it'
    )
  return values[-1]


def _tell(runs: list[hyper.Run], folder: pathlib.Path) -> None:
  """Table, sweep.json, sweep.png."""
  table = [(run, _value(run, folder)) for run in runs]
  width = max(len(run.name) for run in runs)
  print(f'{"":<{width}}  {_METRIC.value}')
  for run, value in table:
    print(f'{run.name:<{width}}  {"not finished" if value is None else f"{value:.4f}"}')
  listed = [{'name': run.name, 'point': run.point, _METRIC.value: value} for run, value in table]
  (folder / 'sweep.json').write_text(json.dumps(listed, indent=2) + '\n', encoding='utf-8')
  _plot([(run, value) for run, value in table if value is not None], folder / 'sweep.png')


def _plot(table: list[tuple[hyper.Run, float]], path: pathlib.Path) -> None:
  """Over the first number that was swept, a line for each choice of the rest; else a dot per point."""
  matplotlib.use('agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(figsize=(7, 4.5), layout='constrained')
  keys = dict.fromkeys(key for run, _ in table for key in run.point)
  numbers = lambda key: {run.point.get(key) for run, _ in table}
  is_number = lambda x: isinstance(x, int | float) and not isinstance(x, bool)
  across = [k for k in keys if len(numbers(k)) > 1 and all(map(is_number, numbers(k)))]
  if across:
    lines: dict[str, list[tuple[float, float]]] = {}
    for run, value in table:
      rest = [f'{k.rpartition(".")[2]}={v}' for k, v in run.point.items() if k != across[0]]
      lines.setdefault(', '.join(rest), []).append((run.point[across[0]], value))
    for label, points in lines.items():
      axes.plot(*zip(*sorted(points), strict=True), marker='o', label=label)
    axes.set_xlabel(across[0])
    if len(lines) > 1:
      axes.legend(fontsize='small')
  else:
    # Dots: bars would begin at 0, and hide what differs.
    axes.plot([value for _, value in table], [run.name for run, _ in table], 'o')
    axes.invert_yaxis()
    axes.grid(axis='y', alpha=0.3)
  axes.set_title(_METRIC.value)
  figure.savefig(path, dpi=120)
  pyplot.close(figure)


if __name__ == '__main__':
  runtime.log_warnings_only()
  flags.run(main)
