"""Number formats in NumPy: E4M3 and E5M2 by tiles of 1x128, BF16, LogFMT (arXiv 2412.19437, 3.3; 2505.09343, 3.2).

What the kernels compute (`dsv3_jax/kernels/quantize`, `kernels/logfmt`) without jax: E4M3 by power-of-two
scales is the same bits, and so are LogFMT's ranges and codes but where two values are equally near to within
the kernel's logarithm, 4e-7 octaves. Arrays are float32 [.., D]; a ragged last tile is filled with zeros.
"""

import dataclasses

import numpy as np

TILE = 128
AMAX_FLOOR = np.float32(1e-4)  # of the released kernels


@dataclasses.dataclass(frozen=True)
class Float8:
  """A float of 8 bits with subnormals."""

  fraction: int  # bits
  min_exponent: int  # of normal numbers
  largest: float

  def round(self, x: np.ndarray) -> np.ndarray:
    """To the nearest value, ties to even; at most `largest`."""
    magnitude = np.minimum(np.abs(x.astype(np.float64)), self.largest)
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, self.min_exponent)
    quantum = np.exp2(exponent - float(self.fraction))
    return np.copysign(np.rint(magnitude / quantum) * quantum, x).astype(np.float32)


E4M3 = Float8(3, -6, 448.0)
E5M2 = Float8(2, -14, 57344.0)


def scaled(x_XD: np.ndarray, kind: Float8, *, power_of_two: bool) -> tuple[np.ndarray, np.ndarray]:
  """(values of the format [.., D], scale [.., S]): x is about values * scale, one scale per 128."""
  x_XSH = _split(x_XD)
  amax_XS1 = np.maximum(np.abs(x_XSH).max(-1, keepdims=True), AMAX_FLOOR)
  scale_XS1 = amax_XS1 / np.float32(kind.largest)
  if power_of_two:
    fraction, exponent = np.frexp(
      amax_XS1 / kind.largest
    )  # float64: the quotient must not round up
    scale_XS1 = np.exp2(exponent - (fraction == 0.5)).astype(np.float32)
  return _join(kind.round(x_XSH / scale_XS1), x_XD.shape[-1]), scale_XS1[..., 0]


def rounded(x_XD: np.ndarray, kind: Float8, *, power_of_two: bool) -> np.ndarray:
  """x after `scaled` and back, float32."""
  values_XD, scale_XS = scaled(x_XD, kind, power_of_two=power_of_two)
  return _join(_split(values_XD) * scale_XS[..., None], x_XD.shape[-1])


def bf16(x: np.ndarray) -> np.ndarray:
  """x rounded to bfloat16, ties to even, as float32; x must be finite."""
  bits = x.astype(np.float32).view(np.uint32)
  return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def tile_max(x_XD: np.ndarray) -> np.ndarray:
  """The largest of its tile, for every element."""
  x_XSH = _split(x_XD)
  return _join(np.broadcast_to(x_XSH.max(-1, keepdims=True), x_XSH.shape), x_XD.shape[-1])


# ---- LogFMT --------------------------------------------------------------------------------------


def logfmt_encode(x_XD: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """(codes uint16 [.., D], low [.., S], high [.., S]) of finite numbers; low and high are bfloat16's.

  A sign over bits - 1 bits of k: 0 is zero, else low * (high / low)^((k - 1) / (2^(bits-1) - 2)), the
  nearest in linear space. `low` and `high` are the tile's smallest and largest magnitude, rounded outwards,
  low at least high / 2^32.
  """
  x_XSH, last = _split(x_XD), 2 ** (bits - 1) - 1
  magnitude_XSH = np.abs(x_XSH)
  magnitude_XSH = np.where(magnitude_XSH < 2.0**-126, 0, magnitude_XSH)
  smallest = np.where(magnitude_XSH == 0, np.inf, magnitude_XSH).min(-1, keepdims=True)
  empty_XS1 = np.isinf(smallest)
  upper = (magnitude_XSH.max(-1, keepdims=True).view(np.uint32) + 0xFFFF) >> 16
  lower = (
    np.where(empty_XS1, 0, smallest.astype(np.float32)).astype(np.float32).view(np.uint32) >> 16
  )
  lower = np.maximum(lower.astype(np.int64), upper.astype(np.int64) - (32 << 7))
  low_XS1, high_XS1 = (
    np.where(empty_XS1, 0, (half.astype(np.uint32) << 16).view(np.float32))
    for half in (lower, upper)
  )
  step_XS1 = _step(low_XS1, high_XS1, last)
  some_XS1 = np.where(step_XS1 > 0, step_XS1, 1)  # a single magnitude has code 1 with any step
  mean_XS1 = np.log2((1 + np.exp2(some_XS1)) / 2) / some_XS1
  with np.errstate(divide='ignore', invalid='ignore'):
    octaves_XSH = np.log2(magnitude_XSH.astype(np.float64)) - np.log2(low_XS1)
  nonzero_XSH = magnitude_XSH >= low_XS1.astype(np.float64) / 2
  nonzero_XSH &= magnitude_XSH > 0
  place_XSH = np.where(nonzero_XSH, octaves_XSH, 0) / some_XS1 + 2 - mean_XS1
  code_XSH = np.where(nonzero_XSH, np.clip(np.floor(place_XSH), 1, last), 0).astype(np.uint16)
  code_XSH |= np.signbit(x_XSH).astype(np.uint16) << (bits - 1)
  return _join(code_XSH, x_XD.shape[-1]), low_XS1[..., 0], high_XS1[..., 0]


def logfmt_decode(
  codes_XD: np.ndarray, low_XS: np.ndarray, high_XS: np.ndarray, bits: int
) -> np.ndarray:
  """The numbers of `logfmt_encode`, float32."""
  codes_XSH, last = _split(codes_XD), 2 ** (bits - 1) - 1
  k_XSH = (codes_XSH & last).astype(np.float64)
  step_XS1 = _step(low_XS[..., None], high_XS[..., None], last)
  magnitude_XSH = np.where(k_XSH == 0, 0, low_XS[..., None] * np.exp2(step_XS1 * (k_XSH - 1)))
  x_XSH = np.where(codes_XSH > last, -magnitude_XSH, magnitude_XSH)
  return _join(x_XSH.astype(np.float32), codes_XD.shape[-1])


def logfmt(x_XD: np.ndarray, bits: int) -> np.ndarray:
  """x coded and decoded, float32."""
  return logfmt_decode(*logfmt_encode(x_XD, bits), bits)


def _step(low: np.ndarray, high: np.ndarray, last: int) -> np.ndarray:
  """Octaves from a code to the next, float64; 0 for tiles of zeros and of a single magnitude."""
  ratio = np.divide(high, low, out=np.ones(np.shape(low)), where=low > 0, dtype=np.float64)
  return np.log2(ratio) / (last - 1)


def _split(x_XD: np.ndarray) -> np.ndarray:
  """[.., D] -> [.., ceil(D / 128), 128]."""
  missing = -x_XD.shape[-1] % TILE
  x_XD = np.pad(x_XD, [(0, 0)] * (x_XD.ndim - 1) + [(0, missing)])
  return x_XD.reshape(*x_XD.shape[:-1], -1, TILE)


def _join(x_XSH: np.ndarray, dim: int) -> np.ndarray:
  return x_XSH.reshape(*x_XSH.shape[:-2], -1)[..., :dim]
