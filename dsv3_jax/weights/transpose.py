"""Transposed copies on the host, at several times NumPy's speed.

Nearly every matrix of ours lies transposed in a released checkpoint, so this is where a conversion's time
goes. NumPy walks a column for each row and misses the cache with every number: 250 to 600 MB/s of BF16 on
the machine where XLA's blocked transposition, which JAX uses to take in an array that is not in row
order, made 1,600 to 2,300.
"""

import functools

import jax
import numpy as np

_BITS = {
  1: np.uint8,
  2: np.uint16,
  4: np.uint32,
}  # moved as whole numbers: no dtype is out of question


def contiguous(x: np.ndarray) -> np.ndarray:
  """x in row order: itself if it is, otherwise a copy that may not be written to."""
  if x.flags.c_contiguous:
    return x
  if x.dtype.itemsize not in _BITS or _cpu() is None:
    return np.ascontiguousarray(x)
  return np.asarray(jax.device_put(x.view(_BITS[x.dtype.itemsize]), _cpu())).view(x.dtype)


@functools.cache
def _cpu() -> jax.Device | None:
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    return None
