"""How fast a run is, against what the same machine does at the same time.

Model FLOPs are those of `counts.training_flops_per_token` with MTP: the work the model needs, not what
happened to be executed. On CPU the yardstick is a plain float32 `jnp.dot` of 2,048 cubed, timed now
and then between steps: machines are noisy and shared, so only the ratio within one run means anything.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from dsv3_jax import config, counts

_SIDE = 2048


class Throughput:
  def __init__(self, c: config.Config) -> None:
    self.flops_per_token = counts.training_flops_per_token(c.model, c.batch.seq_len, mtp=True)
    self._step_rates: list[float] = []
    self._dot_rates: list[float] = []
    self._x = jnp.ones((_SIDE, _SIDE), jnp.float32)
    self._dot = jax.jit(jnp.dot)
    self._dot(self._x, self._x).block_until_ready()

  def step(self, tokens: int, seconds: float) -> float:
    """Notes one step; returns its model FLOP/s."""
    self._step_rates.append(tokens * self.flops_per_token / seconds)
    return self._step_rates[-1]

  def time_dot(self) -> None:
    """Times the yardstick twice and keeps the faster. The device must be idle."""
    times = []
    for _ in range(2):
      start = time.perf_counter()
      self._dot(self._x, self._x).block_until_ready()
      times.append(time.perf_counter() - start)
    self._dot_rates.append(2 * _SIDE**3 / min(times))

  def summary(self) -> str:
    """'... GFLOP/s, 0.66 of a plain float32 dot'; the medians over the run."""
    rate = statistics.median(self._step_rates)
    told = f'model FLOP/s {rate / 1e9:,.1f}G ({self.flops_per_token / 1e6:.1f} MFLOP per token)'
    if not self._dot_rates:
      return told
    dot = statistics.median(self._dot_rates)
    return f'{told} = {rate / dot:.2f} of a plain {_SIDE}^3 float32 dot here, {dot / 1e9:,.1f}G'
