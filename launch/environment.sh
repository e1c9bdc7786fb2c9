# shellcheck shell=bash
# Flags of XLA, libtpu and NCCL for every launcher, a reason beside each. Sourced, with PLATFORM=gpu|tpu|tpu7x.
#
# Defaults are left alone: on GPU all collectives are asynchronous, on TPU permutes are, and both schedule
# for latency. What is not here was not shown to help the programs of this repository.

case "${PLATFORM:?gpu, tpu or tpu7x}" in
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
  tpu7x)
    # A gather of rows, as experts' exchanges have many, is a program for SparseCore here. The libtpu of jax 0.10
    # ends itself on such a one at V3's sizes: "Not enough space for TILESPMEM spill".
    sparse=--xla_tpu_offload_gather_to_sparsecore=false
    # So is each collective and much else, a second of compiling each: hundreds in a train step. Large weights go
    # by permutes instead (mesh.zero_permutes).
    for part in all_gather 2d_all_gather 3d_all_gather all_reduce reduce_scatter nd_reduce_scatter; do
      sparse="$sparse --xla_tpu_enable_sparse_core_collective_offload_$part=false"
    done
    for part in scatter gather sort reduce copy reshape; do
      sparse="$sparse --xla_tpu_enable_offloading_${part}_to_sparsecore=false"
    done
    # Loops keep BF16 in tiles of 16 x 128, arguments of a program in 8 x 128: every step of decoding copied its
    # weights first, 46 GB of temporaries for V3. Tiles of 8 x 128 everywhere.
    tiles=--xla_tpu_control_large_2nd_minor_layout_for_x16=false
    export LIBTPU_INIT_ARGS="$sparse $tiles ${LIBTPU_INIT_ARGS:-}"
    ;;
  *)
    echo "environment.sh: PLATFORM=$PLATFORM: must be gpu, tpu or tpu7x" >&2
    exit 2
    ;;
esac
# Compiled programs are kept beside the run, so that a restart after a lost host starts in seconds.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-${WORKDIR:-/tmp}/programs}"
