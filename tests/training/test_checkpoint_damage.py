"""Damaged checkpoints: passed over with one line, never read as wrong numbers."""

import os
import pathlib
import random
import shutil
from collections.abc import Callable

import checkpoints
import jax
import numpy as np
import pytest

from dsv3_jax.training import checkpoint


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
  checkpoints.fill(tmp_path / 'run', 10, 20)
  _DAMAGE[damage](tmp_path / 'run/20')
  checkpoints.assert_is(ckpt.restore(checkpoints.abstract(checkpoints.make_mesh(1, 2, 4))), 10)
  (line,) = caplog.messages
  assert line.startswith(f'damaged in {tmp_path}/run: checkpoint 20 (')
  assert line.endswith('); using checkpoint 10')
  assert '\n' not in line and len(line) < len(str(tmp_path)) * 2 + 260
  assert ckpt.steps() == [10, 20]  # reading sets nothing aside


def test_no_flipped_byte_anywhere_returns_a_wrong_number(ckpt, tmp_path):
  checkpoints.fill(tmp_path / 'run', 1)
  expected = checkpoints.bits_of(checkpoints.nested(checkpoints.values(1)))
  rng = random.Random(0)
  found = 0
  for path in sorted((tmp_path / 'run/1').rglob('*')):
    if not path.is_file():
      continue
    whole = path.read_bytes()
    for _ in range(24 if path == _chunks(tmp_path / 'run/1') else 6):
      _flip(path, rng.randrange(len(whole)))
      try:
        restored = ckpt.restore(checkpoints.abstract(checkpoints.make_mesh(8, 1, 1)))
        assert checkpoints.bits_of(restored.state) == expected, f'{path} passed with a flipped byte'
        assert restored.data_state == {'position': 1, 'epoch': 0}
      except checkpoint.CheckpointError:
        found += 1
      path.write_bytes(whole)
  assert found > 30


def test_when_all_are_damaged_the_error_names_the_directory_and_each_reason(ckpt, tmp_path):
  checkpoints.fill(tmp_path / 'run', 10, 20)
  _cut(_chunks(tmp_path / 'run/20'))
  (tmp_path / 'run/10/meta/metadata').unlink()
  with pytest.raises(checkpoint.CheckpointError) as caught:
    ckpt.restore(checkpoints.abstract(checkpoints.make_mesh(8, 1, 1)))
  line = str(caught.value)
  assert line.startswith(f'no usable checkpoint in {tmp_path}/run: checkpoint 20 (')
  assert 'checkpoint 10 (' in line and 'start afresh' in line and '\n' not in line


def test_a_damaged_checkpoint_asked_for_by_step_is_an_error_and_no_other_one_is_used(
  ckpt, tmp_path
):
  checkpoints.fill(tmp_path / 'run', 10, 20)
  _cut(_chunks(tmp_path / 'run/20'))
  with pytest.raises(checkpoint.CheckpointError, match=r'checkpoint 20 \(.*restore another step'):
    ckpt.restore(checkpoints.abstract(checkpoints.make_mesh(8, 1, 1)), step=20)


def test_a_run_continued_past_a_damaged_checkpoint_saves_that_step_anew(ckpt, tmp_path):
  checkpoints.fill(tmp_path / 'run', 10, 20)
  _cut(_chunks(tmp_path / 'run/20'))
  checkpoints.assert_is(ckpt.restore(checkpoints.abstract(checkpoints.make_mesh(8, 1, 1))), 10)
  ckpt.save(
    20, checkpoints.make_state(20, checkpoints.make_mesh(8, 1, 1)), {'position': 20, 'epoch': 0}
  )
  checkpoints.assert_is(ckpt.restore(checkpoints.abstract(checkpoints.make_mesh(2, 2, 2))), 20)
  assert (tmp_path / 'run/20.superseded').exists()


def test_a_state_of_another_config_is_an_error_naming_the_leaves_and_is_not_taken_for_damage(
  ckpt, tmp_path
):
  checkpoints.fill(tmp_path / 'run', 10, 20)
  wanted = checkpoints.abstract(checkpoints.make_mesh(8, 1, 1))
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
