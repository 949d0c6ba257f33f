#!/usr/bin/env bash
# accelerate launch, with the launcher passing on the signals by which clusters announce the end, and waiting for the save:
#   launch/launch.sh --config_file configs/accelerate/multi-gpu.yaml launch/train.py --config configs/zero2.json --resume auto
set -euo pipefail
# By default SIGUSR1 kills the launcher and leaves its workers behind.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
# By default workers are killed 30 s after the signal; a large checkpoint on a slow disk takes longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
# On several machines torchrun guesses from names which of them keeps the store, and tells the others the name that this one
# gives itself; where names cannot be looked up both go wrong. Addresses are told instead (progscale/launcher.py): the one from
# which the head is reached, which on the head itself is the head's.
find_address='import sys
from progscale.launcher import towards_head
own, is_host = towards_head(sys.argv[1])
print(own, int(is_host))'
home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) # a checkout works without being installed too
told=()
previous=
for argument in "$@"; do
  if [ "$previous" = --main_process_ip ]; then
    if ! found=$(PYTHONPATH="$home${PYTHONPATH:+:$PYTHONPATH}" python -c "$find_address" "$argument" 2>/dev/null); then
      echo "launch.sh: --main_process_ip: '$argument' cannot be looked up or reached from $(hostname), or is its loopback: give an address" >&2
      exit 2
    fi
    read -r own is_host <<<"$found"
    export PET_LOCAL_ADDR="${PET_LOCAL_ADDR:-$own}"
    told=(--rdzv_conf "is_host=$is_host")
  fi
  previous=$argument
done
exec accelerate launch "${told[@]}" "$@"
