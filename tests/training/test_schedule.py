"""Schedules of the report at every boundary of their phases, and the ramp of the batch."""

import dataclasses

import numpy as np
import oracle
import pytest

from dsv3_jax import config
from dsv3_jax.training import schedule

_V3 = config.Config()
_SHORT = config.Optimizer(
  peak_lr=1.0,
  warmup_steps=4,
  constant_tokens=100.0,
  decay_tokens=50.0,
  end_lr=0.1,
  end_tokens=30.0,
  final_lr=0.03,
)


# ---- learning rate -------------------------------------------------------------------------------


@pytest.mark.parametrize('c', [_V3.optimizer, _SHORT], ids=['v3', 'short'])
def test_learning_rate_equals_the_oracle_in_and_between_all_phases(c):
  ends = np.cumsum([c.constant_tokens, c.decay_tokens, c.end_tokens])
  around = [end * side for end in ends for side in (1 - 1e-5, 1, 1 + 1e-5)]
  for tokens in [0.0, *np.linspace(0, 1.2 * ends[-1], 41), *around]:
    for step in (
      0,
      1,
      c.warmup_steps // 2,
      c.warmup_steps - 1,
      c.warmup_steps,
      10 * c.warmup_steps,
    ):
      got = schedule.learning_rate(c, step, tokens)
      expected = oracle.learning_rate(c, np.float32(tokens), step)
      assert float(got) == pytest.approx(expected, rel=1e-5), f'{tokens:.6e} tokens, step {step}'


@pytest.mark.parametrize(
  ('tokens', 'expected'),
  [
    (0, 2.2e-4),
    (9.99e12, 2.2e-4),
    (10e12, 2.2e-4),
    (12.15e12, (2.2e-4 + 2.2e-5) / 2),
    (14.3e12, 2.2e-5),
    (14.6e12, 2.2e-5),
    (14.633e12, 7.3e-6),
    (14.8e12, 7.3e-6),
  ],
)
def test_learning_rate_of_v3_is_the_published_one(tokens, expected):
  assert float(schedule.learning_rate(_V3.optimizer, 2000, tokens)) == pytest.approx(
    expected, rel=1e-5
  )


def test_warm_up_is_linear_in_steps_from_zero():
  rates = [float(schedule.learning_rate(_SHORT, step, 0)) for step in range(6)]
  assert rates == [0, 0.25, 0.5, 0.75, 1, 1]


def test_phases_of_no_length_are_skipped():
  c = dataclasses.replace(
    _SHORT, warmup_steps=0, constant_tokens=0.0, decay_tokens=0.0, end_tokens=0.0
  )
  assert float(schedule.learning_rate(c, 0, 0)) == pytest.approx(0.03)
  c = dataclasses.replace(_SHORT, warmup_steps=0, decay_tokens=0.0)
  rates = [float(schedule.learning_rate(c, 0, tokens)) for tokens in (99, 100, 129, 130)]
  assert rates == pytest.approx([1, 0.1, 0.1, 0.03])


# ---- what changes once ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('tokens', 'expected'), [(0, 0.3), (9.99e12, 0.3), (10e12, 0.1), (14.8e12, 0.1)]
)
def test_mtp_weight_falls_at_10t_tokens(tokens, expected):
  assert float(schedule.mtp_weight(_V3.objective, tokens)) == pytest.approx(expected)


@pytest.mark.parametrize(
  ('tokens', 'expected'), [(0, 1e-3), (14.29e12, 1e-3), (14.3e12, 0), (14.8e12, 0)]
)
def test_bias_speed_stops_at_14_3t_tokens(tokens, expected):
  assert float(schedule.bias_speed(_V3.objective, tokens)) == pytest.approx(expected)


# ---- batch size ----------------------------------------------------------------------------------


def test_batch_of_v3_grows_from_3072_to_15360_within_469b_tokens():
  b = _V3.batch
  size = lambda tokens: b.micro_size * schedule.micro_batches(b, int(tokens / b.seq_len))
  assert size(0) == 3072
  assert size(117e9) == 3072  # the exact ramp is 6,137 here
  assert size(118e9) == 6144
  assert size(468e9) == 12_288
  assert size(469.1e9) == 15_360
  assert size(14.8e12) == 15_360


def test_batch_without_a_ramp_is_whole_from_the_start():
  b = config.Batch(ramp_tokens=0.0, size=6144, start_size=3072)
  assert schedule.micro_batches(b, 0) == 2


def test_ramp_of_one_sequence_micro_batches_follows_the_line_rounded_down():
  b = config.Batch(seq_len=10, size=8, start_size=2, ramp_tokens=600.0, micro_size=1)
  counts = [schedule.micro_batches(b, sequences) for sequences in range(70)]
  assert counts == [2 + sequences // 10 if sequences < 60 else 8 for sequences in range(70)]


def _count_steps(c: config.Config) -> int:
  sequences, steps = 0, 0
  while sequences * c.batch.seq_len < c.run.total_tokens:
    sequences += c.batch.micro_size * schedule.micro_batches(c.batch, sequences)
    steps += 1
  return steps


@pytest.mark.parametrize(
  'tokens', [1.0, 33.0, 5120.0, 12_582_912.0, 468.99e9, 469e9, 470e9, 14.8e12]
)
def test_total_steps_equals_counting_them(tokens):
  c = dataclasses.replace(_V3, run=dataclasses.replace(_V3.run, total_tokens=tokens))
  assert schedule.total_steps(c) == _count_steps(c)


@pytest.mark.parametrize('ramp', [0.0, 1.0, 319.0, 320.0, 333.0, 5000.0])
@pytest.mark.parametrize('tokens', [1.0, 320.0, 321.0, 1000.0])
def test_total_steps_equals_counting_them_where_nothing_divides(ramp, tokens):
  batch = config.Batch(seq_len=32, size=12, start_size=4, ramp_tokens=ramp, micro_size=2)
  c = dataclasses.replace(_V3, batch=batch, run=dataclasses.replace(_V3.run, total_tokens=tokens))
  assert schedule.total_steps(c) == _count_steps(c)
