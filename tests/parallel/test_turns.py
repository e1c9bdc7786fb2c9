"""A forward and a backward in turns: the same numbers, and a matmul behind every permute of either one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh
from dsv3_jax.compat import vary
from dsv3_jax.kernels import hopper
from dsv3_jax.kernels.fp8_matmul import mosaic_gpu
from dsv3_jax.mesh import AXES
from dsv3_jax.parallel.pipeline import turns
from dsv3_jax.parallel.pipeline.split import split

_HOPS, _D = 3, 8


def _layer(weights, constants, x_BD):
  """Products, a hop to the other device, and so on; the sizes of a layer's exchange do not matter here."""
  for w_DD in weights['before']:
    x_BD = jnp.tanh(x_BD @ w_DD)
  for w_DD in weights['between']:
    x_BD = lax.ppermute(x_BD, 'node', [(0, 1), (1, 0)])
    x_BD = jnp.tanh(x_BD @ w_DD) + constants
  return x_BD, jnp.sum(x_BD)


def _arguments():
  rng = np.random.default_rng(0)
  normal = lambda *shape: jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32)
  weights = {'before': normal(9, _D, _D), 'between': normal(_HOPS, _D, _D)}
  return weights, normal(_D), normal(2, 4, _D)


def _program(how):
  def run(weights, constants, x_nBD):
    weights, constants, x_BD = vary((weights, constants, x_nBD[0]), AXES)
    parts = split(_layer, weights, constants[None], x_BD)
    _, _, kept = parts.forward(weights, constants[None], x_BD)
    ahead, behind = (weights, constants[None], -x_BD), (weights, constants[None], kept, x_BD + 1)
    made = parts.both(ahead, behind) if how == 'turns' else _apart(parts, ahead, behind)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (1, *x.shape)), made)

  device_mesh = mesh.make_mesh(config.Mesh(node=2))
  in_specs = P(), P(), P('node')
  return jax.shard_map(run, mesh=device_mesh, in_specs=in_specs, out_specs=P(AXES))


def _apart(parts, ahead, behind):
  return parts.forward(*ahead), parts.backward(*behind)


def test_results_are_those_of_one_behind_the_other():
  got, expected = (jax.jit(_program(how))(*_arguments()) for how in ('turns', 'apart'))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, expected)


@pytest.mark.parametrize(
  ('how', 'least', 'most'), [('turns', 2 * _HOPS, 2 * _HOPS), ('apart', 0, 0)]
)
def test_what_was_sent_is_read_behind_products_of_the_other(how, least, most):
  (body,) = [e.params['jaxpr'] for e in jax.make_jaxpr(_program(how))(*_arguments()).eqns]
  equations = list(getattr(body, 'jaxpr', body).eqns)
  sends = [i for i, e in enumerate(equations) if e.primitive.name == 'ppermute'][_HOPS:]
  assert len(sends) == 2 * _HOPS  # behind those of the forward that makes what is kept
  behind = 0
  for i in sends:
    (sent,) = equations[i].outvars
    reader = next(k for k, e in enumerate(equations) if k > i and sent in e.invars)
    tied = equations[reader].primitive.name == 'optimization_barrier'
    behind += tied and any(e.primitive.name == 'dot_general' for e in equations[i:reader])
  assert least <= behind <= most


@pytest.mark.skipif(not hopper.AVAILABLE, reason='Mosaic GPU kernels want jax 0.11 or newer')
def test_kernels_for_hopper_count_as_products():
  like = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
  codes = lambda rows: like((rows, 512), jnp.float8_e4m3fn)
  arrays = codes(256), like((256, 4), jnp.float32), codes(512), like((4, 4), jnp.float32)
  run = lambda *arrays: mosaic_gpu.fp8_matmul(*arrays, out_dtype=jnp.bfloat16)
  assert any(turns._multiplies(e) for e in jax.make_jaxpr(run)(*arrays).eqns)
