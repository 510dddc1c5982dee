#!/bin/bash
# A build on a Slurm cluster: one Ray over all nodes of the job, which ends with it. Arguments as for `kdcache build`:
#
#   sbatch examples/cluster/slurm.sh --teacher /models/teacher --corpus '/data/text/*.jsonl' --out /data/caches/lm
#
# Preempted, out of time or cancelled: submit the same line again, and it resumes. `--requeue` lets Slurm do that after a
# preemption. Home, teacher, corpus and cache must be on file systems that all nodes share, or in object storage.
#SBATCH --job-name=kdcache
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --time=24:00:00
# Two minutes before the time limit: kdcache commits what it has and says how to resume.
#SBATCH --signal=TERM@120
set -euo pipefail

# Other users' jobs can reach the ports of these nodes; the token protects this Ray.
export RAY_AUTH_MODE=token
# Makes ~/.ray/auth_token unless it exists; an existing one may be readable by others.
(umask 077 && ray get-auth-token --generate > /dev/null)
[[ ! -e ~/.ray/auth_token ]] || chmod 600 ~/.ray/auth_token

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))       # another job may have its head on the same node

# Every node starts its Ray; the first one also runs the command, and all stop when it ends.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" --dashboard-host=127.0.0.1 -- \
    kdcache build --address auto "$@"
