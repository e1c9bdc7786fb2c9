"""FP8 and LogFMT as the reports describe them, in NumPy float64.

FP8: arXiv 2412.19437, section 3.3. E4M3 for every tensor; activations scaled per 1x128 tile,
weights per 128x128 block, scales taken from the current maximum. LogFMT: arXiv 2505.09343, the
n-bit logarithmic format of the combine, per 1x128 tile. Rounded values are returned as float64
numbers on the format's grid; scales divide on the way in and multiply on the way out.
"""

import math

import numpy as np

Array = np.ndarray

E4M3_MAX = 448.0
E4M3_MIN_EXPONENT = -6  # below it numbers are subnormal
AMAX_FLOOR = 1e-4  # of the released kernels; keeps the scale of an all-zero tile positive


# ---- FP8 -----------------------------------------------------------------------------------------


def round_e4m3(x: Array) -> Array:
  """Nearest E4M3 value, ties to even, saturating at +-448.

  Written out because a cast of float64 by ml_dtypes passes through float32 and rounds twice.
  """
  magnitude = np.minimum(np.abs(x), E4M3_MAX)
  _, exponent = np.frexp(magnitude)  # magnitude = m 2^exponent, m in [1/2, 1)
  quantum = np.exp2(np.maximum(exponent - 1, E4M3_MIN_EXPONENT) - 3.0)  # 3 mantissa bits
  return np.copysign(np.rint(magnitude / quantum) * quantum, x)


def fp8_scale(tile: Array, power_of_two: bool) -> float:
  """amax / 448, or the next power of two at or above it (UE8M0)."""
  scale = max(float(np.max(np.abs(tile))), AMAX_FLOOR) / E4M3_MAX
  if not power_of_two:
    return scale
  mantissa, exponent = math.frexp(scale)  # exact, unlike log2
  return 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)


def quantize(x_XY: Array, tile: tuple[int, int], power_of_two: bool = False) -> tuple[Array, Array]:
  """(q [X, Y] on the E4M3 grid, scale [ceil(X / tile[0]), ceil(Y / tile[1])]); edges may be ragged.

  Tiles of the report: (1, 128) activations, (128, 1) the same for Wgrad, (128, 128) weights.
  """
  X, Y = x_XY.shape
  rows, cols = tile
  q_XY = np.zeros((X, Y))
  scale = np.zeros((math.ceil(X / rows), math.ceil(Y / cols)))
  for a in range(scale.shape[0]):
    for b in range(scale.shape[1]):
      at = np.s_[a * rows : (a + 1) * rows, b * cols : (b + 1) * cols]
      scale[a, b] = fp8_scale(x_XY[at], power_of_two)
      q_XY[at] = round_e4m3(x_XY[at] / scale[a, b])
  return q_XY, scale


def dequantize(q_XY: Array, scale: Array, tile: tuple[int, int]) -> Array:
  x_XY = np.zeros(q_XY.shape)
  for i in range(q_XY.shape[0]):
    for j in range(q_XY.shape[1]):
      x_XY[i, j] = q_XY[i, j] * scale[i // tile[0], j // tile[1]]
  return x_XY


def quantize_rows(x_XY: Array, power_of_two: bool = False) -> tuple[Array, Array]:
  """1x128: per token per 128 channels."""
  return quantize(x_XY, (1, 128), power_of_two)


def quantize_blocks(w_XY: Array, power_of_two: bool = False) -> tuple[Array, Array]:
  """128x128: per 128 input channels per 128 output channels."""
  return quantize(w_XY, (128, 128), power_of_two)


def fp8_matmul(x_TK: Array, w_KN: Array, power_of_two: bool = False) -> Array:
  """Fprop: each 128-wide slice of K is multiplied in FP8, scaled, and added in full precision."""
  x_q, x_scale = quantize_rows(x_TK, power_of_two)
  w_q, w_scale = quantize_blocks(w_KN, power_of_two)
  out_TN = np.zeros((len(x_TK), w_KN.shape[1]))
  for t in range(out_TN.shape[0]):
    for n in range(out_TN.shape[1]):
      for b in range(x_scale.shape[1]):
        at = slice(128 * b, 128 * (b + 1))
        out_TN[t, n] += (x_q[t, at] @ w_q[at, n]) * x_scale[t, b] * w_scale[b, n // 128]
  return out_TN


# ---- LogFMT --------------------------------------------------------------------------------------


def logfmt_values(low: float, step: float, bits: int) -> Array:
  """Magnitude of every code: 0, then exp(low + step (code - 1)) up to code 2^(bits - 1) - 1."""
  values = [0.0]
  for code in range(1, 2 ** (bits - 1)):
    values.append(math.exp(low + step * (code - 1)))
  return np.array(values)


def logfmt_encode(x_H: Array, bits: int) -> tuple[Array, Array, float, float]:
  """One tile: (negative_H bool, code_H int, low, step), for 1 sign bit and bits - 1 code bits.

  log|x| of the non-zero elements spans [low, high], low at least high - ln(2^32); code 1 is low and
  the last code high. An element takes the code whose value is nearest in linear space, the upper
  one from the arithmetic mean of two values on; so what lies below half the smallest becomes 0.
  A tile of zeros has low = step = 0; one of a single magnitude has step 0 and code 1.
  """
  logs = [math.log(abs(x)) for x in x_H if x != 0]
  if not logs:
    return x_H < 0, np.zeros(len(x_H), int), 0.0, 0.0
  high = max(logs)
  low = max(min(logs), high - math.log(2.0**32))
  step = (high - low) / (2 ** (bits - 1) - 2)
  values = logfmt_values(low, step, bits)
  code_H = np.zeros(len(x_H), int)
  for i, x in enumerate(x_H):
    for code in range(1, len(values)):
      apart = values[code] > values[code - 1]
      if apart and abs(x) >= (values[code - 1] + values[code]) / 2:
        code_H[i] = code
  return x_H < 0, code_H, low, step


def logfmt_decode(negative_H: Array, code_H: Array, low: float, step: float, bits: int) -> Array:
  magnitude_H = logfmt_values(low, step, bits)[code_H]
  return np.where(negative_H, -magnitude_H, magnitude_H)


def logfmt_round_trip(x_XY: Array, bits: int) -> Array:
  """Every 1x128 tile encoded and decoded again; Y may be ragged."""
  out_XY = np.zeros(x_XY.shape)
  for i in range(x_XY.shape[0]):
    for j in range(0, x_XY.shape[1], 128):
      out_XY[i, j : j + 128] = logfmt_decode(*logfmt_encode(x_XY[i, j : j + 128], bits), bits)
  return out_XY
