"""A pipe of small stages, x + tanh(x w) v each, run by either executor: in this process, or in several.

`python chain.py ME OF PORT FOLDER` is one of them: it leaves FOLDER/ME.npz, what both executors gave there.
Small so that eight ranks, each with programs of its own, compile in seconds.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh, processes
from dsv3_jax.mesh import AXES
from dsv3_jax.parallel.pipeline import executor, mpmd, schedules

EXECUTORS = ('uniform', 'uniform_at_once', 'mpmd')
B, D, H = 3, 16, 24  # rows of a micro-batch; H is no other array's size


@dataclasses.dataclass(frozen=True)
class Sizes:
  stages: int
  micro_batches: int


def data(z: Sizes) -> dict[str, np.ndarray]:
  """Weights [S, ..], the loss's [D], inputs [A, B, D]; float32."""
  rng = np.random.default_rng(0)
  normal = lambda std, *shape: rng.normal(0, std, shape).astype(np.float32)
  w_SDH, v_SHD = normal(D**-0.5, z.stages, D, H), normal(H**-0.5, z.stages, H, D)
  return {'w': w_SDH, 'v': v_SHD, 'head': normal(1, D), 'x': normal(1, z.micro_batches, B, D)}


def expected(z: Sizes) -> dict[str, np.ndarray]:
  """Loss and gradients in float64, by hand."""
  d = {name: x.astype(np.float64) for name, x in data(z).items()}
  grads = {name: np.zeros_like(d[name]) for name in ('w', 'v', 'head')}
  loss = 0.0
  for x_BD in d['x']:
    seen = []
    for w_DH, v_HD in zip(d['w'], d['v'], strict=True):
      h_BH = np.tanh(x_BD @ w_DH)
      seen.append((x_BD, h_BH))
      x_BD = x_BD + h_BH @ v_HD
    out_B = x_BD @ d['head']
    loss += 0.5 * np.sum(out_B**2)
    grads['head'] += out_B @ x_BD
    dy_BD = out_B[:, None] * d['head'][None]
    for s in reversed(range(z.stages)):
      x_BD, h_BH = seen[s]
      grads['v'][s] += h_BH.T @ dy_BD
      da_BH = (dy_BD @ d['v'][s].T) * (1 - h_BH**2)
      grads['w'][s] += x_BD.T @ da_BH
      dy_BD = dy_BD + da_BH @ d['w'][s].T
  return {'loss': np.array(loss)} | grads


def stage(z: Sizes) -> executor.Stage:
  def constants(given: Any, route: jax.Array, micro: jax.Array, on: jax.Array) -> Any:
    number = jnp.where(route == 0, given['rank'], z.stages - 1 - given['rank'])
    x_BD = lax.dynamic_index_in_dim(given['x'], 2 * micro + route, keepdims=False)
    return {'x': x_BD, 'first': (number == 0) | ~on, 'last': number == z.stages - 1}

  def function(weights: Any, k: Any, x_BD: jax.Array) -> Any:
    own, ends = weights
    x_BD = jnp.where(k['first'], k['x'], x_BD)
    y_BD = x_BD + jnp.tanh(x_BD @ own['w']) @ own['v']
    loss = jnp.where(k['last'], 0.5 * jnp.sum((y_BD @ ends['head']) ** 2), 0.0)
    return (y_BD, loss), {'run': jnp.int32(1)}

  return executor.Stage(function, constants, lambda given, route, micro: micro >= 0)


def begin(z: Sizes, d: Any) -> tuple[executor.Weights, Any, jax.Array]:
  """What an executor takes, of arrays that are whole on every device."""
  rank = lax.axis_index(executor.PIPE)
  both = lambda x: jnp.stack([x[rank], x[z.stages - 1 - rank]])
  weights = executor.Weights({'w': both(d['w']), 'v': both(d['v'])}, {'head': d['head']})
  return weights, {'rank': rank, 'x': d['x']}, jnp.zeros((B, D))


def end(
  z: Sizes, loss: jax.Array, statistics: Any, grads: executor.Weights
) -> dict[str, jax.Array]:
  """Sums over ranks; and each rank's part of the weights' gradients as it is."""
  rank = lax.axis_index(executor.PIPE)

  def both(g_d: jax.Array) -> jax.Array:
    zeros = jnp.zeros((z.stages, *g_d.shape[1:]))
    return zeros.at[rank].add(g_d[0]).at[z.stages - 1 - rank].add(g_d[1])

  out = {'loss': loss, 'head': grads.ends['head']}
  out |= {name: both(g) for name, g in grads.routes.items()} | {'run': statistics['run']}
  return lax.psum(out, AXES)


def uniform(
  z: Sizes, device_mesh: jax.sharding.Mesh, *, deferred: bool = True
) -> Callable[[Any], dict[str, jax.Array]]:
  def run(d: Any) -> dict[str, jax.Array]:
    held = begin(z, d)
    sums = executor.run(z.stages, z.micro_batches, stage(z), *held, deferred=deferred)
    return end(z, *sums)

  return jax.jit(jax.shard_map(run, mesh=device_mesh, in_specs=P(), out_specs=P()))


def by_ranks(
  z: Sizes, device_mesh: jax.sharding.Mesh
) -> tuple[Callable[[Any], dict[str, jax.Array]], mpmd.Streams]:
  of_mesh = lambda f, **specs: jax.jit(jax.shard_map(f, mesh=device_mesh, **specs))
  hold = of_mesh(lambda d: mpmd.hold(*begin(z, d)), in_specs=P(), out_specs=P(AXES))
  finish = of_mesh(lambda sums: end(z, *mpmd.added(sums)), in_specs=P(AXES), out_specs=P())
  schedule = schedules.make('dualpipe', z.stages, z.micro_batches)
  streams = mpmd.Streams(schedule, stage(z), device_mesh)
  return lambda d: finish(streams(hold(d))), streams


def run(name: str, z: Sizes) -> dict[str, np.ndarray]:
  device_mesh = mesh.make_mesh(config.Mesh(pipe=z.stages))
  if name == 'mpmd':
    program = by_ranks(z, device_mesh)[0]
  else:
    program = uniform(z, device_mesh, deferred=name == 'uniform')
  found = processes.compile_together(name, program)(data(z))
  return {key: np.asarray(x.addressable_shards[0].data) for key, x in found.items()}


def main(me: int, of: int, port: int, folder: str) -> None:
  jax.distributed.initialize(f'localhost:{port}', num_processes=of, process_id=me)
  z = Sizes(8, 16)
  found = {f'{name}.{k}': x for name in EXECUTORS for k, x in run(name, z).items()}
  counts = np.array([jax.process_count(), jax.device_count()])
  np.savez(pathlib.Path(folder, f'{me}.npz'), counts=counts, **found)
  jax.distributed.shutdown()


if __name__ == '__main__':
  main(*map(int, sys.argv[1:4]), sys.argv[4])
