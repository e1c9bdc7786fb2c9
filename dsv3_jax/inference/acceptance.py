"""How probable it is that a draft from q is what the model, p, chooses: by two rules without loss.

Both keep p's distribution. The rejection rule (arXiv 2211.17192) takes x from q with probability
min(1, p(x) / q(x)): sum of min(p, q), the most that any rule can have. Shared Gumbel noise, as `sampling`
draws it, keeps more: the token itself is the one of plain decoding with that seed, draft or not.
"""

import numpy as np


def rejection(p_V: np.ndarray, q_V: np.ndarray) -> float:
  return float(np.minimum(p_V, q_V).sum())


def shared_noise(p_V: np.ndarray, q_V: np.ndarray) -> float:
  """Both choose x with probability 1 / sum_y max(p_y / p_x, q_y / q_x): the race that x wins in both.

  Sorted by p / q, the maximum is p's share for all y from x on and q's for those before: O(V log V).
  """
  both = (p_V > 0) & (q_V > 0)
  order = np.argsort(p_V[both] / q_V[both])
  p_V, q_V, p, q = p_V[both][order], q_V[both][order], p_V[~both].sum(), q_V[~both].sum()
  # Tokens that only one of them can choose: p's belong to all those behind, q's to all before.
  behind_V = np.cumsum(p_V[::-1])[::-1] + p
  before_V = np.cumsum(q_V) - q_V + q
  return float((1 / (behind_V / p_V + before_V / q_V)).sum())
