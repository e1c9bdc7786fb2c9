"""ZeRO: state split over the devices that would hold copies of it.

The FP32 weights, both moments and the average of the weights are stored split (`Placement.zero_dim`
over `zero_axes`). What differs is when weights become whole:
- ZeRO-1: once a step, before the micro-batches; gradients are reduce-scattered once, at the end.
- ZeRO-3: layer by layer, inside the layer's remat region; the gather's transpose is the reduce-scatter. What
  is no layer, as with ZeRO-1.

Gathers move the compute dtype, and FP32 for the router alone. Bytes received per device and gather of a
weight of n elements split w ways: n (w-1)/w times the size of that dtype.

Weights may be gathered by recursive doubling (`mesh.zero_permutes`) instead of by all_gather: log2 w permutes,
of as many bytes together. TPUs start and end permutes apart, but gathers and scatters only fused with compute,
which libtpu accepts for v5e alone; and its scatters pad each part to what their rings take at a time, up to an
eighth more. The transpose halves, and adds in the gathered dtype: a gradient is rounded log2 w times on its way.
Small weights whose parts have as many rows go side by side as one, which saves permutes, and time to compile.
Weights split along their columns stay with collectives.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax import compat
from dsv3_jax.mesh import AXES, Placement, path_names

PERMUTES = 'zero_permutes'  # scope of those that gather and scatter, by which programs are read

_NOT_CAST = 'router_DE'  # it decides near ties
_EMBEDDING = 'embed_VD'  # sent as it is looked up, then FP32 again: its gradient adds up many rows
_SMALL = 1 << 24  # elements of a whole weight, below which it goes with others

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
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  names = [prefix + path_names(path) for path, _ in leaves]
  whole: list[jax.Array] = [x for _, x in leaves]
  groups: dict[Any, list[int]] = {}  # weights that the same permutes send
  for i, x in enumerate(whole):
    at = placements.get(names[i])
    if at is None or at.zero_dim is None:
      continue
    whole[i] = x = cast(names[i][-1], x, dtype)
    # [.., n/w, ..] on each of zero_axes -> [.., n, ..], the same everywhere, typed as varying.
    dim, size = at.zero_dim - stacked, x.size * lax.axis_size(at.zero_axes)
    if not _by_permutes(x, dim, size, permutes):
      whole[i] = lax.all_gather(x, at.zero_axes, axis=dim, tiled=True)
      continue
    alike = (x.dtype, x.shape[:-1]) if size < _SMALL else i
    groups.setdefault((at.zero_axes, dim, alike), []).append(i)
  for (axes, dim, _), members in groups.items():
    doubled = _double_side_by_side([whole[i] for i in members], axes, dim)
    for i, x in zip(members, doubled, strict=True):
      whole[i] = x
  for i, (_, stored) in enumerate(leaves):
    if names[i][-1] == _EMBEDDING:
      whole[i] = whole[i].astype(stored.dtype)
  return jax.tree.unflatten(structure, whole)


def _by_permutes(x: jax.Array, dim: int, size: int, permutes: int) -> bool:
  """Whether a weight of `size` elements goes so. Not along columns: parts of V3's head are 505, no whole tiles."""
  return 0 < permutes <= size and dim < x.ndim - 1


def _double_side_by_side(parts: list[jax.Array], axes: Sequence[str], dim: int) -> list[jax.Array]:
  """`_double` of parts that differ in their columns alone."""
  if len(parts) == 1:
    return [_double(parts[0], axes, dim)]
  whole = _double(jnp.concatenate(parts, axis=-1), axes, dim)
  return lax.split(whole, [x.shape[-1] for x in parts], axis=-1)


@jax.named_scope(PERMUTES)
def _double(x: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
  """`lax.all_gather(x, axes, axis=dim, tiled=True)` over axes whose sizes are powers of two.

  The farthest device comes first, with the least to send; every step sends what all before it have brought.
  What comes is put in order once, at the end: a step of its own for each would move all rows log2 w times, and
  takes TPU's compiler minutes where parts fill no tiles. Of a matrix such parts go as whole tiles.
  """
  if x.ndim == 2 and dim == 0 and x.shape[0] % 8 and x.size % 1024 == 0:
    return _double(x.reshape(-1, 8, 128), axes, 0).reshape(-1, x.shape[1])
  ndim, steps = x.ndim, 0
  for axis in axes:
    size = lax.axis_size(axis)
    for distance in (size >> bit for bit in range(1, size.bit_length())):
      other = lax.ppermute(x, axis, [(i, i ^ distance) for i in range(size)])
      lower = lax.axis_index(axis) & distance == 0
      x = jnp.stack([jnp.where(lower, x, other), jnp.where(lower, other, x)])
      steps += 1
  # [2 of the last step, .., 2 of the first, .., part, ..] -> [.., first, .., last, part, ..] -> [.., n, ..]
  *order, rest = *reversed(range(steps)), range(steps, steps + ndim)
  whole = x.transpose(*rest[:dim], *order, *rest[dim:])
  return whole.reshape(*x.shape[steps : steps + dim], -1, *x.shape[steps + dim + 1 :])


def _halve(g: jax.Array, axes: Sequence[str], dim: int) -> jax.Array:
  """`lax.psum_scatter(g, axes, scatter_dimension=dim, tiled=True)`: the transpose of `_double`."""
  part = lax.slice_in_dim(g, 0, g.shape[dim] // lax.axis_size(axes), axis=dim)
  (summed,) = jax.linear_transpose(lambda x: _double(x, axes, dim), part)(g)
  return summed


def by_layer(
  placements: Placements, dtype: jnp.dtype, permutes: int = 0
) -> Callable[[str, Any], Any]:
  """(name of a stack, one layer of it as stored) -> its weights, whole."""
  return lambda name, module: gather(
    module, placements, dtype, prefix=(name,), stacked=1, permutes=permutes
  )


def cast(name: str, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """A weight in the dtype it is gathered in."""
  return x if name == _NOT_CAST else x.astype(dtype)


def reduce(
  grads: Any, placements: Placements, *, scattered: Sequence[str] = (), permutes: int = 0
) -> Any:
  """Sums gradients over the copies of each weight, leaving each device its own part of a split one.

  `scattered`: parts of the tree whose split weights' gradients were summed and scattered over `zero_axes`
  already (ZeRO-3). `permutes`: elements of a weight from which on its gradient is scattered by permutes.
  """

  def one(path: tuple[Any, ...], g: jax.Array) -> jax.Array:
    names = path_names(path)
    at = placements[names]
    over = at.copies + (('pipe',) if 'pipe' in compat.varying_axes(g) else ())
    if at.zero_dim is not None and names[0] not in scattered:
      if _by_permutes(g, at.zero_dim, g.size, permutes):
        g = _halve(g, at.zero_axes, at.zero_dim)
      else:
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
