"""One step of generation over the paged latent cache, as one shard_map: forward, choice, drafts.

  1. The main model runs L tokens of every row at positions start .. start + count - 1: a chunk of a
     prompt, or the last token of a sequence and the drafts behind it.
  2. What follows each of them is chosen from its logits. A draft is accepted where it is what was chosen
     behind the token before it, so the tokens of a sequence are the ones that plain decoding would
     choose, greedy or drawn: the choice looks at the main model, the seed and the position alone.
  3. The MTP module (2.2) runs the accepted positions on the main model's hidden states and the tokens
     chosen behind them, and drafts what comes next. Drafts further ahead come from the module run again
     on its own output, behind its norm, at the next position (its cache entry there is overwritten once
     the token is known).

Prompts and decoding are the same function at two shapes. Attention is absorbed in both. Sequences are
split over (`data`, `node`, `local`), each row's pages lie on its device, routed experts are split over
(`node`, `local`); all other weights are whole on every device. Rows beyond `count` compute on what
stands there and leave nothing behind.
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
from dsv3_jax.inference.sampling import Samplings, sample
from dsv3_jax.kernels.mla_decode import PAGE
from dsv3_jax.model.layers import rms_norm
from dsv3_jax.model.moe import Slots
from dsv3_jax.model.transformer import Block, Mtp, Transformer
from dsv3_jax.parallel import dispatch, placement
from dsv3_jax.precision import recipe

TOP = 20  # most probable tokens that can be told beside the chosen one, as the OpenAI API has it


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
  """What a step runs."""

  tokens_BL: jax.Array
  start_B: jax.Array  # position of the first of them
  count_B: jax.Array  # of them that are there; 0: an empty row
  table_BJ: jax.Array  # pages on the row's own device
  next_B: jax.Array  # of prompts: the token behind the last of them, or -1 where it is to be chosen
  samplings: Samplings
  top: jax.Array  # bool []: whether anybody asks for the most probable tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
  """What came of it. Of prompts, L is 1: behind the last token of the chunk."""

  tokens_BL: jax.Array  # int32: chosen behind each token
  accepted_B: jax.Array  # int32: drafts that were right; so many and one more of the tokens count
  drafts_BK: jax.Array  # int32: of the tokens behind those
  logprob_BL: jax.Array  # float32, of the model as it is, whatever the temperature
  top_ids_BLT: jax.Array
  top_logprobs_BLT: jax.Array
  load_YE: jax.Array  # int32: how many of all rows' tokens chose each expert, in every MoE layer


@dataclasses.dataclass(frozen=True)
class How:
  """What a program is compiled for, besides shapes."""

  prompt: bool
  drafts: int
  vocab_size: int  # tokens below it can be chosen


# ---- what one device does ------------------------------------------------------------------------


def step(
  c: config.Model, how: How, model: Transformer, slots_Y: Slots, rows: Rows, cache: Cache
) -> tuple[Chosen, Cache]:
  L = rows.tokens_BL.shape[1]
  offset_1L = jnp.arange(L, dtype=jnp.int32)[None]
  positions_BL = rows.start_B[:, None] + offset_1L
  valid_BL = offset_1L < rows.count_B[:, None]
  last_B = jnp.maximum(rows.count_B - 1, 0)
  run = functools.partial(_run, c, rows.table_BJ)
  # ---- 1. main model -----------------------------------------------------------------------------
  x_BLD = model.embed(c, rows.tokens_BL)
  if c.num_dense_layers:
    x_BLD, cache, _ = run(model.dense_layers, None, 0, x_BLD, positions_BL, valid_BL, cache)
  stack = model.moe_layers, slots_Y, c.num_dense_layers
  x_BLD, cache, load_YE = run(*stack, x_BLD, positions_BL, valid_BL, cache)
  load_YE = lax.psum(load_YE, mesh.TOKENS)  # 4 bytes an expert and layer: for the placement
  hidden_BLD = rms_norm(x_BLD, model.final_norm_D[...], c.norm_eps)
  # ---- 2. choice ---------------------------------------------------------------------------------
  if how.prompt:
    logits_BLV = _logits(c, how, model, _at(hidden_BLD, last_B))
    tokens_BL = _sample(rows.samplings, logits_BLV, _at(positions_BL, last_B) + 1)
    behind_B1 = jnp.where(rows.next_B < 0, tokens_BL[:, 0], rows.next_B)[:, None]
    rolled_BL = jnp.roll(rows.tokens_BL, -1, axis=1)
    behind_BL = jnp.where(offset_1L == last_B[:, None], behind_B1, rolled_BL)
    accepted_B = jnp.zeros_like(rows.count_B)
    sure_BL, newest_B = valid_BL, last_B
  else:
    logits_BLV = _logits(c, how, model, hidden_BLD)
    tokens_BL = behind_BL = _sample(rows.samplings, logits_BLV, positions_BL + 1)
    right_BL = (rows.tokens_BL[:, 1:] == tokens_BL[:, :-1]) & valid_BL[:, 1:]
    accepted_B = jnp.sum(jnp.cumprod(right_BL.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
    sure_BL, newest_B = valid_BL & (offset_1L <= accepted_B[:, None]), accepted_B
  logprob_BL, top_ids, top_logprobs = _logprobs(rows.top, logits_BLV, tokens_BL)
  # ---- 3. drafts ---------------------------------------------------------------------------------
  drafts = []
  if how.drafts:
    x_BLD, at_BL, there_BL, token_BL = hidden_BLD, positions_BL, sure_BL, behind_BL
    for k in range(how.drafts):
      x_BLD, cache = _mtp(c, model, rows.table_BJ, x_BLD, token_BL, at_BL, there_BL, cache)
      if not k:  # only the newest position goes on
        x_BLD, at_BL, there_BL = (_at(x, newest_B) for x in (x_BLD, at_BL, there_BL))
      token_BL = _sample(rows.samplings, _logits(c, how, model, x_BLD), at_BL + 2)
      drafts.append(token_BL)
      at_BL = at_BL + 1
  drafts_BK = jnp.concatenate(drafts, axis=1) if drafts else tokens_BL[:, :0]
  told = tokens_BL, accepted_B, drafts_BK, logprob_BL, top_ids, top_logprobs, load_YE
  return Chosen(*told), cache


def _run(
  c: config.Model,
  table_BJ: jax.Array,
  layers: Block,
  slots_Y: Slots | None,
  first: int,
  x_BLD: jax.Array,
  positions_BL: jax.Array,
  valid_BL: jax.Array,
  cache: Cache,
) -> tuple[jax.Array, Cache, jax.Array | None]:
  """A stack of blocks, of which the first is layer `first` of the cache; without a final norm.

  Last come the loads of the experts, [Y, E]; None where there are none.
  """
  hidden_BL = jnp.where(valid_BL, positions_BL, -1)  # sees nothing

  def body(carry: tuple[jax.Array, Cache], layer: tuple[jax.Array, Block, Slots | None]):
    x_BLD, cache = carry
    y, block, slots = layer
    normed_BLD = rms_norm(x_BLD, block.attn_norm_D[...], c.norm_eps)
    latents = block.attn.latents(c, normed_BLD, positions_BL)
    cache = cache.store(y, table_BJ, positions_BL, valid_BL, *latents)
    attn_BLD = block.attn.absorbed(c, normed_BLD, *cache.layer(y, table_BJ), hidden_BL)
    x_BLD, routing = block.feed_forward(c, x_BLD + attn_BLD, valid_BL, slots)
    return (x_BLD, cache), routing and routing.counts_E

  count = len(layers.attn_norm_D[...])
  y_Y = first + jnp.arange(count, dtype=jnp.int32)
  carry, load_YE = lax.scan(body, (x_BLD, cache), (y_Y, layers, slots_Y))
  return *carry, load_YE


def _mtp(
  c: config.Model,
  model: Transformer,
  table_BJ: jax.Array,
  hidden_BLD: jax.Array,
  tokens_BL: jax.Array,
  positions_BL: jax.Array,
  valid_BL: jax.Array,
  cache: Cache,
) -> tuple[jax.Array, Cache]:
  """Hidden states of the first MTP module, which read the tokens behind their positions."""
  module: Mtp = jax.tree.map(lambda x: x[0], model.mtp)
  x_BLD = module.join(c, hidden_BLD, model.embed(c, tokens_BL))
  stack = jax.tree.map(lambda x: x[None], module.block)
  rows = x_BLD, positions_BL, valid_BL
  x_BLD, cache, _ = _run(c, table_BJ, stack, None, c.num_layers, *rows, cache)
  return rms_norm(x_BLD, module.out_norm_D[...], c.norm_eps), cache


def _logits(c: config.Model, how: How, model: Transformer, x_BLD: jax.Array) -> jax.Array:
  head_DV = model.head_DV[...].astype(x_BLD.dtype)
  logits_BLV = jnp.einsum('BLD,DV->BLV', x_BLD, head_DV, preferred_element_type=jnp.float32)
  return logits_BLV[..., : how.vocab_size]


def _sample(s: Samplings, logits_BLV: jax.Array, positions_BL: jax.Array) -> jax.Array:
  B, L, V = logits_BLV.shape
  each = jax.tree.map(lambda x_B: jnp.repeat(x_B, L), s)
  return sample(each, logits_BLV.reshape(B * L, V), positions_BL.reshape(-1)).reshape(B, L)


def _logprobs(
  top: jax.Array, logits_BLV: jax.Array, tokens_BL: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Of the tokens; ids and those of the most probable ones, zeros where nobody asks."""
  B, L, V = logits_BLV.shape
  sum_BL1 = jax.nn.logsumexp(logits_BLV, axis=2, keepdims=True)
  logprob_BL = (jnp.take_along_axis(logits_BLV, tokens_BL[..., None], axis=2) - sum_BL1)[..., 0]
  count = min(TOP, V)

  def find() -> tuple[jax.Array, jax.Array]:
    value_BLT, id_BLT = lax.top_k(logits_BLV, count)
    return id_BLT.astype(jnp.int32), value_BLT - sum_BL1

  nothing_BLT = jnp.broadcast_to(tokens_BL[..., None], (B, L, count))
  nothing = lambda: (nothing_BLT, jnp.zeros_like(nothing_BLT, jnp.float32) + logprob_BL[..., None])
  return logprob_BL, *lax.cond(top, find, nothing)


def _at(x_BLX: jax.Array, index_B: jax.Array) -> jax.Array:
  """[B, 1, ..]: each row's own entry."""
  index = index_B.reshape((-1,) + (1,) * (x_BLX.ndim - 1))
  return jnp.take_along_axis(x_BLX, index, axis=1)


# ---- on a mesh -----------------------------------------------------------------------------------


class Decoder:
  """A model ready to generate on a mesh. Its programs compile once for each shape, for all decoders alike.

  Weights are cast once to the compute dtype, which changes no result, and made whole where ZeRO has
  them split. The cache is donated: use the one that comes back.

  Experts of the main model lie as `placement` says: in order at first, and `redundant` copies beside them.
  Who decodes with it may `place` them anew between two steps. A token's sum over its experts is then added
  up in another order; nothing else changes. Raises ConfigError for copies that devices cannot share.
  """

  def __init__(
    self,
    c: config.Model,
    device_mesh: jax.sharding.Mesh,
    model: Transformer,
    *,
    redundant: int = 0,
  ) -> None:
    c = dataclasses.replace(c, precision=recipe.serving(c.precision))
    self.config = c
    self.ways = math.prod(device_mesh.shape[a] for a in mesh.TOKENS)  # devices sharing sequences
    self._programs = _programs(c, device_mesh)
    self._weights = self._programs.prepare(model)
    self.nodes, devices = (
      device_mesh.shape['node'],
      math.prod(device_mesh.shape[a] for a in mesh.EXPERTS),
    )
    layers, experts = c.num_layers - c.num_dense_layers, c.moe.num_experts
    if redundant < 0 or (experts + redundant) % devices:
      right = f'at least 0, and with {experts} experts a multiple of the {devices} devices'
      raise config.ConfigError(f'redundant = {redundant}: must be {right}')
    self._copies = 1 + redundant  # of one expert, at most
    self.placement = placement.in_order(layers, experts, devices)
    self._slots = self._table()
    if redundant:
      self.place(np.ones((layers, experts)), experts + redundant)

  def empty(self, pages: int, *, drafts: int = 0, fp8: bool = False) -> Cache:
    """A cache of `pages` pages on every device; with a layer for the MTP module where it drafts."""
    layers = self.config.num_layers + bool(drafts)
    return self._programs.empty(layers, self.ways * pages, fp8)

  def step(self, how: How, rows: Rows, cache: Cache) -> tuple[Chosen, Cache]:
    """`rows` of NumPy arrays, a multiple of `ways` of them -> arrays whole on every device."""
    return self._programs.step(how, self._weights, self._slots, rows, cache)

  def place(self, load_YE: np.ndarray, slots: int | None = None) -> None:
    """Places experts by their loads: by groups on nodes where they can be shared out, else anywhere."""
    old, groups = self.placement, self.config.moe.num_groups
    slots = slots or old.expert_YS.shape[1]
    self.placement = placement.place(
      load_YE, slots=slots, groups=groups, nodes=self.nodes, devices=old.devices
    )
    source_YS = np.take_along_axis(old.slot_YEC[..., 0], self.placement.expert_YS, axis=1)
    for i in self._programs.routed:
      self._weights[i] = self._programs.move(self._weights[i], source_YS.astype(np.int32))
    self._slots = self._table()

  def _table(self) -> Slots:
    """Of one shape, whatever the copies."""
    slot_YEC = self.placement.slot_YEC
    slot_YEC = np.pad(slot_YEC, ((0, 0), (0, 0), (0, self._copies - slot_YEC.shape[2])))
    return Slots(slot_YEC.astype(np.int32), self.placement.copies_YE.astype(np.int32))

  def read_page(self, cache: Cache, way: int, page: int) -> np.ndarray:
    """What a page of one device holds, in all layers [Y, 64, X]."""
    return np.asarray(self._programs.read(cache, np.int32(way), np.int32(page)))

  def write_page(self, cache: Cache, way: int, page: int, entries_YMX: np.ndarray) -> Cache:
    """The cache, donated, with a page of one device filled."""
    return self._programs.write(cache, np.int32(way), np.int32(page), entries_YMX)


@dataclasses.dataclass(frozen=True)
class _Programs:
  """Jitted, each with the layouts of one mesh. Weights are a list: a module is slow to take apart."""

  prepare: Callable[[Transformer], list[jax.Array]]
  empty: Callable[[int, int, bool], Cache]
  step: Callable[..., tuple[Chosen, Cache]]
  routed: list[int]  # which weights are experts of the main model
  move: Callable[[jax.Array, np.ndarray], jax.Array]
  read: Callable[..., jax.Array]
  write: Callable[..., Cache]


@functools.cache
def _programs(c: config.Model, device_mesh: jax.sharding.Mesh) -> _Programs:
  dispatch.check(c.moe, device_mesh)
  shapes = jax.eval_shape(lambda: Transformer(c, jax.random.key(0)))
  placements = mesh.place(shapes, config.Mesh(**device_mesh.shape, zero=0))
  specs = [at.spec for at in jax.tree.leaves(placements, is_leaf=_is_placement)]
  structure = jax.tree.structure(shapes)
  by_row = P(mesh.TOKENS)
  rows = Rows(*[by_row] * 5, Samplings(*[by_row] * 5), P())
  cached = latent_cache.Cache(latent_cache.SPEC)
  everywhere = NamedSharding(device_mesh, P())

  def run(
    how: How, weights: list[jax.Array], slots: Slots, given: Rows, cache: Cache
  ) -> tuple[Chosen, Cache]:
    mapped = jax.shard_map(
      lambda weights, *rest: step(c, how, jax.tree.unflatten(structure, weights), *rest),
      mesh=device_mesh,
      in_specs=(specs, P(), rows, cached),
      out_specs=(Chosen(*[by_row] * 6, P()), cached),
    )
    return mapped(weights, slots, given, cache)

  def move(w_YEXX: jax.Array, source_YS: jax.Array) -> jax.Array:
    """Each slot gets what lies in its source: one matrix of all experts crosses at most."""
    return jnp.take_along_axis(w_YEXX, source_YS[:, :, None, None], axis=1)

  paths = [mesh.path_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
  routed = [
    i for i, spec in enumerate(specs) if paths[i][0] == 'moe_layers' and mesh.EXPERTS in spec
  ]

  def read(cache: Cache, way: jax.Array, page: jax.Array) -> jax.Array:
    """One page from its device to all: [Y, 64, X] of the cache cross."""
    x_YMX = lax.dynamic_index_in_dim(cache.entries_YPMX, page, axis=1, keepdims=False)
    bits = lax.bitcast_convert_type(x_YMX, f'uint{8 * x_YMX.dtype.itemsize}')  # sums keep each bit
    mine = lax.axis_index(mesh.TOKENS) == way
    bits = lax.psum(jnp.where(mine, bits, jnp.zeros_like(bits)), mesh.TOKENS)
    return lax.bitcast_convert_type(bits, x_YMX.dtype)

  def write(cache: Cache, way: jax.Array, page: jax.Array, entries_YMX: jax.Array) -> Cache:
    """Each device has the entries; the one whose page it is keeps them."""
    x_YPMX = cache.entries_YPMX
    mine = lax.axis_index(mesh.TOKENS) == way
    at = jnp.where(mine, page, x_YPMX.shape[1])  # beyond the last one: dropped
    return Cache(x_YPMX.at[:, at].set(entries_YMX, mode='drop'))

  on_mesh = functools.partial(jax.shard_map, mesh=device_mesh)
  return _Programs(
    read=jax.jit(on_mesh(read, in_specs=(cached, P(), P()), out_specs=P())),
    write=jax.jit(
      on_mesh(write, in_specs=(cached, P(), P(), P()), out_specs=cached), donate_argnums=0
    ),
    routed=routed,
    move=jax.jit(move, out_shardings=NamedSharding(device_mesh, P(None, mesh.EXPERTS))),
    prepare=jax.jit(
      lambda model: jax.tree.leaves(_cast(recipe.compute_dtype(c.precision), model)),
      out_shardings=mesh.shardings(device_mesh, specs),
    ),
    empty=jax.jit(
      lambda layers, pages, fp8: latent_cache.empty(c, layers, pages, fp8=fp8),
      static_argnums=(0, 1, 2),
      out_shardings=NamedSharding(device_mesh, latent_cache.SPEC),
    ),
    step=jax.jit(
      run,
      static_argnums=0,
      donate_argnums=4,
      # Whole on every device: the host reads them.
      out_shardings=(everywhere, NamedSharding(device_mesh, latent_cache.SPEC)),
    ),
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


def trace(
  c: config.Model, device_mesh: jax.sharding.Mesh, how: How, sequences: int, L: int, capacity: int
) -> tuple[jax.stages.Traced, list[jax.ShapeDtypeStruct], Cache]:
  """The step over shapes alone, to be lowered, with the shapes of its weights and of its cache.

  Of `sequences` rows of L tokens over the whole mesh; the cache has pages for `capacity` tokens of each.
  """
  c = dataclasses.replace(c, precision=recipe.serving(c.precision))
  programs = _programs(c, device_mesh)
  on = lambda spec: NamedSharding(device_mesh, spec)
  by_row = lambda dtype, *shape: jax.ShapeDtypeStruct(
    (sequences, *shape), dtype, sharding=on(P(mesh.TOKENS))
  )
  number, real = by_row(jnp.int32), by_row(jnp.float32)
  pages = -(-capacity // PAGE)
  samplings = Samplings(real, real, real, by_row(jnp.uint32), number)
  asks = jax.ShapeDtypeStruct((), jnp.bool_, sharding=on(P()))
  tokens, table = by_row(jnp.int32, L), by_row(jnp.int32, pages)
  rows = Rows(tokens, number, number, table, number, samplings, asks)
  shape = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on(at.spec))
  model = jax.eval_shape(lambda: Transformer(c, jax.random.key(0)))
  placements = mesh.place(model, config.Mesh(**device_mesh.shape, zero=0))
  cast = jax.eval_shape(functools.partial(_cast, recipe.compute_dtype(c.precision)), model)
  each = jax.tree.leaves(placements, is_leaf=_is_placement)
  weights = list(map(shape, jax.tree.leaves(cast), each))
  layers = c.num_layers + bool(how.drafts)
  cache = jax.eval_shape(lambda: latent_cache.empty(c, layers, sequences * pages))
  cache = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on(latent_cache.SPEC)), cache
  )
  whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=on(P()))
  experts = c.num_layers - c.num_dense_layers, c.moe.num_experts
  slots = Slots(whole(*experts, 1), whole(*experts))
  return programs.step.trace(how, weights, slots, rows, cache), weights, cache
