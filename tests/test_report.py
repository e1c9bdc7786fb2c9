"""The page of one or several runs, drawn from synthetic records."""

import itertools
import json
import subprocess
import sys

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from dsv3_jax import config as configs
from dsv3_jax import report
from dsv3_jax.training import metrics, page


def make_run(
  workdir, *, steps=120, broken=(), config=True, evaluation=True, load=True, bias_speed=1e-3
):
  """A record of a plausible run with 3 layers of which 2 are MoE, 1 MTP depth and 8 experts."""
  random = np.random.default_rng(0)
  writer = metrics.MetricsWriter(workdir, 0)
  for step in range(1, steps + 1):
    loss = 2 + 8 / (1 + step / 10) + 0.05 * random.normal()
    load_YE = np.exp(random.normal(size=(3, 8)) * 5 / (5 + step))
    load_YE /= load_YE.mean(1, keepdims=True)
    scalars = {
      'tokens': step * 4096, 'loss': loss, 'ce': loss, 'mtp': loss + 1, 'balance': 1.0,
      'lr': 1e-3 * min(1, step / 20), 'grad_norm': 1 / step + 0.1 * random.random(),
      'max_load': load_YE.max(), 'mean_load': load_YE.max(1).mean(),
      'tokens_per_s': 900 + 50 * random.random(), 'flops_per_s': 1e9,
    }  # fmt: skip
    if step % 40 == 0:
      scalars |= {'heldout_loss': loss + 0.1, 'heldout_bpb': (loss + 0.1) / 2}
    if step in broken:
      scalars |= {'loss': np.nan, 'grad_norm': np.inf, 'mtp': np.nan}
    writer.write(step, scalars, load_YE if load and step % 4 == 0 else None)
  writer.close()
  if config:
    small = configs.debug(configs.default())
    small.objective.bias_speed = bias_speed
    (workdir / 'config.json').write_text(configs.to_json(configs.freeze(small)))
  if evaluation:
    figures = {
      'bits_per_byte': 1.5,
      'gzip_bits_per_byte': 2.125,
      'xz_bits_per_byte': 1.875,
      'heldout_bytes': 20_000,
    }
    (workdir / 'evaluation.json').write_text(json.dumps(figures))
  return str(workdir)


def drawn(workdirs):
  """The figure as it is saved, and its panels by title."""
  with matplotlib.rc_context(page.STYLE):
    figure = page.draw(report.load(workdirs))
    figure.draw_without_rendering()
  return figure, {axes.get_title('left'): axes for axes in figure.axes}


def words(figure):
  return ' | '.join(text.get_text() for text in figure.findobj(matplotlib.text.Text))


def test_the_page_is_a_png_of_the_layout_s_size_with_something_in_every_panel(tmp_path):
  run = make_run(tmp_path / 'run')
  path = report.draw(run)
  assert path == str(tmp_path / 'run' / 'report.png')
  image = matplotlib.image.imread(path)
  figure, panels = drawn([run])
  width, height = (round(inches * page.DPI) for inches in figure.get_size_inches())
  assert image.shape[1] == width == 1650 and abs(image.shape[0] - height) <= 1
  titles = [
    'Loss',
    'Max / mean load',
    'Learning rate',
    'Gradient norm',
    'Tokens per second',
    'Expert load',
  ]
  for title in titles:
    (axes,) = (axes for name, axes in panels.items() if name.startswith(title))
    box = axes.get_position()
    rows = slice(int((1 - box.y1) * height), int((1 - box.y0) * height))
    inside = image[rows, int(box.x0 * width) : int(box.x1 * width), :3]
    assert inside.std() > 0.02, title


@pytest.mark.parametrize('count', [1, 2, 5])
def test_no_two_texts_overlap_and_none_leaves_the_page(tmp_path, count, monkeypatch):
  runs = [
    make_run(
      tmp_path / f'a_run_with_quite_a_long_name_{i}', steps=60, broken=(7, 8), bias_speed=i / 100
    )
    for i in range(count)
  ]
  texts, draw_text = [], matplotlib.text.Text.draw

  def draw(text, renderer):  # what is asked to draw itself: not the ticks beyond an axis
    texts.append(text)
    draw_text(text, renderer)

  monkeypatch.setattr(matplotlib.text.Text, 'draw', draw)
  figure, _ = drawn(runs)
  boxes = {
    text: text.get_window_extent() for text in texts if text.get_visible() and text.get_text()
  }
  boxes = [(text.get_text(), box) for text, box in boxes.items()]
  assert len(boxes) > 60
  for name, box in boxes:
    assert (
      box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= figure.bbox.height
    ), name
  for (a, box_a), (b, box_b) in itertools.combinations(boxes, 2):
    across = min(box_a.x1, box_b.x1) - max(box_a.x0, box_b.x0)
    along = min(box_a.y1, box_b.y1) - max(box_a.y0, box_b.y0)
    assert across <= 0 or along <= 1.5, (a, b)  # line boxes are a pixel taller than their letters


def test_the_heat_map_is_the_mean_over_the_last_quarter_with_layers_and_mtp_named(tmp_path):
  run = make_run(tmp_path / 'run')
  lines = metrics.read(run)
  late = [np.array(line['load']) for line in lines if 'load' in line and line['step'] >= 90]
  np.testing.assert_allclose(report.load([run])[0].load_YE, sum(late) / len(late), rtol=1e-12)
  _, panels = drawn([run])
  (axes,) = (axes for name, axes in panels.items() if name.startswith('Expert load'))
  assert [label.get_text() for label in axes.get_yticklabels()] == ['1', '2', 'MTP 1']


def test_the_table_gives_the_figures_of_config_and_evaluation(tmp_path):
  figure, _ = drawn([make_run(tmp_path / 'small')])
  shown = words(figure)
  for part in ('small', '492K', '1.5000', '2.125', '1.875', '20K bytes', '8 experts, 2 chosen'):
    assert part in shown


def test_parameters_are_the_released_model_s():
  assert page._parameters(configs.Config()) == '671B, 37.6B active'


def test_without_config_and_evaluation_the_page_says_so_and_takes_bits_per_byte_from_training(
  tmp_path,
):
  run = make_run(tmp_path / 'run', config=False, evaluation=False)
  figure, _ = drawn([run])
  assert 'no config.json' in words(figure) and 'row (no config)' in words(figure)
  assert f'{metrics.read(run)[-1]["heldout_bpb"]:.4f}' in words(figure)


def test_a_config_of_another_version_is_named_and_the_page_drawn(tmp_path):
  run = make_run(tmp_path / 'run')
  (tmp_path / 'run' / 'config.json').write_text('{"modle": {}}')
  figure, _ = drawn([run])
  assert 'config.json: modle = {}: no such key' in words(figure)


def test_several_runs_are_named_coloured_and_their_configs_compared(tmp_path):
  on = make_run(tmp_path / 'bias_on')
  off = make_run(tmp_path / 'bias_off', bias_speed=0.0)
  path = report.draw([on, off], str(tmp_path / 'both.png'))
  assert path == str(tmp_path / 'both.png') and matplotlib.image.imread(path).std() > 0.02
  figure, panels = drawn([on, off])
  assert 'objective.bias_speed: 0.001 -> 0.0' in words(figure)
  assert (
    'bias_on: expert load, last quarter' in panels
    and 'bias_off: expert load, last quarter' in panels
  )
  drawn_colors = {line.get_color() for line in panels['Max / mean load'].get_lines()}
  assert {page.RUN_COLORS[0], page.RUN_COLORS[1]} <= drawn_colors


def test_runs_of_one_name_are_told_apart_by_the_directories_in_which_they_differ(tmp_path):
  paths = [make_run(tmp_path / 'sweep' / name / 'run', steps=3) for name in 'ab']
  assert [run.name for run in report.load(paths)] == ['sweep/a/run', 'sweep/b/run']


@pytest.mark.parametrize('broken', [range(50, 60), range(1, 121)])
def test_a_loss_that_is_not_finite_is_marked_where_it_happened(tmp_path, broken):
  figure, panels = drawn([make_run(tmp_path / 'run', broken=broken)])
  assert f'not finite: {len(broken)} of 120' in words(figure)
  crosses = [
    line for line in panels['Loss, nats per token'].get_lines() if line.get_marker() == 'x'
  ]
  np.testing.assert_array_equal(crosses[0].get_xdata(), 4096.0 * np.array(broken))


@pytest.mark.parametrize('steps', [1, 2])
def test_a_run_that_has_just_begun_and_logged_no_load_is_drawn(tmp_path, steps):
  run = make_run(tmp_path / 'run', steps=steps)
  report.draw(run)
  assert 'no expert load in the record' in words(drawn([run])[0])


def test_smooth_equals_a_loop_over_windows():
  values = np.random.default_rng(1).normal(size=50)
  values[[3, 20, 21]] = np.nan
  for half in (0, 1, 7):
    for i, got in enumerate(page.smooth(values, half)):
      reach = min(half, i)
      window = [v for v in values[i - reach : i + reach + 1] if np.isfinite(v)]
      want = np.nan if np.isnan(values[i]) else sum(window) / len(window)
      np.testing.assert_allclose(got, want, rtol=1e-12)


# ---- as a program --------------------------------------------------------------------------------


def test_the_program_prints_last_loss_best_heldout_and_where_files_lie(tmp_path, capsys):
  run = make_run(tmp_path / 'run', broken=(5,))
  assert report.main([run]) == 0
  lines = metrics.read(run)
  best = min(
    (line for line in lines if 'heldout_loss' in line), key=lambda line: line['heldout_loss']
  )
  out = capsys.readouterr().out
  assert f'last loss: {lines[-1]["loss"]:.4f} at step 120, 492K tokens' in out
  assert f'best held-out: {best["heldout_loss"]:.4f}' in out and f'at step {best["step"]}' in out
  assert 'not finite: the loss of 1 of 120 logged steps, first at step 5' in out
  for part in ('metrics.jsonl', 'tensorboard', 'report.png'):
    assert f'{run}/{part}' in out


def empty(workdir):
  workdir.mkdir()
  (workdir / metrics.FILE).touch()


@pytest.mark.parametrize(
  ('prepare', 'message'),
  [
    (lambda workdir: None, 'no such directory; give the workdir of a training run'),
    (lambda workdir: workdir.mkdir(), 'no metrics.jsonl here; training writes it to its workdir'),
    (empty, 'metrics.jsonl has no line yet; wait for the first logged step'),
  ],
)
def test_a_workdir_without_metrics_is_one_clear_line_and_exit_code_2(
  tmp_path, capsys, prepare, message
):
  workdir = tmp_path / 'run'
  prepare(workdir)
  assert report.main([str(workdir)]) == 2
  captured = capsys.readouterr()
  assert captured.out == '' and captured.err == f'report: {workdir}: {message}\n'


def test_a_broken_evaluation_is_one_clear_line(tmp_path, capsys):
  run = make_run(tmp_path / 'run', steps=2)
  (tmp_path / 'run' / 'evaluation.json').write_text('[1')
  assert report.main([run]) == 2
  assert (
    capsys.readouterr().err
    == f'report: {run}/evaluation.json: not a JSON object; evaluate again, or delete it\n'
  )


def test_it_runs_as_a_module_without_jax(tmp_path):
  code = 'import sys, runpy; sys.modules["jax"] = None; '
  code += 'runpy.run_module("dsv3_jax.report", run_name="__main__")'
  ran = subprocess.run([sys.executable, '-c', code, str(tmp_path)], capture_output=True, text=True)
  assert ran.returncode == 2 and ran.stderr.startswith('report: ') and ran.stderr.count('\n') == 1
