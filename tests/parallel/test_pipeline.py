"""A step on a pipeline, by either executor, is the step: loss, terms, gradients, biases, with experts inside."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import runs
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, lowering, mesh
from dsv3_jax.compat import vary
from dsv3_jax.mesh import AXES
from dsv3_jax.model import transformer
from dsv3_jax.parallel.pipeline import mpmd, stages
from dsv3_jax.parallel.pipeline.split import split
from dsv3_jax.training import pipelined
from dsv3_jax.training import state as training_state
from dsv3_jax.training.checkpoint import Checkpointer
from dsv3_jax.training.step import make_step

pytestmark = pytest.mark.xdist_group('pipeline')
_MICRO = 10  # of which the ramp lets fewer count
_SIZES = {
  'model.vocab_size': 256,
  'model.moe.dispatch.form': 'two_hop',
  'model.moe.dispatch.capacity': 0.6,  # several rounds, other ones on each rank
  'batch.size': 4 * _MICRO,
  'batch.start_size': 4,
  'batch.micro_size': 4,
  'optimizer.ema_decay': 0.0,
  'optimizer.warmup_steps': 0,
  'objective.balance_alpha': 0.01,
}
# By the axes pipe, node, local, data. The first has stages of one and of two blocks, one with a layer of
# each kind, and the MTP module alone in the last; the second ends in the main model's head. Programs for every
# rank take long to compile: the other executor's stages are a block each, and two ranks `test_processes.py`'s.
_UNIFORM = {
  (4, 2, 2, 1): {'num_layers': 4, 'num_dense_layers': 2, 'remat': 'latents'},
  (2, 1, 1, 2): {'num_layers': 3, 'num_dense_layers': 1, 'mtp_depth': 0, 'remat': 'none'},
}
_MPMD = {(4, 2, 1, 1): {'num_layers': 3, 'num_dense_layers': 0, 'remat': 'none'}}
_FP8 = (2, 1, 1, 1)
_MODELS = _UNIFORM | _MPMD
_MODELS[_FP8] = {'num_layers': 2, 'num_dense_layers': 1, 'mtp_depth': 0, 'precision': 'fp8'}
_EACH = pytest.mark.parametrize('shape', _UNIFORM, ids=str)


def _config(
  shape: tuple[int, ...], model: tuple[int, ...], executor: str = 'uniform'
) -> config.Config:
  """The model of one of the shapes on the mesh of any."""
  changes = {f'model.{key}': value for key, value in _MODELS[model].items()}
  axes = ('pipe', 'node', 'local', 'data')
  changes |= {f'mesh.{axis}': size for axis, size in zip(axes, shape, strict=True)}
  return parity.small(_SIZES | changes | {'pipeline.executor': executor})


_streams: dict[tuple[int, ...], mpmd.Streams] = {}


@functools.cache
def _program(shape: tuple[int, ...], model: tuple[int, ...], executor: str) -> Any:
  c = _config(shape, model, executor)

  def streams(*arguments: Any) -> mpmd.Streams:
    return _streams.setdefault(shape, make(*arguments))

  with pytest.MonkeyPatch.context() as patch:
    make = pipelined.streams
    patch.setattr(pipelined, 'streams', streams)
    return make_step(c, mesh.make_mesh(c.mesh))


@functools.cache
def _step(
  count: int, shape: tuple[int, ...], model: tuple[int, ...], executor: str = 'uniform'
) -> dict[str, Any]:
  """Metrics, first moments (the gradients, scaled) and biases after one step, on the host; the state."""
  c = _config(shape, model)
  state = runs.place(c, parity.random_state(c))
  tokens_ABX = np.random.default_rng(1).integers(0, 256, (_MICRO, 4, 33), np.int32)
  step = _program(shape, model, executor)
  on = lambda *spec: NamedSharding(mesh.make_mesh(c.mesh), P(*spec))
  rows_ABX = jax.device_put(tokens_ABX, on(None, mesh.TOKENS))
  count = jax.device_put(np.int32(count), on())
  with jax.transfer_guard('disallow'):  # as the trainer does
    state, metrics = step(state, rows_ABX, count)
  found = {'gradients': state['opt']['mu'], 'bias': state['router_bias'], 'metrics': metrics}
  return runs.to_numpy(found) | {'state': state}


@pytest.mark.parametrize(
  ('shape', 'executor'),
  [*((shape, 'uniform') for shape in _UNIFORM), *((shape, 'mpmd') for shape in _MPMD)],
)
@pytest.mark.parametrize('count', [_MICRO, 5])
def test_terms_gradients_and_biases_are_those_of_the_step_without_a_pipeline(
  shape, executor, count
):
  got, expected = _step(count, shape, shape, executor), _step(count, (1, *shape[1:]), shape)
  # With jax 0.12 one norm's gradient is 1.0e-6 off by mpmd, just above what all others keep.
  parity.assert_close(
    got['gradients'], expected['gradients'], 1e-6 if executor == 'uniform' else 2e-6
  )
  parity.assert_same_bits(got['bias'], expected['bias'])
  parity.assert_same_bits(got['metrics']['load'], expected['metrics']['load'])
  for name in expected['metrics'].keys() - {'load'}:
    parity.assert_close(got['metrics'][name], expected['metrics'][name], 1e-6)
  assert {'loss', 'ce', 'balance', 'grad_norm'} <= expected['metrics'].keys()
  assert ('mtp' in got['metrics']) == (shape[0] == 4)
  if shape[1] > 1:
    assert got['metrics']['rounds'] > 1
  if executor == 'mpmd':
    assert _streams[shape].live == shape[0] + 1


def test_executors_agree_to_the_bit_in_fp8_and_with_the_step_without_a_pipeline():
  by_uniform, by_mpmd = (_step(_MICRO, _FP8, _FP8, name) for name in ('uniform', 'mpmd'))
  for what in ('gradients', 'bias'):
    parity.assert_same_bits(by_uniform[what], by_mpmd[what])
  parity.assert_close(by_uniform['metrics'], by_mpmd['metrics'], 1e-7)
  expected = _step(_MICRO, (1, *_FP8[1:]), _FP8)
  for what in ('gradients', 'bias'):
    parity.assert_close(by_mpmd[what], expected[what], 1e-6)
  assert abs(by_mpmd['metrics']['loss'] / expected['metrics']['loss'] - 1) < 1e-6


@_EACH
def test_every_device_keeps_and_updates_a_part_that_no_other_has_a_copy_of(shape):
  opt = _step(_MICRO, shape, shape)['state']['opt']
  for name, x in parity.named_leaves(opt):
    if len(name.rpartition('_')[2]) > 1:
      assert all(s.data.size * shape[0] <= x.size for s in x.addressable_shards), name


@_EACH
def test_both_ranks_of_a_stage_hold_its_layers_to_the_bit(shape):
  c = _config(shape, shape)
  at, s = training_state.layout(c), pipelined.arrange(c)

  def run(params: Any) -> Any:
    routes, _ = pipelined.weights_of(c, at, params, pipelined.holdings(c, s))
    return vary(routes['shared']['attn']['kv_down_DC'], AXES)[None]

  program = jax.shard_map(
    run, mesh=mesh.make_mesh(c.mesh), in_specs=(at.specs(c)['params'],), out_specs=P(AXES)
  )
  state = parity.random_state(c)
  held = np.asarray(jax.jit(program)(runs.place(c, state)['params']))
  held = held.reshape(shape[0], -1, *held.shape[1:])  # rank, its devices, route, place
  blocks = [state['params'][k]['attn']['kv_down_DC'] for k in ('dense_layers', 'moe_layers')]
  if c.model.mtp_depth:
    blocks.append(state['params']['mtp']['block']['attn']['kv_down_DC'])
  blocks = np.concatenate(blocks)
  for (stage, place), block in np.ndenumerate(s.blocks):
    if block != stages.NOTHING:
      for copy in (*held[stage, :, 0, place], *held[-1 - stage, :, 1, place]):
        np.testing.assert_array_equal(copy, blocks[block])


@pytest.mark.parametrize('precision', ['fp32', 'fp8'])
def test_backward_in_two_parts_is_the_backward_and_its_weight_part_sends_nothing(precision):
  """The real block: experts on two devices, FP8 on the wire, rematerialised.

  Experts' gradients of weights are one loop, three in FP8, and in the weight part.
  """
  changes = {'mesh.node': 2, 'model.moe.dispatch.form': 'flat', 'model.moe.dispatch.payload': 'fp8'}
  c = parity.small(changes | {'model.remat': 'latents', 'model.precision': precision}).model
  make = lambda: transformer.Block(c, jax.random.key(0), dense=False)
  params, bias = training_state.split(make())
  graph = nnx.graphdef(jax.eval_shape(make))
  x_BLD, dy_BLD = jax.random.normal(jax.random.key(1), (2, 4, 24, c.dim))
  seen = {}

  def f(params: Any, bias: Any, x_BLD: jax.Array) -> Any:
    def run(params: Any, x_BLD: jax.Array) -> Any:
      block = nnx.merge(graph, *training_state.variables(params, bias))
      return block(c, x_BLD, jnp.ones(x_BLD.shape[:2], bool))

    y_BLD, routing = transformer.remat(c, run, scanned=False)(params, x_BLD)
    return (y_BLD, routing.balance), routing.counts_E

  def both(params: Any, bias: Any, x_BLD: jax.Array, dy_BLD: jax.Array) -> Any:
    params, bias, x_BLD, dy_BLD = vary((params, bias, x_BLD, dy_BLD), AXES)
    parts = split(f, params, bias, x_BLD)
    (y_BLD, balance), counts_E, kept = parts.forward(params, bias, x_BLD)
    kept, dys = vary(kept, AXES), (dy_BLD, jnp.ones_like(balance))  # as slots give them back
    dx_BLD, crossing = parts.input(params, bias, kept, dys)
    got = y_BLD, counts_E, parts.weight(params, bias, kept, crossing), dx_BLD
    (y_BLD, _), pull, counts_E = jax.vjp(lambda p, x: f(p, bias, x), params, x_BLD, has_aux=True)
    seen['parts'] = [str(p.equations) for p in (parts._input, parts._weight)]
    loops = [e for e in parts._weight.equations if e.primitive.name == 'scan']
    seen['loops'] = [[v.aval.shape for v in e.outvars] for e in loops]
    seen['whole'] = str(jax.make_jaxpr(lambda dys: pull(dys))(dys))
    seen['kept'] = [k.shape for k in kept]
    return jax.tree.map(lambda x: x[None], (got, (y_BLD, counts_E, *pull(dys))))

  spec = lambda p: P(mesh.EXPERTS) if p.ndim == 3 and len(p) == c.moe.num_experts else P()
  in_specs = (jax.tree.map(spec, params), P(), P('node'), P('node'))
  program = jax.shard_map(
    both, mesh=mesh.make_mesh(config.Mesh(node=2)), in_specs=in_specs, out_specs=P(AXES)
  )
  got, expected = runs.to_numpy(jax.jit(program)(params, bias, x_BLD, dy_BLD))
  parity.assert_same_bits(got[1], expected[1])
  parity.assert_close(got, expected, 1e-6)
  (of_input, of_weight), sent = seen['parts'], ('ppermute', 'psum', 'all_gather', 'reduce_scatter')
  assert 'ppermute' in of_input and not any(name in of_weight for name in sent)
  dots = [text.count(' = dot_general[') for text in (of_input, of_weight, seen['whole'])]
  # The loops over experts of the first round; further ones are exchanges, and stay whole.
  assert len(seen['loops']) == (3 if precision == 'fp8' else 1), "experts' gradients do not wait"
  if precision == 'fp32':
    gate = (c.moe.num_experts // 2, c.dim, c.moe.expert_dim)
    assert [outs.count(gate) for outs in seen['loops']] == [2]
  assert min(dots) > 0 and dots[0] + dots[1] == dots[2], 'something is computed twice'
  weights = {x.shape for x in jax.tree.leaves(params) if x.ndim > 1}
  assert not weights & set(seen['kept'])


def test_a_checkpoint_of_a_pipe_restores_on_any_other(tmp_path):
  shape = (4, 2, 2, 1)
  c = _config(shape, shape)
  state = runs.place(c, parity.random_state(c))
  with Checkpointer(str(tmp_path), config.Checkpoint()) as checkpointer:
    checkpointer.save(1, state, {})
    checkpointer.wait()
    for other in ((1, 1, 1, 1), (2, 2, 1, 2)):
      c = _config(other, shape)
      restored = checkpointer.restore(training_state.abstract(c, mesh.make_mesh(c.mesh)))
      parity.assert_same_bits(runs.to_numpy(restored.state), runs.to_numpy(state))


@pytest.mark.parametrize(
  ('sizes', 'told'),
  [
    ((1, 2, 0, 4), '4 stages for 3 blocks .*: must be at most 2'),
    ((1, 4, 2, 4), '4 stages with 2 MTP modules, .*: must be at most 2'),
  ],
)
def test_blocks_that_do_not_fill_the_stages_say_what_would(sizes, told):
  with pytest.raises(ValueError, match=told):
    stages.arrange(*sizes)


def test_a_step_of_many_programs_is_not_lowered_as_one():
  shape = next(iter(_MPMD))
  c = _config(shape, shape, 'mpmd')
  with pytest.raises(config.ConfigError, match=r"pipeline.executor = 'mpmd': must be 'uniform'"):
    lowering.train(c, mesh.make_mesh(c.mesh))


def test_v3_stands_on_sixteen_ranks_in_stages_of_three_and_four_blocks():
  s = stages.arrange(3, 58, 1, 16)
  assert [int((row >= 0).sum()) for row in s.blocks] == [3] + [4] * 14 + [3]
  assert list(s.blocks[0]) == [0, 1, 2, -1] and list(s.blocks[-1]) == [59, 60, 61, -1]
  assert [s.may_be_dense(j) for j in range(4)] == [True] * 3 + [False]
