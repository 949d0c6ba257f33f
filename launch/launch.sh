#!/usr/bin/env bash
# accelerate launch, with the launcher passing on the signals by which clusters announce the end, and waiting for the save:
#   launch/launch.sh --config_file configs/accelerate/multi-gpu.yaml launch/train.py --config configs/zero2.json --resume auto
set -euo pipefail
# By default SIGUSR1 kills the launcher and leaves its workers behind.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
# By default workers are killed 30 s after the signal; a large checkpoint on a slow disk takes longer.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
exec accelerate launch "$@"
