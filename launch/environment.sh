# shellcheck shell=bash
# Flags of XLA, libtpu and NCCL for every launcher, a reason beside each. Sourced, with PLATFORM=gpu|tpu.
#
# Defaults are left alone: on GPU all collectives are asynchronous, on TPU permutes are, and both schedule
# for latency. What is not here was not shown to help the programs of this repository.

case "${PLATFORM:?gpu or tpu}" in
  gpu)
    # Several permutes of an exchange may be on their way at once; one is the default, and leaves most of
    # them with nothing beside them (tests/parallel/test_pods_overlap.py).
    xla=--xla_gpu_experimental_parallel_collective_overlap_limit=8
    # The rows of an exchange are merged into one permute only up to this size: larger ones gain nothing.
    # Nothing is set for pipelined sends or the cycle decomposer: with several cycles in one permute, as on
    # the mesh's `node` axis, the decomposer has been wrong (openxla/xla issue 45222).
    export XLA_FLAGS="$xla ${XLA_FLAGS:-}"
    # A lost peer must end the others: NCCL reports it, and does not wait for it.
    export NCCL_ASYNC_ERROR_HANDLING=1
    # Rings through the NICs on the same PCIe switch; other paths cross the CPU.
    export NCCL_NET_GDR_LEVEL=PIX
    # Warnings alone: INFO writes pages for each communicator of 2,048 processes.
    export NCCL_DEBUG=WARN
    # JAX would take three quarters; state and temporaries of the large configs are proven to fit in nine
    # tenths (launch/aot.py).
    export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92
    ;;
  tpu)
    # Nothing is set to fuse gathers with compute (xla_tpu_enable_async_collective_fusion): newer libtpu refuses it
    # on all but v5e, for wrong results that it may give. With mesh.zero_permutes the program itself gathers
    # large weights by permutes, which start and end apart on every TPU.
    ;;
  *)
    echo "environment.sh: PLATFORM=$PLATFORM: must be gpu or tpu" >&2
    exit 2
    ;;
esac
# Compiled programs are kept beside the run, so that a restart after a lost host starts in seconds.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${WORKDIR:-/tmp}/programs}"
