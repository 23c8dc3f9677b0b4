#!/usr/bin/env bash
# A task of MAL on a Slurm cluster: Ray is started on the nodes of the allocation, the task runs, and Ray goes with it.
#
#   sbatch cluster/slurm.sh inference -e spec.yaml
#
# Killed or timed out, the same line submitted again goes on where it was. Lines to change are marked CHANGE.
#SBATCH --job-name=mal
#SBATCH --nodes=2                # CHANGE
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16       # CHANGE
#SBATCH --gpus-per-task=4        # CHANGE: leave out on a CPU partition
#SBATCH --time=24:00:00          # CHANGE
#SBATCH --output=mal-%j.log
set -euo pipefail

VENV="${MAL_VENV:-$SLURM_SUBMIT_DIR/.venv}" # CHANGE: where `make setup` has been run, on a file system of all nodes
export PATH="$VENV/bin:$PATH"
export OMP_WAIT_POLICY=passive

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${nodes[0]}"
address="$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')"
port=$((20000 + SLURM_JOB_ID % 10000))

# A token of this job alone, so that nobody else on these machines can use its Ray.
token="$(mktemp "$SLURM_SUBMIT_DIR/.ray-token-$SLURM_JOB_ID.XXXXXX")"
trap 'rm -f "$token"' EXIT
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$token"

# shellcheck disable=SC2153  # Slurm sets both, SLURM_CPUS_PER_TASK and SLURM_GPUS_PER_TASK
resources=(--num-cpus="$SLURM_CPUS_PER_TASK")
if [[ -n "${SLURM_GPUS_PER_TASK:-}" ]]; then
  resources+=(--num-gpus="$SLURM_GPUS_PER_TASK")
fi

srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$address" --port="$port" --disable-usage-stats --block "${resources[@]}" &
for ((tries = 0; tries < 60; tries++)); do
  if ray health-check --address="$address:$port" > /dev/null 2>&1; then
    break
  fi
  sleep 2
done

if ((${#nodes[@]} > 1)); then
  workers="$(IFS=,; echo "${nodes[*]:1}")"
  srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --nodelist="$workers" \
    ray start --address="$address:$port" --block "${resources[@]}" &
fi

RAY_ADDRESS="$address:$port" mal "$@" num_nodes="$SLURM_JOB_NUM_NODES"
