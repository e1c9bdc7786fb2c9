"""Devices of pods that are not here: what a target may say, and programs compiled for some."""

import functools
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh, pods
from dsv3_jax.codesign import hlo
from dsv3_jax.parallel import zero

_HAS_TPU = importlib.util.find_spec('libtpu') is not None
_HAS_GPU = importlib.util.find_spec('jax_cuda13_plugin') is not None
needs_tpu = pytest.mark.skipif(not _HAS_TPU, reason='no libtpu here (extra [tpu])')
needs_gpu = pytest.mark.skipif(not _HAS_GPU, reason='no GPU compiler here (extra [cuda])')
# libtpu serves one process at a time: all in one worker.
pytestmark = pytest.mark.xdist_group('pods')


@pytest.mark.parametrize(
  ('target', 'name', 'shape', 'slices'),
  [
    ('v5p:8x16x16', 'v5p', (8, 16, 16), 1),
    ('v5e:2x4,slices=2', 'v5e', (2, 4), 2),
    ('tpu7x:2x2x1', 'tpu7x', (2, 2, 1), 1),
    ('h200:256x8', 'h200', (256, 8), 1),
  ],
)
def test_a_target_reads_as_its_parts_and_writes_itself(target, name, shape, slices):
  pod = pods.parse(target)
  assert (pod.name, pod.shape, pod.slices) == (name, shape, slices)
  assert str(pod) == target


@pytest.mark.parametrize(
  'target', ['v5p', 'v5p:', 'v5p:4x', 'v5p:0x4', 'v5e:2x4,slices=0', 'v5e 2x4']
)
def test_a_target_of_another_form_is_refused_with_two_right_ones(target):
  with pytest.raises(config.ConfigError, match=r'write NAME:SHAPE .* like v5p:4x4x4 or h200:8x8'):
    pods.parse(target)


def test_an_unknown_name_is_refused_with_those_that_are_known():
  with pytest.raises(config.ConfigError, match='h100 is none of v5e, v5p, v6e, tpu7x, h200'):
    pods.parse('h100:8x8')


@pytest.mark.parametrize('target', ['h200:8', 'h200:2x2x2', 'h200:2x8,slices=2'])
def test_gpus_are_given_as_hosts_by_gpus(target):
  with pytest.raises(config.ConfigError, match='GPUs are hosts x GPUs'):
    pods.parse(target)


@pytest.mark.parametrize(('target', 'extra'), [('v5e:2x4', 'tpu'), ('h200:1x8', 'cuda')])
def test_a_missing_compiler_is_told_with_the_extra_that_brings_it(target, extra, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(config.ConfigError, match=rf'pip install "dsv3_jax\[{extra}\]"'):
    pods.devices(target)


# ---- with compilers ------------------------------------------------------------------------------


@needs_tpu
@pytest.mark.parametrize(
  ('target', 'count'), [('v5e:2x4', 8), ('v5p:4x4x4', 64), ('v6e:2x4', 8), ('tpu7x:2x2x1', 8)]
)
def test_every_tpu_has_its_devices(target, count):
  assert len(pods.devices(target)) == count


@needs_tpu
def test_a_shape_that_no_tpu_has_is_refused_in_the_words_of_libtpu():
  with pytest.raises(config.ConfigError, match=r'target = v5e:3x5: .*3x5'):
    pods.devices('v5e:3x5')


@needs_tpu
def test_inner_axes_are_neighbours_on_the_torus():
  grid = pods.make_mesh(config.Mesh(node=8, local=8), 'v5p:4x4x4').devices
  for row in grid.reshape(8, 8):
    spans = [len({chip.coords[d] for chip in row}) for d in range(3)]
    assert sorted(spans) == [1, 2, 4], spans


@needs_tpu
def test_slices_lie_along_the_outermost_axis():
  grid = pods.make_mesh(config.Mesh(data=4, local=4), 'v5e:2x4,slices=2').devices
  assert [{chip.slice_index for chip in row.flat} for row in grid[0]] == [{0}, {0}, {1}, {1}]


@needs_tpu
def test_an_outermost_axis_that_slices_do_not_divide_is_refused():
  with pytest.raises(config.ConfigError, match=r'mesh\.data = 2: .* divisible by 4 slices'):
    pods.make_mesh(config.Mesh(data=2, local=8), 'v5e:2x2,slices=4')


@needs_gpu
def test_gpus_come_host_by_host():
  grid = pods.make_mesh(config.Mesh(node=2, local=4), 'h200:2x4').devices
  assert [{gpu.process_index for gpu in row} for row in grid[0, 0]] == [{0}, {1}]


@needs_gpu
def test_a_mesh_that_does_not_fill_the_pod_is_refused():
  with pytest.raises(config.ConfigError, match='= 4 devices: h200:2x4 has 8'):
    pods.make_mesh(config.Mesh(node=2, local=2), 'h200:2x4')


@functools.cache
def _hops(target: str, **options: int | str) -> str:
  """A permute over each of node and local, beside a product that needs neither."""
  grid = pods.make_mesh(config.Mesh(node=2, local=4), target)

  def hops(x_TD, w_DD):
    y_TD = lax.ppermute(x_TD, 'node', [(0, 1), (1, 0)])
    h_TD = jnp.tanh(w_DD @ w_DD)
    y_TD = lax.ppermute(jnp.tanh(y_TD), 'local', [(i, (i + 1) % 4) for i in range(4)])
    return y_TD, h_TD @ w_DD

  spec = P(mesh.TOKENS)
  step = jax.shard_map(hops, mesh=grid, in_specs=(spec, P()), out_specs=(spec, P()))
  shape = lambda n, p: jax.ShapeDtypeStruct(
    (n, 2048), jnp.bfloat16, sharding=NamedSharding(grid, p)
  )
  lowered = jax.jit(step).lower(shape(8 * 4096, spec), shape(2048, P()))
  return pods.compile(lowered, target, **options).as_text()


_POD = pytest.mark.parametrize(
  'target', [pytest.param('v5e:2x4', marks=needs_tpu), pytest.param('h200:2x4', marks=needs_gpu)]
)


@_POD
def test_a_program_for_a_pod_sends_what_it_says_over_the_axes_it_names(target):
  sizes = dict(zip(mesh.AXES, (1, 1, 2, 4), strict=True))
  row = 4096 * 2048 * 2
  assert hlo.bytes_by_axis(hlo.collectives(_hops(target), sizes)) == {'node': row, 'local': row}


@_POD
def test_a_product_that_depends_on_no_permute_is_scheduled_beside_one(target):
  assert any(each.asynchronous and each.matmuls for each in hlo.overlaps(_hops(target)))


@_POD
def test_a_program_for_a_pod_is_kept_in_no_cache_where_it_could_not_be_read_back(target, tmp_path):
  settings = 'jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs'
  before = [getattr(jax.config, key) for key in settings]
  for key, value in zip(settings, (str(tmp_path), 0.0), strict=True):
    jax.config.update(key, value)
  try:
    compilation_cache.reset_cache()
    _hops.__wrapped__(target)
    _hops.__wrapped__(target)  # would warn
    jax.jit(lambda x: x + 3)(1.0)
    kept = [path.name for path in tmp_path.iterdir()]
    assert any('lambda' in name for name in kept) and not any('hops' in name for name in kept)
  finally:
    for key, value in zip(settings, before, strict=True):
      jax.config.update(key, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize(
  ('target', 'option', 'off'),
  [
    pytest.param('v5e:2x4', 'xla_enable_async_collective_permute', 'false', marks=needs_tpu),
    pytest.param(
      'h200:2x4', 'xla_gpu_disable_async_collectives', 'COLLECTIVEPERMUTE', marks=needs_gpu
    ),
  ],
)
def test_with_asynchronous_permutes_switched_off_nothing_is_beside_them(target, option, off):
  found = hlo.overlaps(_hops(target, **{option: off}))
  assert found and not any(each.asynchronous or each.matmuls for each in found)


def _gathers(target: str, permutes: int) -> list[hlo.Overlap]:
  """Forward and backward of layers whose last weight is split."""
  grid = pods.make_mesh(config.Mesh(data=8), target)
  placements = {('w_AB',): mesh.Placement(2, None, 0, ('data',))}

  def layer(x_TD, w_dD, v_DD):
    w_DD = zero.gather({'w_AB': w_dD}, placements, w_dD.dtype, permutes=permutes)['w_AB']
    for _ in range(4):
      x_TD = jnp.tanh(x_TD @ v_DD)
    return jnp.tanh(x_TD @ w_DD)

  def loss(w_YdD, x_TD, v_DD):
    body = lambda x_TD, w_dD: (jax.checkpoint(layer)(x_TD, w_dD, v_DD), None)
    return jnp.sum(lax.scan(body, x_TD, w_YdD)[0].astype(jnp.float32))

  split = P(None, 'data')
  in_specs = split, P('data'), P()
  mapped = jax.shard_map(jax.grad(loss), mesh=grid, in_specs=in_specs, out_specs=split)
  sizes = (6, 4096, 4096), (8 * 2048, 4096), (4096, 4096)
  shapes = [
    jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=NamedSharding(grid, spec))
    for size, spec in zip(sizes, in_specs, strict=True)
  ]
  return hlo.overlaps(pods.compile(jax.jit(mapped).lower(*shapes), target).as_text())


@needs_tpu
def test_weights_gathered_and_scattered_by_permutes_have_products_beside_them_on_v5p():
  found = _gathers('v5p:2x2x2', 1)
  assert [each.kind for each in found] == 9 * ['collective-permute']  # there, again, and back
  assert all(each.asynchronous and each.matmuls for each in found)


@needs_tpu
def test_by_collectives_they_wait_on_v5p():
  found = _gathers('v5p:2x2x2', 0)
  assert len(found) == 3 and not any(each.asynchronous for each in found)


_ROWS = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from dsv3_jax import config, pods
mesh = pods.make_mesh(config.Mesh(data=8), 'tpu7x:2x2x1')
shape = lambda dtype, *s: jax.ShapeDtypeStruct(s, dtype, sharding=NamedSharding(mesh, P('data')))
def run(x, i, w):
  return x[i] @ jax.lax.all_gather(w, 'data', axis=0, tiled=True)
run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P('data'), out_specs=P('data')))
x, i = shape(jnp.bfloat16, 8 * 35328, 7168), shape(jnp.int32, 8 * 18432)
lowered = run.lower(x, i, shape(jnp.bfloat16, 7168, 7168))
assert 'sparsecore' not in pods.compile(lowered, 'tpu7x:2x2x1').as_text()

layers = shape(jnp.bfloat16, 8 * 8, 7168, 2048)
run = lambda x, ws: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, ws)[0]
run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=P('data'), out_specs=P('data')))
memory = pods.compile(run.lower(shape(jnp.bfloat16, 64, 7168), layers), 'tpu7x:2x2x1').memory_analysis()
assert memory.temp_size_in_bytes < 7168 * 2048 * 2  # not one layer is copied, as all are where tiles differ
"""


@needs_tpu
def test_with_the_launchers_flags_tpu7x_gathers_rows_without_sparse_core_and_copies_no_layers():
  """Without them one libtpu aborts, and another compiles a program for each gather; and loops copy their stacks."""
  environment = os.environ | {'PLATFORM': 'tpu7x', 'ALLOW_MULTIPLE_LIBTPU_LOAD': '1'}
  command = '. launch/environment.sh && exec "$@"', 'bash', sys.executable, '-c', _ROWS
  root = pathlib.Path(__file__).parents[1]
  environment['PYTHONPATH'] = str(root)
  subprocess.run(['bash', '-c', *command], check=True, timeout=300, env=environment, cwd=root)


@needs_gpu
def test_without_a_choice_of_backend_jax_itself_stays_on_the_cpu():
  code = 'import jax; from dsv3_jax import pods; pods.devices("h200:2x4")\n'
  code += 'assert {d.platform for d in jax.devices()} == {"cpu"}'
  environment = {k: v for k, v in os.environ.items() if k != 'JAX_PLATFORMS'}
  subprocess.run([sys.executable, '-c', code], check=True, timeout=100, env=environment)


@needs_tpu
def test_a_second_process_is_told_that_libtpu_is_taken():
  pods.devices('v5e:2x4')
  code = 'from dsv3_jax import pods; pods.devices("v5e:2x4")'
  ran = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=100)
  assert 'ConfigError: target = v5e:2x4: another process uses libtpu' in ran.stderr
