"""A few train steps on a mesh of 2 x 4 devices: in this process, or in several that meet.

`python several.py ME OF PORT FOLDER FORM ..` is one of them: it leaves FOLDER/ME.npz, what it saw.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import parity
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import mesh
from dsv3_jax.training.state import layout
from dsv3_jax.training.step import make_step

FORMS = ('two_hop', 'flat')
MPMD = 'mpmd'  # by ranks with programs of their own
STEPS = 3
_SIZES = {
  'model.vocab_size': 256,
  'model.num_dense_layers': 0,
  'model.num_layers': 1,
  'model.mtp_depth': 0,
  'model.remat': 'none',
  # Random weights route unevenly, and few tokens: one round until the biases are skewed.
  'model.moe.dispatch.capacity': 3.0,
  'optimizer.warmup_steps': 0,
  'optimizer.ema_decay': 0.0,
}
_CHANGES = {
  form: {'mesh.node': 2, 'mesh.local': 4, 'model.moe.dispatch.form': form} for form in FORMS
}
# Two ranks of four devices, which share no program but those that send from one to the other.
_CHANGES[MPMD] = {
  'model.num_layers': 2,
  'model.moe.dispatch.form': 'dense',
  'mesh.pipe': 2,
  'mesh.data': 4,
  'pipeline.executor': MPMD,
  'batch.micro_size': 8,
  'batch.size': 32,
}


# What it is held against.
UNPIPELINED = {'mesh.pipe': 1, 'mesh.data': 8}


def all_steps(forms: Sequence[str], changes: dict[str, Any] | None = None) -> dict[str, np.ndarray]:
  """{'two_hop.metrics.loss': [steps], ..}"""
  return {f'{form}.{name}': x for form in forms for name, x in steps(form, changes or {}).items()}


def steps(form: str, changes: dict[str, Any]) -> dict[str, np.ndarray]:
  """Arrays by name: metrics [steps, ..]; weights, first moments (`gradients`) and biases after the last.

  Biases are [devices, ..], of each device of this process. Before the last step they are changed so that
  all tokens choose the same two experts.
  """
  c = parity.small(_SIZES | _CHANGES[form] | changes)
  device_mesh = mesh.make_mesh(c.mesh)
  step, at = make_step(c, device_mesh), mesh.shardings(device_mesh, layout(c).specs(c))
  whole = NamedSharding(device_mesh, P())
  state = jax.tree.map(_place, parity.random_state(c), at)
  metrics = []
  for i in range(STEPS):
    if i == STEPS - 1:
      state['router_bias'] = jax.tree.map(_skewed, state['router_bias'], at['router_bias'])
    rng = np.random.default_rng(i)
    micro = c.batch.size // c.batch.micro_size
    rows_ABX = rng.integers(0, c.model.vocab_size, (micro, c.batch.micro_size, c.batch.seq_len + 1))
    rows_ABX = _place(rows_ABX.astype(np.int32), NamedSharding(device_mesh, P(None, mesh.TOKENS)))
    state, values = step(state, rows_ABX, _place(np.int32(micro), whole))
    metrics.append(values)
  out = {'metrics': jax.tree.map(lambda *xs: np.stack(xs), *metrics)}
  # Parts on other processes' devices come over here.
  ended = {'params': state['params'], 'gradients': state['opt']['mu']}
  out |= jax.jit(lambda tree: tree, out_shardings=whole)(ended)
  of_each = lambda x: np.stack([shard.data for shard in x.addressable_shards])
  out['router_bias'] = jax.tree.map(of_each, state['router_bias'])
  return {name: np.asarray(x) for name, x in parity.named_leaves(out)}


def _place(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
  return jax.make_array_from_callback(np.shape(x), sharding, lambda index: np.asarray(x)[index])


def _skewed(bias: jax.Array, sharding: NamedSharding) -> jax.Array:
  bias_YE = np.array(bias.addressable_shards[0].data)
  bias_YE[:, :2] += 100
  return _place(bias_YE, sharding)


def main(me: int, of: int, port: int, folder: str, *forms: str) -> None:
  jax.distributed.initialize(f'localhost:{port}', num_processes=of, process_id=me)
  counts = np.array([jax.process_count(), jax.device_count(), jax.local_device_count()])
  np.savez(pathlib.Path(folder, f'{me}.npz'), counts=counts, **all_steps(forms))
  jax.distributed.shutdown()


if __name__ == '__main__':
  main(*map(int, sys.argv[1:4]), *sys.argv[4:])
