"""Tiles of the matrix products on Hopper: as measured on a kind of card, else by a rule.

`python -m dsv3_jax.kernels.bench --tune` measures and writes `tuned/KIND.json`; nothing else ever does. A
table is {"device", "versions", "date", "tiles": {"OP N K": {"M": {"rows", .., "microseconds"}}}} with M a
power of two, the least at or above the rows.
"""

import contextvars
import functools
import json
import pathlib
from typing import Any

from dsv3_jax.kernels import hopper
from dsv3_jax.kernels import hopper_gemm as hg

FOLDER = pathlib.Path(__file__).parent / 'tuned'
forced = contextvars.ContextVar('forced', default=None)  # the tile to be measured
_SHAPE = 'rows', 'columns', 'stages', 'width'


def tiling(op: str, M: int, N: int, K: int) -> hg.Tiling:
  """Measured for this shape, else for the nearest number of rows, else the rule of `hopper_gemm`."""
  found = forced.get() or nearest(table(hopper.kind()), op, M, N, K)
  return found or hg.heuristic(M, N)


def nearest(tiles: dict[str, Any], op: str, M: int, N: int, K: int) -> hg.Tiling | None:
  """The entry of a table whose bucket is nearest in octaves, the smaller of two; None without any."""
  entries = tiles.get(key(op, N, K))
  if not entries:
    return None
  own = bucket(M).bit_length()
  best = min(entries, key=lambda m: (abs(int(m).bit_length() - own), int(m)))
  return hg.Tiling(**{name: entries[best][name] for name in _SHAPE})


def key(op: str, N: int, K: int) -> str:
  return f'{op} {N} {K}'


def bucket(M: int) -> int:
  """The power of two at or above: 4096 for 2049."""
  return 1 << (M - 1).bit_length()


def path(kind: str) -> pathlib.Path:
  return FOLDER / f'{kind.replace(" ", "_")}.json'


@functools.cache
def table(kind: str) -> dict[str, Any]:
  """{"OP N K": ..} of a kind of card; empty where it was never measured."""
  file = path(kind)
  return json.loads(file.read_text(encoding='utf-8'))['tiles'] if file.exists() else {}
