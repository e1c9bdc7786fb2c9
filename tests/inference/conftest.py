"""Small models in FP32, and the expanded forward that everything here is held against."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh
from dsv3_jax.inference.decode import Decoder
from dsv3_jax.model.transformer import Transformer


@dataclasses.dataclass(frozen=True)
class Small:
  config: config.Config
  device_mesh: jax.sharding.Mesh
  model: Transformer
  decoder: Decoder

  @property
  def specs(self) -> Transformer:
    """How the model's weights lie."""
    return _specs(self.model, self.config.mesh)

  def expanded(self, tokens_BL: np.ndarray) -> np.ndarray:
    """Logits [B, L, V] of whole sequences, as training computes them."""
    c = self.config.model

    def run(model: Transformer, tokens_BL: jax.Array) -> jax.Array:
      hidden_BLD, _ = model.hidden(c, model.embed(c, tokens_BL))
      return jnp.einsum('BLD,DV->BLV', hidden_BLD, model.head_DV[...])

    rows = P(mesh.TOKENS)
    forward = jax.shard_map(
      run,
      mesh=self.device_mesh,
      in_specs=(self.specs, rows),
      out_specs=rows,
    )
    return np.asarray(jax.jit(forward)(self.model, tokens_BL))


def _specs(model: Transformer, sizes: config.Mesh) -> Transformer:
  placements = mesh.place(model, sizes)
  return jax.tree.map(
    lambda at: at.spec, placements, is_leaf=lambda x: isinstance(x, mesh.Placement)
  )


_ONE_DEVICE = config.Mesh(zero=0)


def _small(kind: str, sizes: config.Mesh = _ONE_DEVICE, precision: str = 'fp32') -> Small:
  """'v3': queries compressed, no YaRN | 'yarn': neither compressed nor short | 'v2': softmax router | 'long'."""
  d = config.default()
  d.model.precision = precision
  d.model.moe.dispatch.update(payload='plain', combine='plain')
  if kind == 'yarn':
    d.model.max_length = 2 * d.model.rope.original_length
    d.model.mla.q_rank = 0
  if kind == 'v2':
    d.model.moe.update(scoring='softmax', normalize=False, route_scale=1.0)
    d.model.mla.q_rank = 0
    d.objective.bias_speed = 0.0
  d = config.debug(d)
  d.model.init_std = 0.3  # attention far from uniform
  if kind == 'long':
    d.model.update(max_length=256)
    d.model.rope.original_length = 256
  d.mesh.update(dataclasses.asdict(sizes))
  c = config.freeze(d)
  device_mesh = mesh.make_mesh(c.mesh)
  model = jax.jit(lambda key: Transformer(c.model, key))(jax.random.key(0))
  model = jax.device_put(model, mesh.shardings(device_mesh, _specs(model, c.mesh)))
  return Small(c, device_mesh, model, Decoder(c.model, device_mesh, model))


@pytest.fixture(scope='session', params=['v3', 'yarn', 'v2'])
def each_small(request) -> Small:
  return request.getfixturevalue(request.param)


@pytest.fixture(scope='session')
def v3() -> Small:
  return _small('v3')


@pytest.fixture(scope='session')
def yarn() -> Small:
  return _small('yarn')


@pytest.fixture(scope='session')
def v2() -> Small:
  return _small('v2')


@pytest.fixture(scope='session')
def long() -> Small:
  return _small('long')


@pytest.fixture(scope='session')
def make_small() -> Callable[..., Small]:
  return _small
