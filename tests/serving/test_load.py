"""The server under pressure, over real sockets: full queues, slow and huge bodies, ends, people who go away.

The engine is held still where a test needs it busy, so nothing here depends on how fast it is.
"""

import concurrent.futures
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest
from shell import ROOT

_ASK = {'prompt': 'a', 'max_tokens': 40, 'temperature': 0}


def _post(port, body, path='/v1/completions'):
  """Status, headers and text of the answer."""
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
  try:
    connection.request('POST', path, json.dumps(body), {'content-type': 'application/json'})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()
  finally:
    connection.close()


def _get(port, path):
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
  try:
    connection.request('GET', path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()
  finally:
    connection.close()


def _message(text):
  return json.loads(text)['error']['message']


def _events(text):
  return [line.removeprefix('data: ') for line in text.split('\n\n') if line]


def _raw(port, head, body=b''):
  """A socket that has sent a POST."""
  s = socket.create_connection(('127.0.0.1', port), timeout=60)
  s.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\n' + head + b'\r\n\r\n' + body)
  return s


def _whole(s):
  """Status and message of a refusal read from a raw socket."""
  answer = http.client.HTTPResponse(s)
  answer.begin()
  return answer.status, _message(answer.read())


@pytest.fixture
def pool():
  with concurrent.futures.ThreadPoolExecutor(32) as made:
    yield made


def test_a_full_queue_is_429_with_when_to_come_again_and_loses_nobody(running, pool):
  with running('--waiting=3') as r:
    r.open.clear()
    first = [pool.submit(_post, r.port, _ASK)]
    r.soon(lambda: not r.served._worker._new and r.engine.waiting)  # it stands before its step
    first += [pool.submit(_post, r.port, _ASK) for _ in range(2)]
    r.soon(lambda: len(r.served._worker._new) == 2)
    for body in (_ASK, {**_ASK, 'stream': True}, {**_ASK, 'n': 3}):
      status, headers, text = _post(r.port, body)
      assert (status, headers['retry-after']) == (429, '1')
      assert _message(text) == 'too many requests wait; try again soon'
    r.open.set()
    answers = [f.result() for f in first]
    assert [status for status, _, _ in answers] == [200] * 3
    assert len({json.loads(text)['choices'][0]['text'] for _, _, text in answers}) == 1
    assert _post(r.port, _ASK)[0] == 200
    assert 'dsv3_answers_total{status="429"} 3' in _get(r.port, '/metrics')[1]
    r.empty_soon()


def test_what_takes_too_long_is_408_and_gives_its_pages_back(running, pool):
  with running('--seconds=1') as r:
    r.open.clear()
    whole = pool.submit(_post, r.port, _ASK)
    stream = pool.submit(_post, r.port, {**_ASK, 'stream': True})
    status, _, text = whole.result()
    assert (status, _message(text)) == (408, 'took more than 1 seconds')
    status, _, text = stream.result()  # its status was sent before
    assert status == 200 and _message(_events(text)[-1]) == 'took more than 1 seconds'
    r.open.set()
    r.empty_soon()
    assert _post(r.port, _ASK)[0] == 200


def test_a_body_that_does_not_come_is_408(running):
  with running(body_seconds=0.3) as r, _raw(r.port, b'content-length: 100', b'{"prompt"') as s:
    assert _whole(s) == (408, 'no body after 0.3 seconds')


@pytest.mark.parametrize('head', [b'content-length: 1000000000', b'transfer-encoding: chunked'])
def test_a_body_too_large_is_413_before_all_of_it_is_there(running, head):
  with running('--body_bytes=20000') as r:
    part = b'x' * 30_000
    body = part if b'length' in head else b'%x\r\n' % len(part) + part + b'\r\n'
    with _raw(r.port, head, body) as s:
      assert _whole(s) == (413, 'the body has more than 20000 bytes')
    assert _post(r.port, _ASK)[0] == 200


def test_an_ending_server_ends_what_it_has_and_takes_nothing_new(running, pool):
  with running() as r:
    r.open.clear()
    asked = [pool.submit(_post, r.port, {**_ASK, 'stream': i % 2 == 0}) for i in range(20)]
    r.soon(lambda: r.engine.waiting + len(r.served._worker._new) == 20)
    r.served.end(60)
    assert _get(r.port, '/health') == (503, '{"status":"ending"}')
    status, _, text = _post(r.port, _ASK)
    assert (status, _message(text)) == (503, 'the server is ending')
    r.uvicorn.should_exit = True
    r.open.set()
    answers = [f.result() for f in asked]
    assert [status for status, _, _ in answers] == [200] * 20
    assert all(_events(text)[-1] == '[DONE]' for _, _, text in answers[::2])
    r.thread.join(20)
    assert not r.thread.is_alive()


def test_what_has_not_ended_by_then_is_503(running, pool):
  with running() as r:
    r.open.clear()
    whole = pool.submit(_post, r.port, _ASK)
    stream = pool.submit(_post, r.port, {**_ASK, 'stream': True})
    r.soon(lambda: r.engine.waiting + len(r.served._worker._new) == 2)
    r.served.end(0)
    r.uvicorn.should_exit = True
    r.soon(lambda: r.served._worker._ends)
    r.open.set()
    status, _, text = whole.result()
    assert (status, _message(text)) == (503, 'the server is ending')
    assert _message(_events(stream.result()[2])[-1]) == 'the server is ending'
    r.thread.join(20)
    assert not r.thread.is_alive()


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_an_engine_that_fails_is_told_to_all_and_to_health(running, pool):
  with running() as r:
    r.open.clear()
    asked = pool.submit(_post, r.port, _ASK)
    r.soon(lambda: r.engine.waiting)
    r.engine._decoder = None
    r.open.set()
    assert asked.result()[0] == 503
    r.soon(lambda: r.served._worker.failure)
    assert _get(r.port, '/health') == (503, '{"status":"failed"}')
    assert _post(r.port, _ASK)[0] == 503


def _leave(s, abruptly):
  if abruptly:  # RST, as a process that is killed behind a dead network
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
  s.close()


@pytest.mark.parametrize('stream', [False, True])
def test_who_goes_away_waiting_or_running_frees_slot_and_pages(running, stream):
  body = json.dumps({**_ASK, 'max_tokens': 60, 'stream': stream}).encode()
  head = b'content-length: %d' % len(body)
  with running() as r:
    r.open.clear()
    sockets = [_raw(r.port, head, body) for _ in range(12)]  # more than slots
    r.soon(lambda: r.engine.waiting + len(r.served._worker._new) == 12)
    for i, s in enumerate(sockets):
      _leave(s, abruptly=i % 2)
    r.soon(lambda: len(r.served._worker._cancelled) == 12)
    r.open.set()
    r.empty_soon()
    assert r.engine.stats.tokens < 60
    # Others, once they run.
    for i in range(6):
      s = _raw(r.port, head, body)
      before = r.engine.stats.tokens
      r.soon(lambda before=before: r.engine.stats.tokens > before)
      _leave(s, abruptly=i % 2)
    r.empty_soon()
    assert _post(r.port, _ASK)[0] == 200


def test_sigterm_under_load_ends_every_answer_then_the_process(folder):
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  command = [sys.executable, '-m', 'dsv3_jax.serve', str(folder), f'--port={port}', '--slots=4']
  process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ)
  with process, concurrent.futures.ThreadPoolExecutor(16) as pool:
    try:
      end = time.monotonic() + 120
      while True:
        try:
          _get(port, '/health')
          break
        except ConnectionRefusedError:
          assert process.poll() is None and time.monotonic() < end
          time.sleep(0.1)
      asked = [pool.submit(_post, port, {**_ASK, 'n': 8, 'stream': i % 2 == 0}) for i in range(16)]
      while True:  # until all are in
        text = _get(port, '/metrics')[1]
        if (
          sum(int(re.search(rf'dsv3_{n} (\d+)', text)[1]) for n in ('requests_total', 'waiting'))
          == 128
        ):
          break
        time.sleep(0.01)
      process.send_signal(signal.SIGTERM)
      answers = [f.result() for f in asked]
      assert process.wait(60) == -signal.SIGTERM  # as one who is asked to end does
    finally:
      process.kill()
    told = process.stderr.read()
  assert 'Traceback' not in told and 'ERROR' not in told
  assert [status for status, _, _ in answers] == [200] * 16
  assert all(_events(text)[-1] == '[DONE]' for _, _, text in answers[::2])
