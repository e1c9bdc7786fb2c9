"""A model on a mesh, ready to generate: its weights as `served` lays them out, its programs, its cache."""

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
from dsv3_jax.inference import served
from dsv3_jax.inference import step as stepping
from dsv3_jax.inference.cache import Cache
from dsv3_jax.inference.sampling import Samplings
from dsv3_jax.inference.served import Served
from dsv3_jax.inference.step import Chosen, How, Rows, Several
from dsv3_jax.kernels.mla_decode import PAGE
from dsv3_jax.model.moe import Slots
from dsv3_jax.model.transformer import Transformer
from dsv3_jax.parallel import dispatch, placement
from dsv3_jax.precision import recipe


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

  def several(
    self, how: How, rows: Rows, left_B: np.ndarray, steps: int, cache: Cache
  ) -> tuple[Several, Cache]:
    """`step.several`: up to `how.most` steps at once, which compile as one program."""
    args = rows, left_B, np.int32(steps)
    return self._programs.several(how, self._weights, self._slots, *args, cache)

  def place(self, load_YE: np.ndarray, slots: int | None = None) -> None:
    """Places experts by their loads: by groups on nodes where they can be shared out, else anywhere."""
    old, groups = self.placement, self.config.moe.num_groups
    slots = slots or old.expert_YS.shape[1]
    self.placement = placement.place(
      load_YE, slots=slots, groups=groups, nodes=self.nodes, devices=old.devices
    )
    source_YS = np.take_along_axis(old.slot_YEC[..., 0], self.placement.expert_YS, axis=1)
    for i, first in self._programs.routed.items():
      source = source_YS[first : first + len(self._weights[i])].astype(np.int32)
      self._weights[i] = self._programs.move(self._weights[i], source)
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
  several: Callable[..., tuple[Several, Cache]]
  routed: dict[int, int]  # weights that are experts of the main model -> first MoE layer in each
  move: Callable[[jax.Array, np.ndarray], jax.Array]
  read: Callable[..., jax.Array]
  write: Callable[..., Cache]


@functools.cache
def _programs(c: config.Model, device_mesh: jax.sharding.Mesh) -> _Programs:
  dispatch.check(c.moe, device_mesh)
  shapes = _shapes(c)
  structure = jax.tree.structure(shapes)
  paths = [mesh.path_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
  specs = _specs(shapes, device_mesh)
  cache_format = latent_cache.format_on(device_mesh)
  by_row = P(mesh.TOKENS)
  rows = Rows(*[by_row] * 5, Samplings(*[by_row] * 5), P())
  cached = latent_cache.Cache(latent_cache.SPEC)
  everywhere = NamedSharding(device_mesh, P())
  on_mesh = functools.partial(jax.shard_map, mesh=device_mesh)

  def step(how: How, weights: list[jax.Array], *args: Any) -> tuple[Chosen, Cache]:
    run = lambda weights, *rest: stepping.step(
      c, how, jax.tree.unflatten(structure, weights), *rest
    )
    out_specs = Chosen(*[by_row] * 6, P()), cached
    return on_mesh(run, in_specs=(specs, P(), rows, cached), out_specs=out_specs)(weights, *args)

  def several(how: How, weights: list[jax.Array], *args: Any) -> tuple[Several, Cache]:
    run = lambda weights, *rest: stepping.several(
      c, how, jax.tree.unflatten(structure, weights), *rest
    )
    by_step = P(None, mesh.TOKENS)
    chosen = Chosen(by_step, by_step, by_row, by_step, by_step, by_step, P())
    in_specs = specs, P(), rows, by_row, P(), cached
    out_specs = Several(chosen, by_step), cached
    return on_mesh(run, in_specs=in_specs, out_specs=out_specs)(weights, *args)

  def move(w_YEXX: jax.Array, source_YS: jax.Array) -> jax.Array:
    """Each slot gets what lies in its source: one matrix of all experts crosses at most."""
    return jnp.take_along_axis(w_YEXX, source_YS[:, :, None, None], axis=1)

  routed = {
    i: sum(layers.count for layers in shapes.moe[: int(path[1].strip('[]'))])
    for i, (path, spec) in enumerate(zip(paths, specs, strict=True))
    if path[0] == 'moe' and mesh.EXPERTS in spec
  }

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

  result = lambda function, cache_at: jax.jit(
    function,
    static_argnums=0,
    donate_argnums=cache_at,
    # Whole on every device: the host reads them.
    out_shardings=(everywhere, cache_format),
  )
  return _Programs(
    read=jax.jit(on_mesh(read, in_specs=(cached, P(), P()), out_specs=P())),
    write=jax.jit(
      on_mesh(write, in_specs=(cached, P(), P(), P()), out_specs=cached),
      donate_argnums=0,
      out_shardings=cache_format,
    ),
    routed=routed,
    move=jax.jit(move, out_shardings=NamedSharding(device_mesh, P(None, mesh.EXPERTS))),
    prepare=jax.jit(
      lambda model: jax.tree.leaves(prepare(c, model)),
      out_shardings=mesh.shardings(device_mesh, specs),
    ),
    empty=jax.jit(
      lambda layers, pages, fp8: latent_cache.empty(c, layers, pages, fp8=fp8),
      static_argnums=(0, 1, 2),
      out_shardings=cache_format,
    ),
    step=result(step, 4),
    several=result(several, 6),
  )


def _shapes(c: config.Model) -> Served:
  """Of the weights as they are served."""
  make = lambda: Transformer(c, jax.random.key(0))
  return jax.eval_shape(lambda: prepare(c, make()))


def _specs(shapes: Served, device_mesh: jax.sharding.Mesh) -> list[P]:
  placements = mesh.place(shapes, config.Mesh(**device_mesh.shape, zero=0))
  is_placement = lambda x: isinstance(x, mesh.Placement)
  return [at.spec for at in jax.tree.leaves(placements, is_leaf=is_placement)]


def prepare(c: config.Model, model: Transformer) -> Served:
  """Weights as the step takes them."""
  return served.lay_out(c, _cast(recipe.compute_dtype(c.precision), model))


def _cast(dtype: jnp.dtype, model: Transformer) -> Transformer:
  """Matrices in `dtype`, as the layers would cast them at each use; router and vectors stay FP32."""

  def one(path: tuple, x: jax.Array) -> jax.Array:
    name = mesh.path_names(path)[-1]
    is_matrix = len(name.rpartition('_')[2]) > 1
    return x.astype(dtype) if is_matrix and name != 'router_DE' else x

  return jax.tree_util.tree_map_with_path(one, model)


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
  shapes = _shapes(c)
  shape = lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)
  weights = list(map(shape, jax.tree.leaves(shapes), map(on, _specs(shapes, device_mesh))))
  layers = c.num_layers + bool(how.drafts)
  cache = jax.eval_shape(lambda: latent_cache.empty(c, layers, sequences * pages))
  cache = Cache(shape(cache.entries_YPMX, latent_cache.format_on(device_mesh)))
  whole = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=on(P()))
  experts = c.num_layers - c.num_dense_layers, c.moe.num_experts
  slots = Slots(whole(*experts, 1), whole(*experts))
  return programs.step.trace(how, weights, slots, rows, cache), weights, cache
