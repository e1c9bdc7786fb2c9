"""What parity tests share: small configs, weights in our form and in the oracle's, one error metric."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import oracle
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh
from dsv3_jax.mesh import path_names
from dsv3_jax.training import optimizer
from dsv3_jax.training import state as training_state

# Largest error over largest value, by the dtype that computes.
LIMIT = {'float32': 1e-5, 'bfloat16': 2e-2}

# ---- errors --------------------------------------------------------------------------------------


def relative_error(actual: Any, expected: Any) -> float:
  """Largest absolute difference over the largest absolute value expected; infinite for a NaN."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape, f'shape {actual.shape}, expected {expected.shape}'
  worst, scale = np.max(np.abs(actual - expected), initial=0), np.max(np.abs(expected), initial=0)
  if not np.isfinite(worst):
    return np.inf
  return float(worst / scale) if scale else float(worst)


def assert_close(actual: Any, expected: Any, limit: float = LIMIT['float32']) -> None:
  """Every leaf of two trees within `limit` by `relative_error`; names all that are not."""
  actual = dict(named_leaves(actual))
  expected = dict(named_leaves(expected))
  assert actual.keys() == expected.keys(), f'leaves differ: {actual.keys() ^ expected.keys()}'
  errors = {name: relative_error(actual[name], expected[name]) for name in expected}
  wrong = [f'  {name or "value"}: {error:.1e}' for name, error in errors.items() if error > limit]
  assert not wrong, f'relative error above {limit:.0e} in\n' + '\n'.join(wrong)


def assert_same_bits(actual: Any, expected: Any) -> None:
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
  """('moe_layers.ffn.gate_EDF', array) of every leaf."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return [('.'.join(path_names(path)), leaf) for path, leaf in leaves]


# ---- configs and programs ------------------------------------------------------------------------


def small(changes: dict[str, Any] | None = None) -> config.Config:
  """The debug config in FP32, moments and wire too, with some keys changed: {'model.mtp_depth': 2}."""
  c = config.debug(config.default())
  c.update_from_flattened_dict({'model.precision': 'fp32', 'optimizer.moments': 'fp32'})
  wire = {'payload': 'plain', 'combine': 'plain'}
  c.update_from_flattened_dict({f'model.moe.dispatch.{k}': v for k, v in wire.items()})
  c.update_from_flattened_dict(changes or {})
  return config.freeze(c)


layout = functools.cache(training_state.layout)


def on_one_device(f: Callable[..., Any]) -> Callable[..., Any]:
  """Jitted f on a mesh of one device: model code asks the mesh axes for their size."""
  device_mesh = mesh.make_mesh(config.Mesh())
  return jax.jit(jax.shard_map(f, mesh=device_mesh, in_specs=P(), out_specs=P()))


def temporary_bytes(f: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> int:
  """Bytes that the compiled f needs beside arguments and results; nothing runs."""
  return jax.jit(f).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


# ---- weights -------------------------------------------------------------------------------------

_OURS_TO_ORACLE = {'proj_XD': 'proj_DD'}
_ORACLE_TO_OURS = {oracles: ours for ours, oracles in _OURS_TO_ORACLE.items()}
_STACKS = ('dense_layers', 'moe_layers', 'mtp')


def random_state(c: config.Config, seed: int = 0) -> training_state.State:
  """A state of NumPy arrays with the oracle's random weights and biases, stacked into our form."""
  weights = oracle.random_weights(c.model, np.random.default_rng(seed))
  stack = lambda layers: jax.tree.map(lambda *xs: np.stack(xs), *layers)
  weights = {k: stack(w) if k in _STACKS else w for k, w in weights.items() if len(w)}
  weights = jax.tree.map(np.float32, _renamed(weights, _ORACLE_TO_OURS))
  params = _leaves_where(weights, lambda name: name != 'bias_E')
  state = {'step': np.uint32(0), 'sequences': np.uint32(0), 'params': params}
  state['router_bias'] = _leaves_where(weights, lambda name: name == 'bias_E')
  state['opt'] = jax.tree.map(np.asarray, optimizer.init(c.optimizer, params))
  return state | ({'ema': params} if c.optimizer.ema_decay else {})


def to_oracle(state: training_state.State) -> oracle.Weights:
  """The oracle's dict of float64 weights of a state: stacks become lists, biases join their layers."""
  weights = _renamed(_joined(state['params'], state['router_bias']), _OURS_TO_ORACLE)
  weights = jax.tree.map(lambda x: np.array(x, np.float64), weights)
  for name in _STACKS:
    stacked = weights.pop(name, {})
    layers = len(jax.tree.leaves(stacked)[0]) if stacked else 0
    weights[name] = [jax.tree.map(lambda x, i=i: x[i].copy(), stacked) for i in range(layers)]
  return weights


def oracle_entry(
  weights: oracle.Weights, names: tuple[str, ...], entry: tuple[int, ...]
) -> tuple[np.ndarray, tuple[int, ...]]:
  """The oracle's array, and the index into it, of one entry of our weight at the path `names`."""
  at: Any = weights
  for name in names:
    at = at[_OURS_TO_ORACLE.get(name, name)]
    if isinstance(at, list):
      at, entry = at[entry[0]], entry[1:]
  return at, entry


def _renamed(tree: Any, names: dict[str, str]) -> Any:
  if not isinstance(tree, dict):
    return tree
  return {names.get(k, k): _renamed(v, names) for k, v in tree.items()}


def _joined(tree: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
  both = {k: _joined(tree[k], other[k]) for k in tree.keys() & other.keys()}
  return tree | other | both


def _leaves_where(tree: dict[str, Any], wanted: Callable[[str], bool]) -> dict[str, Any]:
  kept = {}
  for name, x in tree.items():
    if isinstance(x, dict):
      x = _leaves_where(x, wanted)
      kept |= {name: x} if x else {}
    elif wanted(name):
      kept[name] = x
  return kept
