"""The study of number formats: errors by hand, and the paper's order of them."""

import matplotlib.figure
import numpy as np
import oracle_precision
import pytest

from dsv3_jax import config
from dsv3_jax.codesign import branches, hardware
from dsv3_jax.codesign import logfmt_study as study


def test_errors_are_those_of_a_small_case_by_hand():
  x_XD = np.array([[3.0, -4.0, 0.0] + [0.0] * 125 + [2.0]], np.float32)
  rounded_XD = np.array([[3.0, -4.5, 0.0] + [0.0] * 125 + [0.0]], np.float32)
  found = study.error(x_XD, rounded_XD)
  assert found == study.Error(
    norm=pytest.approx(np.sqrt((0.25 + 4) / 29)),
    median=pytest.approx(0.125),
    zeroed=pytest.approx(1 / 3),
    bias=pytest.approx((7.5 - 9) / 9),
    worst_tile=pytest.approx(1.0),
  )


@pytest.mark.parametrize('heavy', [False, True])
def test_logfmt_8_is_nearer_than_both_fp8_formats_and_10_bits_near_bf16(heavy):
  x_YTD = study.made_up(64)
  if not heavy:
    x_YTD = np.random.default_rng(0).standard_normal(x_YTD.shape).astype(np.float32)
  found = study.errors(x_YTD)
  norm = {name: e.norm for name, e in found.items()}
  assert norm['LogFMT-8'] < norm['E4M3, exact scale'] <= norm['E4M3'] < norm['E5M2']
  assert norm['BF16'] < norm['LogFMT-10'] < 3 * norm['BF16'] < norm['LogFMT-8']
  # The boundary in linear space: nothing is gained or lost on the whole.
  assert all(abs(found[name].bias) < 1e-3 for name in ('LogFMT-8', 'LogFMT-10'))
  np.testing.assert_allclose(study.layer_errors(x_YTD)['E4M3'], [norm['E4M3']])


def test_formats_are_the_oracle_s():
  x_TD = np.random.default_rng(0).standard_normal((3, 200)).astype(np.float32)
  x_TD[0, :150] *= 1e-3
  q_TD, scale = oracle_precision.quantize_rows(x_TD.astype(float), power_of_two=True)
  expected = oracle_precision.dequantize(q_TD, scale, (1, 128))
  np.testing.assert_array_equal(study.FORMATS['E4M3'].round_trip(x_TD), expected.astype(np.float32))
  for bits in (
    8,
    10,
  ):  # the oracle does not round the range to bfloat16: a step differs by 1 % or so
    expected = oracle_precision.logfmt_round_trip(x_TD.astype(float), bits)
    found = study.FORMATS[f'LogFMT-{bits}'].round_trip(x_TD)
    a, b = (np.linalg.norm(y - x_TD) for y in (found, expected))
    assert a == pytest.approx(b, rel=0.1)


def test_shares_of_histograms_add_up():
  x_YTD = study.made_up(16, 256)
  x_YTD[0, 0, :5] = 0
  assert study.octaves(x_YTD, np.arange(-40.0, 1.0)).sum() == pytest.approx(1)
  for name, share in study.relative_errors(x_YTD, np.linspace(-9, 1, 41)).items():
    assert share.sum() == pytest.approx(1), name


def test_bits_of_a_row_are_those_of_the_wire():
  bits = {name: f.bits * 7168 / 8 for name, f in study.FORMATS.items()}
  assert bits['BF16'] == 14_336 and bits['LogFMT-10'] == 7168 * 10 / 8 + 56 * 4 == 9_184
  assert bits['E4M3'] == 7_224 and bits['E4M3, exact scale'] == 7_392


def test_the_section_tells_whose_numbers_it_shows():
  recorded = branches.Branches(np.concatenate([study.made_up(8, 256)] * 2), '/runs/quick', 318)
  for activations in (None, recorded):
    section = study.section(config.Config(), hardware.H800, activations)
    assert section.text.startswith(
      '/runs/quick, step 318: what 2 FFNs' if activations else 'Made-up'
    )
    errors = {row.label: float(row.value) for row in section.tables[0].rows}
    assert errors['LogFMT-8'] < errors['E4M3'] < errors['E5M2']
    figure = matplotlib.figure.Figure()
    for chart, axes in zip(section.charts, figure.subplots(2), strict=True):
      chart.draw(axes)
