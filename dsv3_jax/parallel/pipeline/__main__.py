"""Prints and draws a pipeline schedule: `python -m dsv3_jax.parallel.pipeline show dualpipe --stages=8`.

`bench` runs schedules on a real clock, ranks as threads that sleep, beside the simulated time. Costs are in
any unit of time; by default a forward and both parts of a backward take 1 each and an F&B pair 3.
"""

import argparse
import sys
from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dsv3_jax import console
from dsv3_jax.parallel.pipeline import bench as measured
from dsv3_jax.parallel.pipeline import schedules, simulate, uniform
from dsv3_jax.parallel.pipeline.simulate import Costs, Timeline, describe

_COLORS = {'F': '#e8b04a', 'I': '#6fa8dc', 'W': '#93c47d', 'B': '#3d6fa5', 'FB': '#8e5ea8'}
_NAMES = {'F': 'forward', 'I': 'backward, input', 'W': 'backward, weights', 'B': 'backward'}
_NAMES |= {'FB': 'forward and backward'}
_NAMES_OF_ALL = (*schedules.SCHEDULES, 'uniform')


def show(args: argparse.Namespace) -> None:
  costs = Costs(args.forward, args.input, args.weight, args.overlap, args.transfer)
  stages, micro = args.stages, args.micro_batches or 2 * args.stages + 4
  for line in table(stages, micro, costs):
    print(line)
  timeline = _timeline(args.schedule, stages, micro, costs)
  print(f'\n{args.schedule}, {stages} stages, {micro} micro-batches (route.micro-batch):')
  for r, spans in enumerate(timeline.ranks):
    print(f'  rank {r}: {" ".join(describe(span.op) for span in spans)}')
  if args.out:
    draw(timeline, args.out)
    print(f'drawn: {args.out}')


def bench(args: argparse.Namespace) -> None:
  costs = Costs(args.forward, args.input, args.weight, args.overlap)
  sizes = [(stages, args.micro_batches or 2 * stages + 4) for stages in args.stages]
  for line in measured.table(args.schedules.split(','), sizes, costs, args.unit_ms / 1e3):
    print(line, flush=True)


def table(stages: int, micro: int, costs: Costs) -> list[str]:
  """Every schedule at this size: time, bubble as simulated and by its formula, activations held at most."""
  lines = [f'{"schedule":<11} {"time":>8} {"bubble":>8} {"formula":>8} {"activations":>12}']
  for name in _NAMES_OF_ALL:
    try:
      timeline = _timeline(name, stages, micro, costs)
    except ValueError as error:
      lines.append(f'{name:<11} {error}')
      continue
    time, bubble, by = timeline.makespan, timeline.bubble, simulate.formula(name, stages, costs)
    if name == 'uniform':  # all ranks wait for each other in every tick
      time, by = uniform.makespan(stages, micro, costs), uniform.formula(stages, micro, costs)
      bubble, by = (x - micro * costs.overlap for x in (time, by))
    lines.append(f'{name:<11} {time:8.2f} {bubble:8.2f} {by:8.2f} {max(timeline.live):12d}')
  return lines


def _timeline(name: str, stages: int, micro: int, costs: Costs) -> Timeline:
  if name == 'uniform':
    return simulate.simulate(uniform.as_schedule(stages, micro), costs)
  return simulate.simulate(schedules.make(name, stages, micro), costs)


def draw(timeline: Timeline, path: str) -> None:
  """One row per rank, one box per operation; a darker edge marks route 1."""
  s = timeline.schedule
  with matplotlib.rc_context({'font.size': 8, 'font.family': 'sans-serif'}):
    size = max(6.0, min(40.0, 0.22 * timeline.makespan)), 0.42 * len(timeline.ranks) + 1.2
    figure = Figure(size, layout='constrained')
    axes = figure.subplots()
    for r, spans in enumerate(timeline.ranks):
      for start, end, op in spans:
        items = [item for item in (op.forward, op.backward or op.weight) if item]
        edge = '#1f2933' if all(item.route for item in items) else '#ffffff'
        axes.barh(r, end - start, left=start, height=0.9, color=_COLORS[op.kind], edgecolor=edge)
        text = '\n'.join(str(item.micro) for item in items)
        axes.text((start + end) / 2, r, text, ha='center', va='center', fontsize=6, color='#1f2933')
    axes.set_yticks(range(len(timeline.ranks)), [f'rank {r}' for r in range(len(timeline.ranks))])
    axes.invert_yaxis()
    axes.set_xlim(0, timeline.makespan)
    axes.set_xlabel('time')
    title = f'{s.name}: {s.stages} stages, {s.micro_batches} micro-batches'
    axes.set_title(f'{title}; bubble {timeline.bubble:.2f}', loc='left')
    kinds = {span.op.kind for spans in timeline.ranks for span in spans}
    patches = [Patch(color=_COLORS[k], label=_NAMES[k]) for k in _COLORS if k in kinds]
    figure.legend(handles=patches, loc='outside lower left', ncols=len(patches), frameon=False)
    figure.savefig(path, dpi=130)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser('python -m dsv3_jax.parallel.pipeline', description=__doc__)
  commands = parser.add_subparsers(dest='command', required=True)
  show_parser = commands.add_parser('show', help='prints the table and every rank; draws it')
  show_parser.add_argument('schedule', choices=_NAMES_OF_ALL)
  show_parser.add_argument('--stages', type=int, default=8)
  show_parser.add_argument('--micro_batches', type=int, default=0, help='default: 2 stages + 4')
  bench_parser = commands.add_parser('bench', help='times schedules with stages that sleep')
  bench_parser.add_argument('--schedules', default='dualpipe,1f1b,zb1p', help='names, by commas')
  bench_parser.add_argument('--stages', type=int, nargs='+', default=[4, 8])
  bench_parser.add_argument('--unit_ms', type=float, default=200.0, help='time of a cost of 1')
  for parsed in (show_parser, bench_parser):
    for name in ('forward', 'input', 'weight'):
      parsed.add_argument(f'--{name}', type=float, default=1.0, help='time it takes')
    parsed.add_argument('--overlap', type=float, default=3.0, help='time of an F&B pair')
  bench_parser.add_argument('--micro_batches', type=int, default=0, help='default: 2 stages + 4')
  show_parser.add_argument('--transfer', type=float, default=0.0, help='time from rank to rank')
  show_parser.add_argument('--out', default='', help='PNG to draw')
  return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
  run = lambda args: (bench if args.command == 'bench' else show)(args)
  return console.run('pipeline', _parse, run, arguments, file='out', told=(ValueError,))


if __name__ == '__main__':
  sys.exit(main())
