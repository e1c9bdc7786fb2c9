"""The benchmark of the exchanges: all forms and skews, nothing wrong timed, every flag checked."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.parallel import bench_dispatch as bench
from dsv3_jax.parallel import bench_layer, skews
from dsv3_jax.parallel.trace import Trace

_SIZES = {
  'nodes': 2, 'locals': 2, 'tokens': 16, 'dim': 32, 'experts': 16, 'top_k': 4, 'groups': 4,
  'top_groups': 2, 'expert_dim': 16, 'steps': 2,
}  # fmt: skip
_FORMS = ('flat', 'two_hop', 'allgather', 'dense')


def _flags(**changes) -> list[str]:
  return [f'--{name}={value}' for name, value in (_SIZES | changes).items()]


def _save(path: pathlib.Path, layers: list[str]) -> None:
  """A trace whose layers are skews."""
  args = bench._parse(_flags())
  c = bench._model(args, 'dense').moe
  ids = np.stack([skews.make(name, c, 1, 64)[0] for name in layers]).astype(np.uint16)
  Trace(ids, 16, 4, 2, rows=4, seq_len=16, model='a', step=None, config={}).save(path)


@pytest.fixture(scope='module')
def all_of_it(tmp_path_factory):
  """Exit code and figures of all forms and skews, those of a trace too."""
  folder = tmp_path_factory.mktemp('bench')
  _save(folder / 'trace.npz', ['uniform', 'one_hot', 'zipf'])
  skewed = f'{",".join(skews.NAMES)},{folder}/trace.npz,{folder}/trace.npz:2'
  out = folder / 'figures.json'
  code = bench.main(_flags(forms=','.join(_FORMS), skews=skewed, json=out))
  return code, json.loads(out.read_text()), str(folder)


def test_the_figures_hold_every_form_under_every_skew(all_of_it):
  code, figures, folder = all_of_it
  assert code == 0
  traces = f'{folder}/trace.npz', f'{folder}/trace.npz:2'
  assert list(figures['skews']) == [*skews.NAMES, *traces]
  for of in figures['skews'].values():
    assert list(of['forms']) == list(_FORMS)
    for f in of['forms'].values():
      assert not f['wrong'] and f['rounds'] >= 1
      assert f['errors'].keys() == {'y', 'dx', 'dweight', 'dgate', 'dup', 'ddown'}
      assert list(f['seconds']) == ['forward', 'forward and backward']
      for seconds in f['seconds'].values():
        assert 0 < seconds['best'] <= seconds['median']
  assert figures['sizes']['experts'] == 16 and figures['sizes']['payload'] == 'fp8'
  assert figures['device'].startswith('4 x cpu, emulated on ')
  assert {'jax', 'jaxlib', 'python'} <= figures['versions'].keys() and figures['date'][:2] == '20'


def test_uneven_skews_take_more_rounds_and_more_bytes(all_of_it):
  by_skew = all_of_it[1]['skews']
  even, one = by_skew['uniform']['forms']['two_hop'], by_skew['one_hot']['forms']['two_hop']
  assert even['rounds'] == 1 and one['rounds'] > 1
  for axis in ('node', 'local'):
    assert one['forward_bytes'][axis] == one['rounds'] * even['forward_bytes'][axis]
    # Further rounds are sent forward once more before they are sent backward.
    there, back = (even[f'{way}_bytes'][axis] for way in ('forward', 'backward'))
    assert one['backward_bytes'][axis] == one['rounds'] * back + (one['rounds'] - 1) * there
  for of in by_skew.values():
    for f in of['forms'].values():
      for axis in ('node', 'local'):
        assert f['forward_bytes_needed'][axis] <= f['forward_bytes'][axis]
  needed = {form: f['forward_bytes_needed'] for form, f in by_skew['uniform']['forms'].items()}
  assert needed['two_hop']['node'] < needed['flat']['node'] == needed['allgather']['node']


def test_a_trace_is_replayed_layer_by_layer_and_by_default_the_fullest(all_of_it):
  _, figures, folder = all_of_it
  fullest, third = (figures['skews'][f'{folder}/trace.npz{layer}'] for layer in ('', ':2'))
  assert fullest['expert_load'] == 4 == figures['skews']['one_hot']['expert_load']
  assert 1 < third['expert_load'] < 4


def test_the_table_has_a_line_for_each_and_ratios_to_two_hop(all_of_it):
  lines = bench.table(all_of_it[1]).splitlines()
  assert '16 experts of 16, 4 a token in 2 of 4 groups, bf16, fp8 out, bf16 back' in lines[0]
  assert len(lines) == 3 + 6 * (1 + len(_FORMS))
  two_hops = [line.split() for line in lines if line.startswith('  two_hop')]
  assert len(two_hops) == 6
  for cells in two_hops:
    assert len(cells) == 2 + 4 + 8 and cells[8:10] == cells[12:14] == ['1.00', '1.00']


@pytest.mark.parametrize('spoil', ['one_row', 'nan'])
def test_a_wrong_result_gets_no_time_and_exit_code_1(monkeypatch, capsys, tmp_path, spoil):
  right = bench_layer.dispatch

  def dispatch(c, x_TD, *rest):
    y_TD, traffic = right(c, x_TD, *rest)
    if c.dispatch.form == 'allgather':
      wrong = 0.9 if spoil == 'one_row' else jnp.nan
      rows = jnp.arange(len(y_TD))[:, None] == 5
      y_TD = jnp.where(rows, y_TD * jnp.asarray(wrong, y_TD.dtype), y_TD)
    return y_TD, traffic

  monkeypatch.setattr(bench_layer, 'dispatch', dispatch)
  flags = _flags(forms='allgather,flat', skews='uniform', json=tmp_path / 'a')
  assert bench.main([*flags, '--no-backward']) == 1
  out, err = capsys.readouterr()
  assert err == 'bench_dispatch: WRONG RESULTS, not timed: allgather under uniform\n'
  told = next(line for line in out.splitlines() if line.startswith('  allgather'))
  assert 'WRONG, not timed: y by ' in told
  forms = json.loads((tmp_path / 'a').read_text())['skews']['uniform']['forms']
  assert forms['allgather']['wrong'] == ['y'] and 'seconds' not in forms['allgather']
  assert list(forms['flat']['seconds']) == ['forward'] and not forms['flat']['wrong']


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    ({'experts': 18}, '--experts = 18: must be a multiple of --groups = 4'),
    ({'top_k': 9}, '--top_k = 9: must be at most 8: so many experts are in kept groups'),
    ({'top_groups': 5}, '--top_groups = 5: must be at most --groups = 4'),
    ({'dim': -1}, '--dim = -1: must be positive'),
    ({'locals': 3}, '--experts = 16: must be a multiple of 6 = --nodes * --locals'),
    ({'nodes': 1, 'locals': 1}, '--nodes = 1, --locals = 1: must be two devices or more, or nothing moves'),
    ({'nodes': 8, 'locals': 4, 'experts': 32}, 'mesh = pipe 1 x data 1 x node 8 x local 4 = 32 devices: only '),
    ({'tokens': 0}, '--tokens = 0: must be positive'),
    ({'tokens': 'x'}, "argument --tokens: invalid int value: 'x'; --help shows what there is"),
    ({'payload': 'fp9'}, "--payload = 'fp9': must be one of "),
    ({'combine': 'logfmt8'}, "--combine = 'logfmt8': must be 'bf16' or 'plain': allgather sums on the way"),
    ({'capacity': 0.0}, '--capacity = 0.0: must be positive'),
    ({'forms': 'two_hops'}, "--forms: 'two_hops' must be one of two_hop, flat, allgather, ragged, dense"),
    ({'forms': 'ragged'}, "--forms = 'ragged': XLA has no ragged all-to-all on CPU; leave it out"),
    ({'skews': 'zip'}, "--skews: 'zip' must be one of uniform, zipf, one_hot, sequence, or a trace that ends in .npz"),
    ({'skews': '/no.npz'}, '/no.npz: cannot be read: No such file or directory'),
    ({'skews': '{tmp}/a.npz:2'}, "--skews: '{tmp}/a.npz:2' must end in a layer from :0 to :1"),
    ({'skews': '{tmp}/a.npz', 'experts': 32}, '--experts = 32: must be 16, as in {tmp}/a.npz'),
    ({'skews': '{tmp}/a.npz', 'tokens': 17}, '--tokens = 17: must be at most 16: {tmp}/a.npz has no more'),
    ({'json': '/no/a'}, '--json=/no/a: there is no folder /no'),
  ],
  ids=str,
)  # fmt: skip
def test_flags_that_cannot_work_get_one_line(capsys, tmp_path, changes, told):
  jax.devices()  # or the program would emulate as many as it wants
  _save(tmp_path / 'a.npz', ['uniform', 'zipf'])
  changes = {k: str(v).format(tmp=tmp_path) for k, v in changes.items()}
  assert bench.main(_flags(**changes)) == 2
  err = capsys.readouterr().err
  assert err.startswith(f'bench_dispatch: {told.format(tmp=tmp_path)}') and err.count('\n') == 1


def test_devices_are_emulated_where_there_are_too_few(tmp_path):
  environment = {k: v for k, v in os.environ.items() if k not in ('XLA_FLAGS', 'JAX_PLATFORMS')}
  flags = _flags(forms='flat', skews='uniform', steps=1, json=tmp_path / 'a')
  command = [sys.executable, '-m', 'dsv3_jax.parallel.bench_dispatch', *flags, '--no-backward']
  subprocess.run(command, check=True, env=environment, timeout=300)
  assert json.loads((tmp_path / 'a').read_text())['device'].startswith('4 x ')
