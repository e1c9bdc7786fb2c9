"""The same model trained under several precision recipes: losses, relative errors, curves.

  python -m dsv3_jax.training.precision_study --config=configs/precision_study.py --workdir=DIR

Every recipe starts from the same weights and sees the same batches. Losses (cross entropy) are smoothed
by an exponential average of 0.9, as in appendix B.1 of arXiv 2412.19437, and compared with those of the
first recipe: |a - b| / b. Two numbers: the mean over the second half of the steps of the error, and the
error of the mean, which chance averages out of. Recipes that differ by rounding alone part
ways too: `fp32` shows how far, and errors of its size mean nothing.

DIR/losses.json has every loss with device, versions and date; DIR/losses.png the curves. The file is
written after each recipe, and the same command goes on behind the last one there.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from dsv3_jax import config, console, flags, mesh, runtime
from dsv3_jax.config import ConfigError
from dsv3_jax.data import batches, corpora
from dsv3_jax.data.tokenizer import load_tokenizer
from dsv3_jax.precision import recipe
from dsv3_jax.training import schedule, state
from dsv3_jax.training.step import make_step

SMOOTHING = 0.9
BAR = 0.0025  # of the report
RECIPES = ('bf16', 'fp8', 'fp32', 'fp8_gradient_blocks', 'fp8_gradient_e5m2', 'fp8_sums_fp22')
_VERSIONS = ('jax', 'jaxlib')


def main(arguments: Sequence[str] | None = None) -> int:
  return console.run('precision_study', _parse, study, arguments, file='workdir')


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
  parser = console.Parser(prog='precision_study', description=__doc__.partition('\n')[0])
  parser.add_argument('--config', required=True, help='config file: PATH, or PATH:debug')
  parser.add_argument('--workdir', required=True, help='folder for losses.json and losses.png')
  parser.add_argument('--recipes', default=','.join(RECIPES), help='the first is compared with')
  args = parser.parse_args(arguments)
  args.recipes = args.recipes.split(',')
  for name in args.recipes:
    if name not in recipe.RECIPES:
      raise ConfigError(f'--recipes: {name!r} must be one of {", ".join(recipe.RECIPES)}')
  return args


def study(args: argparse.Namespace) -> None:
  runtime.keep_freed_memory()
  c = config.freeze(flags.load(args.config))
  out = pathlib.Path(args.workdir)
  out.mkdir(parents=True, exist_ok=True)
  found = _resume(out / 'losses.json', c)
  for name in args.recipes:
    if name not in found['losses']:
      started = time.perf_counter()
      found['losses'][name] = train(
        dataclasses.replace(c, model=dataclasses.replace(c.model, precision=name))
      )
      print(f'{name}: {time.perf_counter() - started:.0f} s, compilation included', flush=True)
      (out / 'losses.json').write_text(json.dumps(found) + '\n', encoding='utf-8')
  losses = {name: np.array(found['losses'][name]) for name in args.recipes}
  print(table(losses))
  draw(losses).savefig(out / 'losses.png')
  print(f'{out} holds losses.json, losses.png')


def _resume(path: pathlib.Path, c: config.Config) -> dict[str, Any]:
  """What is there of the same study, or a new one."""
  told = json.loads(config.to_json(c))
  if path.exists():
    found = json.loads(path.read_text(encoding='utf-8'))
    if found['config'] != told:
      raise ConfigError(f'{path}: holds a study of another config; give another --workdir')
    return found
  versions = {name: importlib.metadata.version(name) for name in _VERSIONS}
  date = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
  device = jax.devices()[0].device_kind
  return {'config': told, 'device': device, 'date': date, 'versions': versions, 'losses': {}}


def train(c: config.Config) -> list[float]:
  """Cross entropy of every step, nats per token."""
  device_mesh = mesh.make_mesh(c.mesh)
  corpus = corpora.open_corpus(c.data)
  tokenizer = load_tokenizer(c.data, c.model.vocab_size, corpus)
  data = batches.train_batches(c, corpus, tokenizer, mine=range(c.batch.micro_size))
  step, s = make_step(c, device_mesh), state.init(c, device_mesh)
  losses, count = [], c.batch.size // c.batch.micro_size
  for _ in range(schedule.total_steps(c)):
    rows_ABX = jnp.asarray(np.stack([next(data) for _ in range(count)]))
    s, figures = step(s, rows_ABX, jnp.int32(count))
    losses.append(float(figures['ce']))
  data.close()
  return losses


# ---- figures -------------------------------------------------------------------------------------


def smooth(losses: np.ndarray) -> np.ndarray:
  """Exponential average from the first loss on."""
  smoothed = [losses[0]]
  for loss in losses[1:]:
    smoothed.append(SMOOTHING * smoothed[-1] + (1 - SMOOTHING) * loss)
  return np.array(smoothed)


def errors(losses: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
  """Over the second half: mean and maximum of the relative error of smoothed losses; that of their means.

  The last one has its sign. All are NaN for a run that broke.
  """
  a, b = (smooth(x)[len(x) // 2 :] for x in (losses, base))
  relative = np.abs(a - b) / b
  return float(relative.mean()), float(relative.max()), float(a.mean() / b.mean() - 1)


def table(losses: dict[str, np.ndarray]) -> str:
  (first, base), *others = losses.items()
  lines = [
    f'{"recipe":<20} {"last loss":>9}  error over the second half: mean, largest; of the mean'
  ]
  lines.append(f'{first:<20} {smooth(base)[-1]:9.4f}  {len(base)} steps')
  for name, values in others:
    mean, worst, of_mean = errors(values, base)
    figures = f'{100 * mean:.3f} %, {100 * worst:.3f} %; {100 * of_mean:+.3f} %'
    within = 'below' if mean < BAR else 'ABOVE'
    lines.append(f'{name:<20} {smooth(values)[-1]:9.4f}  {figures}   mean {within} {100 * BAR} %')
  return '\n'.join(lines)


def draw(losses: dict[str, np.ndarray]) -> Figure:
  """Smoothed losses above, relative errors below."""
  figure = Figure(figsize=(9, 8), layout='constrained', dpi=120)
  above, below = figure.subplots(2, 1, sharex=True)
  (first, base), *_ = losses.items()
  for number, (name, values) in enumerate(losses.items()):
    steps, color = np.arange(1, len(values) + 1), f'C{number}'
    above.plot(steps, smooth(values), color=color, linewidth=1, label=name)
    if name != first:
      relative = 100 * (smooth(values) / smooth(base) - 1)
      below.plot(steps, relative, color=color, linewidth=1, label=name)
  above.set_ylabel(f'cross entropy, nats per token (average of {SMOOTHING})')
  above.legend()
  for bar in (-100 * BAR, 100 * BAR):
    below.axhline(bar, color='black', linestyle=':', linewidth=1)
  below.set(xlabel='step', ylabel=f'relative to {first}, % (dotted: {100 * BAR})')
  below.axhline(0, color='grey', linewidth=0.5)
  worst = [errors(v, base)[1] for name, v in losses.items() if name != first]
  limit = 100 * max([2 * BAR, *(1.2 * w for w in worst if np.isfinite(w))])
  below.set_ylim(-limit, limit)
  return figure


if __name__ == '__main__':
  sys.exit(main())
