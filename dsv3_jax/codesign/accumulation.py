"""What Hopper's FP8 tensor cores lose in long sums, and what promotion every 128 products saves.

The model (arXiv 2505.09343, 3.1; 2412.19437, 3.3.2 and 3.5.2): one instruction step takes 32 products and
the register, shifts all to the exponent of the largest, drops what lies below 13 fraction bits, and adds
exactly; the register holds 1 + 8 + 13 bits ("FP22"). Promotion (3.3.2) adds the register to an FP32 sum
after every 128 products, 4 steps, and starts it from zero.

A product's exponent is taken as the sum of its factors' exponents, as hardware aligns before it
normalises. This is a model of the published description, not of the silicon.
"""

import numpy as np

from dsv3_jax.codesign import formats

STEP = 32  # products that are aligned together
FRACTION = 13  # bits kept
PROMOTE = 128
# Random operands before quantisation; each stresses another thing.
DATA = ('normal', 'uniform', 'outliers')


def operands(name: str, outputs: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
  """(a, b) [outputs, k] each, values of E4M3 with one scale a tile taken out.

  'normal'; 'uniform' in [0, 1), where every sum only grows, as after a ReLU; 'outliers': normal with every
  hundredth channel of `a` a hundred times as large.
  """
  rng = np.random.default_rng(seed)
  if name == 'uniform':
    a, b = rng.random((outputs, k)), rng.random((outputs, k))
  elif name in ('normal', 'outliers'):
    a, b = rng.standard_normal((outputs, k)), rng.standard_normal((outputs, k))
    if name == 'outliers':
      a[:, ::100] *= 100
  else:
    raise ValueError(f'data {name!r}: must be one of {", ".join(DATA)}')
  one = lambda x: formats.E4M3.round(x / np.abs(x).max(1, keepdims=True) * 448)
  return one(a), one(b)


def dot(
  a_NK: np.ndarray, b_NK: np.ndarray, *, fraction: int = FRACTION, promote: int | None = None
) -> np.ndarray:
  """Sum over K of a * b in the model, float64 [N]; `promote` products between promotions, None for never.

  Raises:
    ValueError: K or `promote` is not a multiple of 32.
  """
  N, K = a_NK.shape
  for name, value in (('K', K), ('promote', promote or STEP)):
    if value % STEP:
      raise ValueError(f'{name} = {value}: must be a multiple of {STEP}')
  products_NK = a_NK.astype(np.float64) * b_NK
  exponent_NK = np.where(products_NK == 0, -1000, _exponent(a_NK) + _exponent(b_NK))
  register_N, total_N = np.zeros(N), np.zeros(N, np.float32)
  for k in range(0, K, STEP):
    exponent_N = exponent_NK[:, k : k + STEP].max(1)
    held_N = np.where(register_N == 0, -1000, _exponent(register_N))
    quantum_N = np.exp2(np.maximum(exponent_N, held_N) - float(fraction))
    aligned_NX = np.trunc(products_NK[:, k : k + STEP] / quantum_N[:, None])
    register_N = (aligned_NX.sum(1) + np.trunc(register_N / quantum_N)) * quantum_N
    register_N = _truncate(register_N, fraction)
    if promote and (k + STEP) % promote == 0:
      total_N += register_N.astype(np.float32)
      register_N = np.zeros(N)
  return total_N + register_N


def _exponent(x: np.ndarray) -> np.ndarray:
  """floor(log2 |x|)."""
  return np.frexp(x)[1] - 1


def _truncate(x_N: np.ndarray, fraction: int) -> np.ndarray:
  quantum_N = np.exp2(_exponent(x_N) - float(fraction))
  return np.trunc(x_N / quantum_N) * quantum_N


def errors(a_NK: np.ndarray, b_NK: np.ndarray, **kwargs: int | None) -> tuple[float, float]:
  """(relative in the Euclidean norm, largest relative to the largest output) of `dot`, against float64."""
  exact_N = (a_NK.astype(np.float64) * b_NK).sum(1)
  off_N = dot(a_NK, b_NK, **kwargs) - exact_N
  norm = np.linalg.norm(off_N) / np.linalg.norm(exact_N)
  return float(norm), float(np.abs(off_N).max() / np.abs(exact_N).max())
