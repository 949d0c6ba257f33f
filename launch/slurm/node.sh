#!/usr/bin/env bash
# What srun starts once on each node, for train.sbatch: the node's launcher, in the environment of the job.
set -euo pipefail
exec >>"$PROGSCALE_LOG_FOLDER/$SLURMD_NODENAME.log" 2>&1
# Modules, a virtual environment, NCCL's variables: whatever a node of this cluster needs.
if [ -n "${PROGSCALE_SETUP:-}" ]; then
  # Written for a shell that goes on after what fails, and not for this script's arguments.
  setup() {
    set +eu +o pipefail
    # shellcheck disable=SC1090
    source "$PROGSCALE_SETUP"
    set -eu -o pipefail
  }
  setup
  command -v accelerate >/dev/null || echo "progscale: no 'accelerate' on the path after PROGSCALE_SETUP=$PROGSCALE_SETUP"
elif ! command -v accelerate >/dev/null && [ -x "$PROGSCALE_HOME/.venv/bin/accelerate" ]; then
  PATH=$PROGSCALE_HOME/.venv/bin:$PATH
fi
gpus=${SLURM_GPUS_ON_NODE:-0}
if [ "$gpus" = 0 ]; then
  # Without --gpus-per-node a node's GPUs are the job's where SLURM does not deal them out.
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
  if [ "$gpus" -gt 0 ] && [ -n "${PROGSCALE_DEALS_GPUS:-}" ]; then
    echo "progscale: the job has asked for no GPUs: the $gpus of this node are left alone; give sbatch --gpus-per-node"
    gpus=0
    export CUDA_VISIBLE_DEVICES=
  fi
fi
ranks=${PROGSCALE_RANKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}
file=multi-node$([ "$gpus" -gt 0 ] || echo -cpu).yaml
options=(--config_file "$PROGSCALE_HOME/configs/accelerate/$file" --num_machines "$SLURM_JOB_NUM_NODES")
options+=(--num_processes $((ranks * SLURM_JOB_NUM_NODES)) --machine_rank "$SLURM_PROCID")
cores=$(nproc)
options+=(--num_cpu_threads_per_process $((cores > ranks ? cores / ranks : 1)))
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
  is_host=$([ "$SLURMD_NODENAME" = "$PROGSCALE_HEAD" ] && echo 1 || echo 0)
  options+=(--main_process_ip "$PROGSCALE_HEAD_ADDRESS" --main_process_port "$PROGSCALE_PORT")
  # Who keeps the store is said here: torchrun would guess it from names.
  options+=(--rdzv_backend c10d --rdzv_conf "is_host=$is_host,join_timeout=${PROGSCALE_JOIN_SECONDS:-600}")
else
  options+=(--main_process_port 0)
fi
printf 'progscale: node %s, ranks %s, GPUs %s, cores %s, restart %s\n' \
  "$SLURMD_NODENAME" "$ranks" "$gpus" "$cores" "${SLURM_RESTART_COUNT:-0}"
program=("$PROGSCALE_HOME/launch/train.py")
[ -z "${PROGSCALE_DOCTOR:-}" ] || program=(-m progscale doctor)
[ "$cores" -ge "$ranks" ] || echo "progscale: $ranks ranks share $cores cores: give sbatch --cpus-per-task"
exec "$PROGSCALE_HOME/launch/launch.sh" "${options[@]}" "${program[@]}" "$@"
