"""Latency: Table 5 of arXiv 2505.09343, and DeepEP's low-latency kernels."""

import pytest

from dsv3_jax.codesign import latency


def test_table_5_comes_out_of_ends_and_switches():
  for name, (same, cross) in latency.TABLE_5.items():
    net = latency.network(name)
    assert net.one_way(latency.PATHS['same leaf'], 64, 50e9) == pytest.approx(same)
    if cross is not None:
      assert net.one_way(latency.PATHS['cross leaf'], 64, 50e9) == pytest.approx(cross)
  assert latency.network('InfiniBand') == latency.Network(pytest.approx(2.35), pytest.approx(0.45))
  assert latency.network('RoCE') == latency.Network(pytest.approx(2.6), pytest.approx(1.0))


@pytest.mark.parametrize(('gpus', 'close'), [(8, 0.2), (64, 0.1), (128, 0.05), (256, 0.05)])
def test_messages_that_gpus_send_take_as_long_as_deepep_s_low_latency_kernels(gpus, close):
  # 40 GB/s is what small messages reach (section 4.3); few GPUs, fewer messages at a time, reach more.
  net = latency.network('InfiniBand')
  for printed, row in zip(latency.DEEPEP_LOW_LATENCY[gpus], (7168 + 4 * 56, 2 * 7168), strict=True):
    found = latency.burst(net, latency.PATHS['cross leaf'], 128 * 8, row, 40e9)
    assert found == pytest.approx(printed, rel=close)


def test_a_proxy_limits_small_messages_and_delays_large_ones():
  net = latency.network('InfiniBand')
  burst = lambda size, sender, n=1024: latency.burst(net, 3, n, size, 40e9, sender=sender)
  assert latency.break_even(40e9) == pytest.approx(20_000)
  assert burst(7392, 'proxy') > 2.5 * burst(7392, 'gpu')
  assert burst(40_000, 'proxy') - burst(40_000, 'gpu') == pytest.approx(2.0)
  assert burst(64, 'gpu', 1) == pytest.approx(3.7)


def test_unknown_networks_and_senders_are_named():
  with pytest.raises(ValueError, match="network 'Ethernet': must be one of InfiniBand, RoCE, NVL"):
    latency.network('Ethernet')
  with pytest.raises(ValueError, match="sender 'cpu': must be one of gpu, proxy"):
    latency.burst(latency.network('RoCE'), 1, 1, 64, 50e9, sender='cpu')
