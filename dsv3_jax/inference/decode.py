"""Prefill and decode of the main model over a latent cache, one shard_map each, as in training.

  prefill   whole prompts, padded to one length; expanded attention, which multiplies 320 numbers a
            head for each pair of tokens in V3 and not 1,088; latents go to the cache
            -> logits behind each prompt
  decode    a few tokens per sequence at its own positions; absorbed attention over the cache, which is
            all it reads of the past -> logits behind each token

Sequences are split over (`data`, `node`, `local`), routed experts over (`node`, `local`); all other
weights are whole on every device. What comes behind a prompt's end in its padded row is hidden: by
causality in prefill, by position in decode until the sequence's own tokens overwrite it. Every layer
treats tokens one by one but for attention, so neither padding nor neighbours change a sequence.

MTP modules are not run. Prompts are not cut into chunks.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config, mesh
from dsv3_jax.inference import cache as latent_cache
from dsv3_jax.inference.cache import Cache
from dsv3_jax.inference.sampling import Sampling, sample
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.mla import Mla
from dsv3_jax.model.transformer import Block, Transformer
from dsv3_jax.precision import recipe

# (attention, its normed input [B, L, D], cache, number of the layer) -> (output [B, L, D], cache).
Attend = Callable[[Mla, jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]]


# ---- what one device does ------------------------------------------------------------------------


def prefill(
  c: config.Model, model: Transformer, tokens_BL: jax.Array, length_B: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
  """Runs prompts of `length_B` tokens -> logits behind each one's last token, FP32 [B, V]."""
  positions_1L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)[None]

  def attend(attn: Mla, x_BLD: jax.Array, cache: Cache, y: jax.Array) -> tuple[jax.Array, Cache]:
    # `attn` computes the same latents once more; the compiler merges the two.
    cache = cache.store_prompt(y, *attn.latents(c, x_BLD, positions_1L))
    return attn(c, x_BLD), cache

  x_BLD, cache = _layers(c, model, tokens_BL, cache, attend)
  x_B1D = jnp.take_along_axis(x_BLD, (length_B - 1)[:, None, None], axis=1)
  return _logits(c, model, x_B1D)[:, 0], cache


def decode(
  c: config.Model, model: Transformer, tokens_BL: jax.Array, positions_BL: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
  """Runs tokens at `positions_BL`, each after all that the cache holds before it -> logits FP32 [B, L, V]."""

  def attend(attn: Mla, x_BLD: jax.Array, cache: Cache, y: jax.Array) -> tuple[jax.Array, Cache]:
    cache = cache.store(y, positions_BL, *attn.latents(c, x_BLD, positions_BL))
    return attn.absorbed(c, x_BLD, *cache.layer(y), positions_BL), cache

  x_BLD, cache = _layers(c, model, tokens_BL, cache, attend)
  return _logits(c, model, x_BLD), cache


def _layers(
  c: config.Model, model: Transformer, tokens_BL: jax.Array, cache: Cache, attend: Attend
) -> tuple[jax.Array, Cache]:
  """Embedding and all layers, without the final norm."""
  valid_BL = jnp.ones(tokens_BL.shape, bool)

  def body(carry: tuple[jax.Array, Cache], layer: tuple[jax.Array, Block]):
    x_BLD, cache = carry
    y, block = layer
    normed_BLD = rms_norm(x_BLD, block.attn_norm_D[...], c.norm_eps)
    attn_BLD, cache = attend(block.attn, normed_BLD, cache, y)
    x_BLD, _ = block.feed_forward(c, x_BLD + attn_BLD, valid_BL)
    return (x_BLD, cache), None

  carry = model.embed(c, tokens_BL), cache
  y_Y = jnp.arange(c.num_layers, dtype=jnp.int32)
  if c.num_dense_layers:
    carry, _ = lax.scan(body, carry, (y_Y[: c.num_dense_layers], model.dense_layers))
  carry, _ = lax.scan(body, carry, (y_Y[c.num_dense_layers :], model.moe_layers))
  return carry


def _logits(c: config.Model, model: Transformer, x_BLD: jax.Array) -> jax.Array:
  x_BLD = rms_norm(x_BLD, model.final_norm_D[...], c.norm_eps)
  head_DV = model.head_DV[...].astype(x_BLD.dtype)
  return jnp.einsum('BLD,DV->BLV', x_BLD, head_DV, preferred_element_type=jnp.float32)


# ---- on a mesh -----------------------------------------------------------------------------------


class Decoder:
  """A model ready to decode on a mesh. Its programs compile once for each shape, for all decoders alike.

  Weights are cast once to the compute dtype, which changes no result, and made whole where ZeRO has
  them split. The cache is donated: use the one that comes back.
  """

  def __init__(self, c: config.Model, device_mesh: jax.sharding.Mesh, model: Transformer) -> None:
    self.config = c
    self.ways = math.prod(device_mesh.shape[a] for a in mesh.TOKENS)  # devices sharing sequences
    self._everywhere = NamedSharding(device_mesh, P())
    self._programs = _programs(c, device_mesh)
    self._weights = self._programs.prepare(model)

  def empty(self, sequences: int, capacity: int) -> Cache:
    """A cache for `sequences`, a multiple of `ways`, of at most `capacity` tokens each."""
    return self._programs.empty(sequences, capacity)

  def prefill(
    self, tokens_BL: np.ndarray, length_B: np.ndarray, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Prompts in rows padded with anything -> logits behind each, FP32 [B, V]."""
    return self._programs.prefill(self._weights, self._put(tokens_BL), self._put(length_B), cache)

  def decode(
    self, tokens_BL: np.ndarray | jax.Array, positions_BL: np.ndarray, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Tokens at positions -> logits behind each, FP32 [B, L, V]."""
    return self._programs.decode(
      self._weights, self._put(tokens_BL), self._put(positions_BL), cache
    )

  def sample(
    self,
    s: Sampling,
    logits: jax.Array,
    sample_B: np.ndarray,
    position_B: np.ndarray,
    vocab_size: int,
  ) -> jax.Array:
    """Next tokens below `vocab_size`, int32 [B, 1], from logits [B, V] or [B, 1, V]."""
    return self._programs.sample(s, vocab_size, logits, self._put(sample_B), self._put(position_B))

  def _put(self, x: np.ndarray | jax.Array) -> jax.Array:
    return jax.device_put(x, self._everywhere)


@dataclasses.dataclass(frozen=True)
class _Programs:
  """Jitted, each with the layouts of one mesh. Weights are a list: a module is slow to take apart."""

  prepare: Callable[[Transformer], list[jax.Array]]
  empty: Callable[[int, int], Cache]
  prefill: Callable[..., tuple[jax.Array, Cache]]
  decode: Callable[..., tuple[jax.Array, Cache]]
  sample: Callable[..., jax.Array]


@functools.cache
def _programs(c: config.Model, device_mesh: jax.sharding.Mesh) -> _Programs:
  shapes = jax.eval_shape(lambda: Transformer(c, jax.random.key(0)))
  placements = mesh.place(shapes, config.Mesh(**device_mesh.shape, zero=0))
  specs = [at.spec for at in jax.tree.leaves(placements, is_leaf=_is_placement)]
  structure = jax.tree.structure(shapes)
  rows, cached = P(mesh.TOKENS), latent_cache.SPEC
  everywhere = NamedSharding(device_mesh, P())

  def on_mesh(
    run: Callable[..., tuple[jax.Array, Cache]],
  ) -> Callable[..., tuple[jax.Array, Cache]]:
    mapped = jax.shard_map(
      lambda weights, *rest: run(c, jax.tree.unflatten(structure, weights), *rest),
      mesh=device_mesh,
      in_specs=(specs, rows, rows, cached),
      out_specs=(rows, cached),
    )
    return jax.jit(mapped, donate_argnums=3)

  def next_token(
    s: Sampling, vocab_size: int, logits: jax.Array, sample_B: jax.Array, position_B: jax.Array
  ) -> jax.Array:
    logits_BV = logits.reshape(-1, c.vocab_size)[:, :vocab_size]
    return sample(s, logits_BV, sample_B, position_B)[:, None]

  return _Programs(
    prepare=jax.jit(
      lambda model: jax.tree.leaves(_cast(recipe.compute_dtype(c.precision), model)),
      out_shardings=mesh.shardings(device_mesh, specs),
    ),
    empty=jax.jit(
      functools.partial(latent_cache.empty, c),
      static_argnums=(0, 1),
      out_shardings=NamedSharding(device_mesh, cached),
    ),
    prefill=on_mesh(prefill),
    decode=on_mesh(decode),
    # Whole on every device: the host reads tokens, and each device takes its rows of them.
    sample=jax.jit(next_token, static_argnums=(0, 1), out_shardings=everywhere),
  )


def _cast(dtype: jnp.dtype, model: Transformer) -> Transformer:
  """Matrices in `dtype`, as the layers would cast them at each use; router and vectors stay FP32."""

  def one(path: tuple, x: jax.Array) -> jax.Array:
    name = mesh.path_names(path)[-1]
    is_matrix = len(name.rpartition('_')[2]) > 1
    return x.astype(dtype) if is_matrix and name != 'router_DE' else x

  return jax.tree_util.tree_map_with_path(one, model)


def _is_placement(x: Any) -> bool:
  return isinstance(x, mesh.Placement)
