"""The benchmark of the FP8 kernels, at its smallest, through XLA."""

import dataclasses
import json
import math

import jax
import pytest

from dsv3_jax.kernels import bench, bench_cases, tuning
from dsv3_jax.kernels import hopper_gemm as hg


def test_quick_checks_and_times_everything_and_writes_what_it_found(tmp_path, monkeypatch):
  out = tmp_path / 'out.json'
  monkeypatch.setattr('sys.argv', ['bench', '--quick', f'--out={out}'])
  bench.main()
  report = json.loads(out.read_text())
  assert {'device', 'versions', 'date', 'ceilings'} <= report.keys()
  assert report['implementation'] == 'xla'
  assert all(row['ok'] for row in report['checks']) and len(report['checks']) == 17
  assert {row['op'] for row in report['times']} == {
    case.op for case in bench_cases.cases(quick=False)
  }
  assert all(row['us'] > 0 for row in report['times'])


def test_a_case_that_fails_is_a_row_and_the_others_go_on(tmp_path, monkeypatch):
  def broken(*arrays):
    raise NotImplementedError('no such tile')

  case = next(bench_cases.cases(quick=True))
  monkeypatch.setattr(
    bench, 'cases', lambda quick: [dataclasses.replace(case, function=broken), case]
  )
  first, second = bench.times(quick=True)
  assert first['error'] == 'NotImplementedError: no such tile' and 'error' not in second


def test_plain_gives_every_product_beside_a_dot(tmp_path, monkeypatch):
  out = tmp_path / 'out.json'
  monkeypatch.setattr('sys.argv', ['bench', '--plain', '--quick', f'--out={out}'])
  bench.main()
  rows = json.loads(out.read_text())['times']
  assert [row['op'] for row in rows[:4]] == [
    'fp8_matmul', 'fp8_wgrad', 'grouped_matmul', 'grouped_wgrad'
  ]  # fmt: skip
  assert all(row['times_dot'] == pytest.approx(row['us'] / row['dot_us']) for row in rows)


def test_bytes_and_products_of_the_cases_are_those_of_their_arrays():
  for case in bench_cases.cases(quick=False):
    arrays = jax.eval_shape(case.make)
    out = jax.tree.leaves(jax.eval_shape(case.function, *arrays))
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *out))
    assert 0.85 * size < case.moved <= size, (case.op, case.shape)


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
