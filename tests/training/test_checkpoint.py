"""Checkpoints: what comes back, on which mesh, and what stays on disk."""

import pathlib
import shutil

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config
from dsv3_jax.training import checkpoint

# ---- what comes back -----------------------------------------------------------------------------


@pytest.mark.parametrize('sizes', [(2, 2, 2), (8, 1, 1), (1, 2, 4), (4, 1, 2), (1, 1, 1)])
def test_state_returns_bit_identical_on_every_mesh_with_each_device_holding_its_part(
  tmp_path: pathlib.Path, sizes: tuple[int, ...]
):
  checkpoints.fill(tmp_path, 7, mesh=checkpoints.make_mesh(2, 2, 2))
  wanted = checkpoints.abstract(checkpoints.make_mesh(*sizes))
  with checkpoint.Checkpointer(tmp_path, checkpoints.KEEP_ALL) as ckpt:
    restored = ckpt.restore(wanted)
  checkpoints.assert_is(restored, 7)
  for leaf, want in zip(jax.tree.leaves(restored.state), jax.tree.leaves(wanted), strict=True):
    assert (leaf.dtype, leaf.sharding) == (want.dtype, want.sharding)
    part = want.sharding.shard_shape(want.shape)
    assert all(shard.data.shape == part for shard in leaf.addressable_shards)


def test_restore_reads_the_newest_or_the_step_asked_for(ckpt, tmp_path):
  checkpoints.fill(tmp_path / 'run', 2, 10, 9000)
  assert ckpt.steps() == [2, 10, 9000]
  checkpoints.assert_is(ckpt.restore(checkpoints.abstract(checkpoints.make_mesh(8, 1, 1))), 9000)
  checkpoints.assert_is(
    ckpt.restore(checkpoints.abstract(checkpoints.make_mesh(8, 1, 1)), step=10), 10
  )


def test_an_empty_or_missing_directory_restores_to_none(ckpt, tmp_path):
  assert ckpt.steps() == []
  assert ckpt.restore(checkpoints.abstract(checkpoints.make_mesh(8, 1, 1))) is None
  assert not (tmp_path / 'run').exists()


def test_a_step_that_is_not_there_is_an_error_naming_those_that_are(ckpt, tmp_path):
  checkpoints.fill(tmp_path / 'run', 2, 10)
  with pytest.raises(
    checkpoint.CheckpointError, match=r'no checkpoint 5 in .*run; there are 2, 10$'
  ):
    ckpt.restore(checkpoints.abstract(checkpoints.make_mesh(8, 1, 1)), step=5)


def test_arrays_may_be_donated_as_soon_as_save_returns(ckpt):
  sharding = NamedSharding(checkpoints.make_mesh(8, 1, 1), P('data'))
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
  wanted = jax.ShapeDtypeStruct(
    (3,), np.float32, sharding=NamedSharding(checkpoints.make_mesh(8, 1, 1), P())
  )
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
  checkpoints.fill(run, 5)
  for leftover in ('9.orbax-checkpoint-tmp', '8.orbax-checkpoint-tmp-1700000000', '3.deleted.2'):
    shutil.copytree(run / '5', run / leftover)
  (run / 'notes').mkdir()
  assert ckpt.steps() == [5]
  checkpoints.assert_is(ckpt.restore(checkpoints.abstract(checkpoints.make_mesh(8, 1, 1))), 5)
  assert len(list(run.iterdir())) == 5
  ckpt.save(
    9, checkpoints.make_state(9, checkpoints.make_mesh(8, 1, 1)), {'position': 9, 'epoch': 0}
  )
  ckpt.wait()
  assert sorted(path.name for path in run.iterdir()) == ['5', '9', 'notes']


def test_saving_the_step_just_restored_or_saved_changes_nothing(ckpt, tmp_path):
  checkpoints.fill(tmp_path / 'run', 5)
  written = (tmp_path / 'run/5/meta/metadata').stat().st_mtime_ns
  ckpt.restore(checkpoints.abstract(checkpoints.make_mesh(8, 1, 1)))
  ckpt.save(5, checkpoints.make_state(6, checkpoints.make_mesh(8, 1, 1)), {})
  ckpt.wait()
  assert (tmp_path / 'run/5/meta/metadata').stat().st_mtime_ns == written


def test_a_run_that_restored_nothing_does_not_write_over_another(ckpt, tmp_path):
  checkpoints.fill(tmp_path / 'run', 5)
  with pytest.raises(
    checkpoint.CheckpointError, match=r'run already holds checkpoint 5 .* restore it'
  ):
    ckpt.save(5, checkpoints.make_state(5, checkpoints.make_mesh(8, 1, 1)), {})


def test_a_directory_that_cannot_be_made_is_told_at_once_in_one_line(tmp_path, caplog):
  (tmp_path / 'file').write_text('')
  unmakeable = checkpoint.Checkpointer(tmp_path / 'file' / 'run', checkpoints.KEEP_ALL)
  with unmakeable, pytest.raises(checkpoint.CheckpointError) as caught:
    unmakeable.save(1, {'x': jnp.zeros(3)}, {})
  assert str(caught.value).startswith(f'checkpoint 1 in {tmp_path}/file/run could not be written: ')
  assert 'Not a directory' in str(caught.value) and not caplog.messages


def test_going_back_sets_the_newer_checkpoints_aside(ckpt, tmp_path, caplog):
  checkpoints.fill(tmp_path / 'run', 10, 20, 30)
  ckpt.restore(checkpoints.abstract(checkpoints.make_mesh(8, 1, 1)), step=10)
  assert ckpt.steps() == [10, 20, 30]
  ckpt.save(
    20, checkpoints.make_state(20, checkpoints.make_mesh(8, 1, 1)), {'position': 20, 'epoch': 0}
  )
  ckpt.wait()
  assert ckpt.steps() == [10, 20]
  assert sorted(p.name for p in (tmp_path / 'run').glob('*.*')) == [
    '20.superseded',
    '30.superseded',
  ]
  checkpoints.assert_is(ckpt.restore(checkpoints.abstract(checkpoints.make_mesh(8, 1, 1))), 20)
  assert [m.split(' is now ')[0] for m in caplog.messages] == ['checkpoint 20', 'checkpoint 30']
  with pytest.raises(checkpoint.CheckpointError, match=r'checkpoint 15 .* older than 20'):
    ckpt.save(15, checkpoints.make_state(15, checkpoints.make_mesh(8, 1, 1)), {})
