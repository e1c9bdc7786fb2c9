"""Every printed figure of the papers comes out of the report's sections, or is named with its reason."""

import pytest

from dsv3_jax import config
from dsv3_jax.codesign import (
  compute,
  cost,
  decode_limit,
  expert_traffic,
  hardware,
  host,
  memory,
  models,
  schedule,
)
from dsv3_jax.codesign.table import Row

C, H800 = config.Config(), hardware.H800


def printed(section):
  rows = [row for table in section.tables for row in table.rows if row.published is not None]
  return {row.label: row.published for row in rows}, [row for row in rows if not row.agrees]


def test_digits_agree_where_a_value_rounds_to_them_or_is_cut_to_them():
  agrees = lambda value, digits: Row('', value, published=digits).agrees
  assert agrees(67.76, '67') and agrees(67.76, '68') and agrees(14.757, '14.76')
  assert agrees(2788.0, '2,788') and agrees('x', 'x')
  assert not agrees(7.344, '7.28') and not agrees(66.4, '67') and not agrees(68.0, '67')
  assert not agrees('x', 'y') and Row('', 1.0).agrees is None


@pytest.mark.parametrize(
  ('section', 'figures'),
  [
    (cost.section, {'together': '2788', 'together: cost': '5.576', 'pre-training: cost': '5.328',
                    'MPFT: tokens a day': '272.80', 'MRFT: tokens a day': '272.52',
                    'MPFT: causal MFU': '38.94', 'MRFT: not causal MFU': '43.68'}),
    (decode_limit.section, {'h800, 50 GB/s: dispatch and combine': '120.96',
                            'h800, 50 GB/s: a token': '14.76', 'h800, 50 GB/s: speed': '67',
                            'gb200_nvl72, 900 GB/s: dispatch and combine': '6.72',
                            'gb200_nvl72, 900 GB/s: a token': '0.82', 'MTP, 80 % accepted': '1.8'}),
    (expert_traffic.section, {'H800: NVLink over InfiniBand': '3.2',
                              'experts on 4 nodes that cost no more': '13'}),
    (host.section, {'160 lanes of PCIe 5': '640'}),
    (schedule.section, {'dualpipe: bubble': '6', '1f1b: bubble': '21', 'rank 0: forward': '11'}),
  ],
  ids=['cost', 'decode', 'traffic', 'host', 'schedule'],
)  # fmt: skip
def test_sections_have_every_printed_digit(section, figures):
  made = section(C, H800)
  found, missed = printed(made)
  assert not missed
  for label, digits in figures.items():
    assert made.row(label).published == digits and label in found


def test_what_of_tables_1_and_2_cannot_be_met_is_named():
  found, missed = printed(memory.section(C, H800))
  assert found['DeepSeek-V3, MLA'] == '70.272' and found['Qwen-2.5 72B, GQA'] == '327.680'
  assert [(row.label, 'misprint' in row.note) for row in missed] == [
    ('LLaMA-3.1 405B, of V3', True)
  ]
  found, missed = printed(compute.section(C, H800))
  assert (found['DeepSeek-V3 671B'], found['DeepSeek-V2 236B']) == ('250', '155')
  assert all('no one formula' in row.note for row in missed)
  assert [row.label for row in missed] == ['Qwen-2.5 72B, dense', 'LLaMA-3.1 405B, dense']


def test_limits_of_decoding_are_exact():
  for bandwidth, us, ms, speed in ((50e9, 120.96, 14.757, 67.76), (900e9, 6.72, 0.8198, 1219.76)):
    once = decode_limit.PAPER.seconds(bandwidth)
    token = decode_limit.token_seconds(61, once)
    assert (1e6 * once, 1e3 * token, 1 / token) == pytest.approx((us, ms, speed), rel=1e-4)
  exact = decode_limit.exchange(models.V3).seconds(50e9)
  assert 1e6 * exact == pytest.approx(123.86, abs=0.01)
  assert decode_limit.token_seconds(2, 3.0, 5.0) == 20
  assert decode_limit.token_seconds(2, 3.0, 5.0, overlap=False) == 32


def test_hours_follow_from_the_time_of_a_step():
  paper = cost.step(models.V3, 19.926, seq_len=4096, sequences=15_360)
  mfu = paper.rate(paper.flops) / H800.chip.bf16
  days = 14.8e12 / paper.tokens_a_day
  assert cost.device_hours(C, H800, mfu) == pytest.approx(days * 24 * 2048)
  assert days == pytest.approx(54.25, abs=0.01)
  with pytest.raises(ValueError, match=r'mfu = 1.5: must be above 0 and at most 1'):
    cost.device_hours(C, H800, 1.5)
