"""The network's sections: what is printed comes out, what cannot be built is left out or named."""

import dataclasses

import matplotlib.figure
import pytest

from dsv3_jax import config
from dsv3_jax.codesign import hardware, network
from dsv3_jax.codesign.table import Row, Section

C, H800 = config.Config(), hardware.H800


def _rows(section: Section, table: int | None = None) -> list[Row]:
  tables = section.tables if table is None else section.tables[table : table + 1]
  return [row for t in tables for row in t.rows]


def _measured(rows: list[Row]) -> dict[str, tuple[float, float]]:
  return {row.label: (row.value, float(row.published)) for row in rows if row.published is not None}


def _with_experts(**sizes: int) -> config.Config:
  moe = dataclasses.replace(C.model.moe, num_groups=4, top_groups=2, top_k=2, **sizes)
  return dataclasses.replace(C, model=dataclasses.replace(C.model, moe=moe))


def test_every_printed_figure_of_table_3_and_table_5_comes_out():
  rows = _rows(network.topologies(C, H800)) + _rows(network.latencies(C, H800), 0)
  assert [row.agrees for row in rows if row.agrees is not None] == [True] * (25 + 5)
  other = network.topologies(C, H800, radix=32)
  assert not _measured(_rows(other)) and other.row('FT3: endpoints').value == 8192
  with pytest.raises(ValueError, match='radix = 7: a fat tree needs an even number of ports'):
    network.topologies(C, H800, radix=7)


def test_measured_traffic_stands_beside_what_was_simulated():
  traffic = network.traffic(C, H800)
  for row in _rows(traffic, 0):
    assert abs(float(row.note.partition(' %')[0])) < 2, row.label
  found = _measured(_rows(traffic, 1))
  assert len(found) == 8
  for label, (value, given) in found.items():
    assert value == pytest.approx(given, rel=0.2), label
  # Of Figure 8 the ratios are to be met: the paper does not tell how many nodes and leaves it shows.
  found = _measured(_rows(traffic, 2))
  assert len(found) == 9
  for label, (value, given) in found.items():
    whole = found[label.partition(',')[0] + ', adaptive']
    assert value / whole[0] == pytest.approx(given / whole[1], rel=0.25), label
  for label, (value, given) in _measured(_rows(network.latencies(C, H800), 1)).items():
    assert value == pytest.approx(given, rel=0.01), label


def test_failures_are_told_for_planes_rails_leaves_nics_and_cables():
  found = network.failures(C, H800, gpus=32)
  assert len(_rows(found)) == 10 and all(row.value >= 1 for row in _rows(found))
  assert found.row('MPFT without a plane').value == pytest.approx(8 / 7)
  assert found.row('MRFT without a cable from leaf to spine').value == 1


def test_models_of_few_experts_are_shown_on_as_many_gpus_as_have_some():
  rows = network._deep_ep(H800, _with_experts(num_experts=32).model.moe)
  assert [row.label for row in rows] == [
    f'{what}, {gpus} GPUs' for gpus in (16, 32) for what in ('dispatch', 'combine')
  ]
  assert not _measured(rows)
  few = _with_experts(num_experts=8)
  assert network._deep_ep(H800, few.model.moe) == []
  assert 'dispatch' not in _rows(network.failures(few, H800, gpus=16))[0].note


@pytest.mark.parametrize('machine', [hardware.GB200, hardware.V5P])
def test_machines_without_rails_say_so(machine):
  for section in (network.traffic(C, machine), network.failures(C, machine)):
    assert section.row('because').value == f'{machine.chips} rails do not divide 64 leaves'
  assert network.topologies(C, machine).row('MPFT: endpoints').value == 16_384
  assert not _measured(_rows(network.latencies(C, machine), 1))


def test_charts_draw():
  sections = [f(C, H800) for f in (network.topologies, network.traffic, network.latencies)]
  charts = [chart for section in sections for chart in section.charts]
  figure = matplotlib.figure.Figure()
  for chart, axes in zip(charts, figure.subplots(len(charts)), strict=True):
    chart.draw(axes)
    assert axes.get_legend() is not None
