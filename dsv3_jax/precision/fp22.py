"""A model of sums on Hopper's tensor cores without promotion: an accumulator of 13 bits of fraction.

TR 3.3.2 and 3.5.2 (arXiv 2412.19437) and arXiv 2505.09343: products of FP8 numbers are added up, 32 at a
time, into a register of 1 + 8 + 13 bits that truncates. Here the sum over 32 is exact and the register is
truncated after each; that the 32 products are themselves aligned and cut to 13 bits is left out, and scales
are applied before. A model of the error's kind and size, not of a chip's bits.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from dsv3_jax import compat
from dsv3_jax.kernels import tiles

_STEP = 32  # of K in one instruction
_DROPPED = (1 << (23 - 13)) - 1  # bits of a float32


def dot(a_MK: jax.Array, b_NK: jax.Array) -> jax.Array:
  """a b^T for float32 operands -> [M, N]."""
  missing = ((0, 0), (0, -a_MK.shape[1] % _STEP))
  steps = (rearrange(jnp.pad(x, missing), 'X (s k) -> s X k', k=_STEP) for x in (a_MK, b_NK))
  zeros_MN = compat.zeros_like_varying((len(a_MK), len(b_NK)), jnp.float32, a_MK, b_NK)

  def add(total_MN: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    total_MN += jnp.einsum('Mk,Nk->MN', *step)
    return tiles.number(tiles.bits(total_MN) & ~_DROPPED), None

  return lax.scan(add, zeros_MN, tuple(steps))[0]
