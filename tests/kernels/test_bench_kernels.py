"""The benchmark of the FP8 kernels, at its smallest, through XLA."""

import json

import pytest

from dsv3_jax.kernels import bench, tuning
from dsv3_jax.kernels import hopper_gemm as hg


def test_quick_checks_and_times_everything_and_writes_what_it_found(tmp_path, monkeypatch):
  out = tmp_path / 'out.json'
  monkeypatch.setattr('sys.argv', ['bench', '--quick', f'--out={out}'])
  bench.main()
  report = json.loads(out.read_text())
  assert {'device', 'versions', 'date', 'ceilings'} <= report.keys()
  assert report['implementation'] == 'xla'
  assert all(row['ok'] for row in report['checks']) and len(report['checks']) == 16
  assert {row['op'] for row in report['times']} >= {'fp8_matmul', 'grouped_wgrad', 'quantize_tiles'}
  assert all(row['us'] > 0 for row in report['times'])


def test_figures_are_refused_where_there_is_no_gpu(monkeypatch):
  for argument in ('--tune', '--out=x.json'):
    monkeypatch.setattr('sys.argv', ['bench', argument])
    with pytest.raises(SystemExit, match=r'bench: .*(Hopper|jax 0\.11)'):
      bench.main()


def test_a_tile_is_looked_up_exactly_then_by_the_nearest_rows_then_by_the_rule():
  entry = {'rows': 64, 'columns': 256, 'stages': 3, 'width': 4, 'microseconds': 1.0}
  table = {tuning.key('fp8_matmul', 512, 256): {'64': entry, '4096': entry | {'rows': 128}}}
  assert tuning.nearest(table, 'fp8_matmul', 33, 512, 256) == hg.Tiling(64, 256, 3, 4)
  assert tuning.nearest(table, 'fp8_matmul', 3000, 512, 256) == hg.Tiling(128, 256, 3, 4)
  assert tuning.nearest(table, 'fp8_matmul', 100, 512, 256).rows == 64
  assert tuning.nearest(table, 'fp8_matmul', 64, 512, 512) is None
  assert hg.heuristic(64, 4096).rows == 64 and hg.heuristic(4096, 2112).columns == 192
