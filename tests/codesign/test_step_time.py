"""The published step from its parts: what it multiplies, what hides what, and how near Table 4 it comes."""

import dataclasses

import pytest

from dsv3_jax import counts
from dsv3_jax.codesign import cost, layer_time, models, step_time
from dsv3_jax.codesign.hardware import H800

V3, RUN, RATES = models.V3, layer_time.PAPER, layer_time.RATES
_FLAT = layer_time.Rates(*[1e12] * 11, clock=1.0)  # all that multiplies at one speed


def _block(rates=RATES, hardware=H800, dense=False):
  return layer_time.block(V3, hardware, RUN, rates, dense)


def test_the_step_is_within_15_percent_of_the_printed_one_and_each_part_is_told():
  seconds, printed, _ = cost.TABLE_4['MPFT']
  step = step_time.predict()
  assert step.seconds == pytest.approx(seconds, rel=0.15)
  assert list(step.parts) == list(cost.PARTS)
  # Pairs take most of it; each part is off by less than two fifths.
  for name, value in zip(cost.PARTS, printed, strict=True):
    assert step.parts[name] == pytest.approx(value, rel=0.4), name


def test_blocks_multiply_what_the_model_asks_for():
  dense, moe = _block(_FLAT, dense=True), _block(_FLAT)
  forward = lambda b: (b.attention[0].matmul + b.ffn[0].matmul) * 1e12
  weight = lambda b: (b.attention[2].matmul + b.ffn[2].matmul) * 1e12
  layers = V3.num_dense_layers, V3.num_layers - V3.num_dense_layers
  total = layers[0] * forward(dense) + layers[1] * forward(moe)
  head = 2 * counts.embedding_parameters(V3)
  router = 2 * layers[1] * counts.router_parameters(V3)
  want = counts.training_flops_per_token(V3, RUN.seq_len) / 3 - head + router
  assert total == pytest.approx(RUN.seq_len * want)
  experts = 9 * counts.expert_parameters(V3) + counts.router_parameters(V3)
  linear = 2 * (counts.attention_parameters(V3) + experts)
  assert weight(moe) == pytest.approx(RUN.seq_len * linear)


def test_a_pair_hides_exchanges_until_they_take_longer_than_what_stands_beside_them():
  b = _block()
  at = lambda times: dataclasses.replace(b, dispatch=times * b.dispatch, combine=times * b.combine)
  pair = lambda times: layer_time.pair(at(times), at(times), RATES.compute_sms)
  assert pair(0) == pair(1) < pair(4)
  assert pair(1e6) == pytest.approx(1e6 * 2 * (b.dispatch + b.combine))
  apart = b.alone(0) + b.alone(1) + b.alone(2)
  assert pair(1) < apart and at(0).alone(2) == b.alone(2)


def test_parts_are_all_of_the_time_of_every_rank():
  step = step_time.predict()
  alone = sum(value for name, value in step.parts.items() if name != 'optimizer')
  twice = dataclasses.replace(RATES, memory=RATES.memory / 2)
  assert alone < step.seconds < step_time.predict(rates=twice).seconds
  slower = dataclasses.replace(H800, slow=dataclasses.replace(H800.slow, nominal=5e9, achieved=4e9))
  assert step_time.predict(hardware=slower).parts['1F1B'] > 2 * step.parts['1F1B']


def test_sequences_that_do_not_go_round_are_refused():
  with pytest.raises(ValueError, match='15361 sequences over 128 replicas: must be a multiple'):
    step_time.predict(run=dataclasses.replace(RUN, sequences=15_361))
  with pytest.raises(ValueError, match=r'dualpipe .* at least 32'):
    step_time.predict(run=dataclasses.replace(RUN, sequences=128 * 30))
