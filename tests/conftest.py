"""One set-up for all tests: CPU, sixteen emulated devices, nothing promoted or broadcast silently."""

import gc
import importlib.metadata
import os
import pathlib
import tempfile

# Before any backend is made. Tests compile far more than they compute, so LLVM need not optimise, and
# programs are cached for the workers and for the processes that tests start. The emitters that jax 0.12 can
# no longer do without take half of the compile time of a mesh's program with 0.10, and cutting a program
# into parts for threads, of which the workers leave none idle, takes a tenth of the rest.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=16 --xla_backend_optimization_level=0 '
  '--xla_cpu_collective_call_terminate_timeout_seconds=300'
)
if importlib.metadata.version('jax').startswith('0.10.'):
  os.environ['XLA_FLAGS'] += (
    ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
  )
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', os.path.join(tempfile.gettempdir(), 'dsv3_jax_test_programs')
)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '1'

import jax
import pytest

# Tracing makes many small objects, nearly all of which stay.
gc.set_threshold(50_000, 20, 100)
jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')

_MAPS = pathlib.Path('/proc/self/maps')


@pytest.fixture(autouse=True, scope='module')
def few_programs_at_a_time():
  """Lets go of compiled programs before a process has too many.

  XLA:CPU maps memory for each, and where Linux has no more maps for a process, 65,530 by default, it ends
  by a segmentation fault. One file of tests was seen to take 37,000.
  """
  yield
  if _MAPS.exists() and _MAPS.read_bytes().count(b'\n') > 16_000:
    jax.clear_caches()
    gc.collect()
