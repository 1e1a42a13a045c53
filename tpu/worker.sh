#!/usr/bin/env bash
# What every host of a run executes: `tpu/worker.sh EXPERIMENT --run-dir DIR [arguments of rlp train]`.
#
# Starts `rlp train` again as long as starting again can help: it then resumes from the last checkpoint.
#   0                     finished
#   2, 3                  bad input, diverged: the same would happen again
#   75, 134, 137, 139     a process of the run was lost, aborted, killed, crashed: again
#   130, 143              stopped and saved: again, unless this script itself was told to stop (another host was)
#   1                     any other failure (a TPU runtime error, for instance): again
# It gives up after RLP_RESTARTS ends in a row (default 10) within ten minutes of their start; 0: it never starts again.
# RLP_RESTART_DELAY (10) seconds lie between.
#
# --dry-run prints the command and the environment instead.
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

dry=no
if [ "${1-}" = --dry-run ]; then
  dry=yes
  shift
fi
if [ $# -eq 0 ]; then
  echo "usage: worker.sh [--dry-run] EXPERIMENT --run-dir DIR [arguments of rlp train]" >&2
  exit 2
fi
# shellcheck source=tpu/env.sh
. "$here/env.sh" "$@"

if [ "$dry" = yes ]; then
  for name in RLP_DISTRIBUTED JAX_COMPILATION_CACHE_DIR TOKENIZERS_PARALLELISM LIBTPU_INIT_ARGS; do
    [ -n "${!name-}" ] && echo "$name=${!name}"
  done
  printf '%s ' "${PYTHON:-python3}" -m rlp_jax train "$@"
  echo
  exit 0
fi

say() { echo "worker.sh: $(date -u +%FT%TZ) $(hostname): $*" >&2; }

told='' child=''
forward() {
  told=yes
  [ -n "$child" ] && kill -s TERM "$child" 2>/dev/null
}
trap forward TERM INT

quick=0
while :; do
  began=$SECONDS
  "${PYTHON:-python3}" -m rlp_jax train "$@" &
  child=$!
  wait "$child"
  code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the child
    wait "$child"
    code=$?
  done
  child=''
  case $code in
    0 | 2 | 3) exit "$code" ;;
  esac
  if [ -n "$told" ]; then
    say "told to stop, rlp train ended with $code"
    exit "$code"
  fi
  if [ $((SECONDS - began)) -lt 600 ]; then quick=$((quick + 1)); else quick=0; fi
  if [ "$quick" -ge "${RLP_RESTARTS:-10}" ]; then
    say "rlp train ended with $code ($quick times in a row within ten minutes): giving up"
    exit "$code"
  fi
  say "rlp train ended with $code: starting it again in ${RLP_RESTART_DELAY:-10} seconds"
  sleep "${RLP_RESTART_DELAY:-10}" &
  wait $! # so that a signal is heard at once
  [ -n "$told" ] && exit "$code"
done
