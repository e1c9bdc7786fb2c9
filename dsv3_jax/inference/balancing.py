"""Live placement of experts (3.4): where they lie follows what the engine's own tokens choose.

Each step tells its loads; their moving average, over about `SPAN` steps, is what the balancer of
`parallel.placement` is given every so many steps. Weights move only where that makes the fullest device
lighter by `LEAST` of the mean load, taken over layers: moving them stands between two steps.
"""

import numpy as np

from dsv3_jax.inference.decode import Decoder
from dsv3_jax.parallel import placement

SPAN = 100
LEAST = 0.05


class Balancer:
  """Looks every `every` steps. Other engines on the same decoder follow."""

  def __init__(self, decoder: Decoder, every: int) -> None:
    self._decoder, self._every = decoder, every
    self._steps = 0
    self.load_YE = np.zeros(decoder.placement.copies_YE.shape)
    self.moved = 0  # times

  def saw(self, load_YE: np.ndarray, steps: int = 1) -> None:
    """Sums of steps that have ended; places experts anew where it is time and worth it."""
    if not steps:
      return
    self.load_YE += (load_YE / steps - self.load_YE) * (1 - (1 - 1 / SPAN) ** steps)
    before, self._steps = self._steps, self._steps + steps
    if before // self._every == self._steps // self._every or not self.load_YE.any():
      return
    d, now = self._decoder, self._decoder.placement
    sizes = {'slots': now.expert_YS.shape[1], 'groups': d.config.moe.num_groups}
    better = placement.place(self.load_YE, nodes=d.nodes, devices=now.devices, **sizes)
    gain = now.unevenness(self.load_YE).mean() - better.unevenness(self.load_YE).mean()
    if gain > LEAST:
      d.place(self.load_YE)
      self.moved += 1
