"""A backward in two parts, each run when the schedule wants it: gradients of the input, and of the weights.

The backward of a stage is traced once, as one flat list of equations. Those that the input's gradient needs
are the input part; the rest is the weight part, and the values that cross the cut (the gradient of each linear
layer's output) are handed from one to the other. No equation is in both: nothing is computed twice. Exchanges
are on the way to the input's gradient, so the weight part has no collective and may stand anywhere.

What must be one equation for the cut is left whole: a loop or a branch that makes gradients of both kinds goes
to the input part: an exchange's further rounds, and what stands in branches, heads and dense FFNs. Experts of
the first round walk their rows twice, so that their weights' gradients are loops of their own. Rematerialised
regions are opened, and what they recompute for both parts is recomputed once.

Kept from forward to backward: what depends on the input. What follows from weights and constants alone (a cast,
a reshape, a table of positions) is made again, so that slots of activations hold no weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from dsv3_jax.compat import vary, vary_like
from dsv3_jax.parallel.pipeline import turns

# Equations that stand for the equations in them.
_OPENED = {'jit': 'jaxpr', 'pjit': 'jaxpr', 'remat2': 'jaxpr', 'checkpoint': 'jaxpr'}
_OPENED |= {'closed_call': 'call_jaxpr', 'core_call': 'call_jaxpr'}

# (weights, constants, x) -> (outputs that gradients come back for, other results)
Function = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Split:
  """A function with its backward in two parts; made by `split`. All lists are of arrays."""

  _forward: '_Program'  # weights, constants, x -> outputs, others, everything that is kept
  _again: '_Program'  # weights, constants -> what the backward needs that was not kept
  _input: '_Program'  # weights, constants, kept, again, cotangents -> dx, crossing
  _weight: '_Program'  # the same, crossing -> dweights
  _is_kept: tuple[bool, ...]  # of the values that the backward reads

  @property
  def others(self) -> Any:
    """What `forward` gives second, as examples; `kept` and `crossing` likewise."""
    return self._forward.results[0][1]

  @property
  def kept(self) -> list[jax.Array]:
    return self._kept(self._forward.results[1])

  @property
  def crossing(self) -> list[jax.Array]:
    return self._input.results[1]

  def forward(self, weights: Any, constants: Any, x: Any) -> tuple[Any, Any, list[jax.Array]]:
    """(outputs, others, kept)"""
    (outputs, others), values = self._forward(weights, constants, x)
    return outputs, others, self._kept(values)

  def backward(self, weights: Any, constants: Any, kept: list[jax.Array], cotangents: Any) -> Any:
    """(dweights, dx): both parts, one after the other."""
    dx, crossing = self.input(weights, constants, kept, cotangents)
    return self.weight(weights, constants, kept, crossing), dx

  def input(
    self, weights: Any, constants: Any, kept: list[jax.Array], cotangents: Any
  ) -> tuple[Any, list[jax.Array]]:
    """dx, and what the weight part needs beside `kept`."""
    return self._input(self._values(weights, constants, kept), cotangents)

  def weight(
    self, weights: Any, constants: Any, kept: list[jax.Array], crossing: list[jax.Array]
  ) -> Any:
    """dweights"""
    return self._weight(self._values(weights, constants, kept), crossing)

  def both(self, ahead: tuple[Any, Any, Any], behind: tuple[Any, Any, list[jax.Array], Any]) -> Any:
    """What `forward` of the one and `backward` of the other give, run in turns (`turns`)."""
    weights, constants, kept, cotangents = behind
    values = self._values(weights, constants, kept)
    inward, outward = self._input, self._weight
    forward = self._forward.turns(self._forward.equations, ahead)
    backward = inward.turns([*inward.equations, *outward.equations], (values, cotangents))
    turns.run(backward, forward)
    (outputs, others), values = self._forward.read(forward.values)
    dx, _ = inward.read(backward.values)
    return (outputs, others, self._kept(values)), (outward.read(backward.values), dx)

  def _kept(self, values: list[jax.Array]) -> list[jax.Array]:
    return [v for v, is_kept in zip(values, self._is_kept, strict=True) if is_kept]

  def _values(self, weights: Any, constants: Any, kept: list[jax.Array]) -> list[jax.Array]:
    made, kept = iter(self._again(weights, constants)), iter(kept)
    return [next(kept if is_kept else made) for is_kept in self._is_kept]


def split(f: Function, weights: Any, constants: Any, x: Any) -> Split:
  """Traces `f` for arguments like these (arrays or their shapes)."""
  structure = []

  def forward(weights: Any, constants: Any, x: Any) -> Any:
    outputs, pull, others = jax.vjp(
      lambda weights, x: f(weights, constants, x), weights, x, has_aux=True
    )
    leaves, tree = jax.tree.flatten(pull)
    structure.append(tree)
    return (outputs, others), leaves

  ahead = _trace(forward, weights, constants, x)
  (outputs, _), values = ahead.results

  def backward(values: list[jax.Array], cotangents: Any) -> Any:
    return jax.tree.unflatten(structure[-1], values)(cotangents)

  behind = _trace(backward, values, outputs)
  dweights, dx = behind.results
  # ---- what is kept ------------------------------------------------------------------------------
  given = ahead.count(weights, constants)
  of_x = _reached(ahead.equations, ahead.inputs[given:])
  outs = ahead.outputs[-len(values) :]
  is_kept = tuple(not isinstance(v, core.Literal) and v in of_x for v in outs)
  made = [v for v, kept in zip(outs, is_kept, strict=True) if not kept]
  again = ahead.part(ahead.inputs[:given], made, list(made))
  # ---- the cut -----------------------------------------------------------------------------------
  total = len(jax.tree.leaves(dweights))
  to_weights, to_x = behind.outputs[:total], behind.outputs[total:]
  for_x = _needed(behind.equations, to_x)
  rest = [e for e in behind.equations if not any(e is other for other in for_x)]
  for_weights = _needed(rest, to_weights)
  made_before = {v for e in for_x for v in e.outvars} | set(behind.inputs[len(values) :])
  reads = [v for e in for_weights for v in e.invars] + to_weights
  crossing = [v for v in dict.fromkeys(_variables(reads)) if v in made_before]
  inputs = behind.inputs[: len(values)]
  return Split(
    _forward=ahead.part(ahead.inputs, ahead.outputs, ahead.results),
    _again=again,
    _input=behind.part(behind.inputs, to_x + crossing, (dx, [_like(v.aval) for v in crossing])),
    _weight=behind.part(inputs + crossing, to_weights, dweights, for_weights),
    _is_kept=is_kept,
  )


# ---- equations -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Program:
  """Equations from some variables to others; called with any trees of as many arrays as it has inputs."""

  constants: dict[Any, Any]
  equations: list[Any]
  inputs: list[Any]
  outputs: list[Any]
  results: Any  # a tree with a leaf for each output

  def __call__(self, *arguments: Any) -> Any:
    values = self._given(arguments)
    for equation in self.equations:
      outs = _bind(equation, [_read(values, v) for v in equation.invars])
      values |= zip(equation.outvars, outs, strict=True)
    return self.read(values)

  def turns(self, equations: list[Any], arguments: Any) -> turns.Turns:
    """Equations, these or more, to be run on the arguments beside others."""
    return turns.Turns(equations, self._given(arguments), _bind)

  def read(self, values: dict[Any, Any]) -> Any:
    """The results, where all variables have values."""
    outs = [_read(values, v) for v in self.outputs]
    return jax.tree.unflatten(jax.tree.structure(self.results), outs)

  def _given(self, arguments: Any) -> dict[Any, Any]:
    return self.constants | dict(zip(self.inputs, jax.tree.leaves(arguments), strict=True))

  def count(self, *trees: Any) -> int:
    return len(jax.tree.leaves(trees))

  def part(
    self, inputs: list[Any], outputs: list[Any], results: Any, equations: list[Any] | None = None
  ) -> '_Program':
    """What makes `outputs` out of `inputs`."""
    equations = _needed(self.equations if equations is None else equations, outputs)
    return _Program(self.constants, equations, list(inputs), list(outputs), results)


def _trace(f: Callable[..., Any], *arguments: Any) -> _Program:
  """The flat equations of f, whatever stands for other equations opened."""
  trees = []

  def flat(*arguments: Any) -> list[jax.Array]:
    leaves, tree = jax.tree.flatten(f(*arguments))
    trees.append(tree)
    return leaves

  closed = jax.make_jaxpr(flat)(*arguments)
  opened = functools.partial(_run_opened, closed.jaxpr, closed.consts)
  closed = jax.make_jaxpr(opened)(jax.tree.leaves(arguments))
  jaxpr = closed.jaxpr
  constants = dict(zip(jaxpr.constvars, closed.consts, strict=True))
  results = jax.tree.unflatten(trees[-1], [_like(v.aval) for v in jaxpr.outvars])
  return _Program(constants, list(jaxpr.eqns), list(jaxpr.invars), list(jaxpr.outvars), results)


def _read(values: dict[Any, Any], v: Any) -> Any:
  return v.val if isinstance(v, core.Literal) else values[v]


def _like(aval: Any) -> jax.Array:
  """An array of this type; shapes alone would not say over which mesh axes it varies. Never computed."""
  return vary(jnp.zeros(aval.shape, aval.dtype), aval.manual_axis_type.varying)


def _run_opened(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
  values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*constants, *arguments], strict=True))
  read = lambda v: v.val if isinstance(v, core.Literal) else values[v]
  for equation in jaxpr.eqns:
    inner = equation.params.get(_OPENED.get(equation.primitive.name, ''))
    arguments = [read(v) for v in equation.invars]
    if inner is None:
      outs = _bind(equation, arguments)
    else:
      closed = isinstance(inner, core.ClosedJaxpr)
      outs = _run_opened(
        inner.jaxpr if closed else inner, inner.consts if closed else (), arguments
      )
    values |= zip(equation.outvars, outs, strict=True)
  return [read(v) for v in jaxpr.outvars]


def _bind(equation: Any, values: Sequence[Any]) -> Sequence[Any]:
  primitive = equation.primitive
  # What executors keep comes back varying over all axes: it may be so already, and a literal beside it is not.
  if primitive.name == 'pvary':
    return [vary(v, equation.params['axes']) for v in values]
  if not list(core.jaxprs_in_params(equation.params)):
    values = vary_like(list(values), *values)
  outs = primitive.bind(*values, **primitive.get_bind_params(equation.params))
  return outs if primitive.multiple_results else [outs]


def _needed(equations: list[Any], outputs: Iterable[Any]) -> list[Any]:
  """The equations that `outputs` depend on, in order."""
  wanted, found = set(_variables(outputs)), []
  for equation in reversed(equations):
    if any(v in wanted for v in equation.outvars):
      found.append(equation)
      wanted |= set(_variables(equation.invars))
  return found[::-1]


def _reached(equations: list[Any], inputs: Iterable[Any]) -> set[Any]:
  """All variables that depend on `inputs`, these included."""
  reached = set(inputs)
  for equation in equations:
    if any(v in reached for v in _variables(equation.invars)):
      reached |= set(equation.outvars)
  return reached


def _variables(atoms: Iterable[Any]) -> list[Any]:
  return [v for v in atoms if not isinstance(v, core.Literal)]
