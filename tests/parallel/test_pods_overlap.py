"""The exchange as compilers for real pods make it: what crosses between nodes, and beside what."""

import dataclasses
import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import parity
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh, pods
from dsv3_jax.codesign import hlo
from dsv3_jax.compat import vary
from dsv3_jax.inference import decode
from dsv3_jax.inference.step import How
from dsv3_jax.mesh import TOKENS
from dsv3_jax.model.moe import Moe
from dsv3_jax.parallel import plan
from dsv3_jax.parallel.pipeline import mpmd
from dsv3_jax.training import pipelined

_HAS_GPU = importlib.util.find_spec('jax_cuda13_plugin') is not None
_HAS_TPU = importlib.util.find_spec('libtpu') is not None
pytestmark = pytest.mark.skipif(not _HAS_GPU, reason='no GPU compiler here (extra [cuda])')
# libtpu serves one process at a time, in which `test_pods.py` is too; a second compiles for GPUs meanwhile.
_OF_GPUS, _OF_TPUS = (pytest.mark.xdist_group(name) for name in ('pods_of_gpus', 'pods'))

# ---- bytes, at the sizes of V3 on 64 GPUs --------------------------------------------------------


def _v3(form: str, payload: str) -> config.Config:
  c = config.default()
  c.model.moe.dispatch.update(form=form, payload=payload)
  c.mesh.update(node=8, local=8, zero=0)
  return config.freeze(c)


@functools.cache
def _collectives(form: str, payload: str) -> list[hlo.Collective]:
  """Of one layer's forward pass; those in a loop are a further round's."""
  c = _v3(form, payload)
  device_mesh = pods.make_mesh(c.mesh, 'h200:8x8')
  ffn = jax.eval_shape(lambda: Moe(c.model, jax.random.key(0)))
  placements = mesh.place(ffn, c.mesh)
  specs = jax.tree.map(
    lambda at: at.spec, placements, is_leaf=lambda x: isinstance(x, mesh.Placement)
  )
  shape = lambda x, spec, dtype: jax.ShapeDtypeStruct(
    x.shape, dtype, sharding=NamedSharding(device_mesh, spec)
  )
  ffn = jax.tree.map(
    lambda x, s: shape(x, s, jnp.bfloat16 if x.ndim > 2 else jnp.float32), ffn, specs
  )
  x_BLD = jax.ShapeDtypeStruct((64, 4096, 7168), jnp.bfloat16)

  def run(ffn: Moe, x_bLD: jax.Array) -> jax.Array:
    return ffn(c.model, x_bLD, vary(jnp.ones(x_bLD.shape[:2], bool), TOKENS))[0]

  mapped = jax.shard_map(run, mesh=device_mesh, in_specs=(specs, P(TOKENS)), out_specs=P(TOKENS))
  lowered = jax.jit(mapped).lower(ffn, shape(x_BLD, P(TOKENS), jnp.bfloat16))
  text = pods.compile(lowered, 'h200:8x8').as_text()
  return hlo.collectives(text, dict(device_mesh.shape))


def _bytes_sent(form: str, payload: str) -> tuple[dict[str, float], dict[str, float]]:
  """Bytes of permutes by axis, of the first round and of a further one."""
  found = _collectives(form, payload)
  return (
    hlo.bytes_by_axis(each for each in found if not each.loops),
    hlo.bytes_by_axis(each for each in found if each.loops),
  )


@_OF_GPUS
@pytest.mark.parametrize(('form', 'payload'), [('two_hop', 'fp8'), ('flat', 'bf16')])
def test_at_v3_s_sizes_a_device_sends_the_bytes_of_the_plan(form, payload):
  expected = plan.make(_v3(form, payload).model.moe, form, 4096, 8, 8).bytes(7168, 'bfloat16')
  # A permute of flat moves along both axes; what counts is what crosses between nodes.
  axes = ('node', 'local') if form == 'two_hop' else ('node',)
  for sent in _bytes_sent(form, payload):
    assert [sent[a] for a in axes] == pytest.approx([expected[a] for a in axes])


@_OF_GPUS
def test_two_hops_in_fp8_send_a_quarter_of_flat_bf16_between_nodes_on_the_way_out():
  back = {'two_hop': 7 * 2560 * 2 * 7168, 'flat': 56 * 640 * 2 * 7168}
  out = {
    f: _bytes_sent(f, p)[0]['node'] - back[f] for f, p in (('two_hop', 'fp8'), ('flat', 'bf16'))
  }
  assert out['two_hop'] == pytest.approx(
    130_314_240
  )  # 411 MB: one row per token and expert, unpadded
  assert out['two_hop'] / out['flat'] < 0.26


@_OF_GPUS
def test_ragged_compiles_to_one_exchange_there_and_one_back_without_permutes():
  found = _collectives('ragged', 'fp8')
  moves = [each for each in found if each.kind == 'ragged-all-to-all' and not each.loops]
  choices, received = 8 * 4096, 40_960  # rows that a device may send; its buffer at capacity 1.25
  assert [each.operand_bytes for each in moves] == [choices * 7272, received * 2 * 7168]
  assert all(each.axes == ('node', 'local') for each in moves)
  assert not any(each.kind == 'collective-permute' for each in found)


# ---- overlap -------------------------------------------------------------------------------------

_PARALLEL = {'xla_gpu_experimental_parallel_collective_overlap_limit': 8}
_SYNCHRONOUS = {'xla_gpu_disable_async_collectives': 'COLLECTIVEPERMUTE'}


def _layers(dual: bool) -> config.Config:
  """A dense layer and a scan over two MoE layers, 2,048 wide, on 2 x 4 GPUs."""
  sizes = {
    'model.precision': 'bf16',
    'model.dual_batch': dual,
    'model.vocab_size': 1024,
    'model.dim': 2048,
    'model.ffn_dim': 4096,
    'model.max_length': 4096,
    'model.mtp_depth': 0,
    'model.mla.num_heads': 16,
    'model.mla.q_rank': 1536,
    'model.mla.kv_rank': 512,
    'model.mla.nope_dim': 128,
    'model.mla.rope_dim': 64,
    'model.mla.v_dim': 128,
    'model.mla.block': 512,
    'model.rope.original_length': 4096,
    'model.moe.num_experts': 32,
    'model.moe.expert_dim': 1024,
    'model.moe.top_k': 4,
    'model.moe.num_groups': 2,
    'model.moe.top_groups': 2,
    'model.moe.dispatch.payload': 'fp8',
    'batch.seq_len': 1024,
    'batch.size': 16,
    'batch.start_size': 16,
    'batch.micro_size': 16,
    'mesh.node': 2,
    'mesh.local': 4,
    'mesh.zero': 0,
  }
  return parity.small(sizes)


@functools.cache
def _permutes(target: str, dual: bool, **options) -> list[hlo.Overlap]:
  """Of forward and backward of the scanned layers; further rounds, loops inside, left out."""
  c = _layers(dual)
  device_mesh = pods.make_mesh(c.mesh, target)
  at = parity.layout(c)
  specs = at.specs(c)

  def run(params, router_bias, tokens_bL):
    def loss(params):
      model = at.module(params, router_bias)
      hidden_bLD, _ = model.hidden(c.model, model.embed(c.model, tokens_bL))
      return jnp.sum(hidden_bLD.astype(jnp.float32) ** 2)

    grads = jax.grad(loss)(vary(params, TOKENS))
    return jax.tree.map(lambda g, at: lax.psum(g, at.copies), grads, at.placements)

  def shape(x, spec):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(device_mesh, spec))

  params = jax.tree.map(shape, at.params, specs['params'])
  bias = jax.tree.map(shape, at.router_bias, specs['router_bias'])
  rows = NamedSharding(device_mesh, P(TOKENS))
  tokens_BL = jax.ShapeDtypeStruct((16, 1024), jnp.int32, sharding=rows)
  in_specs = specs['params'], specs['router_bias'], P(TOKENS)
  mapped = jax.shard_map(run, mesh=device_mesh, in_specs=in_specs, out_specs=specs['params'])
  lowered = jax.jit(mapped).lower(params, bias, tokens_BL)
  return _scanned(pods.compile(lowered, target, **options).as_text(), device_mesh)


def _scanned(text: str, device_mesh: jax.sharding.Mesh) -> list[hlo.Overlap]:
  """Permutes of scanned layers."""
  depth = {each.name: len(each.loops) for each in hlo.collectives(text, dict(device_mesh.shape))}
  found = [each for each in hlo.overlaps(text) if each.kind == 'collective-permute']
  return [each for each in found if depth[each.name] == 1]


def _beside_a_matmul(found: list[hlo.Overlap]) -> float:
  return sum(each.asynchronous and each.matmuls > 0 for each in found) / len(found)


# A TPU shares its links out by itself; its program takes minutes to compile.
_NEEDS_TPU = pytest.mark.skipif(not _HAS_TPU, reason='no libtpu here (extra [tpu])')
_EACH = pytest.mark.parametrize(
  ('target', 'options'),
  [
    pytest.param('h200:2x4', _PARALLEL, marks=_OF_GPUS),
    pytest.param('v5p:2x2x2', {}, marks=[_NEEDS_TPU, _OF_TPUS]),
  ],
  ids=['h200', 'v5p'],
)


@_EACH
def test_with_two_halves_four_fifths_of_all_permutes_stand_beside_a_matmul(target, options):
  found = _permutes(target, True, **options)
  assert (
    len(found) == 2 * 2 * 8
  )  # forward and backward, two halves, a permute or three for each hop
  assert _beside_a_matmul(found) >= 0.8


@_EACH
def test_undivided_rows_hide_clearly_fewer(target, options):
  assert _beside_a_matmul(_permutes(target, False, **options)) < 0.6


@_OF_GPUS
def test_with_asynchrony_switched_off_none_is_hidden():
  assert _beside_a_matmul(_permutes('h200:2x4', True, **_SYNCHRONOUS)) == 0


# ---- generation ----------------------------------------------------------------------------------


@functools.cache
def _generation(target: str, prompt: bool, **options) -> tuple[str, jax.ShapeDtypeStruct]:
  """Program and cache of a chunk of two prompts on each device, or of a token of 32 sequences, in two halves."""
  c = _layers(False)
  how = How(prompt, 0, c.model.vocab_size, dual_batch=True)
  sequences, length = (16, 128) if prompt else (256, 1)
  device_mesh = pods.make_mesh(c.mesh, target)
  traced, _, cache = decode.trace(c.model, device_mesh, how, sequences, length, 1024)
  return pods.compile(traced.lower(), target, **options).as_text(), cache.entries_YPMX


@_EACH
@pytest.mark.parametrize('prompt', [True, False], ids=['prefill', 'decode'])
def test_generation_in_two_halves_hides_four_fifths_of_its_permutes(target, options, prompt):
  text, cache = _generation(target, prompt, **options)
  found = _scanned(text, cache.sharding.mesh)
  assert len(found) == 2 * 8  # out and back of two halves
  assert _beside_a_matmul(found) >= 0.8


@_EACH
def test_a_step_of_decoding_reads_and_writes_its_cache_where_it_lies(target, options):
  """On TPUs 576 values fill no tiles: left to itself an argument has pages for columns, and attention copies all of it."""
  text, cache = _generation(target, False, **options)
  here = ','.join(map(str, cache.sharding.shard_shape(cache.shape)))
  lines = [line for line in text.splitlines() if f' = bf16[{here}]' in line]
  assert any(' parameter(' in line for line in lines)
  assert not [line for line in lines if re.search(r' (copy|copy-start|transpose)\(', line)]


# ---- a forward and a backward of a pipeline, in one program --------------------------------------


def _pair(target: str, **options) -> list[hlo.Overlap]:
  """A rank of two stages of one MoE layer, on 2 x 4 devices: what the F&B program sends, further rounds left out."""
  c = _layers(False)
  c = dataclasses.replace(
    c,
    mesh=dataclasses.replace(c.mesh, pipe=2, zero=1),
    model=dataclasses.replace(c.model, num_dense_layers=0, num_layers=2),
    batch=dataclasses.replace(c.batch, size=64, start_size=64),
  )
  at = parity.layout(c)
  specs = at.specs(c)

  def begin(params, router_bias, tokens_AbX):
    state = {'params': params, 'router_bias': router_bias}
    return mpmd.hold(*pipelined.begin(c, at, state, tokens_AbX, jnp.int32(4), jnp.float32(0)))

  both_ranks = AbstractMesh((2, 1, 2, 4), mesh.AXES, axis_types=(AxisType.Auto,) * 4)
  in_specs = specs['params'], specs['router_bias'], P(None, TOKENS)
  begin = jax.shard_map(begin, mesh=both_ranks, in_specs=in_specs, out_specs=P(mesh.AXES))
  tokens_ABX = jax.ShapeDtypeStruct((4, 16, 1025), jnp.int32)
  held = jax.eval_shape(begin, at.params, at.router_bias, tokens_ABX)
  rank = NamedSharding(pods.make_mesh(dataclasses.replace(c.mesh, pipe=1), target), P(mesh.AXES))
  on_rank = lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((8, *x.shape[1:]), x.dtype, sharding=rank), tree
  )
  held = on_rank(held)
  programs = mpmd._Programs(pipelined.stage(c), held)
  number = on_rank((jax.ShapeDtypeStruct((8,), jnp.int32),) * 2)
  of = lambda route: ((held.routes[route], held.ends), held.given, number)
  sums = on_rank(jax.eval_shape(programs.zeros, held))
  ahead = (*of(0), held.x)
  _, kept, results = on_rank(jax.eval_shape(programs.forward, ahead, sums.results[0]))
  grads = sums.routes[1], sums.ends
  lowered = programs.both.lower((ahead, (*of(1), kept, held.x)), (results, grads))
  text = pods.compile(lowered, target, **options).as_text()
  depth = {each.name: len(each.loops) for each in hlo.collectives(text, dict(rank.mesh.shape))}
  found = [each for each in hlo.overlaps(text) if each.kind == 'collective-permute']
  return [each for each in found if not depth[each.name]]


@_EACH
def test_in_a_pair_four_fifths_of_both_ones_permutes_stand_beside_a_matmul(target, options):
  found = _pair(target, **options)
  assert len(found) == 2 * 8  # forward and backward, out and back, a permute or three for each hop
  assert _beside_a_matmul(found) >= 0.8
