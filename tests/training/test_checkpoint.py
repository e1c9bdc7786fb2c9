"""Checkpoints: what comes back, on which mesh, and what happens when disks and processes fail."""

import json
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config
from dsv3_jax.training import checkpoint

_ROOT = pathlib.Path(__file__).parents[2]
_KEEP_ALL = config.Checkpoint(keep_last=100)


def _mesh(*sizes: int) -> Mesh:
  return jax.make_mesh(sizes, ('data', 'node', 'local'), axis_types=(AxisType.Auto,) * 3)


_SPECS = {
  'step': P(),
  'sequences': P(),
  'params/embed': P(('data', 'local')),
  'params/experts': P(('node', 'local'), 'data'),
  'params/norm': P(),
  'router_bias/layer': P(None, ('node', 'local')),
  'opt/mu/embed': P('data', 'local'),
  'ema/embed': P(None, 'node'),
}


def _nested(flat: dict[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {'opt': {'empty': {}}}
  for name, leaf in flat.items():
    *folders, last = name.split('/')
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
    node[last] = leaf
  return tree


def _values(seed: int) -> dict[str, np.ndarray]:
  """Arrays of random bits: NaNs with payloads, subnormals and negative zeros among them."""
  rng = np.random.default_rng(seed)

  def bits(dtype: Any, *shape: int) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return rng.integers(0, 256, size, np.uint8).view(dtype).reshape(shape)

  return {
    'step': np.asarray(seed, np.int32),
    'sequences': np.asarray(seed * 8, np.uint32),
    'params/embed': bits(jnp.bfloat16, 256, 96),
    'params/experts': bits(np.float32, 8, 16, 24),
    'params/norm': np.zeros(48, np.float32),
    'router_bias/layer': bits(np.float32, 2, 8),
    'opt/mu/embed': bits(jnp.bfloat16, 256, 96),
    'ema/embed': bits(np.uint32, 256, 96),
  }


def _state(seed: int, mesh: Mesh) -> dict[str, Any]:
  return _nested(
    {k: jax.device_put(v, NamedSharding(mesh, _SPECS[k])) for k, v in _values(seed).items()}
  )


def _abstract(mesh: Mesh) -> dict[str, Any]:
  return _nested(
    {
      k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=NamedSharding(mesh, _SPECS[k]))
      for k, v in _values(0).items()
    }
  )


def _bits(tree: Any) -> list[bytes]:
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def _assert_is(restored: checkpoint.Restored | None, step: int) -> None:
  """`_state(step)` is what each test here saves as `step`, with this data position."""
  assert restored is not None
  assert restored.step == step
  assert restored.data_state == {'position': step, 'epoch': 0}
  assert _bits(restored.state) == _bits(_nested(_values(step)))
  assert jax.tree.structure(restored.state) == jax.tree.structure(_nested(_values(step)))


def _fill(directory: pathlib.Path, *steps: int, mesh: Mesh | None = None) -> None:
  with checkpoint.Checkpointer(directory, _KEEP_ALL) as ckpt:
    for step in steps:
      ckpt.save(step, _state(step, mesh or _mesh(2, 2, 2)), {'position': step, 'epoch': 0})


@pytest.fixture
def ckpt(tmp_path: pathlib.Path) -> Iterator[checkpoint.Checkpointer]:
  with checkpoint.Checkpointer(tmp_path / 'run', _KEEP_ALL) as opened:
    yield opened


# ---- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize('sizes', [(2, 2, 2), (8, 1, 1), (1, 2, 4), (4, 1, 2), (1, 1, 1)])
def test_state_returns_bit_identical_on_every_mesh_with_each_device_holding_its_part(
  tmp_path: pathlib.Path, sizes: tuple[int, ...]
):
  _fill(tmp_path, 7, mesh=_mesh(2, 2, 2))
  wanted = _abstract(_mesh(*sizes))
  with checkpoint.Checkpointer(tmp_path, _KEEP_ALL) as ckpt:
    restored = ckpt.restore(wanted)
  _assert_is(restored, 7)
  for leaf, want in zip(jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True):
    assert (leaf.dtype, leaf.sharding) == (want.dtype, want.sharding)
    part = want.sharding.shard_shape(want.shape)
    assert all(shard.data.shape == part for shard in leaf.addressable_shards)


def test_restore_reads_the_newest_or_the_step_asked_for(ckpt, tmp_path):
  _fill(tmp_path / 'run', 2, 10, 9000)
  assert ckpt.steps() == [2, 10, 9000]
  _assert_is(ckpt.restore(_abstract(_mesh(8, 1, 1))), 9000)
  _assert_is(ckpt.restore(_abstract(_mesh(8, 1, 1)), step=10), 10)


def test_an_empty_or_missing_directory_restores_to_none(ckpt, tmp_path):
  assert ckpt.steps() == []
  assert ckpt.restore(_abstract(_mesh(8, 1, 1))) is None
  assert not (tmp_path / 'run').exists()


def test_a_step_that_is_not_there_is_an_error_naming_those_that_are(ckpt, tmp_path):
  _fill(tmp_path / 'run', 2, 10)
  with pytest.raises(
    checkpoint.CheckpointError, match=r'no checkpoint 5 in .*run; there are 2, 10$'
  ):
    ckpt.restore(_abstract(_mesh(8, 1, 1)), step=5)


def test_arrays_may_be_donated_as_soon_as_save_returns(ckpt):
  sharding = NamedSharding(_mesh(8, 1, 1), P('data'))
  saved = np.arange(1 << 22, dtype=np.float32)
  advance = jax.jit(lambda x: -x - 1.0, donate_argnums=0)
  x = jax.device_put(saved.copy(), sharding)
  ckpt.save(1, {'x': x}, {})
  for _ in range(3):
    x = advance(x)
  jax.block_until_ready(x)
  ckpt.wait()
  restored = ckpt.restore({'x': jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=sharding)})
  np.testing.assert_array_equal(restored.state['x'], saved)


def test_the_data_position_returns_as_json_has_it(ckpt):
  ckpt.save(1, {'x': jnp.zeros(3)}, {'shards': {1: 'a', 10: 'b', 2: (3, 4)}, 'loss': float('nan')})
  wanted = jax.ShapeDtypeStruct((3,), np.float32, sharding=NamedSharding(_mesh(8, 1, 1), P()))
  position = ckpt.restore({'x': wanted}).data_state
  assert position['shards'] == {'1': 'a', '10': 'b', '2': [3, 4]}
  assert np.isnan(position['loss'])


def test_a_leaf_without_sharding_is_refused(ckpt):
  with pytest.raises(ValueError, match='params/w has no sharding'):
    ckpt.restore({'params': {'w': jax.ShapeDtypeStruct((2,), np.float32)}})


# ---- what stays on disk --------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('keep_last', 'keep_every', 'left'),
  [(1, 0, [70]), (3, 0, [50, 60, 70]), (2, 30, [30, 60, 70]), (1, 20, [20, 40, 60, 70])],
)
def test_retention_keeps_the_last_ones_and_every_multiple(tmp_path, keep_last, keep_every, left):
  options = config.Checkpoint(keep_last=keep_last, keep_every=keep_every)
  with checkpoint.Checkpointer(tmp_path, options) as ckpt:
    for step in range(10, 80, 10):
      ckpt.save(step, {'x': jnp.zeros(3)}, {})
  assert ckpt.steps() == left
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, left))


def test_an_old_checkpoint_is_deleted_only_after_the_newer_one_is_committed(tmp_path, monkeypatch):
  seen = []
  delete = checkpoint.Checkpointer._delete
  monkeypatch.setattr(
    checkpoint.Checkpointer, '_delete', lambda c, step: (seen.append(c.steps()), delete(c, step))
  )
  with checkpoint.Checkpointer(tmp_path, config.Checkpoint(keep_last=1)) as ckpt:
    for step in (1, 2, 3):
      ckpt.save(step, {'x': jnp.zeros(3)}, {})
  assert seen == [[1, 2], [2, 3]]


def test_unfinished_folders_are_ignored_and_removed_by_the_first_save_but_not_by_reading(
  ckpt, tmp_path
):
  run = tmp_path / 'run'
  _fill(run, 5)
  for leftover in ('9.orbax-checkpoint-tmp', '8.orbax-checkpoint-tmp-1700000000', '3.deleted.2'):
    shutil.copytree(run / '5', run / leftover)
  (run / 'notes').mkdir()
  assert ckpt.steps() == [5]
  _assert_is(ckpt.restore(_abstract(_mesh(8, 1, 1))), 5)
  assert len(list(run.iterdir())) == 5
  ckpt.save(9, _state(9, _mesh(8, 1, 1)), {'position': 9, 'epoch': 0})
  ckpt.wait()
  assert sorted(path.name for path in run.iterdir()) == ['5', '9', 'notes']


def test_saving_the_step_just_restored_or_saved_changes_nothing(ckpt, tmp_path):
  _fill(tmp_path / 'run', 5)
  written = (tmp_path / 'run/5/meta/metadata').stat().st_mtime_ns
  ckpt.restore(_abstract(_mesh(8, 1, 1)))
  ckpt.save(5, _state(6, _mesh(8, 1, 1)), {})
  ckpt.wait()
  assert (tmp_path / 'run/5/meta/metadata').stat().st_mtime_ns == written


def test_a_run_that_restored_nothing_does_not_write_over_another(ckpt, tmp_path):
  _fill(tmp_path / 'run', 5)
  with pytest.raises(
    checkpoint.CheckpointError, match=r'run already holds checkpoint 5 .* restore it'
  ):
    ckpt.save(5, _state(5, _mesh(8, 1, 1)), {})


def test_a_directory_that_cannot_be_made_is_told_at_once_in_one_line(tmp_path, caplog):
  (tmp_path / 'file').write_text('')
  unmakeable = checkpoint.Checkpointer(tmp_path / 'file' / 'run', _KEEP_ALL)
  with unmakeable, pytest.raises(checkpoint.CheckpointError) as caught:
    unmakeable.save(1, {'x': jnp.zeros(3)}, {})
  assert str(caught.value).startswith(f'checkpoint 1 in {tmp_path}/file/run could not be written: ')
  assert 'Not a directory' in str(caught.value) and not caplog.messages


def test_going_back_sets_the_newer_checkpoints_aside(ckpt, tmp_path, caplog):
  _fill(tmp_path / 'run', 10, 20, 30)
  ckpt.restore(_abstract(_mesh(8, 1, 1)), step=10)
  assert ckpt.steps() == [10, 20, 30]
  ckpt.save(20, _state(20, _mesh(8, 1, 1)), {'position': 20, 'epoch': 0})
  ckpt.wait()
  assert ckpt.steps() == [10, 20]
  assert sorted(p.name for p in (tmp_path / 'run').glob('*.*')) == [
    '20.superseded',
    '30.superseded',
  ]
  _assert_is(ckpt.restore(_abstract(_mesh(8, 1, 1))), 20)
  assert [m.split(' is now ')[0] for m in caplog.messages] == ['checkpoint 20', 'checkpoint 30']
  with pytest.raises(checkpoint.CheckpointError, match=r'checkpoint 15 .* older than 20'):
    ckpt.save(15, _state(15, _mesh(8, 1, 1)), {})


# ---- damage --------------------------------------------------------------------------------------


def _chunks(folder: pathlib.Path) -> pathlib.Path:
  """The file with the array chunks."""
  return max(folder.glob('state/ocdbt.process_*/d/*'), key=lambda path: path.stat().st_size)


def _flip(path: pathlib.Path, at: int) -> None:
  content = bytearray(path.read_bytes())
  content[at] ^= 16
  path.write_bytes(content)


def _cut(path: pathlib.Path) -> None:
  os.truncate(path, path.stat().st_size // 2)


_DAMAGE: dict[str, Callable[[pathlib.Path], None]] = {
  'data cut short': lambda f: _cut(_chunks(f)),
  'data deleted': lambda f: _chunks(f).unlink(),
  'data flipped': lambda f: _flip(_chunks(f), 3000),
  'index cut short': lambda f: _cut(next(f.glob('state/d/*'))),
  'index deleted': lambda f: next(f.glob('state/d/*')).unlink(),
  'manifest deleted': lambda f: (f / 'state/manifest.ocdbt').unlink(),
  'array metadata broken': lambda f: _cut(f / 'state/_METADATA'),
  'array metadata deleted': lambda f: (f / 'state/_METADATA').unlink(),
  'arrays deleted': lambda f: shutil.rmtree(f / 'state'),
  'JSON deleted': lambda f: (f / 'meta/metadata').unlink(),
  'JSON broken': lambda f: _cut(f / 'meta/metadata'),
  'JSON of another kind': lambda f: (f / 'meta/metadata').write_text('[1]'),
  'position changed': lambda f: (f / 'meta/metadata').write_text(
    (f / 'meta/metadata').read_text().replace('"epoch": 0', '"epoch": 1')
  ),
  'everything deleted': lambda f: [shutil.rmtree(f), f.mkdir()],
}


@pytest.mark.parametrize('damage', _DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_one_line_naming_it_the_reason_and_the_one_used(
  ckpt, tmp_path, caplog, damage
):
  _fill(tmp_path / 'run', 10, 20)
  _DAMAGE[damage](tmp_path / 'run/20')
  _assert_is(ckpt.restore(_abstract(_mesh(1, 2, 4))), 10)
  (line,) = caplog.messages
  assert line.startswith(f'damaged in {tmp_path}/run: checkpoint 20 (')
  assert line.endswith('); using checkpoint 10')
  assert '\n' not in line and len(line) < len(str(tmp_path)) * 2 + 260
  assert ckpt.steps() == [10, 20]  # reading sets nothing aside


def test_no_flipped_byte_anywhere_returns_a_wrong_number(ckpt, tmp_path):
  _fill(tmp_path / 'run', 1)
  expected = _bits(_nested(_values(1)))
  rng = random.Random(0)
  found = 0
  for path in sorted((tmp_path / 'run/1').rglob('*')):
    if not path.is_file():
      continue
    whole = path.read_bytes()
    for _ in range(24 if path == _chunks(tmp_path / 'run/1') else 6):
      _flip(path, rng.randrange(len(whole)))
      try:
        restored = ckpt.restore(_abstract(_mesh(8, 1, 1)))
        assert _bits(restored.state) == expected, f'{path} passed with a flipped byte'
        assert restored.data_state == {'position': 1, 'epoch': 0}
      except checkpoint.CheckpointError:
        found += 1
      path.write_bytes(whole)
  assert found > 30


def test_when_all_are_damaged_the_error_names_the_directory_and_each_reason(ckpt, tmp_path):
  _fill(tmp_path / 'run', 10, 20)
  _cut(_chunks(tmp_path / 'run/20'))
  (tmp_path / 'run/10/meta/metadata').unlink()
  with pytest.raises(checkpoint.CheckpointError) as caught:
    ckpt.restore(_abstract(_mesh(8, 1, 1)))
  line = str(caught.value)
  assert line.startswith(f'no usable checkpoint in {tmp_path}/run: checkpoint 20 (')
  assert 'checkpoint 10 (' in line and 'start afresh' in line and '\n' not in line


def test_a_damaged_checkpoint_asked_for_by_step_is_an_error_and_no_other_one_is_used(
  ckpt, tmp_path
):
  _fill(tmp_path / 'run', 10, 20)
  _cut(_chunks(tmp_path / 'run/20'))
  with pytest.raises(checkpoint.CheckpointError, match=r'checkpoint 20 \(.*restore another step'):
    ckpt.restore(_abstract(_mesh(8, 1, 1)), step=20)


def test_a_run_continued_past_a_damaged_checkpoint_saves_that_step_anew(ckpt, tmp_path):
  _fill(tmp_path / 'run', 10, 20)
  _cut(_chunks(tmp_path / 'run/20'))
  _assert_is(ckpt.restore(_abstract(_mesh(8, 1, 1))), 10)
  ckpt.save(20, _state(20, _mesh(8, 1, 1)), {'position': 20, 'epoch': 0})
  _assert_is(ckpt.restore(_abstract(_mesh(2, 2, 2))), 20)
  assert (tmp_path / 'run/20.superseded').exists()


def test_a_state_of_another_config_is_an_error_naming_the_leaves_and_is_not_taken_for_damage(
  ckpt, tmp_path
):
  _fill(tmp_path / 'run', 10, 20)
  wanted = _abstract(_mesh(8, 1, 1))
  sharding = wanted['step'].sharding
  wanted['params']['norm'] = jax.ShapeDtypeStruct((96,), np.float32, sharding=sharding)
  wanted['params']['extra'] = jax.ShapeDtypeStruct((), np.int32, sharding=sharding)
  wanted['ema']['embed'] = jax.ShapeDtypeStruct((256, 96), np.float32, sharding=sharding)
  del wanted['router_bias']
  with pytest.raises(checkpoint.CheckpointError) as caught:
    ckpt.restore(wanted)
  line = str(caught.value)
  assert line.startswith(f'checkpoint 20 in {tmp_path}/run is of another config: ')
  assert 'ema/embed: uint32[256,96] in the checkpoint, float32[256,96] wanted' in line
  assert 'params/extra: nothing in the checkpoint, int32[] wanted' in line
  assert 'params/norm: float32[48] in the checkpoint, float32[96] wanted' in line
  assert 'and 1 more; use the config it was saved with, or another directory' in line


# ---- disks and processes that fail -----------------------------------------------------------------


def _start(program: str, *arguments: Any, devices: int = 2) -> subprocess.Popen[str]:
  environment = os.environ | {
    'PYTHONPATH': str(_ROOT),
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
  }
  return subprocess.Popen(
    [sys.executable, '-W', 'error', '-c', textwrap.dedent(program), *map(str, arguments)],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _finish(process: subprocess.Popen[str], seconds: float) -> tuple[str, str]:
  try:
    out, err = process.communicate(timeout=seconds)
  finally:
    process.kill()
  assert process.returncode == 0, err
  return out, err


# A limit on the size of a file stands in for the full disk: it needs no mount, and fails the same
# writes in the same thread.
_FULL_DISK = """
  import os, resource, sys
  import absl.logging, jax, numpy as np
  from dsv3_jax import config
  from dsv3_jax.training import checkpoint

  absl.logging.set_verbosity(absl.logging.INFO)
  noise = np.random.default_rng(0).integers(0, 1 << 32, (8, 1 << 19), np.uint32)
  state = {str(i): jax.numpy.asarray(row) for i, row in enumerate(noise)}  # 8 writes that fail at once
  ckpt = checkpoint.Checkpointer(sys.argv[1], config.Checkpoint(keep_last=1))
  ckpt.save(1, state, {'position': 1})
  ckpt.wait()

  def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

  def error_of(call, *arguments):
    try:
      call(*arguments)
    except checkpoint.CheckpointError as error:
      return str(error)

  limit(1 << 20)
  ckpt.save(2, state, {'position': 2})
  print(error_of(ckpt.wait))
  ckpt.save(3, state, {'position': 3})
  print(error_of(ckpt.save, 4, state, {'position': 4}))
  print(ckpt.steps(), os.listdir(sys.argv[1]))
  ckpt.wait()
  limit(resource.RLIM_INFINITY)
  whole = jax.ShapeDtypeStruct(noise[0].shape, noise.dtype, sharding=state['0'].sharding)
  whole = dict.fromkeys(state, whole)
  restored = ckpt.restore(whole)
  same = [(np.asarray(restored.state[str(i)]) == row).all() for i, row in enumerate(noise)]
  print(restored.step, all(same))
  limit(0)
  print(error_of(lambda: (ckpt.save(5, state, {'position': 5}), ckpt.wait())))
  limit(resource.RLIM_INFINITY)
  ckpt.save(6, state, {'position': 6})
  ckpt.wait()
  limit(1 << 20)
  ckpt.save(7, state, {'position': 7})
  print(error_of(ckpt.close))
  print(ckpt.steps())
"""


def test_a_full_disk_is_told_in_one_line_at_the_next_call_and_the_last_good_one_survives(tmp_path):
  assert hasattr(resource, 'RLIMIT_FSIZE')
  out, err = _finish(_start(_FULL_DISK, tmp_path), 60)
  at_wait, at_save, left, restored, at_once, at_close, finally_left = out.splitlines()
  for step, newest, line in ((2, 1, at_wait), (3, 1, at_save), (5, 1, at_once), (7, 6, at_close)):
    assert line.startswith(f'checkpoint {step} in {tmp_path} could not be written: ')
    assert 'File too large' in line and line.endswith(f'; the newest one on disk is {newest}')
    assert len(line) < 300
  assert left == "[1] ['1']"  # and the space of the failed ones is given back
  assert restored == '1 True'
  assert finally_left == '[6]'
  assert err == ''  # no traceback from Orbax, and none of its INFO lines


_SAVE_FOREVER = """
  import sys
  import jax, numpy as np
  from jax.sharding import PartitionSpec as P
  from dsv3_jax import config
  from dsv3_jax.training import checkpoint

  def noise(step):
    return np.random.default_rng(step).integers(0, 1 << 32, (256, 1024), np.uint32)

  mesh = jax.make_mesh((2,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, P('data'))
  ckpt = checkpoint.Checkpointer(sys.argv[1], config.Checkpoint(keep_last=2))
  restored = ckpt.restore({'x': jax.ShapeDtypeStruct((256, 1024), np.uint32, sharding=sharding)})
  step = restored.step if restored else 0
  if restored:
    assert (np.asarray(restored.state['x']) == noise(step)).all()
    assert restored.data_state == {'position': step}
  while True:
    step += 1
    ckpt.save(step, {'x': jax.device_put(noise(step), sharding)}, {'position': step})
    print(step, flush=True)
"""


def test_a_process_killed_at_random_while_saving_always_leaves_a_whole_checkpoint(tmp_path):
  rng = random.Random(0)
  before = 0
  for _ in range(5):
    process = _start(_SAVE_FOREVER, tmp_path)
    started = [process.stdout.readline() for _ in range(2)]  # of two saves, the first is committed
    time.sleep(rng.uniform(0.0, 0.5))
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert started[1], err
    sharding = NamedSharding(_mesh(8, 1, 1), P('data'))
    with checkpoint.Checkpointer(tmp_path, config.Checkpoint()) as ckpt:
      wanted = jax.ShapeDtypeStruct((256, 1024), np.uint32, sharding=sharding)
      restored = ckpt.restore({'x': wanted})
      assert len(ckpt.steps()) <= 3
    noise = np.random.default_rng(restored.step).integers(0, 1 << 32, (256, 1024), np.uint32)
    np.testing.assert_array_equal(restored.state['x'], noise)
    assert restored.data_state == {'position': restored.step}
    assert restored.step == max(ckpt.steps()) > before
    before = restored.step


_TWO_PROCESSES = """
  import sys
  import jax, numpy as np
  from jax.sharding import NamedSharding, PartitionSpec as P
  from dsv3_jax import config
  from dsv3_jax.training import checkpoint

  me, port, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
  jax.distributed.initialize(f'localhost:{port}', num_processes=2, process_id=me)
  assert jax.process_count() == 2 and jax.device_count() == 4

  def mesh(*sizes):
    return jax.make_mesh(sizes, ('a', 'b'), axis_types=(jax.sharding.AxisType.Auto,) * 2)

  def noise(step):
    return np.random.default_rng(step).integers(0, 1 << 32, (64, 512), np.uint32)

  def place(step):
    across = NamedSharding(mesh(4, 1), P('a'))
    same = NamedSharding(mesh(4, 1), P())
    return {
      'x': jax.make_array_from_callback((64, 512), across, lambda i: noise(step)[i]),
      'step': jax.make_array_from_callback((), same, lambda i: np.asarray(step, np.int32)),
    }

  def check(restored, step):
    assert restored.step == step and restored.data_state == {'position': step}, restored.step
    assert int(restored.state['step']) == step
    for shard in restored.state['x'].addressable_shards:
      assert (np.asarray(shard.data) == noise(step)[shard.index]).all()

  wanted = {
    'x': jax.ShapeDtypeStruct((64, 512), np.uint32, sharding=NamedSharding(mesh(2, 2), P('b', 'a'))),
    'step': jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh(2, 2), P())),
  }
  with checkpoint.Checkpointer(directory, config.Checkpoint(keep_last=2)) as ckpt:
    assert ckpt.restore(wanted) is None
    for step in (1, 2, 3):
      ckpt.save(step, place(step), {'position': step})
    check(ckpt.restore(wanted), 3)

    # What only process 1 cannot read, process 0 must not use either.
    read = ckpt._read
    if me == 1:
      ckpt._read = lambda step, wanted: (None, 'lost') if step == 3 else read(step, wanted)
    check(ckpt.restore(wanted), 2)
    ckpt._read = read
    ckpt.save(4, place(4), {'position': 4})
  with checkpoint.Checkpointer(directory, config.Checkpoint(keep_last=2)) as ckpt:
    check(ckpt.restore(wanted), 4)
  jax.distributed.shutdown()
"""


def test_two_processes_save_together_agree_on_what_is_damaged_and_one_process_reads_it(tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  both = [_start(_TWO_PROCESSES, me, port, tmp_path) for me in range(2)]
  try:
    messages = [_finish(process, 40)[1] for process in both]
  finally:
    for process in both:
      process.kill()
  assert 'checkpoint 3 (not readable by process 1); using checkpoint 2' in messages[0]
  assert 'using checkpoint' not in messages[1]
  assert sorted(path.name for path in tmp_path.iterdir()) == ['2', '3.superseded', '4']
  mesh = _mesh(2, 2, 2)
  wanted = {
    'x': jax.ShapeDtypeStruct(
      (64, 512), np.uint32, sharding=NamedSharding(mesh, P('data', ('node', 'local')))
    ),
    'step': jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, P())),
  }
  with checkpoint.Checkpointer(tmp_path, _KEEP_ALL) as ckpt:
    restored = ckpt.restore(wanted)
  noise = np.random.default_rng(4).integers(0, 1 << 32, (64, 512), np.uint32)
  np.testing.assert_array_equal(restored.state['x'], noise)
  assert json.loads((tmp_path / '4/meta/metadata').read_text())['body']['leaves'] == {
    'step': 'int32[]',
    'x': 'uint32[64,512]',
  }
