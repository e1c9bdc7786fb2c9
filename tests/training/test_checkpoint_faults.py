"""Checkpoints while disks and processes fail, and between processes."""

import json
import os
import pathlib
import random
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import Any

import checkpoints
import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax import config
from dsv3_jax.training import checkpoint

_ROOT = pathlib.Path(__file__).parents[2]


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
    sharding = NamedSharding(checkpoints.make_mesh(8, 1, 1), P('data'))
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
  mesh = checkpoints.make_mesh(2, 2, 2)
  wanted = {
    'x': jax.ShapeDtypeStruct(
      (64, 512), np.uint32, sharding=NamedSharding(mesh, P('data', ('node', 'local')))
    ),
    'step': jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(mesh, P())),
  }
  with checkpoint.Checkpointer(tmp_path, checkpoints.KEEP_ALL) as ckpt:
    restored = ckpt.restore(wanted)
  noise = np.random.default_rng(4).integers(0, 1 << 32, (64, 512), np.uint32)
  np.testing.assert_array_equal(restored.state['x'], noise)
  assert json.loads((tmp_path / '4/meta/metadata').read_text())['body']['leaves'] == {
    'step': 'int32[]',
    'x': 'uint32[64,512]',
  }
