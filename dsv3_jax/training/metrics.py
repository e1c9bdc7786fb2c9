"""The record of a run: one JSON line per logged step, and the same scalars for TensorBoard.

`WORKDIR/metrics.jsonl` is the record that `dsv3_jax.report` and anyone's notebook reads;
`WORKDIR/tensorboard` shows the scalars live. Keys of a line:

  step, tokens          steps done, tokens seen
  loss, ce, mtp         nats per token: the objective, its cross entropy, the mean over MTP depths
                        (absent at depth 0)
  balance               sequence-wise balance loss, before its alpha
  lr, grad_norm         learning rate; norm of the gradient before clipping
  max_load, mean_load   the fullest expert's load over the mean load: worst layer, mean over layers
  nodes_per_token, devices_per_token   of an expert group that have experts of a token; mean over layers
  rounds                of an exchange, mean: 1 unless routing is far from even
  node_bytes, local_bytes   that a device sends in a step along these axes to bring tokens to experts
                        and back, forward and backward; these five only where experts are spread
  tokens_per_s, flops_per_s
  heldout_loss, heldout_bpb   nats per token and bits per byte, on evaluation steps
  load                  [layers, experts]: tokens of each expert over its layer's mean; 1 is even;
                        MoE layers first, then the MTP depths

A number that is not finite is written as null, since JSON has none. Lines stand in order of their
steps, each step once, also after a run was killed and resumed. One process writes; nothing here
waits for a device, so pass host values.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

FILE = 'metrics.jsonl'
TENSORBOARD = 'tensorboard'
_FLUSH_S = 10.0  # a flush of the event file waits for the disk


class MetricsError(ValueError):
  """A record that cannot be read or written; the message names the file and what would be right."""


class MetricsWriter:
  """Appends to the record in `workdir`, which begins anew behind `start_step`.

  Lines of later steps are what a killed run wrote after its last checkpoint: its successor computes
  them again, so they are dropped. At `start_step` 0 nothing is kept. A disk that takes no more is a
  MetricsError, from `write` and from `close`.
  """

  def __init__(self, workdir: str | os.PathLike[str], start_step: int):
    self._path = os.path.join(workdir, FILE)
    self._events_path = os.path.join(workdir, TENSORBOARD)
    with _written_to(self._events_path):
      os.makedirs(self._events_path, exist_ok=True)
      # Files are named by the second and opened for writing: a quick restart would empty one. Not
      # tensorboardX's SummaryWriter: once its thread met a full disk, it blocks whoever adds to it.
      name = os.path.join(self._events_path, 'events')
      self._events = EventsWriter(name, f'.{time.time_ns()}')
      begin = SessionLog(status=SessionLog.START)  # hides later steps in the other files
      self._events.write_event(Event(step=start_step + 1 if start_step else 0, session_log=begin))
      self._flushed = -math.inf
    with _written_to(self._path):
      self._last_step = _drop_after(self._path, start_step)
      self._file = open(self._path, 'a', encoding='utf-8')  # noqa: SIM115, closed by close()

  def write(self, step: int, scalars: dict[str, float], load: np.ndarray | None = None) -> None:
    """Records one step; steps must increase. `load` is [layers, experts], 1.0 = even."""
    if self._last_step is not None and step <= self._last_step:
      raise MetricsError(
        f'{self._path}: step {step} after step {self._last_step}; steps must increase'
      )
    if load is not None and np.ndim(load) != 2:
      raise MetricsError(f'load of shape {np.shape(load)}: must be [layers, experts]')
    self._last_step = step
    line = {'step': int(step)} | {key: _number(value) for key, value in scalars.items()}
    # TensorBoard gets nothing of a number that is not finite, and shows a gap.
    finite = {key: value for key, value in line.items() if value is not None}
    shown = [Summary.Value(tag=key, simple_value=value) for key, value in finite.items()]
    if load is not None:
      rows = np.round(np.asarray(load, np.float64), 3).tolist()
      line['load'] = [[_number(value) for value in row] for row in rows]
    # One write of a whole line: a kill can tear the last line, never an earlier one.
    with _written_to(self._path):
      self._file.write(json.dumps(line, allow_nan=False) + '\n')
      self._file.flush()
    with _written_to(self._events_path):
      summary = Summary(value=shown)
      self._events.write_event(Event(step=step, wall_time=time.time(), summary=summary))
      if time.monotonic() >= self._flushed + _FLUSH_S:
        self._events.flush()
        self._flushed = time.monotonic()

  def close(self) -> None:
    with _written_to(self._path):
      self._file.close()
    with _written_to(self._events_path):
      self._events.close()


def read(workdir: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """Every line of WORKDIR/metrics.jsonl, without a torn last one; null stays None.

  Raises FileNotFoundError without the file, MetricsError for a broken line that is not the last.
  """
  return list(lines(workdir))


def lines(workdir: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
  """The same line by line: the loads of a large model's long run do not fit in memory at once."""
  for record, _ in _records(os.path.join(workdir, FILE)):
    yield record


def short(value: float) -> str:
  """Three digits and a unit: 45234 is '45.2K', 14.8e12 is '14.8T'."""
  for scale, unit in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'K')):
    if abs(value) >= 0.9995 * scale:  # what would round to 1000 of the smaller unit
      return f'{value / scale:.3g}{unit}'
  return f'{value:.3g}'


def _records(path: str) -> Iterator[tuple[dict[str, Any], bytes]]:
  with open(path, 'rb') as file:
    for number, line in enumerate(file, 1):
      try:
        record = json.loads(line)
      except ValueError:
        record = None
      if isinstance(record, dict) and 'step' in record:
        yield record, line
      elif line.endswith(b'\n'):  # only the last line, torn by a kill, ends without one
        raise MetricsError(
          f'{path}:{number}: not a JSON object with a step; delete the line to read the rest'
        )


def _drop_after(path: str, start_step: int) -> int | None:
  """Cuts the file after the last line to keep; returns that line's step, None without one."""
  if not os.path.exists(path):
    return None
  last_step, kept, line = None, 0, b'\n'
  if start_step > 0:
    for record, line_read in _records(path):
      if record['step'] > start_step:
        break  # lines are in order: all the others are later still
      last_step, line = record['step'], line_read
      kept += len(line)
  with open(path, 'rb+') as file:
    file.truncate(kept)
    if not line.endswith(b'\n'):  # torn exactly before its newline, so nothing was lost
      file.seek(kept)
      file.write(b'\n')
  return last_step


@contextlib.contextmanager
def _written_to(path: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    right = 'make room or give access, and the same command continues the run'
    raise MetricsError(f'{path}: cannot be written: {error.strerror}; {right}') from None


def _number(value: Any) -> float | int | None:
  """A plain JSON number from a Python, NumPy or 0-d array value; None where it is not finite."""
  if isinstance(value, (int, np.integer)):
    return int(value)
  return float(value) if value is not None and math.isfinite(value) else None
