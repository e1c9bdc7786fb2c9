"""One layer of experts as `bench_dispatch` runs it: its inputs, its programs, and what is right."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config
from dsv3_jax.compat import vary
from dsv3_jax.kernels.expert_ffn import expert_ffn, expert_slots
from dsv3_jax.mesh import EXPERTS, TOKENS
from dsv3_jax.parallel import wire
from dsv3_jax.parallel.dispatch import dispatch
from dsv3_jax.precision import recipe


def programs_of(m: config.Model, device_mesh: jax.sharding.Mesh, backward: bool) -> list[Callable]:
  """Jitted (x, ids, weight, experts' weights, dy) -> results by name, rounds: forward; and backward."""
  how = 'reference' if m.moe.dispatch.form == 'dense' else 'xla'

  def experts(weights, x_tD, ids_tK, weight_tK, bound):
    return expert_slots(x_tD, ids_tK, weight_tK, *weights, bound=bound, implementation=how)

  def forward(x_TD, ids_TK, weight_TK, weights, dy_TD):
    del dy_TD
    y_TD, traffic = dispatch(m.moe, x_TD, ids_TK, weight_TK, experts, weights)
    return {'y': y_TD}, traffic.rounds

  def both(x_TD, ids_TK, weight_TK, weights, dy_TD):
    f = lambda x, weight, weights: dispatch(m.moe, x, ids_TK, weight, experts, weights)
    y_TD, pull, traffic = jax.vjp(f, x_TD, weight_TK, weights, has_aux=True)
    dx_TD, dweight_TK, dexperts = pull(dy_TD)
    out = {'y': y_TD, 'dx': dx_TD, 'dweight': dweight_TK}
    names = ('dgate', 'dup', 'ddown')
    return out | dict(zip(names, lax.psum(dexperts, 'data'), strict=True)), traffic.rounds

  def make(f: Callable, results: dict[str, P]) -> Callable:
    def device(x_TD, ids_TK, weight_TK, weights, dy_TD):
      out, rounds = f(x_TD, ids_TK, weight_TK, vary(weights, TOKENS), dy_TD)
      return out, lax.pmax(vary(rounds, TOKENS), TOKENS)

    rows = P(TOKENS)
    in_specs = rows, rows, rows, P(EXPERTS), rows
    return jax.jit(
      jax.shard_map(device, mesh=device_mesh, in_specs=in_specs, out_specs=(results, P()))
    )

  rows, split = P(TOKENS), P(EXPERTS)
  programs = [make(forward, {'y': rows})]
  if backward:
    gradients = {'dx': rows, 'dweight': rows, 'dgate': split, 'dup': split, 'ddown': split}
    programs.append(make(both, {'y': rows} | gradients))
  return programs


class Inputs:
  """The same random rows, weights and cotangent for every form and skew."""

  def __init__(self, args: argparse.Namespace, device_mesh: jax.sharding.Mesh) -> None:
    rng, dtype = np.random.default_rng(0), recipe.compute_dtype(args.precision)
    rows, E, D, F = args.nodes * args.locals * args.tokens, args.experts, args.dim, args.expert_dim
    normal = lambda *shape, std=1.0: (rng.standard_normal(shape, np.float32) * std).astype(dtype)
    self.x_SD, self.dy_SD = normal(rows, D), normal(rows, D)
    weight_SK = rng.uniform(0.2, 1, (rows, args.top_k)).astype(np.float32)
    self.weight_SK = weight_SK / weight_SK.sum(1, keepdims=True)
    self.experts = [normal(E, D, F, std=D**-0.5), normal(E, D, F, std=D**-0.5)]
    self.experts.append(normal(E, F, D, std=F**-0.5))
    put = lambda x, axes: jax.device_put(x, NamedSharding(device_mesh, P(axes)))
    self._rows = functools.partial(put, axes=TOKENS)
    given = self._rows(self.x_SD), self._rows(self.weight_SK)
    self._given = (*given, [put(w, EXPERTS) for w in self.experts], self._rows(self.dy_SD))

  def put(self, ids_nTK: np.ndarray) -> tuple[Any, ...]:
    """Arguments of a program, on the mesh."""
    x_SD, weight_SK, experts, dy_SD = self._given
    return x_SD, self._rows(ids_nTK.reshape(-1, ids_nTK.shape[2])), weight_SK, experts, dy_SD


# ---- what is right -------------------------------------------------------------------------------


def make_reference(
  args: argparse.Namespace, inputs: Inputs, device: jax.Device
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
  """ids [n, T, K] -> results by name: every expert on every token, in FP32, on one device.

  Rows go through the payload's format once, as in every form.
  """

  def coded(x_TD: jax.Array) -> jax.Array:
    rows = wire.encode(x_TD, args.payload)
    return wire.decode(rows, args.payload, args.dim, x_TD.dtype).astype(jnp.float32)

  @jax.jit
  def part(x_TD, ids_TK, weight_TK, experts, dy_TD):
    f = lambda x, weight, experts: expert_ffn(
      x, ids_TK, weight, *experts, implementation='reference'
    )
    y_TD, pull = jax.vjp(f, coded(x_TD), weight_TK, [w.astype(jnp.float32) for w in experts])
    return y_TD, *(pull(coded(dy_TD)) if args.backward else ())

  experts = jax.device_put(inputs.experts, device)

  def results(ids_nTK: np.ndarray) -> dict[str, np.ndarray]:
    parts = []
    for i, ids_TK in enumerate(ids_nTK):  # a device's tokens at a time: all experts take memory
      at = slice(i * args.tokens, (i + 1) * args.tokens)
      rows = (inputs.x_SD[at], ids_TK, inputs.weight_SK[at], inputs.dy_SD[at])
      x_TD, ids_TK, weight_TK, dy_TD = jax.device_put(rows, device)
      parts.append(jax.tree.map(np.asarray, part(x_TD, ids_TK, weight_TK, experts, dy_TD)))
    join = lambda k: np.concatenate([p[k] for p in parts])
    if not args.backward:
      return {'y': join(0)}
    gate_up_down = (sum(p[3][k] for p in parts) for k in range(3))
    weights = dict(zip(('dgate', 'dup', 'ddown'), gate_up_down, strict=True))
    return {'y': join(0), 'dx': join(1), 'dweight': join(2)} | weights

  return results


def error_of(name: str, actual: jax.Array, expected: np.ndarray) -> float:
  """Of the worst row (of weights: the worst expert) its distance over its length."""
  expected = expected.reshape(len(expected), -1)
  actual = np.asarray(actual).astype(np.float32).reshape(expected.shape)
  length = np.linalg.norm(expected, axis=1)
  # Dot products, which cancel, are held against their like, and experts without a token against others.
  least = np.sqrt(np.mean(length**2)) if name == 'dweight' else 1e-3 * length.max()
  return float(np.max(np.linalg.norm(actual - expected, axis=1) / np.maximum(length, least)))
