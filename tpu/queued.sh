#!/usr/bin/env bash
# A run on TPU VMs, by queued resources: `tpu/queued.sh COMMAND [arguments]`; README.md has the order of things.
#
#   create                    ask for the TPUs
#   status                    state of the request
#   setup                     copy this checkout to every host, install it, mount the bucket on /gcs
#   start EXPERIMENT ...      tpu/worker.sh on every host, in the background; arguments of rlp train
#   log                       the log of process 0's host, as it grows
#   stop                      SIGTERM to every host: saves and ends
#   keep EXPERIMENT ...       create, setup, start, and all of it again whenever the TPUs are taken away (spot)
#   delete                    give the TPUs back
#
# From the environment:
#   NAME, ZONE, PROJECT, BUCKET    of the run, where, whose, and the bucket that all hosts share (without gs://)
#   ACCELERATOR (v5litepod-16)     what `gcloud compute tpus accelerator-types list` calls it
#   VERSION (v2-alpha-tpuv5-lite)  the VM's software; v2-alpha-tpuv6e for v6e, v2-alpha-tpuv5 for v5p
#   SLICES (1)                     more than one: a multislice run
#   SPOT (no)                      yes: cheaper, may be taken away at any time
#
# --dry-run before COMMAND prints the commands instead of running them.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

dry=no
if [ "${1-}" = --dry-run ]; then
  dry=yes
  shift
fi
command=${1-}
[ $# -gt 0 ] && shift

: "${ACCELERATOR:=v5litepod-16}" "${VERSION:=v2-alpha-tpuv5-lite}" "${SLICES:=1}" "${SPOT:=no}"
for name in NAME ZONE PROJECT BUCKET; do
  if [ -z "${!name-}" ]; then
    echo "queued.sh: $name is not set; see the head of this file" >&2
    exit 2
  fi
done
where=(--zone "$ZONE" --project "$PROJECT")

run() {
  if [ "$dry" = yes ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# shellcheck disable=SC2153 # NAME comes from the environment
# On every host of every slice, or with "0 0" on the first alone.
on_hosts() {
  run gcloud compute tpus queued-resources ssh "$NAME" "${where[@]}" --node "$1" --worker "$2" --command "$3"
}

create() {
  local request=(--accelerator-type "$ACCELERATOR" --runtime-version "$VERSION")
  if [ "$SLICES" -gt 1 ]; then
    request+=(--node-count "$SLICES" --node-prefix "$NAME")
  else
    request+=(--node-id "$NAME")
  fi
  [ "$SPOT" = yes ] && request+=(--spot)
  run gcloud compute tpus queued-resources create "$NAME" "${where[@]}" "${request[@]}"
}

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format 'value(state.state)' 2>/dev/null || echo NONE
}

setup() {
  local archive
  archive=$(mktemp --suffix .tar.gz)
  run git -C "$here/.." archive --format tar.gz --output "$archive" HEAD
  run gcloud storage cp "$archive" "gs://$BUCKET/rlp_jax.tar.gz" --project "$PROJECT"
  rm -f "$archive"
  # Without the metadata cache a host sees at once what another one wrote; see README.md for the kind of bucket.
  on_hosts all all "set -e
mkdir -p ~/rlp && gcloud storage cp gs://$BUCKET/rlp_jax.tar.gz /tmp/ && tar xzf /tmp/rlp_jax.tar.gz -C ~/rlp
cd ~/rlp && python3 -m venv ~/venv && ~/venv/bin/pip install --quiet '.[tpu]'
sudo mkdir -p /gcs && sudo chown \"\$USER\" /gcs
mountpoint -q /gcs || gcsfuse --implicit-dirs --metadata-cache-ttl-secs 0 $BUCKET /gcs"
}
start() {
  if [ $# -eq 0 ]; then
    echo "queued.sh: start needs an experiment and its arguments" >&2
    exit 2
  fi
  local quoted
  printf -v quoted '%q ' "$@"
  # flock: a second start does nothing while the first one runs. setsid: it outlives the connection.
  on_hosts all all "cd ~/rlp && RLP_SHARED=/gcs PYTHON=\$HOME/venv/bin/python setsid --fork \
flock --nonblock /tmp/rlp.lock tpu/worker.sh $quoted> ~/rlp.log 2>&1 < /dev/null"
}

log() { on_hosts 0 0 "tail -n 100 -F ~/rlp.log"; }
stop() { on_hosts all all "pkill --signal TERM --full '^[^ ]*bash tpu/worker.sh' || true"; }
delete() { run gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet; }

keep() {
  if [ "$dry" = yes ]; then
    create && setup && start "$@"
    return
  fi
  local ready=no now
  while :; do
    now=$(state)
    echo "queued.sh: $(date -u +%FT%TZ) $NAME is $now"
    case $now in
      NONE)
        ready=no
        create || true
        ;;
      SUSPENDED | FAILED) # taken away: a queued resource is not given TPUs twice
        ready=no
        delete || true
        ;;
      ACTIVE)
        if [ "$ready" = no ] && setup && start "$@"; then ready=yes; fi
        ;;
    esac
    sleep "${POLL:-60}"
  done
}

case $command in
  create | setup | stop | log | delete) "$command" ;;
  start | keep) "$command" "$@" ;;
  status) run gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" ;;
  *)
    echo "usage: queued.sh [--dry-run] create|status|setup|start|log|stop|keep|delete" >&2
    exit 2
    ;;
esac
