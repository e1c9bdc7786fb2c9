"""Machines that the co-design report can be asked about: chips, and the links between them.

A machine is a number of chips on fast links (a node, an NVL72 rack, a TPU slice) and a slow network
between such groups. Bandwidths are bytes/s of one chip, one way; FLOP/s are dense peaks. Another machine
is another `Hardware`; nothing in the sections knows a name.

| source                                   | figures                                                     |
|------------------------------------------|-------------------------------------------------------------|
| arXiv 2505.09343 (5.1, 4.3, 2.3.2)       | H800 links, nominal and achieved; NVL72; host of a node     |
| arXiv 2412.19437, Table 1                | 2 $ a GPU-hour                                              |
| NVIDIA data sheets, H100 H200 GB200      | peaks without sparsity, memory                              |
| cloud.google.com/tpu/docs, v5p v6e tpu7x | peaks, memory, ICI (both ways: halved here), network        |
| makers' data sheets                      | parts of a PC                                               |
"""

import dataclasses
import difflib


@dataclasses.dataclass(frozen=True)
class Chip:
  name: str
  bf16: float  # FLOP/s
  fp8: float  # FLOP/s; of BF16 where the chip has no FP8
  memory: float  # bytes
  memory_bandwidth: float  # bytes/s


@dataclasses.dataclass(frozen=True)
class Links:
  """One chip's share, one way."""

  nominal: float
  achieved: float  # in an exchange of small messages
  name: str


@dataclasses.dataclass(frozen=True)
class Host:
  """What a node's chips share, and PCIe of each."""

  memory_bandwidth: float  # bytes/s of the whole node
  pcie: float  # bytes/s of one chip, one way
  price: float  # $ a chip-hour


@dataclasses.dataclass(frozen=True)
class Hardware:
  name: str
  chip: Chip
  chips: int  # on one fast network
  fast: Links
  slow: Links
  host: Host
  torus: int = 0  # dimensions, where the fast network is one: then a byte is forwarded on its way

  def exchange(self, devices: int) -> Links:
    """Links that an all-to-all over so many devices is bound by."""
    if devices > self.chips:
      return self.slow
    hops = max(1.0, self.torus * devices ** (1 / self.torus) / 4) if self.torus else 1.0
    return Links(self.fast.nominal / hops, self.fast.achieved / hops, self.fast.name)


# ---- machines ------------------------------------------------------------------------------------

_NODE = Host(1e12, 64e9, 2.0)
_INFINIBAND = Links(50e9, 40e9, 'InfiniBand')
_HOPPER = Chip('H800', 989e12, 1979e12, 80e9, 3.35e12)
H800 = Hardware('h800', _HOPPER, 8, Links(200e9, 160e9, 'NVLink'), _INFINIBAND, _NODE)
# The share achieved of H800's links is taken for those of others too.
_NVLINK_4 = Links(450e9, 360e9, 'NVLink')
H100 = Hardware('h100', dataclasses.replace(_HOPPER, name='H100'), 8, _NVLINK_4, _INFINIBAND, _NODE)
_H200 = dataclasses.replace(_HOPPER, name='H200', memory=141e9, memory_bandwidth=4.8e12)
H200 = Hardware('h200', _H200, 8, _NVLINK_4, _INFINIBAND, _NODE)
_BLACKWELL = Chip('GB200', 2500e12, 5000e12, 186e9, 8e12)
GB200 = Hardware(
  'gb200_nvl72', _BLACKWELL, 72, Links(900e9, 720e9, 'NVLink'), _INFINIBAND, Host(9.2e12, 64e9, 2.0)
)


def _tpu(name: str, chip: Chip, chips: int, ici: float, dcn: float, torus: int) -> Hardware:
  slow = Links(dcn, 0.8 * dcn, 'data centre network')
  return Hardware(name, chip, chips, Links(ici, 0.8 * ici, 'ICI'), slow, _NODE, torus)


V5P = _tpu('v5p', Chip('TPU v5p', 459e12, 459e12, 95e9, 2.765e12), 8960, 600e9, 6.25e9, 3)
V6E = _tpu('v6e', Chip('TPU v6e', 918e12, 918e12, 32e9, 1.638e12), 256, 400e9, 12.5e9, 2)
TPU7X = _tpu('tpu7x', Chip('TPU7x', 2307e12, 4614e12, 192e9, 7.38e12), 9216, 600e9, 12.5e9, 3)

MACHINES = {h.name: h for h in (H800, H100, H200, GB200, V5P, V6E, TPU7X)}


def get(name: str) -> Hardware:
  """The machine of that name; raises ValueError that lists the known ones."""
  if name not in MACHINES:
    near = difflib.get_close_matches(name, MACHINES, 1)
    meant = f'; did you mean {near[0]}?' if near else ''
    raise ValueError(f'hardware {name!r}: unknown; there are {", ".join(MACHINES)}{meant}')
  return MACHINES[name]


# ---- parts of a PC or workstation ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Part:
  """Memory that weights are read from, once a token."""

  name: str
  memory: float  # bytes
  bandwidth: float  # bytes/s


AI_PC = Part('PC with an AI SoC', 128e9, 256e9)  # 256 bits of LPDDR5X-8000
M3_ULTRA = Part('Mac Studio M3 Ultra', 512e9, 819e9)
RTX_4090 = Part('RTX 4090', 24e9, 1008e9)
RTX_5090 = Part('RTX 5090', 32e9, 1792e9)
TWO_XEONS = Part('two Xeons', 1024e9, 614e9)  # 16 channels of DDR5-4800
