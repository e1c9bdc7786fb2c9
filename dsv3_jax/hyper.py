"""Sweeps as data: what `get_hyper(h)` of a config builds, and the points that come out of it.

  def get_hyper(h):
    return h.product([
      h.sweep('objective.bias_speed', [0.0, 1e-3, 1e-2]),
      h.sweep('objective.balance_alpha', [0.0, 1e-4]),
    ])

A point is a dict of config keys and values; a sweep is a list of points. No jax in here.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import ml_collections

from dsv3_jax import config
from dsv3_jax.config import ConfigError

Point = dict[str, Any]


def fixed(key: str, value: Any) -> list[Point]:
  """One point."""
  return [{key: value}]


def sweep(key: str, values: Iterable[Any]) -> list[Point]:
  """A point for each value."""
  return [{key: value} for value in values]


def product(sweeps: Sequence[Sequence[Point]]) -> list[Point]:
  """Every combination; the last sweep changes fastest."""
  return [_join(points) for points in itertools.product(*sweeps)]


def zipit(sweeps: Sequence[Sequence[Point]]) -> list[Point]:
  """Points side by side; raises ConfigError where sweeps differ in length."""
  sizes = [len(points) for points in sweeps]
  if len(set(sizes)) > 1:
    raise ConfigError(
      f'h.zipit: sweeps of {", ".join(map(str, sizes))} points: must be of one length'
    )
  return [_join(points) for points in zip(*sweeps, strict=True)]


def chainit(sweeps: Iterable[Sequence[Point]]) -> list[Point]:
  """One sweep after another."""
  return list(itertools.chain(*sweeps))


def _join(points: Iterable[Point]) -> Point:
  joined: Point = {}
  for point in points:
    if twice := joined.keys() & point.keys():
      raise ConfigError(f'{min(twice)}: is swept twice in one point')
    joined |= point
  return joined


@dataclasses.dataclass(frozen=True)
class Run:
  """One point of a sweep, checked."""

  name: str
  point: Point
  config: config.Config


def runs(base: config.Config, points: Sequence[Point]) -> list[Run]:
  """The runs of a sweep over `base`, named by what differs between them.

  Raises ConfigError, a line for each fault of any point: keys that no config has, values that cannot
  work, two points that are one.
  """
  if not points or not all(isinstance(point, dict) for point in points):
    raise ConfigError(
      'get_hyper: must return a list of points, at least one: use h.sweep, h.product, ..'
    )
  keys = sorted({key for point in points for key in point}, key=list(_order(points)).index)
  faults = []
  for key in keys:
    try:
      config.check_key(key, f'get_hyper: {key}')
    except ConfigError as error:
      faults.append(str(error))
  if faults:
    raise ConfigError('\n'.join(faults))
  told = [key for key in keys if len({repr(point.get(key)) for point in points}) > 1]
  short = _short(told)
  found: dict[str, Run] = {}
  for number, point in enumerate(points):
    parts = [f'{short[key]}={_text(point[key])}' for key in told if key in point]
    name = ','.join(parts) or 'only'
    values = ml_collections.ConfigDict(dataclasses.asdict(base))
    try:
      with values.ignore_type():
        values.update_from_flattened_dict(point)
      run = Run(name, point, config.freeze(values))
    except ConfigError as error:
      faults += [f'point {number} ({name}): {line}' for line in str(error).splitlines()]
      continue
    if name in found:
      faults.append(f'point {number} ({name}): is there twice')
    found[name] = run
  if faults:
    raise ConfigError('\n'.join(faults))
  return list(found.values())


def _order(points: Sequence[Point]) -> dict[str, None]:
  return dict.fromkeys(key for point in points for key in point)


def _short(keys: Sequence[str]) -> dict[str, str]:
  """The end of each key that tells it from the others."""
  short = {}
  for key in keys:
    parts = key.split('.')
    ends = ['.'.join(parts[-n:]) for n in range(1, len(parts) + 1)]
    alone = lambda end: sum(f'.{other}'.endswith(f'.{end}') for other in keys) == 1
    short[key] = next((end for end in ends if alone(end)), key)
  return short


def _text(value: Any) -> str:
  text = f'{value:g}' if isinstance(value, float) else str(value)
  return re.sub(r'[^\w.+-]+', '_', text)
