"""Kernels for TPU, compiled at sizes of V3 for chips that are not here, inside shard_map."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, lowering, pods
from dsv3_jax.kernels import choice, e5m6, logfmt
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

# libtpu serves one process at a time: all in one worker.
pytestmark = [
  pytest.mark.xdist_group('pods'),
  pytest.mark.skipif(
    importlib.util.find_spec('libtpu') is None, reason='no libtpu here (extra [tpu])'
  ),
]

_E4M3, _BF16, _F32, _I32 = 'float8_e4m3fn', 'bfloat16', 'float32', 'int32'
_SLOTS, _EXPERTS = 4096 + 8 * 128, 8


def _tiles(*shape: int):
  return (shape, _E4M3), ((*shape[:-1], -(-shape[-1] // 128)), _F32)


def _blocks(*shape: int):
  n, k = (-(-size // 128) for size in shape[-2:])
  return (shape, _E4M3), ((*shape[:-2], n, k), _F32)


def _attention(rows: int, queries: int, heads: int, pages: int, entry=(576, _BF16)):
  """Queries over 1,000 pages of V3's cache."""
  return (
    functools.partial(mla_decode, rank=512, scale=0.1),
    ((rows, queries, heads, 576), _BF16),
    ((1000, 64, entry[0]), entry[1]),
    ((rows, pages), _I32),
    ((rows, queries), _I32),
  )


_SIZES_E = ((_EXPERTS,), _I32)
_CASES = {
  'quantize_tiles': (quantize_tiles, ((4096, 7168), _BF16)),
  'quantize_tiles, widest': (quantize_tiles, ((4096, 18432), _F32)),
  'quantize_tiles, exact, ragged': (
    functools.partial(quantize_tiles, power_of_two=False),
    ((1000, 2112), _F32),
  ),
  'quantize_blocks': (quantize_blocks, ((18432, 7168), _BF16)),
  'quantize_blocks, experts, ragged': (quantize_blocks, ((2, 2112, 7168), _F32)),
  'quantize_tiles_transposed': (quantize_tiles_transposed, ((4096, 7168), _BF16)),
  'quantize_tiles_transposed, ragged': (quantize_tiles_transposed, ((1000, 2112), _F32)),
  'requantize_transposed': (requantize_transposed, *_tiles(4096, 7168)),
  'requantize_transposed, ragged': (requantize_transposed, *_tiles(1000, 2112)),
  'swiglu_quantize': (swiglu_quantize, *[((4096, 18432), _BF16)] * 2),
  'swiglu_quantize, weighted': (swiglu_quantize, *[((4096, 2048), _BF16)] * 2, ((4096,), _F32)),
  'swiglu_backward': (swiglu_backward, *[((4096, 18432), _BF16)] * 3),
  'swiglu_backward, weighted': (swiglu_backward, *[((4096, 2048), _BF16)] * 3, ((4096,), _F32)),
  'e5m6.encode': (e5m6.encode, ((4096, 16384), _BF16)),
  'e5m6.decode': (
    lambda c, s: e5m6.decode(c, s, 16384, jnp.bfloat16),
    ((4096, 24576), 'uint8'),
    ((4096, 128), _F32),
  ),
  'logfmt.encode': (lambda x: logfmt.encode(x, 10), ((4096, 7168), _BF16)),
  'logfmt.decode': (
    lambda *x: logfmt.decode(*x, 10, jnp.bfloat16),
    ((4096, 7168), 'uint16'),
    *[((4096, 56), _BF16)] * 2,
  ),
  'mla_decode': _attention(128, 1, 128, 512),
  'mla_decode, cache in FP8': _attention(128, 1, 128, 512, (656, 'uint8')),
  'mla_decode, drafts, few heads': _attention(9, 3, 16, 5),
  'mla_decode, chunk of a prompt': _attention(1, 200, 128, 2048),
  'fp8_matmul': (fp8_matmul, *_tiles(4096, 7168), *_blocks(4096, 7168)),
  'fp8_matmul, ragged': (fp8_matmul, *_tiles(1000, 2112), *_blocks(7168, 2112)),
  'fp8_matmul, ragged columns': (fp8_matmul, *_tiles(64, 7168), *_blocks(2112, 7168)),
  'fp8_matmul, widest': (
    functools.partial(fp8_matmul, out_dtype=jnp.float32),
    *_tiles(4096, 18432),
    *_blocks(7168, 18432),
  ),
  'fp8_wgrad': (fp8_wgrad, *_tiles(4096, 4096), *_tiles(7168, 4096)),
  'fp8_wgrad, accumulating': (
    lambda *x: fp8_wgrad(*x[:4], accumulate=x[4]),
    *_tiles(2112, 1000),
    *_tiles(7168, 1000),
    ((2112, 7168), _F32),
  ),
  'grouped_matmul': (
    grouped_matmul,
    *_tiles(_SLOTS, 7168),
    *_blocks(_EXPERTS, 4096, 7168),
    _SIZES_E,
  ),
  'grouped_matmul, down': (
    grouped_matmul,
    *_tiles(_SLOTS, 2048),
    *_blocks(_EXPERTS, 7168, 2048),
    _SIZES_E,
  ),
  'masked_matmul': (
    masked_matmul,
    *_tiles(_EXPERTS, 256, 7168),
    *_blocks(_EXPERTS, 4096, 7168),
    _SIZES_E,
  ),
  'grouped_wgrad': (grouped_wgrad, *_tiles(4096, _SLOTS), *_tiles(7168, _SLOTS), _SIZES_E),
  'grouped_wgrad, accumulating': (
    lambda *x: grouped_wgrad(*x[:5], accumulate=x[5]),
    *_tiles(7168, _SLOTS),
    *_tiles(2048, _SLOTS),
    _SIZES_E,
    ((_EXPERTS, 7168, 2048), _F32),
  ),
}


@functools.cache
def _mesh(target: str) -> Mesh:
  return Mesh(pods.devices(target)[:1], 'x', axis_types=(AxisType.Auto,))


@pytest.mark.parametrize('case', _CASES)
@pytest.mark.parametrize('target', ['v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'])
def test_kernel_compiles_with_replication_checked(target, case):
  function, *arguments = _CASES[case]
  mesh, platforms = _mesh(target), set()

  def device(*x):
    platforms.add(choice.platform())
    return function(*jax.tree.map(lambda x: x[0], x))

  spec = P('x')
  shape = lambda s, d: jax.ShapeDtypeStruct((1, *s), d, sharding=NamedSharding(mesh, spec))
  leading = lambda *x: jax.tree.map(lambda y: y[None], device(*x))
  step = jax.jit(jax.shard_map(leading, mesh=mesh, in_specs=spec, out_specs=spec))
  program = pods.compile(step.lower(*[shape(*x) for x in arguments]), target)
  assert platforms == {'tpu'}
  assert 'custom_call_target="tpu_custom_call"' in program.as_text()


def test_an_fp8_train_step_on_a_mesh_is_made_of_these_kernels_and_compiles_for_v5p():
  c = config.debug(config.default())
  c.update_from_flattened_dict({'model.precision': 'fp8', 'mesh.node': 2, 'mesh.local': 4})
  c = config.freeze(c)
  lowered = lowering.train(c, pods.make_mesh(c.mesh, 'v5p:2x2x2')).traced.lower()
  named = set(re.findall(r'kernel_name = "(\w+)"', lowered.as_text()))
  expected = {
    'fp8_matmul', 'fp8_wgrad', 'grouped_matmul', 'grouped_wgrad', 'quantize_tiles',
    'quantize_tiles_transposed', 'requantize_transposed', 'quantize_blocks', 'swiglu_quantize',
    'swiglu_backward',
  }  # fmt: skip
  assert named >= expected, expected - named
  assert 'tpu_custom_call' in pods.compile(lowered, 'v5p:2x2x2').as_text()
