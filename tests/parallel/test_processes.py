"""Several processes, each with some of the devices, take the steps of one process that has them all."""

import functools
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

import numpy as np
import parity
import pytest
import several

_TESTS = pathlib.Path(__file__).parents[1]
_DEVICES = 8
_TIMEOUT_S = 300  # of a machine that has other things to do; four take about thirty
_PROCESSES = (2, 4)
# Ranks with programs of their own compile too long for four at a time on a small machine.
_FORMS = {2: (*several.FORMS, several.MPMD), 4: several.FORMS}
_group = lambda n: pytest.mark.xdist_group(f'{n}_processes')
_EACH = pytest.mark.parametrize('processes', [pytest.param(n, marks=_group(n)) for n in _PROCESSES])
_EACH_FORM = pytest.mark.parametrize(
  ('processes', 'form'),
  [pytest.param(n, form, marks=_group(n)) for n in _PROCESSES for form in _FORMS[n]],
)


@functools.cache
def _here(form: str) -> dict[str, np.ndarray]:
  """What this process sees by itself."""
  return several.all_steps([form], several.UNPIPELINED if form == several.MPMD else {})


def _start(me: int, of: int, port: int, folder: str) -> subprocess.Popen[str]:
  environment = os.environ | {
    'PYTHONPATH': os.pathsep.join([str(_TESTS.parent), str(_TESTS)]),
    'XLA_FLAGS': f'{os.environ["XLA_FLAGS"]} --xla_force_host_platform_device_count={_DEVICES // of}',
  }
  command = [sys.executable, '-W', 'error', several.__file__, me, of, port, folder, *_FORMS[of]]
  return subprocess.Popen(
    list(map(str, command)),
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


@functools.cache
def _seen(of: int) -> list[dict[str, np.ndarray]]:
  """What each of so many processes saw; they run once."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  with tempfile.TemporaryDirectory() as folder:
    started = [_start(me, of, port, folder) for me in range(of)]
    try:
      errors = [process.communicate(timeout=_TIMEOUT_S)[1] for process in started]
    finally:
      for process in started:
        process.kill()
    assert [process.returncode for process in started] == [0] * of, '\n'.join(errors)
    return [dict(np.load(f'{folder}/{me}.npz')) for me in range(of)]


def _of(process: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
  found = {name: x for name, x in process.items() if name.startswith(prefix)}
  assert found, f'nothing begins with {prefix}'
  return found


@_EACH
def test_each_process_has_its_part_of_the_devices_of_one_mesh(processes):
  for process in _seen(processes):
    assert list(process['counts']) == [processes, _DEVICES, _DEVICES // processes]


@_EACH_FORM
def test_losses_counts_and_traffic_of_every_step_equal_one_process(processes, form):
  expected = _of(_here(form), f'{form}.metrics')
  for process in _seen(processes):
    parity.assert_close(_of(process, f'{form}.metrics'), expected, 1e-6)
    parity.assert_same_bits(
      _of(process, f'{form}.metrics.load'), _of(_here(form), f'{form}.metrics.load')
    )


@_EACH
@pytest.mark.parametrize('form', several.FORMS)
def test_even_routing_takes_one_round_and_skewed_routing_more_in_every_process(processes, form):
  for process in _seen(processes):
    *even, skewed = process[f'{form}.metrics.rounds']
    assert max(even) == 1 and skewed >= 2


@_EACH_FORM
@pytest.mark.parametrize('what', ['gradients', 'params'])
def test_gradients_and_weights_equal_one_process(processes, form, what):
  for process in _seen(processes):
    parity.assert_close(_of(process, f'{form}.{what}'), _of(_here(form), f'{form}.{what}'))


@_EACH_FORM
def test_router_biases_of_every_device_of_every_process_have_the_same_bits(processes, form):
  for process in _seen(processes):
    for name, expected in _of(_here(form), f'{form}.router_bias').items():
      assert len(expected) == _DEVICES and len(process[name]) == _DEVICES // processes
      for bias in (*expected, *process[name]):
        np.testing.assert_array_equal(bias, expected[0], name)
