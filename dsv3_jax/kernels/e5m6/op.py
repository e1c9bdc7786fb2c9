"""Public functions of E5M6."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import checks, choice, tiles


def row_bytes(dim: int) -> int:
  """Bytes of a row of `dim` numbers, scales aside: 1.5 each where 128 divides."""
  return dim + tiles.TILE // 2 * tiles.count(dim)


def encode(x_XD: jax.Array, *, implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
  """(uint8 [.., D + 64 S], scale float32 [.., S]), S = ceil(D / 128) tiles.

  A code is a float16 without its last 4 bits: sign, 5 of exponent, 6 of mantissa, to nearest even,
  relative error at most 2^-7. Two codes share three bytes: upper 8 bits of all D codes, then of each tile
  64 bytes with the lower 4 bits of codes j and j + 64. Scales are the powers of two that bring the largest
  of a tile to at most 65024 (section 3.3.3 of arXiv 2412.19437). NaN or infinity makes its tile NaN.

  `x_XD`: bfloat16 or float32. Not differentiable.
  """
  checks.numbers('E5M6', x_XD)
  return choice.run('e5m6', 'encode', implementation, x_XD)


def decode(
  codes_XB: jax.Array,
  scale_XS: jax.Array,
  dim: int,
  dtype: jnp.dtype,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """The numbers of `encode`, exact in bfloat16 and float32 -> [.., dim]."""
  if codes_XB.dtype != jnp.uint8 or codes_XB.shape[-1] != row_bytes(dim):
    told = f'codes {codes_XB.dtype}{list(codes_XB.shape)} of {dim} numbers'
    raise ValueError(f'{told}: must be uint8 with {row_bytes(dim)} bytes a row')
  need = (*codes_XB.shape[:-1], tiles.count(dim))
  if scale_XS.shape != need:
    raise ValueError(f'scale {scale_XS.shape}: must be {need}, one per 128 numbers')
  return choice.run('e5m6', 'decode', implementation, codes_XB, scale_XS, dim, dtype)
