"""The real programs over shapes alone: lowered for a mesh of devices that need not be here, and read.

`train`, `prefill` and `decode` are the programs that `train.py` and the engine run, lowered on
ShapeDtypeStructs. `read` walks what was traced: products and collectives as they are written, times the
loops around them. That is the count that compiled programs are held against (`codesign/traffic.py`).
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh
from dsv3_jax.codesign.traffic import ORIGINS, Moved, word
from dsv3_jax.inference import decode as decoding
from dsv3_jax.inference.engine import CHUNK
from dsv3_jax.inference.step import How
from dsv3_jax.training import state
from dsv3_jax.training.step import make_step


@dataclasses.dataclass(frozen=True)
class Program:
  """A traced program on a mesh. `memory`: bytes per device of its arguments, by what they are."""

  name: str
  traced: jax.stages.Traced
  memory: dict[str, int]
  outermost: int  # runs of its outermost loop: micro-batches
  tokens: int  # of one run, over all devices


@dataclasses.dataclass(frozen=True)
class Written:
  """What a program says that one device does.

  Not in `flops`: products of experts, which rows decide, of paged attention, which contexts decide, and
  of kernels, FP8's on chips, of which only the call is written here.
  """

  flops: float
  moved: list[Moved]


def train(c: config.Config, device_mesh: jax.sharding.Mesh) -> Program:
  """One optimizer step at the full batch; ConfigError where it is more than one program."""
  if c.mesh.pipe > 1 and c.pipeline.executor != 'uniform':
    raise config.ConfigError(
      f"pipeline.executor = {c.pipeline.executor!r}: must be 'uniform' here, where a step is one program"
    )
  on = lambda *spec: NamedSharding(device_mesh, P(*spec))
  count = c.batch.size // c.batch.micro_size
  rows = (count, c.batch.micro_size, c.batch.seq_len + 1)
  tokens_ABX = jax.ShapeDtypeStruct(rows, jnp.int32, sharding=on(None, mesh.TOKENS, None))
  s = state.abstract(c, device_mesh)
  traced = make_step(c, device_mesh).trace(
    s, tokens_ABX, jax.ShapeDtypeStruct((), jnp.int32, sharding=on())
  )
  memory = {
    'weights': _bytes(s['params']) + _bytes(s['router_bias']),
    'optimizer': _bytes(s['opt']),
    'average': _bytes(s.get('ema', {})),
    'tokens': _bytes(tokens_ABX),
  }
  return Program('train', traced, memory, count, c.batch.size * c.batch.seq_len)


def prefill(c: config.Config, device_mesh: jax.sharding.Mesh, rows: int) -> Program:
  """A chunk of each of `rows` prompts a device, behind up to `batch.seq_len` tokens of them."""
  return _generation(c, device_mesh, rows, 'prefill', min(CHUNK, c.batch.seq_len))


def decode(c: config.Config, device_mesh: jax.sharding.Mesh, rows: int) -> Program:
  """One token of each of `rows` sequences a device, behind up to `batch.seq_len` others.

  The step itself; an engine runs it in a loop, whose rounds only a run decides (`inference.step.several`).
  """
  return _generation(c, device_mesh, rows, 'decode', 1)


def _generation(
  c: config.Config, device_mesh: jax.sharding.Mesh, rows: int, name: str, length: int
) -> Program:
  sequences = rows * device_mesh.size
  how = How(name == 'prefill', 0, c.model.vocab_size, dual_batch=c.model.dual_batch)
  traced, weights, cache = decoding.trace(
    c.model, device_mesh, how, sequences, length, c.batch.seq_len
  )
  memory = {'weights': _bytes(weights), 'cache': _bytes(cache)}
  return Program(name, traced, memory, 0, sequences * length)


def _bytes(tree: Any) -> int:
  """Of one device; in tiles of 8 x 128 where a layout is given, which TPUs' caches have."""
  return sum(math.prod(_stored(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _stored(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
  shape = x.sharding.shard_shape(x.shape)
  if x.format.layout is None:
    return shape
  *outer, rows, columns = shape
  return *outer, -(-rows // 8) * 8, -(-columns // 128) * 128


# ---- what is written -----------------------------------------------------------------------------


def read(program: Program, sizes: dict[str, int]) -> Written:
  """Products and collectives of one device in one run of the program."""
  flops, moved = 0.0, []
  for equation, times in _equations(program.traced.jaxpr.jaxpr, 1, program.outermost):
    name = equation.primitive.name
    if name == 'dot_general':
      flops += times * _dot_flops(equation)
    elif name in ORIGINS:
      moved.append(_moved(equation, name, times, sizes))
  return Written(flops, moved)


def _equations(jaxpr: Any, times: int, outermost: int) -> Iterator[tuple[Any, int]]:
  """All equations with how often they run. Of loops of unknown length only the outermost runs."""
  for equation in jaxpr.eqns:
    name = equation.primitive.name
    inside = times
    rest = outermost
    if name == 'scan':
      inside, rest = times * equation.params['length'], 0
    elif name == 'while':
      inside, rest = times * outermost, 0
    bodies = list(_bodies(equation))
    if not bodies or not inside or name == 'pallas_call':
      yield equation, times
    elif name == 'cond':
      # Branches that stand for one another move the same; the first is counted.
      yield from _equations(bodies[0], inside, rest)
    else:
      for body in bodies:
        yield from _equations(body, inside, rest)


def _bodies(equation: Any) -> Iterator[Any]:
  for value in equation.params.values():
    for each in value if isinstance(value, tuple | list) else (value,):
      inner = getattr(each, 'jaxpr', each)
      if hasattr(inner, 'eqns'):
        yield inner


def _dot_flops(equation: Any) -> float:
  (contract, _), _ = equation.params['dimension_numbers']
  shape = equation.invars[0].aval.shape
  return 2.0 * equation.outvars[0].aval.size * math.prod(shape[d] for d in contract)


def _moved(equation: Any, name: str, times: int, sizes: dict[str, int]) -> Moved:
  axes = equation.params.get('axis_name', equation.params.get('axes'))
  axes = axes if isinstance(axes, tuple) else (axes,)
  axes = tuple(a for a in sizes if a in axes and sizes[a] > 1)
  kind = word(name, str(equation.source_info.name_stack))
  members = math.prod(sizes[a] for a in axes)
  ends = equation.outvars if kind == 'gather' else equation.invars
  size = sum(x.aval.size * x.aval.dtype.itemsize for x in ends)
  if name == 'ppermute':
    perm = np.array(equation.params['perm'])
    size *= float((perm[:, 0] != perm[:, 1]).mean()) if len(perm) else 0.0
  return Moved(kind, axes, members, float(size * times), name)
