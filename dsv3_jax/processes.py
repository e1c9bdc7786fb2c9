"""Several processes that are one program: how they meet, stop together, and end when one of them is lost.

The launcher says who is who in the environment, the same three variables on every kind of machine
(`launch/`); without them a program is by itself:

  JAX_COORDINATOR_ADDRESS   HOST:PORT of process 0
  JAX_NUM_PROCESSES         how many
  JAX_PROCESS_ID            which one this is

JAX would guess them under Slurm, Kubernetes or Cloud TPU; said explicitly, a run is the same everywhere.
A process that dies takes the others along, within `_LOST_S` or as soon as a collective misses it: none of
them could go on. Starting all again continues from the last checkpoint.
"""

import atexit
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import multihost

from dsv3_jax.config import ConfigError

ADDRESS, COUNT, ID = 'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'
_LOST_S = 30  # without a heartbeat; JAX waits 100
_APART_S = 3600  # processes may come to the same place so far apart


def join() -> None:
  """Meets the others, before JAX is first used; nothing where there are none. Raises ConfigError."""
  given = {name: os.environ.get(name, '') for name in (ADDRESS, COUNT, ID)}
  if not given[COUNT]:
    return
  for name in (COUNT, ID):
    if not given[name].isdecimal():
      raise ConfigError(f'{name} = {given[name]!r}: must be a whole number, beside {COUNT}')
  count, number = int(given[COUNT]), int(given[ID])
  if not number < count:
    raise ConfigError(f'{ID} = {number}: must be below {COUNT} = {count}')
  if count == 1:
    return
  if ':' not in given[ADDRESS]:
    raise ConfigError(f'{ADDRESS} = {given[ADDRESS]!r}: must be HOST:PORT of process 0')
  jax.config.update('jax_enable_preemption_service', False)  # it would take SIGTERM; see `Stop`
  jax.distributed.initialize(
    given[ADDRESS],
    count,
    number,
    cluster_detection_method='deactivate',
    heartbeat_timeout_seconds=_LOST_S,
    shutdown_timeout_seconds=_LOST_S,
  )
  # After an error in one process alone, the time-out ends it and then the others.
  atexit.register(jax.distributed.shutdown)


def wait_for_all(name: str) -> None:
  """Returns once all processes are here. Devices send nothing, so it may take long. A name serves once."""
  multihost.get_barrier_sync_fn()(key=name, timeout_ms=1000 * _APART_S)


def compile_together(name: str, program: Callable[..., Any]) -> Callable[..., Any]:
  """`program`, for arguments of one shape; jitted, it runs in no process before it is compiled in all.

  One that compiles for longer would be missed: the first collective on CPUs waits half a minute for others.
  """
  if jax.process_count() == 1 or not isinstance(program, jax.stages.Wrapped):
    return program
  compiled = None

  def run(*arguments: Any) -> Any:
    nonlocal compiled
    if compiled is None:
      compiled = program.lower(*arguments).compile()
      wait_for_all(name)
    return compiled(*arguments)

  return run


class Stop:
  """SIGTERM or SIGINT to any process stops all of them behind the same step. A context manager.

  A second SIGINT interrupts as usual.
  """

  def __init__(self, device_mesh: jax.sharding.Mesh) -> None:
    self._caught = False
    self._before: dict[int, object] = {}
    self._each = NamedSharding(device_mesh, P(device_mesh.axis_names))
    self._size = device_mesh.size
    everywhere = NamedSharding(device_mesh, P())
    self._any = jax.jit(lambda asked: asked.max(), out_shardings=everywhere)
    self._asked: jax.Array | None = None

  def __enter__(self) -> 'Stop':
    for number in (signal.SIGTERM, signal.SIGINT):
      self._before[number] = signal.signal(number, self._note)
    return self

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: FrameType | None) -> None:
    del number, frame
    self._caught = True
    signal.signal(signal.SIGINT, signal.default_int_handler)

  def agreed(self) -> bool:
    """Whether to stop: the same answer in every process. To be asked once a step, by all.

    Of several processes the answer is that of the last time it was asked: it has travelled meanwhile, and
    nobody waits for it.
    """
    if jax.process_count() == 1:
      return self._caught
    before = self._asked
    asked = np.full((1,), self._caught, np.int32)
    one = lambda index: asked
    self._asked = self._any(jax.make_array_from_callback((self._size,), self._each, one))
    return before is not None and bool(before)
