"""Latency of a message, and of many: InfiniBand, RoCE, NVLink; sent by the CPU or by the GPU itself.

arXiv 2505.09343, Table 5, gives 64 bytes end to end between CPUs, below one leaf switch and across leaves.
Across is two switches further, so each row says what a switch costs, cable included, and what remains for
the two ends:

| network    | same leaf | cross leaf | a switch | both ends |
|------------|-----------|------------|----------|-----------|
| InfiniBand | 2.8 us    | 3.7 us     | 0.45 us  | 2.35 us   |
| RoCE       | 3.6 us    | 5.6 us     | 1.0 us   | 2.6 us    |
| NVLink     | 3.33 us   | -          |          | 3.33 us   |

Two numbers a row against two unknowns: what is new are other numbers of switches, sizes and counts.

A kernel that sends through the CPU (NVSHMEM's IBRC, NCCL's proxy) leaves its request in host memory, where
a thread finds it, writes the work request and rings the NIC. With IBGDA the GPU does both. The paper says
that this matters and gives no figure; `Proxy` are this module's assumptions.
"""

import dataclasses

# us of 64 bytes, same leaf and cross leaf; NVLink has no leaves.
TABLE_5 = {'InfiniBand': (2.8, 3.7), 'RoCE': (3.6, 5.6), 'NVLink': (3.33, None)}
_TABLE_BYTES = 64
# Switches that a message passes.
PATHS = {'same leaf': 1, 'cross leaf': 3, 'three layers': 5}
SENDERS = ('gpu', 'proxy')


@dataclasses.dataclass(frozen=True)
class Network:
  ends: float  # us in both ends together
  switch: float  # us a switch, with its cable

  def one_way(self, switches: int, size: float, bandwidth: float) -> float:
    """us until the last byte of one message is there; `bandwidth` in bytes/s. Switches cut through."""
    return self.ends + self.switch * switches + max(size - _TABLE_BYTES, 0) / bandwidth * 1e6


def network(name: str) -> Network:
  """Of a row of Table 5; raises ValueError for another name."""
  if name not in TABLE_5:
    raise ValueError(f'network {name!r}: must be one of {", ".join(TABLE_5)}')
  same, cross = TABLE_5[name]
  if cross is None:
    return Network(same, 0.0)
  switch = (cross - same) / (PATHS['cross leaf'] - PATHS['same leaf'])
  return Network(same - switch * PATHS['same leaf'], switch)


@dataclasses.dataclass(frozen=True)
class Proxy:
  """What sending through a CPU thread adds; assumed."""

  handoff: float = 1.5  # us: a write over PCIe to host memory, and a thread that polls for it
  each: float = 0.5  # us of the thread for each message: 2 million a second


def burst(
  net: Network,
  switches: int,
  messages: int,
  size: float,
  bandwidth: float,
  *,
  sender: str = 'gpu',
  proxy: Proxy | None = None,
) -> float:
  """us until the last of `messages` of `size` bytes, which one GPU sends by one NIC, has arrived.

  Messages follow each other as fast as the NIC sends them or, from a 'proxy', the thread posts them. The
  GPU posts from many threads at once and is not the limit.
  """
  if sender not in SENDERS:
    raise ValueError(f'sender {sender!r}: must be one of {", ".join(SENDERS)}')
  apart = size / bandwidth * 1e6
  first = net.one_way(switches, size, bandwidth)
  if sender == 'gpu':
    return first + (messages - 1) * apart
  proxy = proxy or Proxy()
  return first + proxy.handoff + proxy.each + (messages - 1) * max(apart, proxy.each)


def break_even(bandwidth: float, proxy: Proxy | None = None) -> float:
  """Bytes of a message below which a proxy thread cannot keep a NIC of `bandwidth` bytes/s busy."""
  return (proxy or Proxy()).each * 1e-6 * bandwidth


# DeepEP's low-latency kernels, 128 tokens to 8 experts each, us of dispatch and combine by GPUs (its first
# README, February 2025: all traffic by the network).
DEEPEP_LOW_LATENCY = {
  8: (163, 318), 16: (173, 329), 32: (182, 350), 64: (186, 353), 128: (192, 369), 256: (194, 360),
}  # fmt: skip
