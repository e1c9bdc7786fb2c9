"""ZeRO: state split over the devices that would hold copies of it.

The FP32 weights, both moments and the average of the weights are stored split (`Placement.zero_dim`
over `zero_axes`). What differs is when weights become whole:
- ZeRO-1: once a step, before the micro-batches; gradients are reduce-scattered once, at the end.
- ZeRO-3: layer by layer, inside the layer's remat region; the gather's transpose is the reduce-scatter. What
  is no layer, as with ZeRO-1.

Gathers move the compute dtype, not FP32. Bytes received per device and gather of a weight of n elements
split w ways: n (w-1)/w times the size of that dtype.

A layer's large weights may be gathered by recursive doubling (`mesh.zero_permutes`) instead of by all_gather:
log2 w permutes, of as many bytes together. TPUs start and end permutes apart, but gathers and scatters only
fused with compute, which libtpu accepts for v5e alone. The transpose halves, and adds in the gathered dtype: a
gradient is rounded log2 w times on its way. Of small weights many permutes would come, and long compilations.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax import compat
from dsv3_jax.mesh import AXES, Placement, path_names

PERMUTES = 'zero_permutes'  # scope of those that gather and scatter, by which programs are read

# Kept in FP32: the router decides near ties, the embedding's gradient adds up many rows.
_NOT_CAST = ('router_DE', 'embed_VD')

Placements = dict[tuple[str, ...], Placement]


def by_path(placements: Any) -> Placements:
  """{names of the path: Placement} of a tree of placements."""
  leaves = jax.tree_util.tree_leaves_with_path(
    placements, is_leaf=lambda x: isinstance(x, Placement)
  )
  return {path_names(path): leaf for path, leaf in leaves}


def gather(
  tree: Any,
  placements: Placements,
  dtype: jnp.dtype,
  *,
  prefix: tuple[str, ...] = (),
  stacked: int = 0,
  permutes: int = 0,
) -> Any:
  """Makes every split weight below `prefix` whole, in `dtype`.

  `stacked` leading dimensions of the stored weight are gone from `tree` already (a scan walks them).
  `permutes`: elements of a whole weight from which on it is gathered by permutes; 0 for never.
  """

  def one(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
    names = prefix + path_names(path)
    at = placements.get(names)
    if at is None or at.zero_dim is None:
      return x
    x = cast(names[-1], x, dtype)
    # [.., n/w, ..] on each of zero_axes -> [.., n, ..], the same everywhere, typed as varying.
    dim = at.zero_dim - stacked
    if permutes and x.size * lax.axis_size(at.zero_axes) >= permutes:
      return _double(x, at.zero_axes, dim)
    return lax.all_gather(x, at.zero_axes, axis=dim, tiled=True)

  return jax.tree_util.tree_map_with_path(one, tree)


@jax.named_scope(PERMUTES)
def _double(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
  """`lax.all_gather(x, axes, axis=dim, tiled=True)` over axes whose sizes are powers of two.

  The farthest device comes first, with the least to send; every step sends what all before it have brought.
  """
  part = x.shape[dim]
  for axis in axes:
    size = lax.axis_size(axis)
    for distance in (size >> bit for bit in range(1, size.bit_length())):
      other = lax.ppermute(x, axis, [(i, i ^ distance) for i in range(size)])
      lower = lax.axis_index(axis) & distance == 0
      pair = jnp.where(lower, x, other), jnp.where(lower, other, x)
      # [.., parts so far x part, ..] twice -> each part beside the one that came for it.
      cut = [y.reshape(*y.shape[:dim], -1, part, *y.shape[dim + 1 :]) for y in pair]
      x = jnp.stack(cut, axis=dim + 1).reshape(*x.shape[:dim], -1, *x.shape[dim + 1 :])
  return x


def by_layer(
  placements: Placements, dtype: jnp.dtype, permutes: int = 0
) -> Callable[[str, Any], Any]:
  """(name of a stack, one layer of it as stored) -> its weights, whole."""
  return lambda name, module: gather(
    module, placements, dtype, prefix=(name,), stacked=1, permutes=permutes
  )


def cast(name: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """A weight in the dtype it is gathered in."""
  return x if name in _NOT_CAST else x.astype(dtype)


def reduce(grads: Any, placements: Placements, *, scattered: Sequence[str] = ()) -> Any:
  """Sums gradients over the copies of each weight, leaving each device its own part of a split one.

  `scattered`: parts of the tree whose split weights' gradients were summed and scattered over `zero_axes`
  already (ZeRO-3).
  """

  def one(path: tuple[Any, ...], g: jax.Array) -> jax.Array:
    names = path_names(path)
    at = placements[names]
    over = at.copies + (('pipe',) if 'pipe' in compat.varying_axes(g) else ())
    if at.zero_dim is not None and names[0] not in scattered:
      g = lax.psum_scatter(g, at.zero_axes, scatter_dimension=at.zero_dim, tiled=True)
    # Of the part alone: an embedding split over 256 of 2,048 devices is summed over the others in 1/256.
    return lax.psum(g, tuple(a for a in over if a not in at.zero_axes))

  return jax.tree_util.tree_map_with_path(one, grads)


def global_norm(tree: Any) -> jax.Array:
  """L2 norm over all elements of a tree of device-local parts; one psum per kind of split."""
  squares: dict[tuple[str, ...], jax.Array] = {}
  for x in jax.tree.leaves(tree):
    axes = tuple(a for a in AXES if a in compat.varying_axes(x))
    squares[axes] = squares.get(axes, 0.0) + jnp.sum(jnp.square(x.astype(jnp.float32)))
  return jnp.sqrt(sum(lax.psum(s, axes) if axes else s for axes, s in squares.items()))
