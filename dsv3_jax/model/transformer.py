"""The whole model: embedding, a stack of dense and a stack of MoE layers, head, MTP modules.

Model code is what one device does inside the step's shard_map. Stacks are scanned; only per-layer
statistics leave the scan. With ZeRO-3 weights arrive split, and `unshard` gathers one layer's where
that layer runs, inside its remat region, so the backward gathers again instead of keeping them.

With `dual_batch` a layer runs on two halves of the rows out of step (3.4.1, there for prefill): while one
half's tokens travel, the other computes, forward and backward. Its weights are gathered once for both.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_policies

from dsv3_jax import config
from dsv3_jax.model import dual
from dsv3_jax.model.layers import Ffn, normal, ones, rms_norm
from dsv3_jax.model.mla import Mla
from dsv3_jax.model.moe import Moe, Routing
from dsv3_jax.precision import recipe

# (name of the part, module with weights as stored) -> module with whole weights.
Unshard = Callable[[str, Any], Any]
# This device's rows as they go through the layers: all together, or two halves.
Parts = tuple[jax.Array, ...]


def whole(name: str, module: Any) -> Any:
  """Unshard for weights that are whole already."""
  del name
  return module


class Block(nnx.Module):
  """Pre-norm transformer block; `dense` picks its FFN."""

  def __init__(self, c: config.Model, key: jax.Array, *, dense: bool) -> None:
    attn_key, ffn_key = jax.random.split(key)
    self.attn_norm_D = ones(c.dim)
    self.attn = Mla(c, attn_key)
    self.ffn_norm_D = ones(c.dim)
    self.ffn = Ffn(c.dim, c.ffn_dim, c.init_std, ffn_key) if dense else Moe(c, ffn_key)

  def __call__(
    self, c: config.Model, x_BLD: jax.Array, valid_BL: jax.Array
  ) -> tuple[jax.Array, Routing | None]:
    return self.feed_forward(c, self.attend(c, x_BLD), valid_BL)

  def attend(self, c: config.Model, x_BLD: jax.Array) -> jax.Array:
    """First half: x + attn(norm(x))."""
    return self.add_attention(c, x_BLD, self.heads(c, x_BLD))

  def heads(self, c: config.Model, x_BLD: jax.Array) -> jax.Array:
    """The dear part of attention -> [B, L, N, V]."""
    return self.attn.heads(c, rms_norm(x_BLD, self.attn_norm_D[...], c.norm_eps))

  def add_attention(self, c: config.Model, x_BLD: jax.Array, out_BLNV: jax.Array) -> jax.Array:
    return jax.ad_checkpoint.checkpoint_name(x_BLD + self.attn.output(c, out_BLNV), 'residual')

  def feed_forward(
    self, c: config.Model, x_BLD: jax.Array, valid_BL: jax.Array
  ) -> tuple[jax.Array, Routing | None]:
    """Second half: x + ffn(norm(x))."""
    y_BLD, routing = self.branch(c, x_BLD, valid_BL)
    return x_BLD + y_BLD, routing

  def branch(
    self, c: config.Model, x_BLD: jax.Array, valid_BL: jax.Array
  ) -> tuple[jax.Array, Routing | None]:
    """What the second half adds: ffn(norm(x))."""
    normed_BLD = rms_norm(x_BLD, self.ffn_norm_D[...], c.norm_eps)
    if isinstance(self.ffn, Ffn):
      return self.ffn(c, normed_BLD), None
    return self.ffn(c, normed_BLD, valid_BL)


class Mtp(nnx.Module):
  """One multi-token prediction module (2.2, eq. 21-23); embedding and head are the main model's.

  The projection acts on [embedding ; hidden], the order of the released weights; the paper writes the
  other one. Hidden states come in, and go out to the next depth, after their final norm.
  """

  def __init__(self, c: config.Model, key: jax.Array) -> None:
    proj_key, block_key = jax.random.split(key)
    self.embed_norm_D = ones(c.dim)
    self.hidden_norm_D = ones(c.dim)
    self.proj_XD = normal(proj_key, (2 * c.dim, c.dim), c.init_std)
    self.block = Block(c, block_key, dense=False)
    self.out_norm_D = ones(c.dim)

  def join(self, c: config.Model, hidden_BLD: jax.Array, embed_BLD: jax.Array) -> jax.Array:
    """h' of eq. 21: input of the block."""
    norms = self.embed_norm_D[...], self.hidden_norm_D[...]
    return join(c, hidden_BLD, embed_BLD, *norms, self.proj_XD[...])


def join(
  c: config.Model,
  hidden_BLD: jax.Array,
  embed_BLD: jax.Array,
  embed_norm_D: jax.Array,
  hidden_norm_D: jax.Array,
  proj_XD: jax.Array,
) -> jax.Array:
  """h' of eq. 21, of an MTP module's weights."""
  embed_BLD = rms_norm(embed_BLD, embed_norm_D, c.norm_eps)
  hidden_BLD = rms_norm(hidden_BLD, hidden_norm_D, c.norm_eps)
  joined_BLX = jnp.concatenate([embed_BLD, hidden_BLD], axis=2)
  # Not in FP8: the released weights keep this matrix in BF16.
  return recipe.linear(recipe.serving(c.precision), joined_BLX, proj_XD)


class Transformer(nnx.Module):
  def __init__(self, c: config.Model, key: jax.Array) -> None:
    keys = jax.random.split(key, 5)
    stack = lambda make, key, size: jax.vmap(make)(jax.random.split(key, size))
    self.embed_VD = normal(keys[0], (c.vocab_size, c.dim), c.init_std)
    if c.num_dense_layers:
      self.dense_layers = stack(lambda k: Block(c, k, dense=True), keys[1], c.num_dense_layers)
    moe_layers = c.num_layers - c.num_dense_layers
    self.moe_layers = stack(lambda k: Block(c, k, dense=False), keys[2], moe_layers)
    self.final_norm_D = ones(c.dim)
    self.head_DV = normal(keys[3], (c.dim, c.vocab_size), c.init_std)
    if c.mtp_depth:
      self.mtp = stack(lambda k: Mtp(c, k), keys[4], c.mtp_depth)

  def embed(self, c: config.Model, tokens_BL: jax.Array) -> jax.Array:
    """Rows of the embedding in the compute dtype -> [B, L, D]."""
    return self.embed_VD[...][tokens_BL].astype(recipe.compute_dtype(c.precision))

  def hidden(
    self, c: config.Model, embed_BLD: jax.Array, *, unshard: Unshard = whole
  ) -> tuple[jax.Array, Routing]:
    """All layers and the final norm -> hidden [B, L, D] and statistics stacked over MoE layers."""
    valid_BL = jnp.ones(embed_BLD.shape[:2], bool)
    x_BLD = embed_BLD
    if c.num_dense_layers:
      x_BLD, _ = _scan(c, 'dense_layers', self.dense_layers, x_BLD, valid_BL, unshard)
    x_BLD, routing_Y = _scan(c, 'moe_layers', self.moe_layers, x_BLD, valid_BL, unshard)
    return rms_norm(x_BLD, self.final_norm_D[...], c.norm_eps), routing_Y

  def predict_further(
    self, c: config.Model, hidden_BLD: jax.Array, embed_BLD: jax.Array, *, unshard: Unshard = whole
  ) -> tuple[list[jax.Array], Routing]:
    """Hidden states of every MTP depth k = 1.., [B, L, D] each, and their statistics stacked.

    `embed_BLD` embeds the L inputs; depth k at position i reads the embedding of token i + k. Its last
    k positions have none: they compute on rolled-in values, are hidden from every other position by
    causality, and must be masked by the caller, as they are from the statistics here.
    """
    L = embed_BLD.shape[1]
    hiddens, routings = [], []
    for depth in range(1, c.mtp_depth + 1):
      stored = jax.tree.map(lambda x: x[depth - 1], self.mtp)
      valid_BL = jnp.broadcast_to(jnp.arange(L) < L - depth, embed_BLD.shape[:2])

      def run(stored: Any, hidden_BLD: jax.Array, embed_BLD: jax.Array, valid_BL=valid_BL) -> Any:
        module = unshard('mtp', stored)
        parts = _parts(c, module.join(c, hidden_BLD, embed_BLD))
        parts, routing = _run_block(c, module.block, parts, _parts(c, valid_BL))
        x_BLD = jnp.concatenate(parts)
        return rms_norm(x_BLD, module.out_norm_D[...], c.norm_eps), routing

      embed_BLD = jnp.roll(embed_BLD, -1, axis=1)
      hidden_BLD, routing = remat(c, run, scanned=False)(stored, hidden_BLD, embed_BLD)
      hiddens.append(hidden_BLD)
      routings.append(routing)
    return hiddens, jax.tree.map(lambda *xs: jnp.stack(xs), *routings)


def _scan(
  c: config.Model, name: str, layers: Block, x_BLD: jax.Array, valid_BL: jax.Array, unshard: Unshard
) -> tuple[jax.Array, Routing | None]:
  valids = _parts(c, valid_BL)

  def body(parts: Parts, stored: Block) -> tuple[Parts, Routing | None]:
    return _run_block(c, unshard(name, stored), parts, valids)

  body = remat(c, body, scanned=True)
  parts, routing = lax.scan(body, _parts(c, x_BLD), layers, unroll=c.unroll)
  return jnp.concatenate(parts), routing


def _parts(c: config.Model, x_BX: jax.Array) -> Parts:
  """The rows that go through a layer together: all, or with `dual_batch` one half and the other."""
  if not c.dual_batch:
    return (x_BX,)
  B = len(x_BX)
  if B % 2:
    right = 'give each device an even number of them, or set it to False'
    raise config.ConfigError(f'model.dual_batch = True: cannot halve {B} rows per device; {right}')
  return x_BX[: B // 2], x_BX[B // 2 :]


def _run_block(
  c: config.Model, block: Block, parts: Parts, valids: Parts
) -> tuple[Parts, Routing | None]:
  """One block on all parts; statistics of all rows."""
  if not c.dual_batch:
    x_BLD, routing = block(c, *parts, *valids)
    return (x_BLD,), routing
  if isinstance(block.ffn, Ffn):  # nothing is exchanged
    return tuple(
      block(c, x_BLD, valid_BL)[0] for x_BLD, valid_BL in zip(parts, valids, strict=True)
    ), None
  return dual.run(c, block, parts, valids)


def remat(c: config.Model, body: Callable[..., Any], *, scanned: bool) -> Callable[..., Any]:
  """'block' keeps a block's input alone; 'latents' (3.3.3) also what is dear to compute and small to keep.

  Recomputed under 'latents': every RMSNorm, the up-projections of MLA, SwiGLU's product. Tokens that were
  sent to experts are kept as they came, so that the backward does not send them again.
  """
  if c.remat == 'none':
    return body
  # Where one program holds forward and backward of a layer, XLA would merge the recomputation with the
  # first one and keep everything; a loop of its own holds them apart anyway.
  apart = not scanned or c.unroll > 1
  if c.remat == 'block':
    return jax.checkpoint(body, prevent_cse=apart)
  names = ('latent', 'attn_out', 'attn_lse', 'residual', 'routing', 'dispatched', 'ffn_hidden')
  policy = checkpoint_policies.save_only_these_names(*names)
  return jax.checkpoint(body, prevent_cse=apart, policy=policy)
