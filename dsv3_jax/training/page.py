"""Draws the page of one or several runs, from what `dsv3_jax.report` read of their workdirs.

Panels over tokens seen: loss (smoothed over faint raw values, held-out points, MTP), balance of the
experts, learning rate, gradient norm, throughput; then the load of every expert in every layer. A
colour is a run; the table at the top is the legend. Where a loss was not finite the page says so.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib import cm, colors, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from dsv3_jax import config as configs
from dsv3_jax import counts
from dsv3_jax.training import metrics

DPI = 110
WIDTH, MARGIN = 15.0, 0.75  # inches, like every length of the layout
HEATMAPS_PER_ROW = 3
NOTHING = '\u2013'

INK, GREY, FAINT, ALARM = '#1f2933', '#6b7785', '#e4e7eb', '#d64545'
RUN_COLORS = (
  '#2f6db5', '#e07b39', '#3a9d7c', '#8e5ea8', '#b8a12b', '#c2527b', '#4aa3c2', '#6b6f76',
)  # fmt: skip
LOAD_COLORS = colors.LinearSegmentedColormap.from_list(
  'load', ('#174a7c', '#5b9bd0', '#f7f5f0', '#eb9f62', '#a8401c')
)
DASHED = {'linestyle': (0, (4, 2)), 'linewidth': 1.1}
DOTTED = {'linestyle': ':', 'linewidth': 1.1}
POINTS = {'linestyle': '', 'marker': 'o', 'markersize': 6, 'markeredgewidth': 1.4}
POINTS |= {'markerfacecolor': 'white'}
CROSSES = {'linestyle': '', 'marker': 'x', 'markersize': 5, 'color': ALARM}
STYLE = {
  'font.family': 'DejaVu Sans', 'font.size': 9.5, 'text.color': INK,
  'axes.edgecolor': GREY, 'axes.labelcolor': GREY, 'axes.linewidth': 0.6,
  'axes.spines.top': False, 'axes.spines.right': False,
  'axes.titlesize': 11.5, 'axes.titleweight': 'bold', 'axes.titlelocation': 'left',
  'axes.titlepad': 9,
  'axes.grid': True, 'axes.axisbelow': True, 'grid.color': FAINT, 'grid.linewidth': 0.6,
  'xtick.color': GREY, 'ytick.color': GREY, 'xtick.major.width': 0.6, 'ytick.major.width': 0.6,
  'legend.frameon': False, 'legend.fontsize': 9, 'lines.linewidth': 1.6, 'lines.markersize': 3,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
  """What one workdir holds. `columns` are [lines] float64, NaN where a line has no number."""

  workdir: str
  name: str
  color: str
  columns: dict[str, np.ndarray]
  load_YE: np.ndarray | None  # tokens of an expert over its layer's mean; the last quarter's mean
  config: configs.Config | None
  config_note: str  # why there is no config; '' with one
  evaluation: dict[str, Any]

  def column(self, key: str) -> np.ndarray:
    return self.columns.get(key, np.full_like(self.columns['tokens'], np.nan))


def save(runs: list[Run], path: str) -> None:
  """Writes the page as a PNG."""
  with matplotlib.rc_context(STYLE):
    draw(runs).savefig(path, format='png')


def draw(runs: list[Run]) -> Figure:
  """Places the panels from top to bottom; draw and save under one rc_context(STYLE)."""
  per_row = min(len(runs), HEATMAPS_PER_ROW)
  rows = math.ceil(len(runs) / per_row)
  layers = max((len(run.load_YE) for run in runs if run.load_YE is not None), default=1)
  table, upper, lower, heat = 0.3 * (len(runs) + 1), 3.8, 2.3, min(max(0.17 * layers, 1.3), 5.0)
  gap, aside = 1.15, 0.8  # below a panel for its tick labels and the next title; between neighbours
  inner, height = WIDTH - 2 * MARGIN, 1.45 + table + upper + lower + 2 * gap + rows * (heat + gap)
  figure = Figure((WIDTH, height), dpi=DPI, facecolor='white')

  def place(left: float, top: float, width: float, tall: float) -> Axes:
    return figure.add_axes((left / WIDTH, 1 - (top + tall) / height, width / WIDTH, tall / height))

  # ---- title and table
  title = _fit(', '.join(run.name for run in runs), 85)
  figure.text(0.35 / WIDTH, 1 - 0.45 / height, title, size=18, weight='bold', va='center')
  _table(place(0.35, 0.8, WIDTH - 0.7, table), runs)
  top = 0.8 + table + 0.65

  # ---- the curves
  wide = 0.56 * inner
  _loss(place(MARGIN, top, wide, upper), runs)
  _balance(place(MARGIN + wide + aside, top, inner - wide - aside, upper), runs)
  top += upper + gap
  third = (inner - 2 * aside) / 3
  for i, panel in enumerate((_learning_rate, _gradient_norm, _throughput)):
    panel(place(MARGIN + i * (third + aside), top, third, lower), runs)
  top += lower + gap

  # ---- the heat maps, with a colour bar at the right end of each row
  limit = _load_limit(runs)
  across = (inner - 0.55 - aside * (per_row - 1)) / per_row
  for i, run in enumerate(runs):
    at = top + i // per_row * (heat + gap)
    axes = place(MARGIN + i % per_row * (across + aside), at, across, heat)
    _heat_map(axes, run, limit, len(runs) > 1)
    if i % per_row == 0:
      _color_bar(place(WIDTH - MARGIN - 0.3, at, 0.14, heat), limit)
  return figure


def _table(axes: Axes, runs: list[Run]) -> None:
  """One row a run: the figures that get quoted, and what its config is or changes."""
  columns: tuple[tuple[str, float, Callable[[Run], str]], ...] = (  # head, right end, text
    ('parameters', 4.45, lambda run: _parameters(run.config)),
    ('tokens', 5.2, lambda run: metrics.short(run.column('tokens')[-1])),
    ('tokens/s', 6.0, lambda run: _figure(_median(run.column('tokens_per_s')))),
    ('last loss', 6.85, lambda run: _figure(run.column('loss')[-1], '.4f', 'not finite')),
    ('bits/byte', 7.75, _bits_per_byte),
    ('gzip', 8.35, lambda run: _figure(run.evaluation.get('gzip_bits_per_byte'), '.3f')),
    ('xz', 8.95, lambda run: _figure(run.evaluation.get('xz_bits_per_byte'), '.3f')),
    ('of held-out', 9.95, _heldout_bytes),
  )
  words = 10.3
  axes.set(xlim=(0, WIDTH - 0.7), ylim=(len(runs) + 1, 0))
  axes.set_axis_off()
  axes.plot([0, WIDTH - 0.7], [0.95, 0.95], color=GREY, linewidth=0.6)
  for head, right, _ in columns:
    axes.text(right, 0.5, head, color=GREY, size=9, ha='right', va='center')
  head = 'config' if len(runs) == 1 else 'config, and what differs'
  axes.text(words, 0.5, head, color=GREY, size=9, va='center')
  for i, run in enumerate(runs):
    y = i + 1.5
    axes.plot([0.02, 0.24], [y, y], color=run.color, linewidth=4, solid_capstyle='round')
    axes.text(0.36, y, _fit(run.name, 27), weight='bold', size=10, va='center')
    for _, right, text in columns:
      axes.text(right, y, text(run), size=10, ha='right', va='center')
    axes.text(words, y, _fit(_describe(run, runs[0]), 56), color=GREY, size=9, va='center')


def _loss(axes: Axes, runs: list[Run]) -> None:
  axes.set_title('Loss, nats per token')
  keys = ('loss', 'mtp', 'heldout_loss')
  for run in runs:
    train, mtp, heldout = map(run.column, keys)
    _curve(axes, run, train, raw=True)
    _curve(axes, run, mtp, **DASHED)
    axes.plot(run.column('tokens'), heldout, color=run.color, zorder=4, **POINTS)
  _scale(axes, runs, keys)
  _tokens_axis(axes, runs)
  styles = [('train, smoothed', {}), ('MTP', DASHED), ('held-out', POINTS)]
  there = [any(key in run.columns for run in runs) for key in keys]
  _legend(axes, [style for style, drawn in zip(styles, there, strict=True) if drawn])
  _mark_broken(axes, runs, 'loss', 80)


def _balance(axes: Axes, runs: list[Run]) -> None:
  axes.set_title('Max / mean load')
  for run in runs:
    _curve(axes, run, run.column('max_load'), raw=True)
    _curve(axes, run, run.column('mean_load'), **DASHED)
  axes.axhline(1, color=INK, **DOTTED)
  _scale(axes, runs, ('max_load', 'mean_load'))
  _tokens_axis(axes, runs)
  _legend(axes, [('worst layer', {}), ('mean of layers', DASHED), ('even', DOTTED)])
  if 1 < len(runs) <= 4:  # more names than fit stand in the table alone
    names = [(_fit(run.name, 48 // len(runs)), {'color': run.color}) for run in runs]
    _legend(axes, names, below=True)


def _learning_rate(axes: Axes, runs: list[Run]) -> None:
  axes.set_title('Learning rate')
  for i, run in enumerate(runs):  # schedules mostly coincide: later runs lie dashed on the first
    lr = run.column('lr')
    style = (4 * i, (4, 4)) if i else '-'
    axes.plot(run.column('tokens'), lr, color=run.color, linestyle=style, marker=_dot(lr))
  _from_zero(axes, runs, 'lr', lambda value: f'{value:.1e}'.replace('e-0', 'e-') if value else '0')


def _gradient_norm(axes: Axes, runs: list[Run]) -> None:
  axes.set_title('Gradient norm')
  for run in runs:
    _curve(axes, run, run.column('grad_norm'), raw=True)
  _scale(axes, runs, ('grad_norm',))
  _tokens_axis(axes, runs)
  _mark_broken(axes, runs, 'grad_norm', 40)


def _throughput(axes: Axes, runs: list[Run]) -> None:
  axes.set_title('Tokens per second')
  for run in runs:  # dips are evaluations and checkpoints, which smoothing would smear
    speed = run.column('tokens_per_s')
    axes.plot(
      run.column('tokens'), speed, color=run.color, linewidth=0.9, alpha=0.6, marker=_dot(speed)
    )
    axes.axhline(_median(speed), color=run.color, **DOTTED)
  _from_zero(axes, runs, 'tokens_per_s', metrics.short)
  _legend(axes, [('median', DOTTED)])


def _heat_map(axes: Axes, run: Run, limit: float, named: bool) -> None:
  """Rows are layers, MTP depths last, columns experts; `named` puts the run's name above it."""
  if named:
    axes.set_title(f'{_fit(run.name, 20)}: expert load, last quarter', color=run.color)
  else:
    axes.set_title("Expert load over its layer's mean, average of the last quarter of the run")
  axes.grid(False)
  if run.load_YE is None:
    axes.set_axis_off()
    axes.text(
      0.5, 0.5, 'no expert load in the record', color=GREY, ha='center', transform=axes.transAxes
    )
    return
  layers, experts = run.load_YE.shape
  axes.imshow(
    np.clip(run.load_YE, 1 / limit, limit),
    norm=colors.LogNorm(1 / limit, limit), cmap=LOAD_COLORS, aspect='auto', interpolation='nearest',
  )  # fmt: skip
  axes.spines[:].set_visible(False)
  axes.tick_params(length=0)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(8 if named else 16, integer=True))
  axes.set_xlim(-0.5, experts - 0.5)
  axes.set_xlabel('expert', loc='right')
  moe_layers = layers  # without a config the record does not say which rows are MTP depths
  first = 0
  if run.config is not None:
    first = run.config.model.num_dense_layers
    moe_layers = min(layers, run.config.model.num_layers - first)
  every = math.ceil(moe_layers / 15)  # a label too near the first MTP row is left out
  labels = {i: str(first + i) for i in range(0, moe_layers, every) if moe_layers - i > every / 2}
  labels |= {i: f'MTP {i - moe_layers + 1}' for i in range(moe_layers, layers)}
  axes.set_yticks(list(labels), labels=list(labels.values()))
  axes.set_ylabel('layer' if run.config is not None else 'row (no config)')
  if 0 < moe_layers < layers:
    axes.axhline(moe_layers - 0.5, color='white', linewidth=3)


def _color_bar(axes: Axes, limit: float) -> None:
  scale = cm.ScalarMappable(colors.LogNorm(1 / limit, limit), LOAD_COLORS)
  bar = axes.figure.colorbar(scale, cax=axes)
  ticks = [1 / limit, 1, limit]
  bar.set_ticks(ticks, labels=['\u2264' + f'{ticks[0]:.3g}', '1', '\u2265' + f'{ticks[2]:.3g}'])
  bar.minorticks_off()
  bar.outline.set_visible(False)
  axes.tick_params(length=0)


# ---- the strokes ---------------------------------------------------------------------------------


def _curve(axes: Axes, run: Run, values: np.ndarray, raw: bool = False, **style: Any) -> None:
  """The smoothed line, over the faint raw one where `raw`."""
  tokens = run.column('tokens')
  if raw:
    axes.plot(tokens, values, color=run.color, linewidth=0.7, alpha=0.28)
  style = {'color': run.color, 'marker': _dot(values)} | style
  axes.plot(tokens, smooth(values, len(values) // 60), **style)


def _dot(values: np.ndarray) -> str | None:
  """A marker where there are so few values that a line alone might show nothing."""
  return 'o' if np.isfinite(values).sum() <= 10 else None


def smooth(values: np.ndarray, half: int) -> np.ndarray:
  """Mean over `half` neighbours to each side; NaN stays NaN, and counts nowhere.

  Near the start the window shrinks on both sides alike, so that the steep first steps are not bent;
  near the end only its right side ends.
  """
  n = len(values)
  finite = np.isfinite(values)
  i = np.arange(n)
  reach = np.minimum(half, i)
  low, high = i - reach, np.minimum(i + reach, n - 1) + 1
  total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
  count = np.concatenate([[0], np.cumsum(finite)])
  mean = (total[high] - total[low]) / np.maximum(count[high] - count[low], 1)
  return np.where(finite, mean, np.nan)


def _scale(axes: Axes, runs: list[Run], keys: tuple[str, ...]) -> None:
  """A logarithmic y axis with plain numbers where the values span a factor of three or more."""
  values = np.concatenate([run.column(key) for run in runs for key in keys])
  values = values[np.isfinite(values) & (values > 0)]
  if not values.size or values.max() < 3 * values.min():
    return
  decades = math.log10(values.max() / values.min())
  ticks = (1,) if decades > 2.5 else (1, 2, 5) if decades > 1.2 else (1, 1.5, 2, 3, 4, 6, 8)
  axes.set_yscale('log')
  axes.yaxis.set_major_locator(ticker.LogLocator(subs=ticks))
  axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:g}'))
  axes.yaxis.set_minor_locator(ticker.NullLocator())


def _from_zero(axes: Axes, runs: list[Run], key: str, form: Callable[[float], str]) -> None:
  """Both axes of a panel whose y axis begins at zero."""
  values = np.concatenate([run.column(key) for run in runs])
  top = float(np.max(values, where=np.isfinite(values), initial=0.0))
  axes.set_ylim(0, 1.1 * top or 1)
  axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: form(value)))
  _tokens_axis(axes, runs)


def _tokens_axis(axes: Axes, runs: list[Run]) -> None:
  axes.set_xlim(0, max(run.column('tokens')[-1] for run in runs) * 1.01 or 1)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(6))
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: metrics.short(value)))
  axes.set_xlabel('tokens', loc='right')


def _legend(axes: Axes, entries: list[tuple[str, dict[str, Any]]], below: bool = False) -> None:
  """(label, line style) in a row, on no curve: right of the title, or `below`, left of 'tokens'."""
  lines = [Line2D([], [], **({'color': INK} | style)) for _, style in entries]
  tall = axes.get_position().height * axes.figure.get_figheight()
  corner, at = ('upper left', (-0.01, -0.25 / tall)) if below else ('lower right', (1, 1))
  labels = [label for label, _ in entries]
  axes.add_artist(Legend(
    axes, lines, labels, loc=corner, bbox_to_anchor=at, bbox_transform=axes.transAxes,
    ncols=max(len(lines), 1), columnspacing=1.2, borderaxespad=0.2,
  ))  # fmt: skip


def _mark_broken(axes: Axes, runs: list[Run], key: str, length: int) -> None:
  """Crosses at the foot where `key` is not finite, and below them how many, in `length` letters."""
  counts = []
  for run in runs:
    broken = ~np.isfinite(run.column(key))
    if broken.any():
      tokens = run.column('tokens')[broken]
      foot = axes.get_xaxis_transform()
      axes.plot(
        tokens, np.full_like(tokens, 0.02), transform=foot, clip_on=False, zorder=5, **CROSSES
      )
      whose = f'{run.name} ' if len(runs) > 1 else ''
      counts.append(f'{whose}{broken.sum()} of {broken.size}')
  if counts:
    _legend(axes, [(_fit(f'not finite: {", ".join(counts)}', length), CROSSES)], below=True)


def _load_limit(runs: list[Run]) -> float:
  """The load at which colours saturate, one for all runs: between 1.25 and 4."""
  loads = [run.load_YE[np.isfinite(run.load_YE)] for run in runs if run.load_YE is not None]
  spreads = [
    np.percentile(np.abs(np.log(np.maximum(load, 0.01))), 99) for load in loads if load.size
  ]
  return float(np.clip(np.exp(max(spreads, default=0.0)), 1.25, 4.0))


# ---- the words -----------------------------------------------------------------------------------


def _describe(run: Run, first: Run) -> str:
  """The sizes of the first run's model; of the others, what they change in its config."""
  if run.config is None:
    return run.config_note
  if run is not first and first.config is not None:
    return '; '.join(configs.differences(first.config, run.config)) or 'the same config'
  m = run.config.model
  return f'{m.num_layers} layers, {m.dim} wide, {m.moe.num_experts} experts, {m.moe.top_k} chosen'


def _parameters(config: configs.Config | None) -> str:
  """'671B, 37.6B active': the main model with embedding and head, and what one token passes."""
  if config is None:
    return NOTHING
  total = counts.parameters(config.model)
  active = counts.active_parameters(config.model, embedding=True)
  return f'{metrics.short(total)}, {metrics.short(active)} active'


def _bits_per_byte(run: Run) -> str:
  """The evaluation's figure, or the last one from training."""
  seen = [value for value in run.column('heldout_bpb') if np.isfinite(value)]
  return _figure(run.evaluation.get('bits_per_byte', seen[-1] if seen else None), '.4f')


def _heldout_bytes(run: Run) -> str:
  size = _figure(run.evaluation.get('heldout_bytes'))
  return size if size == NOTHING else f'{size} bytes'


def _figure(value: float | None, form: str = '', otherwise: str = NOTHING) -> str:
  if value is None or not np.isfinite(value):
    return otherwise
  return format(value, form) if form else metrics.short(value)


def _median(values: np.ndarray) -> float:
  values = values[np.isfinite(values)]
  return float(np.median(values)) if values.size else math.nan


def _fit(text: str, length: int) -> str:
  return text if len(text) <= length else text[: length - 1] + '\u2026'
