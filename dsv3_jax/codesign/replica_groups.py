"""Which devices a collective connects: replica groups of a compiled program, as axes of the mesh."""

import math
import re
from collections.abc import Mapping

import numpy as np

_PAIRS = re.compile(r'source_target_pairs=\{(\{.*?\})\}')
_LISTS = re.compile(r'replica_groups=\{(\{.*?\})?\}')
_IOTA = re.compile(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_MESH = re.compile(r'replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}')


class Places:
  """Coordinates of device ids in the mesh. `partitions`: ids of the program, those of one slice if `sliced`.

  `attributes` are those of a collective's instruction. Raises ValueError when the program is not one for
  that many devices, or on replica groups unknown here.
  """

  def __init__(self, mesh_shape: Mapping[str, int], partitions: int, sliced: bool) -> None:
    self.mesh_shape = dict(mesh_shape)
    self.ids = partitions
    size = math.prod(mesh_shape.values())
    slices = size // self.ids
    if size != self.ids and not (sliced and slices * self.ids == size):
      told = ' x '.join(f'{axis} {n}' for axis, n in mesh_shape.items())
      raise ValueError(f'mesh = {told} = {size} devices: the program is one for {self.ids}')
    self.between_slices = np.arange(slices)[None] * self.ids

  def share(self, kind: str, attributes: str) -> dict[str, float]:
    """Part of all devices that send to another index of each axis, of those that any crosses."""
    if pairs := _PAIRS.search(attributes):
      crosses = self._differ(np.array(_lists(pairs[1]))).sum(axis=1) / self.ids
    elif kind in ('send', 'recv'):
      crosses = self._differ(self.between_slices).any(axis=1)
    else:
      crosses = self._differ(_groups(attributes, self.ids)).any(axis=1)
    return {axis: float(part) for axis, part in zip(self.mesh_shape, crosses, strict=True) if part}

  def members(self, kind: str, attributes: str) -> int:
    """Devices of one group; of a permute 2."""
    if kind in ('collective-permute', 'send', 'recv'):
      return 2
    return _groups(attributes, self.ids).shape[1]

  def _differ(self, groups: np.ndarray) -> np.ndarray:
    """Whether the devices of each group differ along each axis: [G, n] -> [axes, G]."""
    places = np.stack(np.unravel_index(groups, tuple(self.mesh_shape.values())))
    return (places != places[:, :, :1]).any(axis=2)


def _groups(attributes: str, ids: int) -> np.ndarray:
  """Device ids of each replica group: [G, n]."""
  if match := _LISTS.search(attributes):
    return np.array(_lists(match[1])) if match[1] else np.arange(ids)[None]
  if match := _IOTA.search(attributes):
    shape, dims, order = (_numbers(part) for part in match.groups(''))
    devices = np.arange(math.prod(dims)).reshape(dims)
    return devices.transpose(order or range(len(dims))).reshape(shape)
  match = _MESH.search(attributes)
  sizes = re.findall(r"'(\w+)'=(\d+)", match[1]) if match else []
  axes = re.findall(r"'(\w+)'", match[2]) if match else []
  names = [name for name, _ in sizes]
  if not match or ':' in match[2] or not set(axes) <= set(names):
    raise ValueError(f'replica groups in a form unknown here: {attributes[:200]!r}')
  devices = np.arange(ids).reshape([int(n) for _, n in sizes])
  devices = np.moveaxis(devices, [names.index(a) for a in axes], range(-len(axes), 0))
  return devices.reshape(-1, math.prod(int(n) for name, n in sizes if name in axes))


def _lists(text: str) -> list[list[int]]:
  return [_numbers(part) for part in re.findall(r'\{([\d,]*)\}', text)]


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',') if n]
