"""Checkpoint folders: what is read and written is what the safetensors package has; nothing else passes."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import textwrap
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from dsv3_jax.weights import files, headers, shards
from dsv3_jax.weights.shards import FormatError

_ROOT = pathlib.Path(__file__).parents[2]
_PT = {'format': 'pt'}


def _array(dtype, shape=(3, 4), seed=0):
  """Any bits at all, NaN patterns too; booleans are 0 or 1."""
  dtype = np.dtype(dtype)
  codes = np.random.default_rng(seed).integers(0, 256, int(np.prod(shape)) * dtype.itemsize)
  codes = codes.astype(np.uint8)
  return (codes % 2 if dtype == np.bool_ else codes).view(dtype).reshape(shape)


def _all_dtypes():
  shapes = [(3, 4), (), (0, 5), (7,), (2, 1, 3)]
  return {
    f'layers.{i}.{name}': _array(dtype, shapes[i % 5], i)
    for i, (name, dtype) in enumerate(headers.DTYPES.items())
  }


def _specs(arrays):
  return [(name, x.dtype, x.shape) for name, x in arrays.items()]


def _write(folder, arrays, shard_bytes=10**9, metadata=_PT, source=''):
  writer = shards.Writer(folder, _specs(arrays), shard_bytes, metadata, source)
  for shard in writer.shards():
    if not shard.done:
      writer.write_shard(shard, arrays.__getitem__)
  writer.finish()
  return folder


def _assert_same_bits(actual, expected):
  assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
  assert actual.tobytes() == expected.tobytes()


def _contents(folder):
  return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


# ---- read what the package writes ----------------------------------------------------------------


def test_all_dtypes_that_the_package_writes_are_read_bit_for_bit(tmp_path):
  arrays = _all_dtypes()
  safetensors.numpy.save_file(arrays, tmp_path / shards.SINGLE, _PT)
  folder = shards.Folder(tmp_path)
  assert folder.tensors.keys() == arrays.keys()
  for name, x in arrays.items():
    _assert_same_bits(folder.read(name), x)
  assert folder.total_bytes == sum(x.nbytes for x in arrays.values())
  assert folder.largest_shard_bytes == (tmp_path / shards.SINGLE).stat().st_size


_SLICES = [
  (),
  (slice(1, 3),),
  (slice(0, 4), slice(2, 5)),
  (slice(2, 3), slice(1, 2)),
  (slice(None), slice(None), slice(3, None)),
  (slice(1, 4), slice(0, 2), slice(2, 5)),
  (slice(2, 2),),
  (slice(0, 0), slice(1, 2), slice(0, 1)),
]


@pytest.mark.parametrize('index', _SLICES, ids=str)
@pytest.mark.parametrize('dtype', [np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_a_slice_is_that_of_the_whole(tmp_path, dtype, index):
  x = _array(dtype, (4, 5, 6))
  _write(tmp_path / 'a', {'before': _array('u1', (3,)), 'x': x, 'y': _array(dtype)})
  _assert_same_bits(shards.Folder(tmp_path / 'a').read('x', index), x[index])


def test_a_slice_of_leading_dimensions_reads_only_its_bytes_at_once(tmp_path, monkeypatch):
  x = _array('f4', (8, 16, 32))
  folder = shards.Folder(_write(tmp_path / 'a', {'x': x}))
  read, counts = os.preadv, []
  monkeypatch.setattr(os, 'preadv', lambda *args: counts.append(read(*args)) or counts[-1])
  folder.read('x', (slice(3, 4), slice(4, 12)))
  assert counts == [8 * 32 * 4]
  counts.clear()
  folder.read('x', (slice(2, 5),))
  assert counts == [3 * 16 * 32 * 4]


@pytest.mark.parametrize(
  'index',
  [(slice(0, 5),), (slice(3, 2),), (slice(-1, 4),), (slice(0, 4, 2),), (slice(0, 1),) * 3],
  ids=str,
)
def test_a_slice_outside_the_tensor_is_refused_and_not_clipped(tmp_path, index):
  folder = shards.Folder(_write(tmp_path / 'a', {'x': _array('f4', (4, 5))}))
  with pytest.raises(IndexError, match='x'):
    folder.read('x', index)


def test_short_reads_of_the_system_are_continued(tmp_path, monkeypatch):
  x = _array('f4', (50, 50))
  folder = shards.Folder(_write(tmp_path / 'a', {'x': x}))
  read = os.preadv
  monkeypatch.setattr(os, 'preadv', lambda f, to, at: read(f, [to[0][:77]], at))
  _assert_same_bits(folder.read('x'), x)


def test_shards_that_are_links_into_a_cache_are_followed(tmp_path):
  arrays = {f'w{i}': _array('f4', (i + 1, 3), i) for i in range(4)}
  _write(tmp_path / 'blobs', arrays, 40)
  (tmp_path / 'snapshot').mkdir()
  for path in (tmp_path / 'blobs').iterdir():
    (tmp_path / 'snapshot' / path.name).symlink_to(path)
  folder = shards.Folder(tmp_path / 'snapshot')
  for name, x in arrays.items():
    _assert_same_bits(folder.read(name), x)


# ---- write what the package reads ----------------------------------------------------------------


def test_a_single_file_has_the_bytes_that_the_package_would_write(tmp_path):
  arrays = _all_dtypes() | {'été "quoted"': _array('f4')}
  _write(tmp_path / 'a', arrays)
  safetensors.numpy.save_file(arrays, tmp_path / 'theirs', _PT)
  assert (tmp_path / 'a' / shards.SINGLE).read_bytes() == (tmp_path / 'theirs').read_bytes()


@pytest.mark.parametrize('shard_bytes', [1, 30, 100, 150])
def test_shards_load_with_the_package_and_the_index_finds_every_tensor(tmp_path, shard_bytes):
  arrays = _all_dtypes()
  folder = _write(tmp_path / 'a', arrays, shard_bytes)
  index = json.loads((folder / shards.INDEX).read_text())
  assert index['metadata'] == {'total_size': sum(x.nbytes for x in arrays.values())}
  assert index['weight_map'].keys() == arrays.keys()
  names = sorted(p.name for p in folder.glob('*.safetensors'))
  count = len(names)
  assert names == [f'model-{i + 1:05d}-of-{count:05d}.safetensors' for i in range(count)]
  found = {}
  for name in names:
    held = dict(safetensors.deserialize((folder / name).read_bytes()))
    assert sum(len(x['data']) for x in held.values()) <= shard_bytes or len(held) == 1
    assert all(index['weight_map'][k] == name for k in held)
    found |= held
  for name, x in arrays.items():
    assert headers.DTYPES[found[name]['dtype']] == x.dtype
    assert (tuple(found[name]['shape']), bytes(found[name]['data'])) == (x.shape, x.tobytes())


def test_written_tensors_lie_on_multiples_of_their_item_size(tmp_path):
  folder = shards.Folder(_write(tmp_path / 'a', _all_dtypes()))
  assert all(t.offset % t.dtype.itemsize == 0 for t in folder.tensors.values())


def test_arrays_that_are_transposed_are_written_in_row_order(tmp_path):
  x = _array('f4', (5, 7)).T
  _assert_same_bits(shards.Folder(_write(tmp_path / 'a', {'x': x})).read('x'), x)


@pytest.mark.parametrize('given', [_array('f4', (4, 3)), _array('f2'), np.zeros(12, np.float32)])
def test_an_array_of_another_shape_or_dtype_than_planned_is_refused(tmp_path, given):
  writer = shards.Writer(tmp_path / 'a', [('x', np.float32, (3, 4))], 100, _PT)
  with pytest.raises(FormatError, match=r'x: read .* to be written float32'):
    writer.write_shard(writer.shards()[0], lambda _: given)
  assert not list((tmp_path / 'a').glob('model*'))
  with pytest.raises(FormatError, match='not written yet'):
    writer.finish()


@pytest.mark.parametrize(
  'specs, shard_bytes, why',
  [
    ([], 9, 'no tensors'),
    ([('x', np.int8, (1,))] * 2, 9, "'x': the name is taken"),
    ([('__metadata__', np.int8, (1,))], 9, 'the name is taken'),
    ([('x', np.complex128, (1,))], 9, 'no name for complex128'),
    ([('x', np.int8, (1,))], 0, 'shards of 0 bytes'),
    ([('x', np.int8, (2**60,))], 9, 'needs 1152921504.6 GB'),
  ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path, specs, shard_bytes, why):
  with pytest.raises(FormatError, match=why):
    shards.Writer(tmp_path / 'a', specs, shard_bytes, _PT)
  assert not (tmp_path / 'a').exists()


def test_a_disk_that_takes_nothing_more_is_one_line_and_leaves_no_partial_file(
  tmp_path, monkeypatch
):
  def full(*_):
    raise OSError(28, os.strerror(28))

  writer = shards.Writer(tmp_path / 'a', [('x', np.int8, (4,))], 100, _PT)
  monkeypatch.setattr(os, 'write', full)
  with pytest.raises(FormatError, match=r'model\.safetensors: cannot be written: No space left'):
    writer.write_shard(writer.shards()[0], lambda _: np.zeros(4, np.int8))
  assert _contents(tmp_path / 'a').keys() == {shards.RECORD}


def test_a_fault_of_the_source_is_not_blamed_on_the_target(tmp_path):
  def broken(_):
    raise OSError(5, 'broken source')

  writer = shards.Writer(tmp_path / 'a', [('x', np.int8, (4,))], 100, _PT)
  with pytest.raises(OSError, match='broken source'):
    writer.write_shard(writer.shards()[0], broken)
  assert _contents(tmp_path / 'a').keys() == {shards.RECORD}


# ---- interrupted ---------------------------------------------------------------------------------


def _many():
  return {f'w{i:02d}': _array('f4', (40, 40), i) for i in range(24)}


class _KilledError(Exception):
  pass


@pytest.mark.parametrize('at', [0, 1, 7, 12, 23])
def test_a_run_that_ends_half_way_is_no_checkpoint_and_goes_on_to_the_same_bytes(tmp_path, at):
  arrays = _many()
  expected = _contents(_write(tmp_path / 'whole', arrays, 30_000, source='s'))
  names = list(arrays)

  def read(name):
    if name == names[at]:
      raise _KilledError
    return arrays[name]

  writer = shards.Writer(tmp_path / 'a', _specs(arrays), 30_000, _PT, 's')
  with pytest.raises(_KilledError):
    for shard in writer.shards():
      writer.write_shard(shard, read)
  with pytest.raises(FormatError):
    shards.Folder(tmp_path / 'a')

  again, asked = shards.Writer(tmp_path / 'a', _specs(arrays), 30_000, _PT, 's'), []
  done = [shard.done for shard in again.shards()]
  assert done == sorted(done, reverse=True) and sum(done) == at // 4  # four tensors fill a shard
  for shard in again.shards():
    if not shard.done:
      again.write_shard(shard, lambda name: asked.append(name) or arrays[name])
  again.finish()
  assert _contents(tmp_path / 'a') == expected
  assert sorted(asked) == names[at // 4 * 4 :]


def test_a_whole_folder_written_again_by_an_equal_run_asks_for_nothing(tmp_path):
  arrays = _many()
  before = _contents(_write(tmp_path / 'a', arrays, 30_000))
  assert all(s.done for s in shards.Writer(tmp_path / 'a', _specs(arrays), 30_000, _PT).shards())
  _write(tmp_path / 'a', arrays, 30_000)
  assert _contents(tmp_path / 'a') == before


def test_a_finished_shard_that_has_lost_bytes_is_written_again(tmp_path):
  arrays = _many()
  expected = _contents(_write(tmp_path / 'a', arrays, 30_000))
  (tmp_path / 'a' / shards.INDEX).unlink()
  paths = sorted((tmp_path / 'a').glob('*.safetensors'))
  paths[1].write_bytes(paths[1].read_bytes()[:-1])
  paths[3].unlink()
  writer = shards.Writer(tmp_path / 'a', _specs(arrays), 30_000, _PT)
  assert [s.done for s in writer.shards()] == [True, False, True, False, True, True]
  with pytest.raises(FormatError, match=r'00002-of-00006\.safetensors: is not written yet'):
    writer.finish()
  _write(tmp_path / 'a', arrays, 30_000)
  assert _contents(tmp_path / 'a') == expected


@pytest.mark.parametrize(
  'change',
  [
    {'shard_bytes': 9_000},
    {'source': 'elsewhere'},
    {'metadata': {'format': 'np'}},
    {'arrays': _many() | {'w99': _array('f4')}},
    {'arrays': _many() | {'w00': _array('i4', (40, 40))}},
  ],
  ids=lambda change: next(iter(change)),
)
def test_another_plan_does_not_go_on_with_a_folder_and_leaves_it_alone(tmp_path, change):
  arrays = {'arrays': _many(), 'shard_bytes': 30_000}
  _write(tmp_path / 'a', **arrays)
  (tmp_path / 'a' / shards.INDEX).unlink()
  before = _contents(tmp_path / 'a')
  with pytest.raises(FormatError, match='was begun with other tensors, sizes or source'):
    _write(tmp_path / 'a', **(arrays | change))
  assert _contents(tmp_path / 'a') == before


@pytest.mark.parametrize('name', [shards.SINGLE, shards.INDEX, 'other.safetensors'])
def test_a_checkpoint_of_somebody_else_is_not_overwritten(tmp_path, name):
  (tmp_path / name).write_text('theirs')
  with pytest.raises(FormatError, match=f'holds {name} already'):
    shards.Writer(tmp_path, [('x', np.int8, (1,))], 9, _PT)
  assert _contents(tmp_path) == {name: b'theirs'}


def test_killed_at_random_points_and_run_again_the_files_are_the_same(tmp_path):
  program = textwrap.dedent("""
    import sys, time
    import numpy as np
    from dsv3_jax.weights import shards
    specs = [(f'w{i:02d}', np.dtype(np.float32), (64, 64 + i)) for i in range(30)]
    def read(name):
      time.sleep(0.004)
      i = int(name[1:])
      return (np.arange(64 * (64 + i), dtype=np.float32) * (i + 1)).reshape(64, 64 + i)
    print('begun', flush=True)
    writer = shards.Writer(sys.argv[1], specs, 60_000, {'format': 'pt'})
    for shard in writer.shards():
      if not shard.done:
        writer.write_shard(shard, read)
    writer.finish()
  """)

  def start(folder):
    command = [sys.executable, '-c', program, str(folder)]
    run = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE)
    assert run.stdout.readline() == b'begun\n'
    return run

  with start(tmp_path / 'whole') as run:
    assert run.wait(60) == 0
  expected = _contents(tmp_path / 'whole')
  rng, killed = random.Random(0), 0
  for _ in range(12):
    with start(tmp_path / 'a') as run:
      time.sleep(rng.uniform(0, 0.06))
      run.send_signal(signal.SIGKILL)
      killed += run.wait(60) == -signal.SIGKILL
    held = _contents(tmp_path / 'a') if (tmp_path / 'a').exists() else {}
    assert all(held[name] == expected[name] for name in held.keys() & expected.keys())
    if not expected.keys() <= held.keys():
      with pytest.raises(FormatError):
        shards.Folder(tmp_path / 'a')
  with start(tmp_path / 'a') as run:
    assert run.wait(60) == 0
  assert killed > 2
  assert _contents(tmp_path / 'a') == expected
  assert len(shards.Folder(tmp_path / 'a').tensors) == 30


def test_a_json_file_is_whole_under_its_name_or_is_the_old_one(tmp_path, monkeypatch):
  files.write_json(tmp_path / 'x.json', {'é': 1})
  write = os.write
  monkeypatch.setattr(os, 'write', lambda file, data: write(file, data[:3]) and 1 / 0)
  with pytest.raises(ZeroDivisionError):
    files.write_json(tmp_path / 'x.json', {'é': 2})
  assert json.loads((tmp_path / 'x.json').read_text(encoding='utf-8')) == {'é': 1}
