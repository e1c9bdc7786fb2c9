"""What JAX spells differently from version to version, and the casts that replication checking asks for.

Supported: jax 0.10.2 (the last for Python 3.11) up to 0.12. Imports jax alone, so kernels may use it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def varying_axes(x: jax.Array) -> frozenset[str]:
  """Mesh axes over which `x` may differ from device to device, inside a manual shard_map."""
  return frozenset(jax.typeof(x).manual_axis_type.varying)


def vary(tree: Any, axes: Sequence[str]) -> Any:
  """Casts every leaf to varying over `axes`; `pcast` refuses axes on which a leaf varies already.

  The transpose of the cast is the psum that a replicated weight's gradient needs.
  """

  def cast(x: jax.Array) -> jax.Array:
    missing = tuple(a for a in axes if a not in varying_axes(x))
    return lax.pcast(x, missing, to='varying') if missing else x

  return jax.tree.map(cast, tree)


def vary_like(tree: Any, *examples: jax.Array) -> Any:
  """Casts every leaf to varying wherever any of `examples` varies (loop carries must enter as they leave)."""
  return vary(tree, sorted(frozenset().union(*map(varying_axes, examples))))


def zeros_like_varying(shape: Sequence[int], dtype: Any, *examples: jax.Array) -> jax.Array:
  """Zeros that vary like `examples`."""
  return vary_like(jnp.zeros(shape, dtype), *examples)
