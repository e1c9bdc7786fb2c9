"""The record of a run, and what a person sees of it while it trains."""

import io
import json
import math

import numpy as np
import pytest

from dsv3_jax.training import metrics
from dsv3_jax.training.progress import Progress


def write_steps(workdir, start_step, steps, **scalars):
  writer = metrics.MetricsWriter(workdir, start_step)
  for step in steps:
    writer.write(step, {'tokens': 100 * step, 'loss': 1 / step} | scalars)
  writer.close()


def steps_of(workdir):
  return [line['step'] for line in metrics.read(workdir)]


# ---- the record ----------------------------------------------------------------------------------


def test_what_is_written_is_read_back_with_load_to_three_digits(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0)
  load = np.array([[0.12345, 1.9], [1.0, 0.0]], np.float32)
  writer.write(1, {'tokens': 64, 'loss': np.float32(2.5), 'lr': 1e-4}, load)
  writer.write(2, {'tokens': 128, 'loss': 2.25, 'lr': 2e-4})
  writer.close()
  assert metrics.read(tmp_path) == [
    {'step': 1, 'tokens': 64, 'loss': 2.5, 'lr': 1e-4, 'load': [[0.123, 1.9], [1.0, 0.0]]},
    {'step': 2, 'tokens': 128, 'loss': 2.25, 'lr': 2e-4},
  ]


def test_each_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.write(1, {'tokens': 1})
  assert steps_of(tmp_path) == [1]
  writer.close()


def test_numbers_that_are_not_finite_become_null_and_the_line_stays_json(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0)
  writer.write(1, {'loss': math.nan, 'grad_norm': np.float32(np.inf)}, np.array([[np.nan, 2.0]]))
  writer.close()

  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  line = json.loads((tmp_path / metrics.FILE).read_text(), parse_constant=refuse)
  assert line == {'step': 1, 'loss': None, 'grad_norm': None, 'load': [[None, 2.0]]}


def test_a_resumed_run_has_each_step_exactly_once(tmp_path):
  write_steps(tmp_path, 0, range(1, 8), lr=1.0)
  write_steps(tmp_path, 4, range(5, 10), lr=2.0)
  assert steps_of(tmp_path) == list(range(1, 10))
  assert [line['lr'] for line in metrics.read(tmp_path)] == [1.0] * 4 + [2.0] * 5


def test_a_run_that_begins_again_at_step_0_keeps_nothing(tmp_path):
  write_steps(tmp_path, 0, range(1, 4))
  write_steps(tmp_path, 0, [1])
  assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize('start_step', [2, 9])
def test_a_line_torn_anywhere_is_skipped_by_read_and_cut_by_the_next_writer(tmp_path, start_step):
  write_steps(tmp_path, 0, range(1, 4))
  path = tmp_path / metrics.FILE
  whole = path.read_bytes()
  last_begins = whole.rindex(b'\n', 0, -1) + 1
  for size in range(last_begins, len(whole)):
    path.write_bytes(whole[:size])
    before = [1, 2] if size < len(whole) - 1 else [1, 2, 3]  # only the newline is missing
    assert steps_of(tmp_path) == before
    write_steps(tmp_path, start_step, [10])
    assert steps_of(tmp_path) == [step for step in before if step <= start_step] + [10]
    assert path.read_bytes().endswith(b'}\n')


def test_a_broken_line_in_the_middle_is_an_error_that_names_its_place(tmp_path):
  (tmp_path / metrics.FILE).write_text('{"step": 1}\n{"st\n{"step": 3}\n')
  with pytest.raises(metrics.MetricsError, match=r'metrics\.jsonl:2: not a JSON object'):
    metrics.read(tmp_path)


def test_steps_must_increase_also_across_a_resume(tmp_path):
  write_steps(tmp_path, 0, [1, 2])
  writer = metrics.MetricsWriter(tmp_path, 2)
  with pytest.raises(metrics.MetricsError, match='step 2 after step 2'):
    writer.write(2, {})
  writer.close()


def test_a_load_that_is_not_layers_by_experts_is_refused_and_leaves_no_line(tmp_path):
  writer = metrics.MetricsWriter(tmp_path, 0)
  with pytest.raises(metrics.MetricsError, match=r'\(3,\): must be \[layers, experts\]'):
    writer.write(1, {}, np.ones(3))
  writer.close()
  assert metrics.read(tmp_path) == []


def test_tensorboard_gets_every_finite_scalar_and_hides_what_a_resume_repeats(tmp_path):
  from tensorboardX.proto.event_pb2 import Event, SessionLog

  write_steps(tmp_path, 0, [1, 2, 3], grad_norm=math.inf)
  write_steps(tmp_path, 2, [3])
  files = sorted((tmp_path / metrics.TENSORBOARD).glob('events*'))
  assert len(files) == 2  # also when both were opened within the same second
  seen = []
  for file in files:
    data, at = file.read_bytes(), 0
    while at < len(data):  # a record: length, checksum, event, checksum
      length = int.from_bytes(data[at : at + 8], 'little')
      event = Event.FromString(data[at + 12 : at + 12 + length])
      at += length + 16
      if event.session_log.status == SessionLog.START:
        seen.append(('hide from', event.step))
      seen += [(value.tag, event.step) for value in event.summary.value]
  keys = ('step', 'tokens', 'loss')
  first = [(key, step) for step in (1, 2, 3) for key in keys]
  assert seen == [('hide from', 0), *first, ('hide from', 3), *((key, 3) for key in keys)]


@pytest.mark.parametrize(
  ('value', 'text'),
  [(0, '0'), (7.25, '7.25'), (999.4, '999'), (999.6, '1K'), (45_234, '45.2K'), (999_999, '1M'),
   (6.2e6, '6.2M'), (671e9, '671B'), (14.8e12, '14.8T'), (-2000, '-2K')],
)  # fmt: skip
def test_short_has_three_digits_and_never_a_thousand_of_a_unit(value, text):
  assert metrics.short(value) == text


# ---- the progress display ------------------------------------------------------------------------


class Clock:
  def __init__(self):
    self.now = 0.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_off_a_terminal_there_is_a_plain_line_every_ten_seconds_and_one_at_the_end():
  stream, clock = io.StringIO(), Clock()
  with Progress(100, 0, 50, stream=stream, clock=clock) as progress:
    clock.now = 60.0  # the first step compiles
    for step in range(1, 101):
      progress.update(step, loss=5 - step / 100, tokens_per_s=1234.5)
      clock.now += 0.5
  assert stream.getvalue().splitlines() == [
    'step 1/100   1%  loss 4.9900  1.23K tokens/s  left -',
    'step 21/100  21%  loss 4.7900  1.23K tokens/s  left 0:00:40',
    'step 41/100  41%  loss 4.5900  1.23K tokens/s  left 0:00:30',
    'step 61/100  61%  loss 4.3900  1.23K tokens/s  left 0:00:20',
    'step 81/100  81%  loss 4.1900  1.23K tokens/s  left 0:00:10',
    'step 100/100 100%  loss 4.0000  1.23K tokens/s  left 0:00:00',
  ]
  assert '\r' not in stream.getvalue()


def test_the_line_at_the_end_also_comes_when_the_run_breaks_off_but_never_twice():
  stream = io.StringIO()
  with (
    pytest.raises(KeyboardInterrupt),
    Progress(9, 0, 1, stream=stream, clock=Clock()) as progress,
  ):
    progress.update(1, loss=1.0)
    progress.update(2, loss=math.nan)
    raise KeyboardInterrupt
  assert [line.split()[:4] for line in stream.getvalue().splitlines()] == [
    ['step', '1/9', '11%', 'loss'], ['step', '2/9', '22%', 'loss']]  # fmt: skip
  assert 'loss nan' in stream.getvalue()


def test_time_left_follows_the_recent_speed_and_not_the_whole_run():
  stream, clock = io.StringIO(), Clock()
  with Progress(10_000, 500, 1, stream=stream, clock=clock, every_s=0.0) as progress:
    for step in range(501, 601):  # 1 step a second ...
      progress.update(step)
      clock.now += 1.0
    for step in range(601, 1001):  # ... then 1 step in four
      progress.update(step)
      clock.now += 4.0
  days, seconds = divmod(4 * 9000, 86_400)
  assert days == 0 and stream.getvalue().splitlines()[-1].endswith(f'left {seconds // 3600}:00:00')


def test_tokens_per_s_come_from_the_speed_where_nobody_gives_them():
  stream, clock = io.StringIO(), Clock()
  with Progress(4, 0, 3000, stream=stream, clock=clock, every_s=0.0) as progress:
    for step in (1, 2, 3):
      progress.update(step)
      clock.now += 2.0
  rates = [line.split('  ')[-2] for line in stream.getvalue().splitlines()]
  assert rates == ['- tokens/s', '1.5K tokens/s', '1.5K tokens/s']


def test_on_a_terminal_there_is_a_live_bar_with_the_same_fields(monkeypatch):
  monkeypatch.setenv('TERM', 'xterm')
  monkeypatch.setenv('COLUMNS', '120')
  stream, clock = Terminal(), Clock()
  with Progress(40, 0, 100, stream=stream, clock=clock) as progress:
    progress.update(10, loss=3.25)
    clock.now += 10.0
    progress.update(20, loss=3.0)
  shown = stream.getvalue()
  for part in (
    '20/40',
    'loss 3.0000',
    '100 tokens/s',
    'left 0:00:20',
    '━',
  ):
    assert part in shown


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(monkeypatch):
  monkeypatch.setenv('TERM', 'dumb')
  stream = Terminal()
  with Progress(2, 0, 1, stream=stream, clock=Clock()) as progress:
    progress.update(2, loss=1.0)
  assert stream.getvalue() == 'step 2/2 100%  loss 1.0000  - tokens/s  left 0:00:00\n'
