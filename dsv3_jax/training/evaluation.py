"""Loss on held-out text, in bits per byte, beside gzip and xz on the very same bytes."""

import dataclasses
import gzip
import json
import lzma
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config
from dsv3_jax.compat import vary
from dsv3_jax.data.batches import Heldout
from dsv3_jax.kernels.cross_entropy import cross_entropy
from dsv3_jax.mesh import AXES
from dsv3_jax.parallel import zero
from dsv3_jax.precision import recipe
from dsv3_jax.training.state import STACKS, layout

FILE = 'evaluation.json'


@dataclasses.dataclass(frozen=True)
class Evaluation:
  heldout_bytes: int
  heldout_loss: float  # nats per token
  bits_per_byte: float  # all tokens' nats, document marks included, over the bytes of the text
  gzip_bits_per_byte: float
  xz_bits_per_byte: float

  def table(self) -> str:
    rows = [('this model', self.bits_per_byte), ('xz -9', self.xz_bits_per_byte)]
    rows += [('gzip -9', self.gzip_bits_per_byte)]
    lines = [f'  {name:<11} {value:7.3f} bits per byte' for name, value in rows]
    loss = f'{self.heldout_loss:.4f} nats per token'
    return '\n'.join([f'held-out text, {self.heldout_bytes:,} bytes, {loss}', *lines])

  def save(self, workdir: str | pathlib.Path) -> None:
    text = json.dumps(dataclasses.asdict(self), indent=2) + '\n'
    pathlib.Path(workdir, FILE).write_text(text, encoding='utf-8')


def make_nats(c: config.Config, device_mesh: jax.sharding.Mesh) -> Callable[..., jax.Array]:
  """Jitted (params, router_bias, tokens_BX, weight_BL) -> sum of weighted cross entropies, in nats.

  Rows are split over all axes, `pipe` included: every device runs all layers, each one's weights gathered
  where it runs. The main model alone is asked, without its MTP modules.
  """
  at = layout(c)
  specs = at.specs(c)
  placements = zero.by_path(at.placements)
  dtype = recipe.compute_dtype(c.model.precision)
  weights = recipe.weight_dtype(c.model.precision)

  def run(params: Any, router_bias: Any, tokens_bX: jax.Array, weight_bL: jax.Array) -> jax.Array:
    rest = {name: x for name, x in params.items() if name not in STACKS}
    model = at.module(vary(params | zero.gather(rest, placements, weights), AXES), router_bias)
    hidden_bLD, _ = model.hidden(
      c.model, model.embed(c.model, tokens_bX[:, :-1]), unshard=zero.by_layer(placements, weights)
    )
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    head_DV = model.head_DV[...].astype(dtype)
    nats = cross_entropy(flat(hidden_bLD), head_DV, flat(tokens_bX[:, 1:]), flat(weight_bL))
    return lax.psum(nats, AXES)

  rows = P(AXES, None)
  in_specs = (specs['params'], specs['router_bias'], rows, rows)
  return jax.jit(jax.shard_map(run, mesh=device_mesh, in_specs=in_specs, out_specs=P()))


def evaluate(
  nats: Callable[..., jax.Array],
  device_mesh: jax.sharding.Mesh,
  params: Any,
  router_bias: Any,
  heldout: Heldout,
  rows: int,
) -> Evaluation:
  """Runs `nats` over the held-out rows, `rows` at a time, all processes together."""
  sharding = NamedSharding(device_mesh, P(AXES, None))

  def put(x: np.ndarray) -> jax.Array:
    x = np.pad(x, ((0, rows - len(x)), (0, 0)))  # padded rows weigh 0
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

  # The next starts before the last one is waited for, and no more: four processes with all of a text queued
  # were seen to stand still.
  parts, running = [], None
  for i in range(0, len(heldout.tokens), rows):
    tokens_BX, weight_BL = (put(x[i : i + rows]) for x in (heldout.tokens, heldout.weights))
    started = nats(params, router_bias, tokens_BX, weight_BL)
    if running is not None:
      parts.append(float(running))
    running = started
  total = math.fsum([*parts, float(running)])
  size = len(heldout.text)
  bits = lambda compressed: 8 * len(compressed) / size
  return Evaluation(
    heldout_bytes=size,
    heldout_loss=total / float(heldout.weights.sum()),
    bits_per_byte=total / math.log(2) / size,
    gzip_bits_per_byte=bits(gzip.compress(heldout.text, 9, mtime=0)),
    xz_bits_per_byte=bits(lzma.compress(heldout.text, preset=9)),
  )
