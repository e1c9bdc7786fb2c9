"""Which device holds which expert, and of which it holds copies, so that devices have even load; NumPy alone.

The balancer of github.com/deepseek-ai/EPLB, from loads counted beforehand (arXiv 2412.19437, 3.4):

1. Groups of experts go to nodes, equally many to each, so that a token's nodes stay few.
2. Inside a node the expert with the most load per copy gets another copy, until the node's slots are full.
3. Copies go to the node's devices, equally many to each.

Steps 1 and 3 are one greedy rule: in order of falling load, each to the least loaded place that has room;
ties go to what comes first. Where the groups cannot be shared out over the nodes, everything is one group
on one node: any expert may then go anywhere (`hierarchical` says which it was).

Example: loads [4, 2] in three slots on three devices. Expert 0 has 4 and gets the third slot: copies carry
2, 2, 2 and the slots hold experts 0, 1, 0.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Placement:
  """For Y layers: S slots, as many on each device, devices in order, a node's devices together."""

  expert_YS: np.ndarray  # int64: what lies in each slot
  slot_YEC: np.ndarray  # int64: slots of each expert's copies, in order of the copies; then -1
  copies_YE: np.ndarray  # int64
  devices: int
  hierarchical: bool

  def device_load(self, load_YE: np.ndarray) -> np.ndarray:
    """Load of each device, [Y, devices], where an expert's copies share its load evenly."""
    each_YS = np.take_along_axis(load_YE / self.copies_YE, self.expert_YS, axis=1)
    return each_YS.reshape(len(each_YS), self.devices, -1).sum(2)

  def unevenness(self, load_YE: np.ndarray) -> np.ndarray:
    """Load of each layer's fullest device over the mean, [Y]; 1 where nothing is loaded."""
    load_Yd = self.device_load(load_YE)
    mean_Y = load_Yd.mean(1)
    return np.where(mean_Y > 0, load_Yd.max(1) / np.where(mean_Y > 0, mean_Y, 1), 1.0)


def place(load_YE: np.ndarray, *, slots: int, groups: int, nodes: int, devices: int) -> Placement:
  """Places the experts of each layer by their loads (not negative, any unit).

  `groups` are of contiguous experts; `devices` and `slots` count those of all nodes together.

  Raises:
    ValueError: sizes that do not divide, too few slots, or loads that are none.
  """
  load_YE = np.asarray(load_YE, np.float64)
  _check(load_YE, slots, groups, nodes, devices)
  hierarchical = groups % nodes == 0
  if not hierarchical:
    groups = nodes = 1
  Y, E = load_YE.shape
  # 1. Experts in the order of their groups' nodes.
  group_load_YG = load_YE.reshape(Y, groups, -1).sum(2)
  order_YG = _pack(group_load_YG, nodes)
  inside = E // groups
  expert_YE = (order_YG[:, :, None] * inside + np.arange(inside)).reshape(Y, E)
  # 2. Copies, for each node by itself: rows are (layer, node), experts are numbered inside the node.
  load_XE = np.take_along_axis(load_YE, expert_YE, axis=1).reshape(Y * nodes, E // nodes)
  expert_XS, copies_XE = _replicate(load_XE, slots // nodes)
  # 3. Copies in the order of their devices.
  each_XS = np.take_along_axis(load_XE / copies_XE, expert_XS, axis=1)
  order_XS = _pack(each_XS, devices // nodes)
  copy_XS = np.take_along_axis(_occurrence(expert_XS), order_XS, axis=1)
  inner_XS = np.take_along_axis(expert_XS, order_XS, axis=1)
  first_n = np.arange(nodes) * (E // nodes)
  inner_YS = (inner_XS.reshape(Y, nodes, -1) + first_n[:, None]).reshape(Y, slots)
  expert_YS = np.take_along_axis(expert_YE, inner_YS, axis=1)
  copies_YE = np.zeros((Y, E), np.int64)
  np.put_along_axis(copies_YE, expert_YE, copies_XE.reshape(Y, E), axis=1)
  slot_YEC = np.full((Y, E, int(copies_YE.max())), -1)
  slot_YEC[np.arange(Y)[:, None], expert_YS, copy_XS.reshape(Y, slots)] = np.arange(slots)
  return Placement(expert_YS, slot_YEC, copies_YE, devices, hierarchical)


def in_order(layers: int, experts: int, devices: int) -> Placement:
  """One copy of each expert, in order: what training has, and where a balancer starts."""
  if experts % devices:
    raise ValueError(f'{devices} devices: must divide {experts} experts')
  expert_YS = np.tile(np.arange(experts), (layers, 1))
  ones_YE = np.ones((layers, experts), np.int64)
  return Placement(expert_YS, expert_YS[:, :, None], ones_YE, devices, True)


def _pack(load_XN: np.ndarray, packs: int) -> np.ndarray:
  """Numbers of the items in the order of their packs, N / packs in each, [X, N]."""
  X, N = load_XN.shape
  room = N // packs
  if room == 1:
    return np.tile(np.arange(N), (X, 1))
  order_XN = np.empty((X, N), np.int64)
  for x, load_N in enumerate(load_XN):
    total_P, held_P = np.zeros(packs), np.zeros(packs, np.int64)
    for item in np.argsort(-load_N, kind='stable'):
      pack = np.where(held_P < room, total_P, np.inf).argmin()
      order_XN[x, pack * room + held_P[pack]] = item
      total_P[pack] += load_N[item]
      held_P[pack] += 1
  return order_XN


def _replicate(load_XE: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
  """Experts of the slots, first each once, then the copies -> [X, S], and how many of each [X, E]."""
  X, E = load_XE.shape
  row_X = np.arange(X)
  expert_XS = np.tile(np.arange(slots) % E, (X, 1))
  copies_XE = np.ones((X, E), np.int64)
  for slot in range(E, slots):
    most_X = (load_XE / copies_XE).argmax(1)
    expert_XS[:, slot] = most_X
    copies_XE[row_X, most_X] += 1
  return expert_XS, copies_XE


def _occurrence(expert_XS: np.ndarray) -> np.ndarray:
  """How often a slot's expert came before it in its row, [X, S]."""
  X, S = expert_XS.shape
  order_XS = np.argsort(expert_XS, axis=1, kind='stable')
  sorted_XS = np.take_along_axis(expert_XS, order_XS, axis=1)
  starts_XS = np.where(sorted_XS != np.roll(sorted_XS, 1, axis=1), np.arange(S), 0)
  starts_XS = np.maximum.accumulate(starts_XS, axis=1)
  number_XS = np.empty((X, S), np.int64)
  np.put_along_axis(number_XS, order_XS, np.arange(S) - starts_XS, axis=1)
  return number_XS


def _check(load_YE: np.ndarray, slots: int, groups: int, nodes: int, devices: int) -> None:
  if load_YE.ndim != 2 or not load_YE.size:
    raise ValueError(f'loads are {list(load_YE.shape)}: must be [layers, experts]')
  if not (np.isfinite(load_YE).all() and (load_YE >= 0).all()):
    raise ValueError('loads: must be finite and not negative')
  E = load_YE.shape[1]
  sizes = {'slots': slots, 'groups': groups, 'nodes': nodes, 'devices': devices}
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f'{name} = {size}: must be at least 1')
  if slots < E:
    raise ValueError(f'slots = {slots}: must be at least {E}, one for each expert')
  if slots % devices:
    raise ValueError(f'slots = {slots}: must be a multiple of devices = {devices}')
  if devices % nodes:
    raise ValueError(f'devices = {devices}: must be a multiple of nodes = {nodes}')
  if E % groups:
    raise ValueError(f'groups = {groups}: must divide {E} experts')
