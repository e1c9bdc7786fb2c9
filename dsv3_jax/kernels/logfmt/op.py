"""Public functions of LogFMT."""

import jax
import jax.numpy as jnp

from dsv3_jax.kernels import checks, choice, tiles


def encode(
  x_XD: jax.Array, bits: int, *, implementation: str | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(codes uint16 [.., D], low bfloat16 [.., S], high bfloat16 [.., S]), S = ceil(D / 128) tiles.

  A code is a sign, bit `bits` - 1, over `bits` - 1 bits of magnitude k: 0 is zero, k = 1 .. 2^(bits-1) - 1
  is low * 2^(step (k - 1)) with step = log2(high / low) / (2^(bits-1) - 2). A number takes the code
  nearest in linear space (from the arithmetic mean of two values on the upper one), which keeps sums
  unbiased. Section 3.2 of arXiv 2505.09343.

  `low` and `high` are the smallest non-zero and the largest magnitude of the tile, rounded outwards to
  bfloat16, low down and high up, before anything is coded: both ends compute with the same range, no
  number lies outside, and each is off by tanh(step ln 2 / 2) of itself at most, about 0.35 step. Outward
  rounding widens the range by at most 2^-6 octaves, and not at all for numbers from bfloat16. low is
  at least high / 2^32: what lies below half of it becomes zero, as does what lies below 2^-126.
  A tile of zeros has low = high = 0. NaN or infinity in a tile makes both NaN, and all of it decodes to NaN.

  `x_XD`: bfloat16 or float32. `bits`: 3 to 16. Not differentiable.
  """
  _check(bits)
  checks.numbers('LogFMT', x_XD)
  return choice.run('logfmt', 'encode', implementation, x_XD, bits)


def decode(
  codes_XD: jax.Array,
  low_XS: jax.Array,
  high_XS: jax.Array,
  bits: int,
  dtype: jnp.dtype,
  *,
  implementation: str | None = None,
) -> jax.Array:
  """The numbers of `encode`, computed in float32 and rounded once -> [.., D] in `dtype`."""
  _check(bits)
  need = (*codes_XD.shape[:-1], tiles.count(codes_XD.shape[-1]))
  for name, x_XS in (('low', low_XS), ('high', high_XS)):
    if x_XS.shape != need:
      raise ValueError(
        f'{name} {x_XS.shape} of codes {codes_XD.shape}: must be {need}, one per 128'
      )
  return choice.run('logfmt', 'decode', implementation, codes_XD, low_XS, high_XS, bits, dtype)


def _check(bits: int) -> None:
  if not 3 <= bits <= 16:
    raise ValueError(f'bits = {bits}: LogFMT has 3 to 16, sign included')
