"""What a compiled program moves in a whole run of it, beside what was written: rows of one table.

A program is written with `ppermute`, `all_gather`, `reduce_scatter` and sums. Compilers make of them what
suits the links: TPU's gathers over far-flung groups come as a ring of permutes, or as an all-reduce over
zeros. So collectives are put back under the word they were written with, and counted by payload: the
bytes of one device's gathered result or unreduced input, or what a permute hands on. A payload does not
depend on the algorithm; what crosses links is `Row.sent`. Permutes are of the experts' exchange, or of ZeRO
(`parallel/zero.py`), which gathers and scatters by them: 'zero'.

Loops around a collective multiply it. The number of micro-batches may be an argument of the program, and
rounds of an exchange behind the first one run only where routing overflows the buffers: the caller says
how often the outermost such loop runs, and all others of unknown length count as not run.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping

from dsv3_jax.codesign.hlo import Collective, Loop, Overlap
from dsv3_jax.parallel import zero

# What JAX calls them -> the word in the table.
ORIGINS = {
  'ppermute': 'exchange',
  'ragged_all_to_all': 'exchange',
  'all_to_all': 'exchange',
  'all_gather': 'gather',
  'all_gather_invariant': 'gather',
  'reduce_scatter': 'scatter',
  'psum': 'sum',
  'psum_invariant': 'sum',
  'pmin': 'sum',
  'pmax': 'sum',
}
_PERMUTED = 'exchange', 'zero'
_BY_FORM = {'all-gather': 'gather', 'reduce-scatter': 'scatter'}


@dataclasses.dataclass(frozen=True)
class Moved:
  """One collective of a program, over all its runs. As written, or as compiled."""

  kind: str
  axes: tuple[str, ...]
  members: int
  payload: float  # bytes of one device
  form: str  # 'all-reduce', ..: how it is done; of a written one its own word

  @property
  def sent(self) -> float:
    """Bytes that a device sends."""
    ways = (self.members - 1) / self.members
    doubled = 2 if self.form == 'all-reduce' or self.kind == 'sum' else 1
    return self.payload if self.kind in _PERMUTED else self.payload * ways * doubled


@dataclasses.dataclass(frozen=True)
class Row:
  """Totals of one kind over the same axes; `hidden` and `beside_matmul` are parts of `sent`."""

  kind: str
  axes: tuple[str, ...]
  written: float  # payloads
  compiled: float
  sent: float
  asynchronous: float
  hidden: float  # asynchronous, with work between start and done
  beside_matmul: float
  forms: tuple[str, ...]

  @property
  def ratio(self) -> float:
    return self.compiled / self.written if self.written else math.inf


def word(origin: str, scope: str) -> str | None:
  """In the table, for what JAX calls `origin` in the scope of a program; None where it is no collective's."""
  return 'zero' if zero.PERMUTES in scope and origin == 'ppermute' else ORIGINS.get(origin)


def times(loops: Iterable[Loop], outermost: int) -> int:
  """How often what stands in these loops runs."""
  total = 1
  for depth, loop in enumerate(loops):
    unknown = outermost if depth == 0 else 0
    total *= unknown if loop.trips is None else loop.trips
  return total


def compiled(each: Collective, sizes: Mapping[str, int], outermost: int) -> Moved:
  """A collective under the word it was written with."""
  ways = math.prod(sizes[axis] for axis in each.axes)
  form = each.kind
  kind = word(each.origin, each.scope) or _BY_FORM.get(form)
  size = max(each.operand_bytes, each.result_bytes) if kind == 'gather' else each.operand_bytes
  members = each.members
  if kind is None and form == 'collective-permute':  # one hop of a ring that gathers
    kind, members = 'gather', ways
    size *= ways / max(ways - 1, 1)
  elif kind in _PERMUTED and form == 'collective-permute':
    size *= max(each.share.values(), default=0)
  elif kind is None:
    # An all-reduce without a word: over a buffer of zeros but for one part, of several sums, or cut up after.
    kind = 'gather' if each.fills else 'sum' if each.joins else 'scatter'
  return Moved(kind, each.axes, members, size * times(each.loops, outermost), form)


def table(
  written: Iterable[Moved],
  found: Iterable[Collective],
  overlaps: Iterable[Overlap],
  sizes: Mapping[str, int],
  outermost: int,
) -> list[Row]:
  """Rows by kind and axes, the largest first; what moves nothing is left out."""
  beside = {each.name: each for each in overlaps}
  sums: dict[tuple[str, tuple[str, ...]], dict[str, float]] = {}
  forms: dict[tuple[str, tuple[str, ...]], set[str]] = {}

  def add(key: tuple[str, tuple[str, ...]], **values: float) -> None:
    row = sums.setdefault(key, {})
    for name, value in values.items():
      row[name] = row.get(name, 0.0) + value

  for moved in written:
    if moved.axes and moved.payload:
      add((moved.kind, moved.axes), written=moved.payload)
  for each in found:
    moved = compiled(each, sizes, outermost)
    if not moved.axes or not moved.payload:
      continue
    key, over = (moved.kind, moved.axes), beside[each.name]
    work = over.asynchronous and over.matmuls + over.others > 0
    forms.setdefault(key, set()).add(moved.form)
    add(
      key,
      compiled=moved.payload,
      sent=moved.sent,
      asynchronous=moved.sent * over.asynchronous,
      hidden=moved.sent * work,
      beside_matmul=moved.sent * (over.asynchronous and over.matmuls > 0),
    )
  names = [f.name for f in dataclasses.fields(Row)][2:-1]
  rows = [
    Row(*key, *(values.get(name, 0.0) for name in names), tuple(sorted(forms.get(key, ()))))
    for key, values in sums.items()
  ]
  return sorted(rows, key=lambda row: -max(row.sent, row.written))
