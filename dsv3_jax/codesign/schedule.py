"""Pipeline schedules beside their formulas (arXiv 2412.19437, Table 2), drawn.

A forward, an input gradient and a weight gradient take a unit each: then DualPipe's formula is exact. What
stands as printed is a formula's value, or follows from the eight steps of github.com/deepseek-ai/DualPipe.
"""

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from dsv3_jax import config
from dsv3_jax.codesign.hardware import Hardware
from dsv3_jax.codesign.table import Chart, Row, Section, Table
from dsv3_jax.parallel.pipeline import schedules, simulate

NAMES = ('1f1b', 'zb1p', 'dualpipe', 'dualpipe_v')
STAGES, MICRO_BATCHES = 8, 20  # of the published drawing
_PAPER_STAGES = 16
# Of each rank from an end: how often each of DualPipe's eight steps is done (8 ranks, 20 micro-batches).
STEPS = (
  [6, 1, 3, 3, 3, 1, 3, 1],
  [4, 2, 2, 4, 2, 2, 2, 2],
  [2, 3, 1, 5, 1, 3, 1, 3],
  [0, 4, 0, 6, 0, 4, 0, 4],
)
_COLORS = {'F': '#e8b04a', 'I': '#6fa8dc', 'W': '#93c47d', 'B': '#3d6fa5', 'FB': '#8e5ea8'}
_SAYS = {'F': 'forward', 'I': 'input', 'W': 'weights', 'B': 'backward', 'FB': 'both'}


def section(c: config.Config, hardware: Hardware) -> Section:
  del hardware
  micro = max(c.batch.size // 128, 2 * _PAPER_STAGES)
  micro += micro % 2
  tables = [
    _compare(STAGES, MICRO_BATCHES),
    _compare(_PAPER_STAGES, micro),
    _steps(),
  ]
  charts = tuple(
    Chart(f'{name}: {STAGES} stages, {MICRO_BATCHES} micro-batches', _gantt(name), height=height)
    for name, height in (('1f1b', 2.5), ('zb1p', 2.5), ('dualpipe', 2.5), ('dualpipe_v', 1.8))
  )
  return Section(
    'Schedule',
    'Idle time of the rank that idles most, in units of a forward; an input gradient and a weight gradient '
    'take a unit each, and a forward beside a backward three, so that nothing is gained but order.',
    tuple(tables),
    charts,
  )


def timeline(name: str, stages: int, micro_batches: int) -> simulate.Timeline:
  """Raises ValueError for sizes that the schedule has no order for."""
  return simulate.simulate(schedules.make(name, stages, micro_batches))


def _compare(stages: int, micro_batches: int) -> Table:
  rows = []
  held = {'1f1b': stages, 'zb1p': stages, 'dualpipe': stages + 1, 'dualpipe_v': stages + 1}
  for name in NAMES:
    t = timeline(name, stages, micro_batches)
    exact = f'{simulate.formula(name, stages):g}'
    rows.append(Row(f'{name}: bubble', t.bubble, 'units', exact, f'of {t.makespan:g}'))
    rows.append(Row(f'{name}: activations', float(max(t.live)), 'micro-batches', str(held[name])))
  title = f'{stages} stages, {micro_batches} micro-batches: simulated, and the formulas of Table 2'
  return Table(title, tuple(rows))


def _steps() -> Table:
  """Operations of a rank against the sum of DualPipe's steps."""
  stream = schedules.make('dualpipe', STAGES, MICRO_BATCHES).ranks
  rows = []
  for h, s in enumerate(STEPS):
    # Steps 3 and 7 hold input and weight gradients apart; of step 4 on the middle ranks the first pair too.
    kinds = [op.kind for op in stream[h]]
    apart = int(h == STAGES // 2 - 1)
    want = {
      'F': s[0] + 2 * s[1] + s[2] + apart,
      'FB': 2 * s[3] + s[4] - apart,
      'B': s[4] + s[5] + apart,
      'I': s[2] + s[5] + s[6],
      'W': s[2] + s[6] + s[7],
    }
    for kind, count in want.items():
      label = f'rank {h}: {_SAYS[kind]}'
      rows.append(Row(label, float(kinds.count(kind)), 'operations', str(count)))
  return Table('DualPipe of 8 stages and 20 micro-batches: counts by its steps', tuple(rows))


def _gantt(name: str):
  def draw(axes: Axes) -> None:
    t = timeline(name, STAGES, MICRO_BATCHES)
    for r, spans in enumerate(t.ranks):
      for kind in _COLORS:
        bars = [(s.start, s.end - s.start) for s in spans if s.op.kind == kind]
        axes.broken_barh(bars, (r - 0.44, 0.88), facecolor=_COLORS[kind], edgecolor='white', lw=0.4)
    axes.set_yticks(range(len(t.ranks)))
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(xlim=(0, t.makespan), ylabel='rank', xlabel=f'time; bubble {t.bubble:g}')
    patches = [Patch(color=color, label=_SAYS[kind]) for kind, color in _COLORS.items()]
    axes.legend(
      handles=patches,
      ncols=5,
      columnspacing=1.2,
      fontsize=7,
      loc='lower left',
      bbox_to_anchor=(0, 1),
      borderaxespad=0,
    )

  return draw
