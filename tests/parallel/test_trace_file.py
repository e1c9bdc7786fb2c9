"""Traces as files: what is written is read again, and whatever is no trace is refused in one line."""

import json
import pathlib
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from dsv3_jax.parallel import trace
from dsv3_jax.parallel.trace import Trace, TraceError

_E, _G = 16, 4


def _choices(layers: int = 3, tokens: int = 50) -> np.ndarray:
  """Three experts of two groups of four."""
  rng = np.random.default_rng(0)
  ids = np.array([[_pick(rng) for _ in range(tokens)] for _ in range(layers)])
  return ids.astype(np.uint16)


def _pick(rng: np.random.Generator) -> np.ndarray:
  groups = rng.choice(_G, 2, replace=False)
  return rng.choice(np.concatenate([4 * g + np.arange(4) for g in groups]), 3, replace=False)


def _trace(**changes) -> Trace:
  values = {'ids_YTK': _choices(), 'num_experts': _E, 'num_groups': _G, 'top_groups': 2, 'rows': 4}
  values |= {'seq_len': 16, 'model': 'runs/a', 'step': 36, 'config': {'model': {'dim': 32}}}
  return Trace(**(values | changes))


@pytest.fixture
def saved(tmp_path) -> pathlib.Path:
  _trace().save(tmp_path / 'a.npz')
  return tmp_path / 'a.npz'


def _refused(path: pathlib.Path) -> str:
  with pytest.raises(TraceError) as error:
    trace.load(path)
  told = str(error.value)
  assert told.startswith(f'{path}: ') and '\n' not in told
  return told.removeprefix(f'{path}: ')


def _rewrite(path: pathlib.Path, about: dict | None = None, without: str = '', **arrays) -> None:
  with np.load(path) as file:
    values = {name: file[name] for name in file.files}
  if about is not None:
    values['about'] = np.array(json.dumps(json.loads(str(values['about'])) | about))
  values |= arrays
  values.pop(without, None)
  np.savez(path, **values)


def test_a_trace_is_read_as_it_was_written(saved):
  found, written = trace.load(saved), _trace()
  np.testing.assert_array_equal(found.ids_YTK, written.ids_YTK)
  assert found.ids_YTK.dtype == np.uint16
  for name in ('num_experts', 'num_groups', 'top_groups', 'rows', 'seq_len', 'model', 'step'):
    assert getattr(found, name) == getattr(written, name)
  assert found.config == written.config
  assert (found.layers, found.tokens, found.top_k) == (3, 50, 3)
  assert [path.name for path in saved.parent.iterdir()] == ['a.npz']


def test_the_file_is_what_the_table_says(saved):
  with np.load(saved) as file:
    assert sorted(file.files) == ['about', 'counts', 'ids']
    ids, counts, about = file['ids'], file['counts'], json.loads(str(file['about']))
  assert (ids.dtype, ids.shape) == (np.uint16, (3, 50, 3))
  assert (counts.dtype, counts.shape) == (np.int64, (3, _E))
  for layer, expert in np.ndindex(3, _E):
    assert counts[layer, expert] == (ids[layer] == expert).sum()
  assert (about['version'], about['top_k'], about['num_experts']) == (1, 3, _E)


def test_load_is_the_fullest_expert_over_the_mean():
  ids = np.zeros((1, 64, 1), np.uint16)
  ids[0, 32:, 0] = np.arange(32) % _E
  assert _trace(ids_YTK=ids).load_Y == pytest.approx([34 / 4])


@pytest.mark.parametrize(
  ('ids', 'told'),
  [
    ([3, 16, 1], 'layer 1, token 7 chose [3, 16, 1]: there are 16 experts'),
    ([3, 1, 3], 'layer 1, token 7 chose [3, 1, 3]: they must differ'),
    ([3, 5, 9], 'layer 1, token 7 chose [3, 5, 9]: they lie in more than 2 groups'),
  ],
)
def test_choices_that_no_router_makes_are_named(saved, ids, told):
  wrong = _choices()
  wrong[1, 7] = ids
  with pytest.raises(TraceError) as error:
    _trace(ids_YTK=wrong)
  assert str(error.value) == told
  _rewrite(saved, ids=wrong)
  assert _refused(saved) == told


@pytest.mark.parametrize(
  ('changes', 'told'),
  [
    ({'without': 'counts'}, 'has no counts; wants'),
    ({'without': 'about'}, 'has no about; wants'),
    ({'ids': _choices().astype(np.int32)}, 'ids are int32 [3, 50, 3]: must be uint16'),
    ({'ids': _choices()[0]}, 'ids are uint16 [50, 3]: must be uint16 [layers, tokens, top_k]'),
    ({'ids': _choices()[:, :0]}, 'ids are uint16 [3, 0, 3]'),
    ({'counts': np.zeros((3, _E), np.int64)}, 'counts are not those of ids'),
    ({'counts': np.zeros(3)}, 'counts are not those of ids'),
    ({'about': {'version': 2}}, 'is of version 2: this program reads version 1'),
    ({'about': {'top_k': 4}}, 'about says top_k = 4: ids have 3 a token'),
    ({'about': {'rows': '4'}}, "about says rows = '4': of another type"),
    ({'about': {'rows': 5}}, '50 tokens are not 5 rows of 16'),
    ({'about': {'num_groups': 3}}, 'no router has such sizes'),
    ({'about': {'num_experts': 0}}, 'no router has such sizes'),
    ({'about': {'config': None}}, 'about says config = None: of another type'),
  ],
)
def test_every_other_fault_is_told_in_one_line(saved, changes, told):
  _rewrite(saved, **changes)
  assert told in _refused(saved)


def test_headers_that_are_no_json_object_are_told(saved):
  for about, told in (
    (np.array('{'), 'about is not JSON: '),
    (np.array('[1]'), 'is of version None: '),
    (np.array(['a', 'b']), 'about is <U1 [2]: must be a single string'),
    (np.array(1), 'about is int64 []: must be a single string'),
    (np.array('{"version": 1}'), 'about has no top_k'),
  ):
    with np.load(saved) as file:
      np.savez(saved.parent / 'b.npz', ids=file['ids'], counts=file['counts'], about=about)
    assert _refused(saved.parent / 'b.npz').startswith(told)


def test_files_that_are_none_are_told(tmp_path):
  assert _refused(tmp_path / 'nothing') == 'cannot be read: No such file or directory'
  assert _refused(tmp_path) == 'cannot be read: Is a directory'
  for name, content in (('empty', b''), ('text', b'no trace'), ('zip', b'PK\x03\x04' + bytes(99))):
    (tmp_path / name).write_bytes(content)
    assert _refused(tmp_path / name).startswith('is no .npz file, or a damaged one: ')
  np.save(tmp_path / 'single.npy', _choices())
  assert _refused(tmp_path / 'single.npy').startswith('is a single array; ')
  with zipfile.ZipFile(tmp_path / 'other.zip', 'w') as file:
    file.writestr('readme', 'text')
  assert _refused(tmp_path / 'other.zip').startswith('has no ids and no counts and no about; ')
  np.savez(tmp_path / 'pickled.npz', ids=np.array([{}]), counts=0, about='')
  assert _refused(tmp_path / 'pickled.npz').startswith('is no .npz file, or a damaged one: ')


def test_a_file_cut_anywhere_is_refused(saved):
  whole = saved.read_bytes()
  for size in range(0, len(whole), 7):
    saved.write_bytes(whole[:size])
    assert _refused(saved)


def test_a_changed_byte_is_refused_or_changes_nothing(saved):
  whole, expected = saved.read_bytes(), _trace()
  refused = 0
  for at in range(0, len(whole), 3):
    saved.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
    try:
      found = trace.load(saved)
    except TraceError as error:
      assert '\n' not in str(error)
      refused += 1
    else:
      np.testing.assert_array_equal(found.ids_YTK, expected.ids_YTK)
      assert found.config == expected.config
  assert refused > len(whole) // 6


def test_reading_a_trace_and_making_skews_take_no_jax(saved):
  code = 'import sys; from dsv3_jax.parallel import skews, trace; trace.load(sys.argv[1])'
  code += "; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, '-c', code, saved], check=False).returncode == 0
