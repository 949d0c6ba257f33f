#!/usr/bin/env bash
# accelerate launch, with the launcher passing on the signals by which clusters announce the end, and waiting for the save:
#   launch/launch.sh --config_file configs/accelerate/multi-gpu.yaml launch/train.py --config configs/zero2.json --resume auto
set -euo pipefail
# By default SIGUSR1 kills the launcher and leaves its workers behind.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
# By default workers are killed 30 s after the signal; a large checkpoint on a slow disk takes longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
# On several machines torchrun guesses from names which of them keeps the store, and tells the others the name that this one
# gives itself; where names cannot be looked up both go wrong. Addresses are told instead: the one from which the head is
# reached, which on the head itself is the head's. There its name may stand for its loopback (Debian: 127.0.1.1), where nobody
# else finds it: then it is the one on the way to another machine.
find_address='import ipaddress, socket, sys
def reach(host):
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return probe.getsockname()[0], address[0]
head, peer = sys.argv[1:]
own, there = reach(head)
is_host = own == there
if ipaddress.ip_address(there).is_loopback and head not in (there, "localhost"):
    own, is_host = reach(peer or "192.0.2.1")[0], True
print(own, int(is_host))'
told=()
previous=
for argument in "$@"; do
  if [ "$previous" = --main_process_ip ]; then
    if ! found=$(python -c "$find_address" "$argument" "${PROGSCALE_PEER_ADDRESS:-}" 2>/dev/null); then
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
