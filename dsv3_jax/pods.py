"""Devices of pods that are not here: the real TPU and GPU compilers run on any CPU machine.

    mesh = pods.make_mesh(sizes, 'v5p:8x16x16')
    program = pods.compile(jax.jit(step).lower(shapes_with_shardings), 'v5p:8x16x16')

`program.memory_analysis()` says whether the step fits, `codesign/hlo.py` what it sends and whether that
overlaps. Nothing runs there: arguments are ShapeDtypeStructs, and `lower` runs on the CPU.

A target is NAME:SHAPE or NAME:SHAPE,slices=N:
  v5e:2x4           a TPU slice, in chips: v5e, v5p, v6e or tpu7x. A tpu7x chip is two devices, others one
  v5e:2x4,slices=2  so many of these, joined by the slow network between slices
  h200:8x8          hosts x GPUs

Extra [tpu] brings libtpu; one process at a time may use it, to compile as well. Extra [cuda] brings the
GPU compiler and a ptxas: no GPU, no driver, no other part of CUDA. Without a GPU the compiler cannot try
out kernels, so which one multiplies may differ from the machine's choice. With either installed, start
CPU programs with JAX_PLATFORMS=cpu: JAX would look for the chips first.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType

from dsv3_jax import config
from dsv3_jax.mesh import AXES

_TPUS = ('v5e', 'v5p', 'v6e', 'tpu7x')

# Else libtpu asks the cloud's metadata server what machine this is, and complains that none answers.
_TPU_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5p-8',
}

# What the compiler would ask the GPU itself: as the CUDA driver reports it, and as OpenXLA publishes
# it in xla/backends/gpu/target_config/specs/h200.txtpb.
_H200 = """
gpu_device_info {
  name: "NVIDIA H200"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_core_limit: 2048
  threads_per_block_limit: 1024
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
runtime_version { major: 13 minor: 0 patch: 0 }
dnn_version_info { major: 9 minor: 10 patch: 0 }
"""


@dataclasses.dataclass(frozen=True)
class Target:
  """One pod, read from its name."""

  name: str
  shape: tuple[int, ...]
  slices: int

  @property
  def is_tpu(self) -> bool:
    return self.name in _TPUS

  def __str__(self) -> str:
    slices = f',slices={self.slices}' if self.slices > 1 else ''
    return f'{self.name}:{"x".join(map(str, self.shape))}{slices}'


def parse(target: str) -> Target:
  """'v5e:2x4,slices=2' -> Target; raises ConfigError on anything that names no pod."""
  match = re.fullmatch(r'(\w+):([1-9]\d*(?:x[1-9]\d*)*)(?:,slices=([1-9]\d*))?', target)
  if not match:
    raise config.ConfigError(
      f'target = {target!r}: write NAME:SHAPE or NAME:SHAPE,slices=N, like v5p:4x4x4 or h200:8x8'
    )
  pod = Target(match[1], tuple(int(n) for n in match[2].split('x')), int(match[3] or 1))
  if pod.name not in (*_TPUS, 'h200'):
    known = ', '.join((*_TPUS, 'h200'))
    raise config.ConfigError(f'target = {target!r}: {pod.name} is none of {known}')
  if pod.name == 'h200' and (len(pod.shape) != 2 or pod.slices > 1):
    raise config.ConfigError(
      f'target = {target!r}: GPUs are hosts x GPUs in one slice, like h200:8x8'
    )
  return pod


def devices(target: str) -> list[jax.Device]:
  """The pod's devices, slice by slice and host by host, for programs that are compiled only.

  Raises ConfigError when the target is none or its compiler is missing. Chooses the CPU for JAX itself
  unless JAX_PLATFORMS says otherwise: tracing needs a backend, and the pod's plug-in would look for chips.
  """
  pod = parse(target)
  if not jax.config.jax_platforms:
    jax.config.update('jax_platforms', 'cpu')
  return _tpus(pod) if pod.is_tpu else _gpus(pod)


def make_mesh(sizes: config.Mesh, target: str) -> jax.sharding.Mesh:
  """Mesh over all devices of a pod; raises ConfigError when it has more or fewer.

  On a TPU inner axes lie next to each other on the torus; between slices goes the outermost axis that is
  larger than 1. GPUs stay in order, so that `local` within a host's GPUs stays on its fast links.
  """
  pod, chips = parse(target), devices(target)
  shape = tuple(getattr(sizes, axis) for axis in AXES)
  if math.prod(shape) != len(chips):
    told = ' x '.join(f'{axis} {size}' for axis, size in zip(AXES, shape, strict=True))
    raise config.ConfigError(f'mesh = {told} = {math.prod(shape)} devices: {pod} has {len(chips)}')
  outer = next((d for d, size in enumerate(shape) if size > 1), 0)
  if shape[outer] % pod.slices:
    raise config.ConfigError(
      f'mesh.{AXES[outer]} = {shape[outer]}: the outermost axis must be divisible by {pod.slices} slices'
    )
  grid = np.array(chips).reshape(shape)
  if pod.is_tpu:
    # jax.make_mesh takes neither several slices nor an axis of 8 on a torus of 4 x 4 x 4.
    part = tuple(n // pod.slices if d == outer else n for d, n in enumerate(shape))
    each = np.array(chips).reshape(pod.slices, -1)
    lay = lambda slice_: mesh_utils.create_device_mesh(
      part, list(slice_), allow_split_physical_axes=True
    )
    grid = np.concatenate([lay(slice_) for slice_ in each], axis=outer)
  return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def compile(lowered: jax.stages.Lowered, target: str, **options: Any) -> jax.stages.Compiled:
  """Compiles what was lowered on a mesh of the pod; `options` are the compiler's own.

  Nothing is kept in the persistent cache: without the pod JAX cannot read a program back and fails on it.
  """
  if not parse(target).is_tpu:
    options = {'xla_gpu_autotune_level': 0} | options  # there is no GPU to try kernels on
  seconds = jax.config.jax_persistent_cache_min_compile_time_secs
  jax.config.update('jax_persistent_cache_min_compile_time_secs', math.inf)
  try:
    return lowered.compile(options)
  finally:
    jax.config.update('jax_persistent_cache_min_compile_time_secs', seconds)


def _tpus(pod: Target) -> list[jax.Device]:
  if importlib.util.find_spec('libtpu') is None:
    raise config.ConfigError(f'target = {pod}: no libtpu here; pip install "dsv3_jax[tpu]"')
  for name, value in _TPU_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  layout = 'x'.join(map(str, pod.shape))
  try:
    topology = topologies.get_topology_desc(
      platform='tpu', topology_name=f'{pod.name}:{layout}', num_slices=pod.slices
    )
  except jax.errors.JaxRuntimeError as error:
    taken = 'another process uses libtpu, wait for it: ' if 'libtpu_lockfile' in str(error) else ''
    raise config.ConfigError(f'target = {pod}: {taken}{error}') from error
  return list(topology.devices)


def _gpus(pod: Target) -> list[jax.Device]:
  plugins = importlib.util.find_spec('jax_plugins')
  if plugins is None or importlib.util.find_spec('jax_plugins.xla_cuda13') is None:
    raise config.ConfigError(f'target = {pod}: no GPU compiler here; pip install "dsv3_jax[cuda]"')
  # Compiling needs neither cuDNN nor the other libraries whose versions the plug-in would check.
  os.environ.setdefault('JAX_SKIP_CUDA_CONSTRAINTS_CHECK', '1')
  hosts, gpus = pod.shape
  topology = topologies.get_topology_desc(
    platform='cuda', target_config=_H200, topology=f'1x{hosts}x{gpus}'
  )
  return list(topology.devices)
