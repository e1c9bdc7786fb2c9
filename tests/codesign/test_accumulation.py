"""The model of Hopper's accumulator: bits by hand, and what promotion saves."""

import dataclasses
import fractions
import itertools

import matplotlib.figure
import numpy as np
import pytest

from dsv3_jax import config
from dsv3_jax.codesign import accumulation, accumulation_study, hardware


def _by_hand(a_K: np.ndarray, b_K: np.ndarray, fraction: int, promote: int | None) -> float:
  """One dot product in exact rational numbers."""
  exponent = lambda x: int(np.frexp(float(x))[1]) - 1
  cut = lambda x, e: (
    fractions.Fraction(int(x / fractions.Fraction(2) ** (e - fraction)))
    * (fractions.Fraction(2) ** (e - fraction))
  )
  register, total = fractions.Fraction(0), np.float32(0)
  for k in range(0, len(a_K), 32):
    pairs = [(float(a), float(b)) for a, b in zip(a_K[k : k + 32], b_K[k : k + 32], strict=True)]
    exponents = [exponent(a) + exponent(b) for a, b in pairs if a * b]
    exponents += [exponent(register)] if register else []
    if exponents:
      e = max(exponents)
      register = sum(
        (cut(fractions.Fraction(a) * fractions.Fraction(b), e) for a, b in pairs), cut(register, e)
      )
    register = cut(register, exponent(register)) if register else register
    if promote and (k + 32) % promote == 0:
      total, register = total + np.float32(float(register)), fractions.Fraction(0)
  return float(total) + float(register)


@pytest.mark.parametrize('promote', [None, 128])
@pytest.mark.parametrize('data', accumulation.DATA)
def test_the_register_is_aligned_cut_and_promoted_as_described(data, promote):
  a_NK, b_NK = accumulation.operands(data, 6, 256)
  a_NK[0, 32:64] = 0  # a step that adds nothing
  for fraction in (5, 13):
    found_N = accumulation.dot(a_NK, b_NK, fraction=fraction, promote=promote)
    expected_N = [_by_hand(a, b, fraction, promote) for a, b in zip(a_NK, b_NK, strict=True)]
    np.testing.assert_array_equal(found_N, expected_N)


def test_promotion_keeps_the_error_where_it_is_while_it_grows_with_k_without():
  errors = lambda data, k, promote: accumulation.errors(
    *accumulation.operands(data, 128, k), promote=promote
  )[0]
  for data in accumulation.DATA:
    assert errors(data, 128, 128) == errors(data, 128, None)
    assert errors(data, 4096, 128) < 1.5 * errors(data, 512, 128) < 2e-3
    assert errors(data, 4096, None) > 1.5 * errors(data, 512, None)
  # Sums that only grow tell most: two orders at K = 4096.
  assert 0.05 < errors('uniform', 4096, None) < 0.1
  assert errors('uniform', 4096, 128) < 1e-3


def test_random_sums_of_4096_lose_about_2_percent_of_their_size_at_worst():
  # arXiv 2412.19437, 3.3.2: "nearly 2 %", of a single output; of whole outputs this is rarely met.
  a_NK, b_NK = accumulation.operands('normal', 1024, 4096)
  exact_N = (a_NK.astype(np.float64) * b_NK).sum(1)
  usual_N = np.abs(exact_N) > 0.1 * np.std(exact_N)
  off_N = np.abs(accumulation.dot(a_NK, b_NK) - exact_N)
  assert 0.01 < (off_N / np.abs(exact_N))[usual_N].max() < 0.04


def test_wider_registers_lose_less_and_32_bits_next_to_nothing():
  a_NK, b_NK = accumulation.operands('uniform', 64, 2048)
  error = [accumulation.errors(a_NK, b_NK, fraction=f)[0] for f in (10, 13, 16, 23)]
  assert all(a > 4 * b for a, b in itertools.pairwise(error)) and error[-1] < 1e-4


def test_what_is_not_whole_steps_is_refused():
  a_NK = np.ones((1, 96), np.float32)
  with pytest.raises(ValueError, match='promote = 48: must be a multiple of 32'):
    accumulation.dot(a_NK, a_NK, promote=48)
  with pytest.raises(ValueError, match='K = 40: must be a multiple of 32'):
    accumulation.dot(a_NK[:, :40], a_NK[:, :40])
  with pytest.raises(ValueError, match="data 'zeros': must be one of normal, uniform, outliers"):
    accumulation.operands('zeros', 1, 32)


def test_the_section_shows_the_model_s_own_sums_and_what_promotion_saves():
  c = config.freeze(config.debug(config.default()))
  c = dataclasses.replace(c, model=dataclasses.replace(c.model, dim=512))
  section = accumulation_study.section(c, hardware.H800)
  value = lambda label: float(section.row(label).value)
  assert value('uniform, K = 512, not promoted') > 5 * value('uniform, K = 512, promoted')
  figure = matplotlib.figure.Figure()
  section.charts[0].draw(figure.subplots())
