"""One set-up for all tests: CPU, eight emulated devices, nothing promoted or broadcast silently."""

import os
import tempfile

# Before any backend is made. Tests compile far more than they compute, so LLVM need not optimise, and
# programs are cached for the workers and for the processes that tests start.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = (
  '--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 '
  '--xla_cpu_collective_call_terminate_timeout_seconds=300'
)
os.environ.setdefault(
  'JAX_COMPILATION_CACHE_DIR', os.path.join(tempfile.gettempdir(), 'dsv3_jax_test_programs')
)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '1'

import jax

jax.config.update('jax_numpy_dtype_promotion', 'strict')
jax.config.update('jax_numpy_rank_promotion', 'raise')
