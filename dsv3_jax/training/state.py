"""The training state: a dict of arrays, and nothing else that a step changes.

step         uint32, updates done
sequences    uint32, rows seen (14.8T tokens overflow 32 bits, 3.6G rows of 4,096 do not)
params       FP32 weights, a nested dict named like the modules
router_bias  selection biases, same names
opt          {'mu', 'nu'}, each like params
ema          average of params, where `optimizer.ema_decay` asks for one
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh
from dsv3_jax.model.layers import RouterBias
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.training import optimizer

State = dict[str, Any]

# Stacks of layers; with ZeRO-3 they are gathered a layer at a time, the rest once a step.
STACKS = ('dense_layers', 'moe_layers', 'mtp')


@dataclasses.dataclass(frozen=True)
class Layout:
  """Static description of a config's state: module structure, shapes, placements."""

  graph: Any  # nnx.GraphDef
  params: Any  # nested dict of ShapeDtypeStruct, global shapes
  router_bias: Any
  placements: Any  # nested dict of Placement, like params

  def module(self, params: Any, router_bias: Any) -> Transformer:
    """The model over these arrays (tracers too): a view, nothing is copied."""
    return nnx.merge(self.graph, *variables(params, router_bias))

  def specs(self, c: config.Config) -> State:
    """PartitionSpec of every leaf of the state."""
    split = jax.tree.map(lambda at: at.spec, self.placements, is_leaf=_is_placement)
    specs = {'step': P(), 'sequences': P(), 'params': split, 'opt': {'mu': split, 'nu': split}}
    specs['router_bias'] = jax.tree.map(lambda _: P(), self.router_bias)
    return specs | ({'ema': split} if c.optimizer.ema_decay else {})


def layout(c: config.Config) -> Layout:
  model = jax.eval_shape(lambda: Transformer(c.model, jax.random.key(0)))
  params, router_bias = split(model)
  return Layout(nnx.graphdef(model), params, router_bias, mesh.place(params, c.mesh))


def split(model: Transformer) -> tuple[Any, Any]:
  """(params, router_bias) of a module, as nested dicts of its arrays."""
  _, params, router_bias = nnx.split(model, nnx.Param, RouterBias)
  return nnx.to_pure_dict(params), nnx.to_pure_dict(router_bias)


def init(c: config.Config, device_mesh: jax.sharding.Mesh) -> State:
  """A fresh state on the mesh; the same bits on every mesh."""
  at = layout(c)

  def make() -> State:
    params, router_bias = split(Transformer(c.model, jax.random.key(c.run.seed)))
    state = {'step': jnp.uint32(0), 'sequences': jnp.uint32(0), 'params': params}
    state |= {'router_bias': router_bias, 'opt': optimizer.init(c.optimizer, params)}
    return state | ({'ema': params} if c.optimizer.ema_decay else {})

  return jax.jit(make, out_shardings=mesh.shardings(device_mesh, at.specs(c)))()


def abstract(c: config.Config, device_mesh: jax.sharding.Mesh) -> State:
  """Shapes, dtypes and shardings of the state, for restoring into."""
  at = layout(c)
  state = {
    'step': jax.ShapeDtypeStruct((), jnp.uint32),
    'sequences': jax.ShapeDtypeStruct((), jnp.uint32),
  }
  state |= {'params': at.params, 'router_bias': at.router_bias}
  state['opt'] = jax.eval_shape(lambda p: optimizer.init(c.optimizer, p), at.params)
  state |= {'ema': at.params} if c.optimizer.ema_decay else {}
  shardings = mesh.shardings(device_mesh, at.specs(c))
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
  )


def variables(params: Any, router_bias: Any) -> tuple[nnx.State, nnx.State]:
  """What `nnx.merge` wants of a module's nested dicts."""
  kinds = ((nnx.Param, params), (RouterBias, router_bias))
  return tuple(nnx.State(jax.tree.map(kind, tree)) for kind, tree in kinds)


def _is_placement(x: Any) -> bool:
  return isinstance(x, mesh.Placement)
