"""Made-up routing, from even to as uneven as it gets, and what an exchange has to do for it; NumPy alone.

| skew       | a token's experts                                                               |
|------------|---------------------------------------------------------------------------------|
| `uniform`  | any                                                                             |
| `zipf`     | by popularity: expert of rank r counts 1/r; ranks lie anywhere among the experts |
| `sequence` | the same, but each device reads another domain, with ranks of its own            |
| `one_hot`  | those of all other tokens: 0 .. K - 1                                            |

All obey the router's limit: first a token draws `top_groups` groups, by the popularity of what is in
them, then `top_k` different experts inside those. With one group and one expert a token, shares are the
popularities themselves; with more, popular experts cannot be chosen twice and the rest get more.
"""

import numpy as np

from dsv3_jax import config

NAMES = ('uniform', 'zipf', 'one_hot', 'sequence')


def make(name: str, c: config.Moe, devices: int, tokens: int, seed: int = 0) -> np.ndarray:
  """Experts that each device's tokens choose, int32 [devices, tokens, K]; ValueError for no skew."""
  rng, E = np.random.default_rng(seed), c.num_experts
  if name == 'one_hot':
    return np.broadcast_to(np.arange(c.top_k, dtype=np.int32), (devices, tokens, c.top_k)).copy()
  if name == 'uniform':
    popularity_nE = np.ones((devices, E))
  elif name == 'zipf':
    popularity_nE = np.broadcast_to(1 / (1.0 + rng.permutation(E)), (devices, E))
  elif name == 'sequence':
    popularity_nE = np.stack([1 / (1.0 + rng.permutation(E)) for _ in range(devices)])
  else:
    raise ValueError(f'skew {name!r}: must be one of {", ".join(NAMES)}')
  return np.stack([_draw(rng, c, popularity_E, tokens) for popularity_E in popularity_nE])


def _draw(
  rng: np.random.Generator, c: config.Moe, popularity_E: np.ndarray, tokens: int
) -> np.ndarray:
  """Groups, then experts, without replacement -> [T, K], the first drawn first."""
  # The largest of log p + Gumbel noise is a draw by p, the next ones draws from what is left.
  popularity_GE = popularity_E.reshape(c.num_groups, -1)
  group_TG = np.log(popularity_GE.sum(1)) + rng.gumbel(size=(tokens, c.num_groups))
  kept_TM = np.argsort(-group_TG, axis=1)[:, : c.top_groups]
  score_TE = np.log(popularity_E) + rng.gumbel(size=(tokens, c.num_experts))
  kept_TG = np.zeros((tokens, c.num_groups), bool)
  np.put_along_axis(kept_TG, kept_TM, True, axis=1)
  score_TE[~np.repeat(kept_TG, popularity_GE.shape[1], axis=1)] = -np.inf
  return np.argsort(-score_TE, axis=1)[:, : c.top_k].astype(np.int32)


# ---- what it asks of an exchange -----------------------------------------------------------------


def describe(ids_nTK: np.ndarray, num_experts: int, node: int, local: int) -> dict[str, float]:
  """Largest load over the mean one, of experts, devices and nodes; nodes and devices per token."""
  count_E = np.bincount(ids_nTK.ravel(), minlength=num_experts)
  uneven = lambda parts: float(count_E.reshape(parts, -1).sum(1).max() * parts / count_E.sum())
  need_nTNL = needed(ids_nTK, num_experts, node, local)
  return {
    'expert_load': uneven(num_experts),
    'device_load': uneven(node * local),
    'node_load': uneven(node),
    'nodes_per_token': float(need_nTNL.any(3).sum(2).mean()),
    'devices_per_token': float(need_nTNL.sum((2, 3)).mean()),
  }


def useful_rows(
  form: str, ids_nTK: np.ndarray, num_experts: int, node: int, local: int
) -> dict[str, float]:
  """Rows that a device sends out along each axis, mean over devices, were there no padding.

  two_hop: once to each other node, there once to each device but the forwarder. Other forms: once to
  each other device.
  """
  need_nTNL = needed(ids_nTK, num_experts, node, local)
  pairs = need_nTNL.sum(1).reshape(
    node, local, node, local
  )  # [its node, its local, to node, local]
  n, l = np.arange(node), np.arange(local)
  if form == 'two_hop':
    crossed = need_nTNL.any(3).sum(1).reshape(node, local, node)
    across = crossed.sum() - crossed[n, :, n].sum()
    within = pairs.sum() - pairs[:, l, :, l].sum()
  else:
    across = pairs.sum() - pairs[n, :, n].sum()
    within = pairs[n, :, n].sum() - pairs[n[:, None], l, n[:, None], l].sum()
  return {'node': float(across) / len(ids_nTK), 'local': float(within) / len(ids_nTK)}


def needed(ids_nTK: np.ndarray, num_experts: int, node: int, local: int) -> np.ndarray:
  """Whether a token has experts on each device, bool [devices, tokens, node, local]."""
  device_nTK = ids_nTK // (num_experts // (node * local))
  need_nTn = np.zeros((*ids_nTK.shape[:2], node * local), bool)
  np.put_along_axis(need_nTn, device_nTK, True, axis=2)
  return need_nTn.reshape(*ids_nTK.shape[:2], node, local)
