"""Prompts in a process of their own, over a real socket, against one engine; and what may go wrong there."""

import json
import os
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from shell import ROOT

from dsv3_jax import serve
from dsv3_jax.config import ConfigError
from dsv3_jax.inference.requests import Request
from dsv3_jax.inference.sampling import GREEDY, Sampling
from dsv3_jax.serving import wire

_FLAGS = ['--slots=8', '--chunk=64']


@pytest.fixture(scope='module')
def prompts(folder):
  """Address of a process that runs prompts over two devices."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  command = [
    sys.executable,
    '-m',
    'dsv3_jax.serve',
    str(folder),
    '--prompts_only',
    '--local=2',
    *_FLAGS,
  ]
  with subprocess.Popen([*command, f'--port={port}'], cwd=ROOT, env=os.environ) as process:
    end = time.monotonic() + 200
    while True:
      try:
        socket.create_connection(('127.0.0.1', port)).close()
        break
      except ConnectionRefusedError:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    yield f'127.0.0.1:{port}'
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture
def engine(folder):
  """Makes engines as `serve` makes them."""
  made = []

  def make(*flags):
    made.append(serve.server(serve._parse([str(folder), *_FLAGS, *flags])))
    return made[-1]._worker.engine

  yield make
  for server in made:
    server._chat.close()
    if hasattr(server._worker.engine, '_prompts'):
      server._worker.engine._prompts.close()


def _run(engine, requests):
  found, waiting = {id(r): [] for r in requests}, list(requests)
  end = time.monotonic() + 60
  while waiting or not engine.idle:
    assert time.monotonic() < end
    for request in waiting[:3]:
      engine.submit(request)
    waiting = waiting[3:]
    for event in engine.step():
      found[id(event.request)] += event.tokens
  assert not engine.pages_owned
  return [[t.id for t in found[id(r)]] for r in requests]


def test_two_processes_with_other_devices_give_the_tokens_of_one_engine(prompts, engine):
  rng = np.random.default_rng(0)
  ways = [GREEDY, Sampling(1.0, 1.0, 1), Sampling(0.7, 0.9, 2)]
  requests = [
    Request(
      rng.integers(0, 250, rng.integers(1, 60)).tolist(), int(rng.integers(1, 12)), ways[i % 3], i
    )
    for i in range(24)
  ]
  apart = engine(f'--prefill={prompts}')
  assert apart._decode.drafts == 1
  assert _run(apart, requests) == _run(engine(), requests)
  # Cancelled at once, or once it decodes: neither comes back, and others go on.
  gone, later, stays = (Request([i] * 40, 20) for i in range(3))
  for request in (gone, later, stays):
    apart.submit(request)
  apart.cancel(gone)
  while apart._decode.running < 2:
    assert all(event.request is not gone for event in apart.step())
  apart.cancel(later)
  while not apart.idle:
    assert all(event.request is stays for event in apart.step())
  assert not apart.pages_owned


def test_another_model_or_nobody_is_refused_by_name(prompts, engine):
  with pytest.raises(ConfigError, match=r'has drafts = 1: must be 0|has cache = '):
    engine(f'--prefill={prompts}', '--drafts=0')
  with pytest.raises(ConfigError, match=r'--prefill=nonsense: .* wants HOST:PORT'):
    engine('--prefill=nonsense')


def test_nonsense_on_the_socket_ends_that_connection_alone(prompts):
  host, _, port = prompts.rpartition(':')
  for said in [
    b'\x80\x04\x95pickle\n',
    b'[]\n',
    b'{"run": 1}\n',
    b'{"run": 1, "prompt": ["x"]}\n',
    b'{',
  ]:
    with socket.create_connection((host, int(port)), timeout=30) as s, s.makefile('rb') as stream:
      assert json.loads(stream.readline())['drafts'] == 1
      s.sendall(said)
      s.shutdown(socket.SHUT_WR)
      assert stream.read() == b''


def test_a_page_cut_off_is_no_page(engine):
  made = engine()
  ours, theirs = socket.socketpair()
  token = {'id': 1, 'logprob': -1.0, 'top': []}
  wire.send(ours, {'id': 0, 'token': token, 'finish': None, 'drafts': [], 'pages': 1})
  ours.sendall(b'too short')
  ours.close()
  with (
    theirs,
    theirs.makefile('rb') as stream,
    pytest.raises(wire.WireError, match='middle of a page'),
  ):
    wire.read_event(stream, wire.read(stream), Request([1], 2), made)
