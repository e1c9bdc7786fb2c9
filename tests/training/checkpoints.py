"""States to save and to find again, with one position of the data for each step."""

import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config
from dsv3_jax.training import checkpoint

KEEP_ALL = config.Checkpoint(keep_last=100)


def make_mesh(*sizes: int) -> Mesh:
  return jax.make_mesh(sizes, ('data', 'node', 'local'), axis_types=(AxisType.Auto,) * 3)


SPECS = {
  'step': P(),
  'sequences': P(),
  'params/embed': P(('data', 'local')),
  'params/experts': P(('node', 'local'), 'data'),
  'params/norm': P(),
  'router_bias/layer': P(None, ('node', 'local')),
  'opt/mu/embed': P('data', 'local'),
  'ema/embed': P(None, 'node'),
}


def nested(flat: dict[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {'opt': {'empty': {}}}
  for name, leaf in flat.items():
    *folders, last = name.split('/')
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[last] = leaf
  return tree


def values(seed: int) -> dict[str, np.ndarray]:
  """Arrays of random bits: NaNs with payloads, subnormals and negative zeros among them.

  With XLA:CPU's older emitters, which tests use on jax 0.10, NaNs in BF16 have no payload: there it is lost
  where Orbax copies a restored array.
  """
  rng = np.random.default_rng(seed)

  def bits(dtype: Any, *shape: int) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    x = rng.integers(0, 256, size, np.uint8).view(dtype).reshape(shape)
    if x.dtype == jnp.bfloat16 and 'use_fusion_emitters=false' in os.environ['XLA_FLAGS']:
      as_bits = x.view(np.uint16)
      is_nan = as_bits & 0x7FFF > 0x7F80
      as_bits[is_nan] = as_bits[is_nan] & 0x8000 | 0x7FC0
    return x

  return {
    'step': np.asarray(seed, np.int32),
    'sequences': np.asarray(seed * 8, np.uint32),
    'params/embed': bits(jnp.bfloat16, 256, 96),
    'params/experts': bits(np.float32, 8, 16, 24),
    'params/norm': np.zeros(48, np.float32),
    'router_bias/layer': bits(np.float32, 2, 8),
    'opt/mu/embed': bits(jnp.bfloat16, 256, 96),
    'ema/embed': bits(np.uint32, 256, 96),
  }


def make_state(seed: int, mesh: Mesh) -> dict[str, Any]:
  return nested(
    {k: jax.device_put(v, NamedSharding(mesh, SPECS[k])) for k, v in values(seed).items()}
  )


def abstract(mesh: Mesh) -> dict[str, Any]:
  return nested(
    {
      k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, SPECS[k]))
      for k, v in values(0).items()
    }
  )


def bits_of(tree: Any) -> list[bytes]:
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def assert_is(restored: checkpoint.Restored | None, step: int) -> None:
  """`make_state(step)` is what each test here saves as `step`, with this data position."""
  assert restored is not None
  assert restored.step == step
  assert restored.data_state == {'position': step, 'epoch': 0}
  assert bits_of(restored.state) == bits_of(nested(values(step)))
  assert jax.tree.structure(restored.state) == jax.tree.structure(nested(values(step)))


def fill(directory: pathlib.Path, *steps: int, mesh: Mesh | None = None) -> None:
  with checkpoint.Checkpointer(directory, KEEP_ALL) as ckpt:
    for step in steps:
      ckpt.save(step, make_state(step, mesh or make_mesh(2, 2, 2)), {'position': step, 'epoch': 0})
