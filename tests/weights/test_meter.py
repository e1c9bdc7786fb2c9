"""What a person sees of a conversion."""

import io

from dsv3_jax.weights.meter import Meter


class _Clock:
  now = 100.0

  def __call__(self) -> float:
    return self.now


def test_a_file_gets_a_line_every_ten_seconds_and_one_at_the_end():
  stream, clock = io.StringIO(), _Clock()
  with Meter('import', 4_000_000_000, stream=stream, clock=clock) as meter:
    for _ in range(8):
      clock.now += 5
      meter.add(500_000_000)
  assert stream.getvalue().splitlines() == [
    'import  25%  1.00 GB of 4.00 GB  100.00 MB/s  left 0:00:30',
    'import  50%  2.00 GB of 4.00 GB  100.00 MB/s  left 0:00:20',
    'import  75%  3.00 GB of 4.00 GB  100.00 MB/s  left 0:00:10',
    'import 100%  4.00 GB of 4.00 GB  100.00 MB/s  left 0:00:00',
    'import 100%  4.00 GB of 4.00 GB  100.00 MB/s  left 0:00:00',
  ]


def test_what_an_interrupted_conversion_has_done_counts_but_not_for_the_rate():
  stream, clock = io.StringIO(), _Clock()
  with Meter('export', 1000, stream=stream, clock=clock) as meter:
    meter.skip(500)
    clock.now += 10
    meter.add(100)
  line = 'export  60%  600 B of 1.00 kB  10 B/s  left 0:00:40'
  assert stream.getvalue().splitlines() == [line, line]


def test_a_conversion_that_fails_has_no_last_line():
  stream = io.StringIO()
  try:
    with Meter('import', 10, stream=stream):
      raise KeyError
  except KeyError:
    pass
  assert not stream.getvalue()


def test_nothing_to_do_and_nothing_done_are_no_division_by_zero():
  stream, clock = io.StringIO(), _Clock()
  with Meter('import', 0, stream=stream, clock=clock):
    pass
  assert stream.getvalue() == 'import   0%  0 B of 0 B  0 B/s  left -\n'
