"""One page that shows how a run went, or how several compare: `WORKDIR/report.png`.

  python -m dsv3_jax.report WORKDIR [WORKDIR2 ...] [--out PAGE.png]

reads what training leaves in a workdir (metrics.jsonl; config.json and evaluation.json where they
are) and draws it over tokens seen; `dsv3_jax/training/page.py` tells what is on the page. The load
of every expert is its mean over the last quarter of the run. It needs no jax and no device.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsv3_jax import config as configs
from dsv3_jax.training import metrics, page
from dsv3_jax.training.page import Run

PAGE = 'report.png'


class ReportError(ValueError):
  """A page that cannot be drawn; one line that names the file and what would be right."""


def main(arguments: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog='python -m dsv3_jax.report', description='Draws one page of one or several training runs.'
  )
  parser.add_argument('workdirs', nargs='+', metavar='WORKDIR', help='where a training run wrote')
  parser.add_argument(
    '--out', metavar='PNG', help=f'the page (default: {PAGE} in the first WORKDIR)'
  )
  flags = parser.parse_args(arguments)
  try:
    runs = load(flags.workdirs)
    path = _save(runs, flags.out)
  except (ReportError, metrics.MetricsError, OSError) as error:
    print(f'report: {error}', file=sys.stderr)
    return 2
  for run in runs:
    print(summary(run))
  print(f'page: {path}')
  return 0


def draw(workdirs: str | Sequence[str], out: str | None = None) -> str:
  """Draws the page of one or several workdirs and returns its path; raises ReportError."""
  return _save(load([workdirs] if isinstance(workdirs, str) else workdirs), out)


def _save(runs: list[Run], out: str | None) -> str:
  path = out or os.path.join(runs[0].workdir, PAGE)
  page.save(runs, path)
  return path


def summary(run: Run) -> str:
  """Last loss, best held-out loss, and where the record lies, a line each."""
  step, loss, heldout = run.column('step'), run.column('loss'), run.column('heldout_loss')
  value = f'{loss[-1]:.4f}' if np.isfinite(loss[-1]) else 'not finite'
  tokens = metrics.short(run.column('tokens')[-1])
  lines = [
    run.name,
    f'  last loss: {value} at step {step[-1]:.0f}, {tokens} tokens',
  ]
  if broken := int((~np.isfinite(loss)).sum()):
    first = step[~np.isfinite(loss)][0]
    lines.append(
      f'  not finite: the loss of {broken} of {loss.size} logged steps, first at step {first:.0f}'
    )
  if np.isfinite(heldout).any():
    i = int(np.nanargmin(heldout))
    bits = f'{run.column("heldout_bpb")[i]:.4f} bits per byte'
    lines.append(f'  best held-out: {heldout[i]:.4f} nats per token, {bits}, at step {step[i]:.0f}')
  else:
    lines.append('  best held-out: never evaluated')
  record, live = (os.path.join(run.workdir, name) for name in (metrics.FILE, metrics.TENSORBOARD))
  lines.append(f'  record: {record}; TensorBoard: {live}')
  return '\n'.join(lines)


# ---- reading -------------------------------------------------------------------------------------


def load(workdirs: Sequence[str]) -> list[Run]:
  """Reads the workdirs, each with its name and colour; raises ReportError."""
  paths = [os.path.normpath(os.fspath(workdir)) for workdir in workdirs]
  full = [os.path.abspath(path) for path in paths]
  names = [os.path.basename(path) for path in full]
  if len(set(names)) < len(names):  # then with the directories in which they differ
    above = os.path.dirname(os.path.commonpath(full))
    names = [os.path.relpath(path, above) for path in full]
  return [
    _load(path, name, page.RUN_COLORS[i % len(page.RUN_COLORS)])
    for i, (path, name) in enumerate(zip(paths, names, strict=True))
  ]


def _load(workdir: str, name: str, color: str) -> Run:
  if not os.path.isdir(workdir):
    raise ReportError(f'{workdir}: no such directory; give the workdir of a training run')
  if not os.path.exists(os.path.join(workdir, metrics.FILE)):
    raise ReportError(f'{workdir}: no {metrics.FILE} here; training writes it to its workdir')
  # Loads are too many to keep.
  records = [record | {'load': None} for record in metrics.lines(workdir)]
  if not records:
    raise ReportError(f'{workdir}: {metrics.FILE} has no line yet; wait for the first logged step')
  keys = {'step', 'tokens', 'loss'}.union(*records) - {'load'}
  columns = {  # None becomes NaN
    key: np.array([record.get(key) for record in records], np.float64) for key in sorted(keys)
  }
  if not np.isfinite(columns['tokens']).all():
    raise ReportError(f'{workdir}: {metrics.FILE} has lines without tokens, the x axis of the page')
  load_YE = _mean_load(workdir, 0.75 * columns['tokens'][-1])
  return Run(
    workdir, name, color, columns, load_YE, *_read_config(workdir), _read_evaluation(workdir)
  )


def _mean_load(workdir: str, from_tokens: float) -> np.ndarray | None:
  """[layers, experts], the mean from there on; the last load where there is none, else None."""
  total_YE, count_YE, last_YE = 0.0, 0, None
  for record in metrics.lines(workdir):
    if record.get('load'):
      last_YE = np.array(record['load'], np.float64)
      if record['tokens'] >= from_tokens:
        finite = np.isfinite(last_YE)
        total_YE, count_YE = total_YE + np.where(finite, last_YE, 0), count_YE + finite
  if np.ndim(count_YE) == 0:
    return last_YE
  return np.where(count_YE > 0, total_YE / np.maximum(count_YE, 1), np.nan)


def _read_config(workdir: str) -> tuple[configs.Config | None, str]:
  path = os.path.join(workdir, 'config.json')
  if not os.path.exists(path):
    return None, 'no config.json'
  with open(path, encoding='utf-8') as file:
    try:
      return configs.from_json(file.read()), ''
    except ValueError as error:  # what was trained can still be drawn
      return None, f'config.json: {str(error).splitlines()[0]}'


def _read_evaluation(workdir: str) -> dict[str, Any]:
  path = os.path.join(workdir, 'evaluation.json')
  if not os.path.exists(path):
    return {}
  with open(path, encoding='utf-8') as file:
    try:
      return dict(json.load(file))
    except (TypeError, ValueError):
      raise ReportError(f'{path}: not a JSON object; evaluate again, or delete it') from None


if __name__ == '__main__':
  sys.exit(main())
