"""Eight ranks, in one process and in four, by either executor: what they compute, and what they keep for it."""

import collections
import functools
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile

import chain
import jax
import numpy as np
import parity
import pytest

from dsv3_jax import config, mesh
from dsv3_jax.parallel.pipeline import mpmd

_TESTS = pathlib.Path(__file__).parents[1]
_SIZES = chain.Sizes(8, 16)
_PROCESSES = 4
_TIMEOUT_S = 300  # of a machine that has other things to do
_EACH = pytest.mark.parametrize('name', chain.EXECUTORS)


@functools.cache
def _here(name: str) -> dict[str, np.ndarray]:
  return chain.run(name, _SIZES)


def _start(me: int, port: int, folder: str) -> subprocess.Popen[str]:
  devices = f'--xla_force_host_platform_device_count={_SIZES.stages // _PROCESSES}'
  environment = os.environ | {
    'PYTHONPATH': os.pathsep.join([str(_TESTS.parent), str(_TESTS)]),
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} {devices}',
  }
  command = [sys.executable, '-W', 'error', chain.__file__, me, _PROCESSES, port, folder]
  pipes = {'stdout': subprocess.DEVNULL, 'stderr': subprocess.PIPE, 'text': True}
  return subprocess.Popen(list(map(str, command)), env=environment, **pipes)


@functools.cache
def _seen() -> list[dict[str, np.ndarray]]:
  """What each of four processes saw, with two ranks each."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  with tempfile.TemporaryDirectory() as folder:
    started = [_start(me, port, folder) for me in range(_PROCESSES)]
    try:
      errors = [process.communicate(timeout=_TIMEOUT_S)[1] for process in started]
    finally:
      for process in started:
        process.kill()
    assert [process.returncode for process in started] == [0] * _PROCESSES, '\n'.join(errors)
    return [dict(np.load(f'{folder}/{me}.npz')) for me in range(_PROCESSES)]


@_EACH
def test_eight_ranks_give_loss_and_gradients_of_the_chain_in_float64(name):
  got, expected = dict(_here(name)), chain.expected(_SIZES)
  assert list(got.pop('run')) == [_SIZES.stages * _SIZES.micro_batches // 2] * 2
  parity.assert_close(got, expected, 1e-6)


@_EACH
def test_four_processes_get_what_one_gets_to_the_bit(name):
  for process in _seen():
    assert list(process['counts']) == [_PROCESSES, _SIZES.stages]
    for key, expected in _here(name).items():
      parity.assert_same_bits(process[f'{name}.{key}'], expected)


def test_compiled_uniform_program_has_as_many_slots_as_ranks_and_one_whatever_the_micro_batches():
  device_mesh, sizes = mesh.make_mesh(config.Mesh(pipe=_SIZES.stages)), {}
  for micro_batches in (_SIZES.micro_batches, 2 * _SIZES.micro_batches):
    z = chain.Sizes(_SIZES.stages, micro_batches)
    text = chain.uniform(z, device_mesh).lower(chain.data(z)).compile().as_text()
    sizes[micro_batches] = {int(n) for n in re.findall(rf'f32\[(\d+),{chain.B},{chain.H}\]', text)}
  assert all(max(found) == _SIZES.stages + 1 for found in sizes.values()), sizes


def test_every_rank_with_programs_of_its_own_keeps_as_many_activations_as_ranks_and_one(
  monkeypatch,
):
  """Buffers on its device, counted while an operation holds what it reads and what it made."""
  device_mesh = mesh.make_mesh(config.Mesh(pipe=_SIZES.stages))
  program, streams = chain.by_ranks(_SIZES, device_mesh)
  done, shape = mpmd._Rank._forward_done, (1, chain.B, chain.H)
  most: collections.Counter[int] = collections.Counter()

  def count(self, item, y, kept, results):
    done(self, item, y, kept, results)
    (device,) = y.devices()
    live = sum(x.shape == shape and device in x.devices() for x in jax.live_arrays())
    most[device.id] = max(most[device.id], live / sum(k.shape == shape for k in kept))

  monkeypatch.setattr(mpmd._Rank, '_forward_done', count)
  program(chain.data(_SIZES))
  assert list(most.values()) == [_SIZES.stages + 1] * _SIZES.stages
  assert streams.live == _SIZES.stages + 1
