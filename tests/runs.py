"""Twenty steps of one small model on any mesh, from the same state, on the same data; made once each.

The batch ramps within them: where a step's count is 1, its second micro-batch holds other token ids on
every mesh, so that reading them would show.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity

from dsv3_jax import config, mesh
from dsv3_jax.training import state as training_state
from dsv3_jax.training.step import Step, make_step

STEPS = 20
ONE_ROUND = 8.0
_SIZES = {
  'model.vocab_size': 256,
  # One round, whatever the routing: programs with further ones take twice as long to compile.
  'model.moe.dispatch.capacity': ONE_ROUND,
  'batch.size': 16,
  'batch.start_size': 8,
  'batch.micro_size': 8,
  'optimizer.peak_lr': 1e-3,
  'optimizer.clip_norm': 0.5,  # so that it clips
  'optimizer.warmup_steps': 0,
  'optimizer.constant_tokens': 1e9,
  'objective.bias_stop_tokens': 1e9,
}
COUNTS = [2, 1, 1, 1] + [2] * (STEPS - 4)  # micro-batches of each step
ONE_DEVICE = (1, 1, 1, 0)


def configure(
  data: int = 1, node: int = 1, local: int = 1, zero: int = 0, changes: dict[str, Any] | None = None
) -> config.Config:
  """The config of the runs on a mesh, with some keys changed."""
  on = {'mesh.data': data, 'mesh.node': node, 'mesh.local': local, 'mesh.zero': zero}
  return parity.small(_SIZES | on | (changes or {}))


def rows(step: int, garbage: int = 0) -> np.ndarray:
  """int32 [2, 8, 33]; what a count of 1 leaves unread is the token `garbage`."""
  tokens_ABX = np.random.default_rng(step).integers(0, 256, (2, 8, 33), np.int32)
  tokens_ABX[COUNTS[step] :] = garbage
  return tokens_ABX


def place(c: config.Config, state: training_state.State) -> training_state.State:
  """A NumPy state on the config's mesh."""
  specs = parity.layout(c).specs(c)
  return jax.device_put(state, mesh.shardings(mesh.make_mesh(c.mesh), specs))


def to_numpy(tree: Any) -> Any:
  """A copy on the host: the step donates its state."""
  return jax.tree.map(lambda x: np.array(x), tree)


_compilations: list[float] = []


def _listen(event: str, duration: float, **_: Any) -> None:
  if event == '/jax/core/compile/backend_compile_duration':
    _compilations.append(duration)


jax.monitoring.register_event_duration_secs_listener(_listen)


@dataclasses.dataclass(frozen=True)
class Run:
  config: config.Config
  step: Step
  metrics: list[dict[str, np.ndarray]]
  states: list[training_state.State]  # after the first steps, on the host
  last: training_state.State  # after all steps, on the devices
  compilations: list[int]  # in each step

  @property
  def gradients(self) -> Any:
    """Those of the first step, clipped."""
    keep = self.config.optimizer.beta1
    return jax.tree.map(lambda mu: mu / np.float32(1 - keep), self.states[0]['opt']['mu'])


@functools.cache
def run(
  data: int = 1,
  node: int = 1,
  local: int = 1,
  zero: int = 0,
  permutes: int = 0,
  capacity: float = ONE_ROUND,
) -> Run:
  changes = {'mesh.zero_permutes': permutes, 'model.moe.dispatch.capacity': capacity}
  c = configure(data, node, local, zero, changes)
  step = make_step(c, mesh.make_mesh(c.mesh))
  state, metrics, states, compilations = place(c, parity.random_state(c)), [], [], []
  for i in range(STEPS):
    before = len(_compilations)
    state, values = step(state, jnp.asarray(rows(i, data * node)), jnp.int32(COUNTS[i]))
    compilations.append(len(_compilations) - before)
    metrics.append(to_numpy(values))
    if i < 2:
      states.append(to_numpy(state))
  return Run(c, step, metrics, states, state, compilations)


@functools.cache
def hlo(*shape: int) -> str:
  """The optimised step of a run, as text."""
  c = configure(*shape)
  state = training_state.abstract(c, mesh.make_mesh(c.mesh))
  rows_ABX = jax.ShapeDtypeStruct((2, 8, 33), jnp.int32)
  return run(*shape).step.lower(state, rows_ABX, jnp.int32(2)).compile().as_text()
