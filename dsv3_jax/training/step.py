"""One optimizer step: a single shard_map over the whole mesh, fully manual, replication checked.

What one device does, top to bottom:
1. Gather the split weights (all_gather over `zero_axes`); with ZeRO-3 only those outside the stacks, whose
   layers gather their own.
2. Cast weights to varying, so that no gradient is summed before all micro-batches are done.
3. For each micro-batch: loss and gradients of this device's rows; add up in FP32.
   On a pipeline (`pipelined.py`) 1 to 3 are the executor's: micro-batches go through ranks instead.
4. Sum gradients over the copies of each weight (psum; reduce-scatter where it is split), counts and
   losses over all token axes (psum).
5. Clip by the global norm, AdamW on this device's part, average of weights, router biases by sign.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv3_jax import config
from dsv3_jax.compat import vary
from dsv3_jax.mesh import AXES, TOKENS
from dsv3_jax.model.transformer import whole
from dsv3_jax.parallel import dispatch, zero
from dsv3_jax.parallel.pipeline import mpmd
from dsv3_jax.precision import recipe
from dsv3_jax.training import balance, optimizer, pipelined, schedule
from dsv3_jax.training.objective import Terms, objective
from dsv3_jax.training.state import STACKS, Layout, State, layout

Step = Callable[[State, jax.Array, jax.Array], tuple[State, dict[str, jax.Array]]]


def make_step(c: config.Config, device_mesh: jax.sharding.Mesh) -> Step:
  """Jitted (state, tokens_ABX, count) -> (state, metrics); the state is donated.

  `tokens_ABX`: int32 [micro-batches, micro_size, seq_len + 1], rows split over the token axes; the
  first `count` micro-batches count, so the ramp of the batch size needs one compilation. metrics:
  float32 scalars loss, ce, mtp (mean over depths), balance, grad_norm, lr, where tokens went
  (`dispatch.figures`), and load [layers, experts].
  """
  dispatch.check(c.model.moe, device_mesh)
  at = layout(c)
  specs, rows = at.specs(c), P(None, TOKENS, None)
  of_mesh = functools.partial(jax.shard_map, mesh=device_mesh)
  if c.mesh.pipe == 1 or c.pipeline.executor == 'uniform':
    step = of_mesh(
      functools.partial(_device_step, c, at), in_specs=(specs, rows, P()), out_specs=(specs, P())
    )
    return jax.jit(step, donate_argnums=0)

  def begin(state: State, tokens_AbX: jax.Array, count: jax.Array) -> mpmd.Held:
    mtp_weight = schedule.mtp_weight(c.objective, _tokens(c, state))
    return mpmd.hold(*pipelined.begin(c, at, state, tokens_AbX, count, mtp_weight))

  def end(state: State, sums: mpmd.Sums, count: jax.Array) -> tuple[State, dict[str, jax.Array]]:
    return _update(c, state, count, *pipelined.end(c, at, *mpmd.added(sums)))

  begin = jax.jit(of_mesh(begin, in_specs=(specs, rows, P()), out_specs=P(AXES)))
  end = of_mesh(end, in_specs=(specs, P(AXES), P()), out_specs=(specs, P()))
  end, streams = jax.jit(end, donate_argnums=0), pipelined.streams(c, device_mesh)
  return lambda state, tokens_ABX, count: end(
    state, streams(begin(state, tokens_ABX, count)), count
  )


def make_gradients(c: config.Config, device_mesh: jax.sharding.Mesh) -> Callable[..., Any]:
  """Jitted (state, tokens_ABX, count) -> (loss, gradients), split like the weights; nothing updated."""
  at = layout(c)
  specs = at.specs(c)

  def run(state: State, tokens_AbX: jax.Array, count: jax.Array) -> Any:
    loss, _, grads = _gradients(c, at, state, tokens_AbX, count)
    return loss, grads

  in_specs = (specs, P(None, TOKENS, None), P())
  return jax.jit(
    jax.shard_map(run, mesh=device_mesh, in_specs=in_specs, out_specs=(P(), specs['params']))
  )


def _device_step(
  c: config.Config, at: Layout, state: State, tokens_AbX: jax.Array, count: jax.Array
) -> tuple[State, dict[str, jax.Array]]:
  return _update(c, state, count, *_gradients(c, at, state, tokens_AbX, count))


def _update(
  c: config.Config, state: State, count: jax.Array, loss: jax.Array, terms: Terms, grads: Any
) -> tuple[State, dict[str, jax.Array]]:
  tokens = _tokens(c, state)
  norm = zero.global_norm(grads)
  rate = schedule.learning_rate(c.optimizer, state['step'], tokens)
  grads = optimizer.clip(c.optimizer, grads, norm)
  params, opt = optimizer.update(
    c.optimizer, grads, state['opt'], state['params'], state['step'], rate
  )
  speed = schedule.bias_speed(c.objective, tokens)
  new = {
    'step': state['step'] + 1,
    'sequences': state['sequences'] + (count * c.batch.micro_size).astype(jnp.uint32),
    'params': params,
    'router_bias': balance.update_bias(state['router_bias'], terms.counts, speed),
    'opt': opt,
  }
  if 'ema' in state:
    decay = c.optimizer.ema_decay
    new['ema'] = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state['ema'], params)
  # ---- metrics -----------------------------------------------------------------------------------
  metrics = {'loss': loss, 'ce': terms.ce, 'balance': terms.balance, 'grad_norm': norm, 'lr': rate}
  metrics['load'] = balance.relative_load(terms.counts)
  if c.model.mtp_depth:
    metrics['mtp'] = jnp.mean(terms.mtp_K)
  halves = 2 if c.model.dual_batch else 1
  rows = c.batch.micro_size // (c.mesh.data * c.mesh.node * c.mesh.local * halves)
  tokens = rows * c.batch.seq_len
  metrics |= dispatch.figures(c.model, terms.traffic, c.mesh, tokens, halves * count)
  return new, metrics


def _gradients(
  c: config.Config, at: Layout, state: State, tokens_AbX: jax.Array, count: jax.Array
) -> tuple[jax.Array, Terms, Any]:
  """Loss and terms of the global batch, the same on all devices, and this device's part of the gradient."""
  placements = zero.by_path(at.placements)
  dtype = recipe.weight_dtype(c.model.precision)
  by_layer = c.mesh.zero == 3
  sequences = count * c.batch.micro_size
  mtp_weight = schedule.mtp_weight(c.objective, _tokens(c, state))
  if c.mesh.pipe > 1:
    return pipelined.gradients(c, at, state, tokens_AbX, count, mtp_weight)

  permutes = c.mesh.zero_permutes
  unshard = zero.by_layer(placements, dtype, permutes) if by_layer else whole

  def loss_fn(params: Any, tokens_bX: jax.Array) -> tuple[jax.Array, Terms]:
    model = at.module(params, state['router_bias'])
    return objective(c, model, tokens_bX, mtp_weight, sequences, unshard=unshard)

  # ---- weights -----------------------------------------------------------------------------------
  # Embedding and head once a step, not once a micro-batch: their gradients add up whole, in FP32, and are
  # scattered once. XLA makes the same of sums in the loop on TPU, where it moves them behind it.
  once = {k: v for k, v in state['params'].items() if not (by_layer and k in STACKS)}
  gathered = zero.gather(once, placements, dtype, permutes=permutes)
  params = vary(state['params'] | gathered, TOKENS)
  # ---- micro-batches -----------------------------------------------------------------------------
  micro = jax.value_and_grad(loss_fn, has_aux=True)
  fp32 = lambda tree: jax.tree.map(lambda g: g.astype(jnp.float32), tree)

  def run(tokens_bX: jax.Array) -> Any:
    (loss, terms), grads = micro(params, tokens_bX)
    return loss, terms, fp32(grads)

  A = tokens_AbX.shape[0]
  if A == 1:
    loss, terms, grads = run(tokens_AbX[0])
  else:
    shapes = jax.eval_shape(run, tokens_AbX[0])
    zeros = vary(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), TOKENS)
    ramps = c.batch.start_size != c.batch.size
    add = lambda a, total: jax.tree.map(jnp.add, total, vary(run(tokens_AbX[a]), TOKENS))
    loss, terms, grads = lax.fori_loop(0, count if ramps else A, add, zeros)
  # ---- sums over devices -------------------------------------------------------------------------
  loss, terms = lax.psum((loss, terms), TOKENS)
  scattered = STACKS if by_layer else ()
  return loss, terms, zero.reduce(grads, placements, scattered=scattered, permutes=permutes)


def _tokens(c: config.Config, state: State) -> jax.Array:
  return state['sequences'].astype(jnp.float32) * c.batch.seq_len
