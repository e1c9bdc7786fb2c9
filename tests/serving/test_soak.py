"""Five seconds of random load; what it watches for is itself shown to be seen."""

import json

import pytest

from dsv3_jax.serving import soak


def test_five_seconds_of_random_load_leave_nothing_behind(folder, capfd):
  # So short a time says nothing of memory.
  code = soak.main([str(folder), '--seconds=5', '--clients=6', '--growth=1'])
  figures = json.loads(capfd.readouterr().out)
  assert (code, figures['faults']) == (0, [])
  kinds = {name.partition(' ')[0] for name in figures['done']}
  assert kinds == {'whole', 'stream', 'leave', 'oversized', 'malformed', 'no_http'}
  assert figures['first_token']['p50_ms'] <= figures['first_token']['p99_ms']


def test_memory_is_compared_by_thirds():
  rss = [(float(t), 100 + (t > 20) * 10) for t in range(31)]
  assert soak._growth(rss) == pytest.approx(0.1)
  assert soak._growth([(float(t), 100) for t in range(31)]) == 0


@pytest.mark.parametrize(
  ('status', 'text', 'told'),
  [
    (500, b'Internal Server Error', 'status 500 where [400, 404] is due'),
    (400, b'', 'status 400 without a reason'),
    (400, b'{"error": {"message": ""}}', 'status 400 without a reason'),
  ],
)
def test_a_refusal_must_be_due_and_say_why(status, text, told):
  with pytest.raises(soak._Fault) as error:
    soak._refused(status, text, {400, 404})
  assert str(error.value).startswith(told)


def test_what_cannot_run_is_one_line(tmp_path, capfd):
  assert soak.main([str(tmp_path / 'none'), '--clients=0']) == 2
  assert capfd.readouterr().err == 'soak: clients = 0: must be above 0\n'
