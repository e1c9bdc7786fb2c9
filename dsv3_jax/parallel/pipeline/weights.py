"""Brings layers to the ranks of their stages and gradients back; the state itself knows no stages.

Every layer's weight is stored split over `pipe` and the other ZeRO axes, whoever computes with it. Once a step
a rank gets the layers of its two stages (route 0's and route 1's), whole: an all_to_all over `pipe` and an
all_gather over the rest. Both ranks that hold a stage so get the same bits. Gradients go back the same way, and
meet the other copy's on the device that updates them: moments are kept once, and each of a pair's gradients is
sent once. So a checkpoint is the same for any pipe, and ZeRO-1 needs no exchange of its own.

Bytes received per device and weight of n elements a layer, N layers held: N n (w-1)/w times the size of the
dtype it is gathered in, w ways split; gradients in FP32 the other way.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv3_jax.mesh import Placement
from dsv3_jax.parallel import zero

PIPE = 'pipe'


def spread(
  name: str, x: jax.Array, at: Placement, index_RN: np.ndarray, dtype: jnp.dtype
) -> jax.Array:
  """This device's part of a stack [Y, ...] -> the N layers that its rank holds, whole, [N, ...]."""
  ranks, held = index_RN.shape
  if at.zero_dim is not None:
    x = zero.cast(name, x, dtype)
  if PIPE not in at.zero_axes:
    if at.zero_dim is not None:
      x = lax.all_gather(x, at.zero_axes, axis=at.zero_dim, tiled=True)
    return x[own(index_RN)]
  rest = at.zero_axes[1:]
  x = x[index_RN.reshape(-1)].reshape(ranks, held, *x.shape[1:])
  # [to, N, .., n/w, ..] -> [from, N, .., n/w, ..]: each rank's piece of this rank's layers.
  x = lax.all_to_all(x, PIPE, 0, 0, tiled=True)
  if rest:
    # [.., n/w, ..] -> [.., n/ranks, ..]
    x = lax.all_gather(x, rest, axis=at.zero_dim + 1, tiled=True)
  x = jnp.moveaxis(x, 0, at.zero_dim)
  shape = (*x.shape[: at.zero_dim], -1, *x.shape[at.zero_dim + 2 :])
  return x.reshape(shape)


def collect(
  g: jax.Array, at: Placement, index_RN: np.ndarray, used_RN: np.ndarray, layers: int
) -> jax.Array:
  """Gradients [N, ...] of what `spread` gave -> of this device's part of the stack, summed over all copies."""
  ranks, held = index_RN.shape
  used_N = own(used_RN).reshape(held, *[1] * (g.ndim - 1))
  g = jnp.where(used_N, g, 0)
  sums = tuple(a for a in at.copies if a not in at.zero_axes)
  if PIPE not in at.zero_axes:
    g = jnp.zeros((layers, *g.shape[1:]), g.dtype).at[own(index_RN)].add(g)
    if at.zero_dim is not None:
      g = lax.psum_scatter(g, at.zero_axes, scatter_dimension=at.zero_dim, tiled=True)
    return lax.psum(g, (PIPE, *sums))
  rest, d = at.zero_axes[1:], at.zero_dim
  g = g.reshape(*g.shape[:d], ranks, g.shape[d] // ranks, *g.shape[d + 1 :])
  g = jnp.moveaxis(g, d, 0)
  if rest:
    # [to, N, .., n/ranks, ..] -> [to, N, .., n/w, ..], summed
    g = lax.psum_scatter(g, rest, scatter_dimension=d + 1, tiled=True)
  if sums:
    g = lax.psum(g, sums)
  g = lax.all_to_all(g, PIPE, 0, 0, tiled=True)
  g = g.reshape(math.prod(g.shape[:2]), *g.shape[2:])
  return jnp.zeros((layers, *g.shape[1:]), g.dtype).at[index_RN.reshape(-1)].add(g)


def own(table_RN: np.ndarray) -> jax.Array:
  """This rank's row."""
  return jnp.asarray(table_RN)[lax.axis_index(PIPE)]
