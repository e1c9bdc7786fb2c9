"""Mosaic GPU kernels at the model's shapes, lowered and compiled for an H200: no spills, FP8 tensor cores."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, lowering, pods
from dsv3_jax.kernels import e5m6, hopper, logfmt, tiles
from dsv3_jax.kernels.fp8_matmul import fp8_matmul
from dsv3_jax.kernels.fp8_wgrad import fp8_wgrad
from dsv3_jax.kernels.grouped_matmul import grouped_matmul, masked_matmul
from dsv3_jax.kernels.grouped_wgrad import grouped_wgrad
from dsv3_jax.kernels.mla_decode import mla_decode
from dsv3_jax.kernels.quantize import (
  quantize_blocks,
  quantize_tiles,
  quantize_tiles_transposed,
  requantize_transposed,
)
from dsv3_jax.kernels.swiglu_quantize import swiglu_backward, swiglu_quantize

pytestmark = [
  pytest.mark.xdist_group('pods'),
  pytest.mark.skipif(
    importlib.util.find_spec('jax_cuda13_plugin') is None, reason='no GPU compiler (extra [cuda])'
  ),
  pytest.mark.skipif(not hopper.AVAILABLE, reason='kernels for Hopper need jax 0.11, Python 3.12'),
]

F32, BF16, I32 = jnp.float32, jnp.bfloat16, jnp.int32
TARGET = 'h200:1x1'


def _codes(*shape):
  *lead, dim = shape
  return (shape, jnp.float8_e4m3fn), ((*lead, tiles.count(dim)), F32)


def _blocks(*shape):
  *lead, rows, columns = shape
  return (shape, jnp.float8_e4m3fn), ((*lead, tiles.count(rows), tiles.count(columns)), F32)


@pytest.fixture
def compiled(tmp_path, monkeypatch):
  """Compiles `op(*shapes, **options)` for an H200 -> (PTX, the assembler's report)."""
  for name, value in (('TO', str(tmp_path)), ('PTX', '1'), ('PTXAS', '1')):
    monkeypatch.setenv(f'MOSAIC_GPU_DUMP_{name}', value)

  def compile_(op, *shapes, **options):
    mesh = jax.sharding.Mesh(np.array(pods.devices(TARGET)), ('x',), axis_types=(AxisType.Auto,))
    arrays = [
      None if s is None else jax.ShapeDtypeStruct(*s, sharding=NamedSharding(mesh, P()))
      for s in shapes
    ]
    # Under the mesh nothing is named: `implementation=None` has to find the kernel on its own.
    with jax.set_mesh(mesh):
      traced = jax.jit(lambda *arrays: op(*arrays, **options)).trace(*arrays)
      lowered = traced.lower(lowering_platforms=('cuda',))
    assert 'mosaic_gpu' in lowered.as_text()
    pods.compile(lowered, TARGET)
    read = lambda ending: ''.join(p.read_text() for p in sorted(tmp_path.glob(f'*.{ending}')))
    return read('ptx'), read('ptxas')

  return compile_


def _assert_no_spills(report):
  found = re.findall(r'(\d+) bytes spill stores, (\d+) bytes spill loads', report)
  assert found and all(each == ('0', '0') for each in found), report


@pytest.mark.parametrize(
  ('op', 'shapes', 'options'),
  [
    (fp8_matmul, (*_codes(4096, 7168), *_blocks(4096, 7168)), {}),
    (fp8_matmul, (*_codes(4096, 7168), *_blocks(2112, 7168)), {}),
    (fp8_matmul, (*_codes(64, 7168), *_blocks(4096, 7168)), {}),
    (fp8_matmul, (*_codes(4096, 2112), *_blocks(7168, 2112)), {'out_dtype': F32}),
    (fp8_wgrad, (*_codes(4096, 4096), *_codes(7168, 4096)), {'accumulate': None}),
    (fp8_wgrad, (*_codes(2112, 4096), *_codes(7168, 4096)), {'accumulate': ((2112, 7168), F32)}),
    (grouped_matmul, (*_codes(8192, 7168), *_blocks(8, 4096, 7168), ((8,), I32)), {}),
    (masked_matmul, (*_codes(4, 256, 2048), *_blocks(4, 7168, 2048), ((4,), I32)), {}),
    (
      grouped_wgrad,
      (*_codes(4096, 8192), *_codes(7168, 8192), ((8,), I32)),
      {'accumulate': ((8, 4096, 7168), F32)},
    ),
  ],
  ids=lambda x: getattr(x, '__name__', '') or '-',
)
def test_a_product_has_fp8_tensor_cores_and_no_spills(op, shapes, options, compiled):
  added = options.get('accumulate')
  if added is not None:
    run = lambda *arrays: op(*arrays[:-1], accumulate=arrays[-1])
    ptx, report = compiled(run, *shapes, added)
  else:
    ptx, report = compiled(op, *shapes, **options)
  _assert_no_spills(report)
  assert re.search(r'wgmma\.mma_async\.\S*\.f32\.e4m3\.e4m3', ptx)


@pytest.mark.parametrize(
  ('rows', 'queries', 'heads', 'pages'),
  [(128, 1, 128, 512), (8, 3, 16, 5), (1, 200, 128, 2048)],
  ids=['a page of rows', 'drafts, pages split', 'a chunk of a prompt'],
)
def test_attention_over_pages_has_tensor_cores_and_no_spills(rows, queries, heads, pages, compiled):
  attend = lambda *x: mla_decode(*x, rank=512, scale=0.1)
  q, cache = ((rows, queries, heads, 576), BF16), ((1000, 64, 576), BF16)
  ptx, report = compiled(attend, q, cache, ((rows, pages), I32), ((rows, queries), I32))
  _assert_no_spills(report)
  of_width = lambda n: rf'wgmma\.mma_async\.\S*\.m64n{n}k16\.f32\.bf16\.bf16'
  assert len(re.findall(of_width(64), ptx)) == 576 // 16
  assert len(re.findall(of_width(256), ptx)) == 64 // 16


_ROWS = (4096, 2048), BF16


def _decode_e5m6(codes, scale):
  return e5m6.decode(codes, scale, 16384, BF16)


def _encode_logfmt(x):
  return logfmt.encode(x, 10)


def _decode_logfmt(codes, low, high):
  return logfmt.decode(codes, low, high, 10, BF16)


@pytest.mark.parametrize(
  ('op', 'shapes'),
  [
    (quantize_tiles, [((4096, 7168), BF16)]),
    (quantize_tiles_transposed, [((4096, 7168), BF16)]),
    (quantize_blocks, [((8, 4096, 7168), BF16)]),
    (requantize_transposed, _codes(4096, 7168)),
    (swiglu_quantize, [_ROWS, _ROWS, ((4096,), F32)]),
    (swiglu_backward, [_ROWS, _ROWS, _ROWS, ((4096,), F32)]),
    (e5m6.encode, [((4096, 16384), BF16)]),
    (_decode_e5m6, [((4096, 16384 // 2 * 3), jnp.uint8), ((4096, 128), F32)]),
    (_encode_logfmt, [((4096, 7168), BF16)]),
    (_decode_logfmt, [((4096, 7168), jnp.uint16), *[((4096, 56), BF16)] * 2]),
  ],
  ids=lambda x: getattr(x, '__name__', '-'),
)
def test_what_is_done_element_by_element_spills_nothing(op, shapes, compiled):
  _, report = compiled(op, *shapes)
  _assert_no_spills(report)


def test_an_fp8_train_step_on_a_mesh_is_made_of_these_kernels():
  c = config.debug(config.default())
  c.update_from_flattened_dict({'model.precision': 'fp8', 'mesh.node': 2, 'mesh.local': 4})
  c = config.freeze(c)
  step = lowering.train(c, pods.make_mesh(c.mesh, 'h200:2x4')).traced
  named = set(re.findall(r'\bname=(\w+)', str(step.jaxpr)))
  expected = {
    'fp8_matmul', 'fp8_wgrad', 'grouped_matmul', 'grouped_wgrad', 'quantize_tiles',
    'quantize_tiles_transposed', 'requantize_transposed', 'quantize_blocks', 'swiglu_quantize',
    'swiglu_backward', 'encode', 'decode',  # the last two of e5m6
  }  # fmt: skip
  assert named >= expected, expected - named
