"""Device mesh and the one table that says where every tensor lies.

| axis    | splits                                              | carries                            |
|---------|-----------------------------------------------------|------------------------------------|
| `pipe`  | layers; with ZeRO, state                            | ppermute of activations            |
| `data`  | tokens; with ZeRO, state                            | all_gather, reduce-scatter         |
| `node`  | tokens and experts: slow links of an expert group   | hop 1 of dispatch and combine      |
| `local` | tokens and experts: fast links inside a node        | hop 2                              |

Tokens are split over (`data`, `node`, `local`), routed experts over (`node`, `local`). Everything else
is replicated there, or (ZeRO) stored split over the devices that would hold copies of it: the weights
of routed experts over `data`, all others over those of (`data`, `node`, `local`) that leave a device the least to
store, padding to tiles counted; and both over `pipe` besides: the state knows nothing of stages.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config

AXES = ('pipe', 'data', 'node', 'local')
TOKENS = ('data', 'node', 'local')
EXPERTS = ('node', 'local')

# Stored and computed split over EXPERTS along their `E`. Router and bias know all experts everywhere.
_EXPERT_WEIGHTS = ('gate_EDF', 'up_EDF', 'down_EFD')


def make_mesh(sizes: config.Mesh, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
  """Mesh over the first devices; raises ConfigError when there are not enough.

  Axis types are Auto: the step is one manual shard_map and types of its own outside would add nothing.
  """
  devices = jax.devices() if devices is None else devices
  shape = tuple(getattr(sizes, axis) for axis in AXES)
  need = int(np.prod(shape))
  if need > len(devices):
    told = ' x '.join(f'{axis} {size}' for axis, size in zip(AXES, shape, strict=True))
    raise config.ConfigError(
      f'mesh = {told} = {need} devices: only {len(devices)} {devices[0].platform} devices are here; '
      f'make it smaller, or emulate more on CPU with JAX_NUM_CPU_DEVICES={need}'
    )
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 4, devices=devices[:need])


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where one weight lies: `expert_dim` is split over EXPERTS, `zero_dim` over `zero_axes`."""

  ndim: int
  expert_dim: int | None
  zero_dim: int | None
  zero_axes: tuple[str, ...]

  @property
  def spec(self) -> P:
    """As stored."""
    dims: list[Any] = [None] * self.ndim
    if self.expert_dim is not None:
      dims[self.expert_dim] = EXPERTS
    if self.zero_dim is not None:
      dims[self.zero_dim] = self.zero_axes
    return P(*dims)

  @property
  def copies(self) -> tuple[str, ...]:
    """Token axes over which the weight, once gathered, is replicated: its gradient is summed over them."""
    return ('data',) if self.expert_dim is not None else TOKENS


def place(params: Any, sizes: config.Mesh) -> Any:
  """Placement of every weight in a tree of arrays (or ShapeDtypeStructs) of global shapes.

  A name's suffix gives the letters of its dimensions; dimensions before those stack layers and are
  never split, because scans walk them. Vectors (norms) stay replicated: they weigh nothing.
  """
  return jax.tree_util.tree_map_with_path(
    lambda path, x: _place(path_names(path)[-1], x.shape, sizes), params
  )


def _place(name: str, shape: tuple[int, ...], sizes: config.Mesh) -> Placement:
  letters = name.rpartition('_')[2]
  stacked = len(shape) - len(letters)
  expert_dim = stacked + letters.index('E') if name in _EXPERT_WEIGHTS else None
  whole = Placement(len(shape), expert_dim, None, ())
  if not sizes.zero or len(letters) < 2:
    return whole
  groups = (
    [('data',)]
    if expert_dim is not None
    else [TOKENS, ('data', 'node'), ('data', 'local'), ('data',)]
  )
  if sizes.pipe > 1:
    groups = [('pipe', *axes) for axes in groups] + [('pipe',)] + groups
  found = []
  for axes in groups:
    ways = int(np.prod([getattr(sizes, a) for a in axes]))
    for d in range(stacked, len(shape) if ways > 1 else 0):
      if d != expert_dim and shape[d] % ways == 0:
        part = (*shape[:d], shape[d] // ways, *shape[d + 1 :])
        at = dataclasses.replace(whole, zero_dim=d, zero_axes=axes)
        found.append(((_padded(part[stacked:]), -ways, -shape[d]), at))
  return min(found, key=lambda each: each[0])[1] if found else whole


def _padded(shape: tuple[int, ...]) -> int:
  """Elements that a part takes on a TPU, in tiles of 8 x 128: a column alone 128 times its own. Small ones weigh nothing."""
  *outer, rows, columns = shape
  return max(int(np.prod(outer)) * (-(-rows // 8) * 8) * (-(-columns // 128) * 128), 2**16)


def path_names(path: tuple[Any, ...]) -> tuple[str, ...]:
  """Attributes and keys along a tree path: ('moe_layers', 'ffn', 'gate_EDF').

  The same for a module and for its pure dict; an NNX variable adds a key of its own, dropped here.
  """
  names = [str(getattr(k, 'key', getattr(k, 'name', k))) for k in path]
  return tuple(n for n in names if n != 'value')


def rows_here(device_mesh: jax.sharding.Mesh, rows: int) -> list[int]:
  """Which of so many rows, split over TOKENS, lie on devices of this process: those it must read.

  Neither one block nor this process's alone in general: a pod's mesh follows its torus, and processes that
  differ along `pipe` alone hold the same rows.
  """
  at = NamedSharding(device_mesh, P(TOKENS)).addressable_devices_indices_map((rows,))
  return sorted({row for (index,) in at.values() for row in range(rows)[index]})


def shardings(mesh: jax.sharding.Mesh, specs: Any) -> Any:
  """NamedShardings for a tree of PartitionSpecs."""
  return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))
