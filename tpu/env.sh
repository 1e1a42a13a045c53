# shellcheck shell=bash
# Environment of a run on Cloud TPU, sourced by worker.sh before Python starts. Every line says why it is here; what is
# already the default is left out. Sources: OpenXLA "XLA Flags Guidance" (docs/flags_guidance.md of openxla/xla), JAX
# "Persistent compilation cache". None of it has been timed by us on a TPU: try a change on 20 steps before a long run.
# Variables that are set already win.

# Ask Cloud TPU (metadata server) or GKE (TPU_WORKER_HOSTNAMES, MEGASCALE_*) for processes and coordinator.
case " $* " in *" --processes "*) ;; *) export RLP_DISTRIBUTED="${RLP_DISTRIBUTED-auto}" ;; esac

# A restart compiles nothing anew if the programs are kept; on a shared disk a replaced host finds them, too.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR-${RLP_SHARED:-$HOME}/jax_cache}"

# Threads of tokenizers inside a process that has others already: the library warns and falls back; say so beforehand.
export TOKENIZERS_PARALLELISM="${TOKENIZERS_PARALLELISM-false}"

# The guide suggests these two against their defaults, and they fit what a step does: FSDP gathers a layer's weights over
# ICI (pipelining of all-gathers, three flags that belong together) and sums gradients (asynchronous all-reduce, v5e).
# Only on request, because a libtpu that does not know a flag refuses to start: RLP_TPU_FLAGS=overlap.
if [ "${RLP_TPU_FLAGS-}" = overlap ]; then
  LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS-} --xla_should_allow_loop_variant_parameter_in_chain=kEnabled"
  LIBTPU_INIT_ARGS="$LIBTPU_INIT_ARGS --xla_should_add_loop_invariant_op_in_chain=kEnabled"
  LIBTPU_INIT_ARGS="$LIBTPU_INIT_ARGS --xla_tpu_enable_ici_ag_pipelining=true"
  LIBTPU_INIT_ARGS="$LIBTPU_INIT_ARGS --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true"
  export LIBTPU_INIT_ARGS
fi

# Where compiling runs out of memory by a little, the guide suggests more tries of the scheduler (default 1), each with a
# smaller limit: RLP_TPU_FLAGS=memory. Costs compile time and some overlap; smaller microbatches come first.
if [ "${RLP_TPU_FLAGS-}" = memory ]; then
  export LIBTPU_INIT_ARGS="${LIBTPU_INIT_ARGS-} --xla_latency_hiding_scheduler_rerun=5"
fi
