"""Two programs that share no value, run in turns: while one waits for what it sent, the other computes.

Each runs to its next permutes. Before what they bring is read, the other computes a few matmuls, and the two
are tied by a barrier, so that a compiler must put the one between start and done of the other. A scheduler
left to itself runs one program behind the other: libtpu then had a matmul beside a quarter of the permutes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax import lax
from jax.extend import core

from dsv3_jax import compat
from dsv3_jax.mesh import AXES

_SENDS = 'ppermute'
_MULTIPLIES = ('dot_general', 'ragged_dot', 'wgmma_ref')  # the last one in kernels for Hopper
_TURN = 3  # matmuls beside a hop: attention has four times as many, which is the hops of a layer's exchange


class Turns:
  """A program under way: flat equations in order, and the values of the variables that they read."""

  def __init__(
    self,
    equations: Iterable[Any],
    values: dict[Any, Any],
    bind: Callable[[Any, Sequence[Any]], Sequence[Any]],
  ) -> None:
    self.values = values
    self._left = list(equations)
    self._bind = bind
    self._sent: dict[Any, Any] = {}  # not arrived yet
    self._operands: list[Any] = []  # of what was sent last
    self._made: list[Any] = []  # since the last turn

  @property
  def waits(self) -> bool:
    return bool(self._sent)

  @property
  def sends(self) -> bool:
    """Whether it has permutes before it."""
    return any(e.primitive.name == _SENDS for e in self._left)

  def go(self, turn: int | None = None) -> None:
    """Runs what does not wait, in order, until it has sent something or multiplied `turn` times."""
    waiting, left, self._made, self._operands = set(self._sent), [], [], []
    multiplied = 0
    for number, equation in enumerate(self._left):
      if any(v in waiting for v in _variables(equation.invars)):
        left.append(equation)
        waiting |= set(equation.outvars)
        continue
      if _multiplies(equation):
        if self._sent or multiplied == turn:
          left += self._left[number:]
          break
        multiplied += 1
      read = lambda v: v.val if isinstance(v, core.Literal) else self.values[v]
      arguments = [read(v) for v in equation.invars]
      outs = dict(zip(equation.outvars, self._bind(equation, arguments), strict=True))
      if equation.primitive.name == _SENDS:
        self._sent |= outs
        self._operands += arguments
        waiting |= set(outs)
      else:
        self.values |= outs
        self._made += outs
    self._left = left

  def arrive(self, other: 'Turns') -> None:
    """What was sent is there, behind what `other` made in its turn, and what it sent."""
    read = {v for e in other._left for v in _variables(e.invars)}
    # A barrier makes all of its operands vary alike; what varies less is no matmul's.
    varies = lambda v: compat.varying_axes(other.values[v]) == set(AXES)
    made = [v for v in other._made if v in read and varies(v)]
    tied = list(self._sent.values()), [other.values[v] for v in made], other._operands
    sent, beside, _ = lax.optimization_barrier(tied)
    self.values |= zip(self._sent, sent, strict=True)
    other.values |= zip(made, beside, strict=True)
    self._sent = {}


def run(first: Turns, second: Turns) -> None:
  """Both to their ends; `first` is the one that sends sooner."""
  away: list[Turns] = []
  while away or first.sends or second.sends:
    if away:
      one = away.pop(0)
      other = second if one is first else first
      if not other.waits:
        other.go(_TURN)
        if other.waits:
          away.append(other)
      one.arrive(other)
    else:
      one = first if first.sends else second
      one.go()
      if one.waits:
        away.append(one)
  first.go()
  second.go()


def _multiplies(equation: Any) -> bool:
  """Itself, or in a loop, a branch or a kernel."""
  inner = core.jaxprs_in_params(equation.params)
  return equation.primitive.name in _MULTIPLIES or any(
    _multiplies(e) for jaxpr in inner for e in jaxpr.eqns
  )


def _variables(atoms: Iterable[Any]) -> list[Any]:
  return [v for v in atoms if not isinstance(v, core.Literal)]
