"""What a section of the co-design report is made of: tables of figures beside the published ones, charts.

A published figure is kept as printed, so that it says how many digits there are to meet.
"""

import dataclasses
from collections.abc import Callable

from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True)
class Row:
  """One figure; `note` says what it assumes or, where it misses the published one, why."""

  label: str
  value: float | str
  unit: str = ''
  published: str | None = None  # digits as printed, in the same unit
  note: str = ''

  @property
  def agrees(self) -> bool | None:
    """Whether the value, rounded or cut, has the digits printed; None where nothing was."""
    if self.published is None:
      return None
    if isinstance(self.value, str):
      return self.value == self.published
    decimals = len(self.published.partition('.')[2])
    # Half of the last digit down to a cut, with room for binary fractions.
    off = (self.value - float(self.published.replace(',', ''))) * 10**decimals
    return -0.5 - 1e-6 <= off < 1 - 1e-9

  @property
  def text(self) -> str:
    """The value, with the digits printed or about four."""
    if isinstance(self.value, str):
      return self.value
    if self.published is not None:
      decimals = len(self.published.partition('.')[2])
      exact = f'{self.value:.{decimals}f}' == self.published.replace(',', '')
      return f'{self.value:,.{decimals + (not exact)}f}'
    if self.value == round(self.value) and abs(self.value) < 1e15:
      return f'{self.value:,.0f}'
    size = abs(self.value)
    return f'{self.value:,.{0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 4}f}'


@dataclasses.dataclass(frozen=True)
class Table:
  title: str
  rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Chart:
  """A figure of the page; `draw` fills its axes. Sizes in inches, as on a wide screen."""

  title: str
  draw: Callable[[Axes], None]
  width: float = 5.2
  height: float = 3.0


@dataclasses.dataclass(frozen=True)
class Section:
  title: str
  text: str  # one paragraph: what is counted, from which paper
  tables: tuple[Table, ...]
  charts: tuple[Chart, ...] = ()

  def row(self, label: str) -> Row:
    """The first row of that label; KeyError."""
    for table in self.tables:
      for row in table.rows:
        if row.label == label:
          return row
    raise KeyError(label)
