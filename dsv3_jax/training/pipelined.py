"""Loss and gradients of a step whose layers stand on the ranks of a pipeline (3.2.1).

Rank r computes stage r of micro-batches that enter at the first rank, and stage PP-1-r of those that enter at
the last. So either end of the pipe has both ends of the model: embedding and head, shared with the MTP modules
(2.2). In one program for all ranks every rank keeps these weights; what costs much and sends nothing, the heads
and the dense layers' FFN, stands in branches that only their ranks take. An MTP module's block is one block
more behind the layers of the last stage.

What leaves: the same loss, terms and gradients as `step.py` makes without a pipeline, ready for the same update.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dsv3_jax import config
from dsv3_jax.compat import vary
from dsv3_jax.mesh import AXES, path_names
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.transformer import Block, join, remat
from dsv3_jax.parallel import zero
from dsv3_jax.parallel.dispatch import Traffic
from dsv3_jax.parallel.pipeline import executor, mpmd, schedules, stages, weights
from dsv3_jax.precision import recipe
from dsv3_jax.training.objective import Terms, nats
from dsv3_jax.training.state import STACKS, Layout, State, variables


def arrange(c: config.Config) -> stages.Stages:
  m = c.model
  moe = m.num_layers - m.num_dense_layers
  return stages.arrange(m.num_dense_layers, moe, m.mtp_depth, c.mesh.pipe)


def gradients(
  c: config.Config,
  at: Layout,
  state: State,
  tokens_AbX: jax.Array,
  count: jax.Array,
  mtp_weight: jax.Array,
) -> tuple[jax.Array, Terms, Any]:
  """Loss and terms of the global batch, the same on all devices, and this device's part of the gradient.

  By the tick-uniform executor, inside one program; `streams` makes the other one.
  """
  s = arrange(c)
  weights, given, x_bLD = begin(c, at, state, tokens_AbX, count, mtp_weight)
  deferred = c.pipeline.weight_part == 'deferred'
  micro_batches = len(tokens_AbX)
  found = executor.run(s.stages, micro_batches, stage(c), weights, given, x_bLD, deferred=deferred)
  return end(c, at, *found)


def streams(c: config.Config, device_mesh: jax.sharding.Mesh) -> mpmd.Streams:
  """What stands between `begin` and `end` where every rank runs programs of its own, in DualPipe's order."""
  s = arrange(c)
  schedule = schedules.make('dualpipe', s.stages, c.batch.size // c.batch.micro_size)
  return mpmd.Streams(schedule, stage(c), device_mesh)


def begin(
  c: config.Config,
  at: Layout,
  state: State,
  tokens_AbX: jax.Array,
  count: jax.Array,
  mtp_weight: jax.Array,
) -> tuple[executor.Weights, Any, jax.Array]:
  """What an executor wants of this device: its rank's weights, what its stages need besides, zeros like x."""
  s = arrange(c)
  held_of = holdings(c, s)
  routes, ends = weights_of(c, at, state['params'], held_of)
  biases = _concatenated([x['ffn']['bias_E'] for x in _blocks(state['router_bias'])])
  given = {
    'rank': lax.axis_index(executor.PIPE),
    'tokens_AbX': tokens_AbX,
    'bias_dYE': biases[weights.own(held_of['routed'].index)].reshape(2, s.places, -1),
    'mtp_weight': mtp_weight,
    'count': count,
    'sequences': (count * c.batch.micro_size).astype(jnp.float32),
  }
  b, L = tokens_AbX.shape[1], tokens_AbX.shape[2] - 1
  x_bLD = jnp.zeros((b, L, c.model.dim), recipe.compute_dtype(c.model.precision))
  return executor.Weights(routes, ends), given, x_bLD


def end(
  c: config.Config, at: Layout, loss: jax.Array, statistics: Any, grads: executor.Weights
) -> tuple[jax.Array, Terms, Any]:
  """Of this rank's shares: what `gradients` gives."""
  s = arrange(c)
  held_of = holdings(c, s)
  loss, terms = lax.psum((loss, _terms(c, s, held_of['routed'], statistics)), AXES)
  return loss, terms, _collected(c, at, grads, held_of)


def stage(c: config.Config) -> executor.Stage:
  s = arrange(c)

  def constants(given: Any, route: jax.Array, micro: jax.Array, on: jax.Array) -> Any:
    number = jnp.where(route == 0, given['rank'], s.stages - 1 - given['rank'])
    at = functools.partial(lax.dynamic_index_in_dim, keepdims=False)
    return {
      'tokens_bX': at(given['tokens_AbX'], 2 * micro + route),
      'blocks': at(jnp.asarray(s.blocks), number),
      'bias_YE': at(given['bias_dYE'], route),
      'embeds': (number == 0) | ~on,  # where nothing is to do, something harmless
      'last': number == s.stages - 1,
      'mtp_weight': given['mtp_weight'],
      'sequences': given['sequences'],
    }

  live = lambda given, route, micro: 2 * micro + route < given['count']
  return executor.Stage(functools.partial(_stage, c, s), constants, live)


# ---- what one rank does with a micro-batch -------------------------------------------------------


def _stage(c: config.Config, s: stages.Stages, params: Any, k: Any, x_bLD: jax.Array) -> Any:
  """((weights of the places, ends), constants, x) -> ((y, loss), statistics); every share of the whole step's."""
  m, (places, ends) = c.model, params
  tokens_bX, last = k['tokens_bX'], k['last']
  share = 1.0 / (k['sequences'] * (tokens_bX.shape[1] - 1))
  embed_bLD = ends['embed_VD'][tokens_bX[:, :-1]].astype(x_bLD.dtype)
  x_bLD = jnp.where(k['embeds'], embed_bLD, x_bLD)
  predicted = jnp.zeros(
    (1 + m.mtp_depth,), jnp.float32
  )  # nats: the next token's, then each depth's
  balance, seen = jnp.float32(0), []

  def head(depth: int, hidden_bLD: jax.Array) -> jax.Array:
    loss = lambda hidden_bLD, head_DV: nats(
      hidden_bLD, head_DV.astype(hidden_bLD.dtype), tokens_bX, depth
    )
    return share * _only(last, loss, hidden_bLD, ends['head_DV'])

  def enter(depth: int, hidden_bLD: jax.Array, x_bLD: jax.Array) -> jax.Array:
    """Input of the MTP module of that depth, if there is one, on the last stage."""
    if depth > m.mtp_depth:
      return x_bLD
    module = {name: w[depth - 1] for name, w in ends['mtp'].items() if name != 'out_norm_D'}
    ahead_bLD = jnp.roll(embed_bLD, -depth, axis=1)
    return jnp.where(last, join(m, hidden_bLD, ahead_bLD, **module), x_bLD)

  for place in range(s.places + 1):
    if place >= s.end and place - s.end <= m.mtp_depth:
      depth = place - s.end
      norm_D = ends['mtp']['out_norm_D'][depth - 1] if depth else ends['final_norm_D']
      hidden_bLD = rms_norm(x_bLD, norm_D, m.norm_eps)
      predicted = predicted.at[depth].set(head(depth, hidden_bLD))
      x_bLD = enter(depth + 1, hidden_bLD, x_bLD)
    if place < s.places:
      x_bLD, routing = _place(m, s, place, places, k, x_bLD)
      balance += routing.pop('balance')
      seen.append(routing)

  balance = balance / k['sequences']
  loss = predicted[0] + c.objective.balance_alpha * balance
  if m.mtp_depth:
    loss += k['mtp_weight'] * jnp.mean(predicted[1:])
  statistics = {'predicted': predicted, 'balance': balance}
  return (x_bLD, loss), statistics | jax.tree.map(lambda *xs: jnp.stack(xs), *seen)


def _place(
  m: config.Model, s: stages.Stages, place: int, places: Any, k: Any, x_bLD: jax.Array
) -> tuple[jax.Array, dict[str, Any]]:
  """The block that stands in a place, or x as it came; its statistics, 0 where no router ran."""
  block = k['blocks'][place]
  dense = (block >= 0) & (block < s.dense)
  depth = jnp.maximum(block - (s.dense + s.moe) + 1, 0)  # of an MTP module
  valid_bL = jnp.broadcast_to(jnp.arange(x_bLD.shape[1]) < x_bLD.shape[1] - depth, x_bLD.shape[:2])
  at = lambda tree, i: jax.tree.map(lambda w: w[i], tree)
  may_be_dense, may_be_moe = s.may_be_dense(place), s.may_be_moe(place)
  own = {'shared': at(places['shared'], place)}
  if may_be_moe:
    own['routed'] = at(places['routed'], place)
  if may_be_dense:
    own['plain'] = at(places['plain'], [s.may_be_dense(j) for j in range(place)].count(True))

  def run(own: Any, x_bLD: jax.Array) -> Any:
    if may_be_moe:
      module = _block(m, own['shared'], own['routed'], k['bias_YE'][place])
      x_bLD = module.attend(m, x_bLD)
      y_bLD, routing = module.feed_forward(m, x_bLD, valid_bL)
    else:
      x_bLD = _block(m, own['shared'], own['plain']).attend(m, x_bLD)
      y_bLD, routing = x_bLD, None
    if may_be_dense:
      feed = lambda own, x_bLD: _block(m, own['shared'], own['plain']).feed_forward(
        m, x_bLD, valid_bL
      )[0]
      y_bLD = jnp.where(dense, _only(dense, feed, own, x_bLD), y_bLD)
    return y_bLD, routing

  y_bLD, routing = remat(m, run, scanned=False)(own, x_bLD)
  zero = jnp.float32(0)
  seen = {'balance': zero, 'counts_E': jnp.zeros((m.moe.num_experts,), jnp.int32)}
  seen['traffic'] = Traffic(zero, zero, jnp.int32(0))
  if routing is not None:
    ran = {'balance': routing.balance, 'counts_E': routing.counts_E, 'traffic': routing.traffic}
    seen = jax.tree.map(lambda a, b: jnp.where(block >= s.dense, a, b), ran, seen)
  return jnp.where(block >= 0, y_bLD, x_bLD), seen


def _block(m: config.Model, shared: Any, ffn: Any, bias_E: jax.Array | None = None) -> Block:
  """A dense one where there is no bias."""
  bias = {} if bias_E is None else {'ffn': {'bias_E': bias_E}}
  return nnx.merge(_graph(m, bias_E is None), *variables(shared | {'ffn': ffn}, bias))


@functools.cache
def _graph(m: config.Model, dense: bool) -> nnx.GraphDef:
  return nnx.graphdef(jax.eval_shape(lambda: Block(m, jax.random.key(0), dense=dense)))


def _only(here: jax.Array, f: Callable[..., Any], *operands: Any) -> Any:
  """f where `here`, else zeros, without computing it. Nothing may be sent inside.

  Computed again in the backward: a branch would keep the weights it reads beside the activations.
  """
  shapes = jax.eval_shape(f, *operands)
  nothing = lambda *_: vary(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), AXES)
  run = lambda *operands: vary(f(*operands), AXES)
  return jax.checkpoint(lambda *operands: lax.cond(here, run, nothing, *operands))(*operands)


# ---- weights to the ranks and gradients back -----------------------------------------------------


def holdings(c: config.Config, s: stages.Stages) -> dict[str, stages.Held]:
  """Of each kind of weight, which of its stack every rank holds."""
  blocks = s.dense + s.moe + s.mtp
  held = {'shared': s.held(0, blocks), 'routed': s.held(s.dense, s.moe + s.mtp)}
  if s.dense:
    held['plain'] = s.held(0, s.dense, [j for j in range(s.places) if s.may_be_dense(j)])
  return held


def _blocks(tree: Any) -> list[Any]:
  """The stacks of blocks in a tree like the weights, in the order of their numbers."""
  found = [tree[name] for name in ('dense_layers', 'moe_layers') if name in tree]
  return found + ([tree['mtp']['block']] if 'mtp' in tree else [])


def _by_kind(tree: Any, leaf: Callable[..., Any]) -> dict[str, Any]:
  """The stacks' weights by kind, leaves of stacks behind each other joined by `leaf`."""
  every = _blocks(tree)
  dense = [tree['dense_layers']['ffn']] if 'dense_layers' in tree else []
  ffns = [block['ffn'] for block in every]
  shared = [{k: v for k, v in block.items() if k != 'ffn'} for block in every]
  kinds = {'shared': shared, 'routed': ffns[len(dense) :], 'plain': dense}
  is_leaf = lambda x: not isinstance(x, dict)
  return {
    kind: jax.tree.map(lambda *xs: leaf(list(xs)), *trees, is_leaf=is_leaf)
    for kind, trees in kinds.items()
    if trees
  }


def _ends(tree: Any) -> Any:
  """What is not in a stack of blocks."""
  ends = {name: x for name, x in tree.items() if name not in STACKS}
  if 'mtp' in tree:
    ends['mtp'] = {name: x for name, x in tree['mtp'].items() if name != 'block'}
  return ends


def _concatenated(xs: list[jax.Array]) -> jax.Array:
  return jnp.concatenate(xs) if len(xs) > 1 else xs[0]


def weights_of(
  c: config.Config, at: Layout, params: Any, held_of: dict[str, stages.Held]
) -> tuple[Any, Any]:
  """(leaves [2, places, ...] by kind, ends), whole, in the dtype they compute in."""
  dtype = recipe.weight_dtype(c.model.precision)
  ends = zero.gather(_ends(params), zero.by_path(_ends(at.placements)), dtype)
  stacks, where = _by_kind(params, _concatenated), _by_kind(at.placements, lambda xs: xs[0])
  routes = {}
  for kind, held in held_of.items():

    def one(path: Any, x: jax.Array, place: Any, held: stages.Held = held) -> jax.Array:
      x = weights.spread(path_names(path)[-1], x, place, held.index, dtype)
      return x.reshape(2, -1, *x.shape[1:])

    routes[kind] = jax.tree_util.tree_map_with_path(one, stacks[kind], where[kind])
  return routes, ends


def _collected(
  c: config.Config, at: Layout, grads: executor.Weights, held_of: dict[str, stages.Held]
) -> Any:
  """A tree like the weights."""
  s = arrange(c)
  where = _by_kind(at.placements, lambda xs: xs[0])
  stacks = {}
  for kind, held in held_of.items():

    def one(g: jax.Array, place: Any, held: stages.Held = held) -> jax.Array:
      g = g.reshape(-1, *g.shape[2:])
      return weights.collect(g, place, held.index, held.used, held.count)

    stacks[kind] = jax.tree.map(one, grads.routes[kind], where[kind])
  out = zero.reduce(grads.ends, zero.by_path(_ends(at.placements)))
  cut = lambda kind, first, size: jax.tree.map(lambda g: g[first : first + size], stacks[kind])
  block = lambda first, size: (
    cut('shared', first, size) | {'ffn': cut('routed', first - s.dense, size)}
  )
  if s.dense:
    out['dense_layers'] = cut('shared', 0, s.dense) | {'ffn': stacks['plain']}
  out['moe_layers'] = block(s.dense, s.moe)
  if s.mtp:
    out['mtp'] = out['mtp'] | {'block': block(s.dense + s.moe, s.mtp)}
  return out


def _terms(c: config.Config, s: stages.Stages, held: stages.Held, statistics: Any) -> Terms:
  """This rank's shares, layers in the order of the model."""

  def by_layer(x: jax.Array) -> jax.Array:
    """[2, places, ...] -> [layers with experts, ...]"""
    x = x.reshape(-1, *x.shape[2:])
    used = weights.own(held.used).reshape(-1, *[1] * (x.ndim - 1))
    x = jnp.where(used, x, jnp.zeros_like(x))
    return jnp.zeros((held.count, *x.shape[1:]), x.dtype).at[weights.own(held.index)].add(x)

  predicted = jnp.sum(statistics['predicted'], axis=0)
  counts_YE = by_layer(statistics['counts_E'])
  counts = {'moe_layers': {'ffn': {'bias_E': counts_YE[: s.moe]}}}
  if s.mtp:
    counts['mtp'] = {'block': {'ffn': {'bias_E': counts_YE[s.moe :]}}}
  traffic = jax.tree.map(by_layer, statistics['traffic'])
  return Terms(predicted[0], predicted[1:], jnp.sum(statistics['balance']), counts, traffic)
