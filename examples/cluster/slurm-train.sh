#!/bin/bash
# A training on a Slurm cluster without Ray: one process for each GPU. Arguments as for `kdcache train`:
#
#   sbatch examples/cluster/slurm-train.sh --cache /data/caches/lm --student student.json --streams 32 --out /data/runs/lm
#
# Preempted, out of time or cancelled: submit the same line again, with more nodes or fewer (`--nodes`, `--ntasks`), and it
# continues from the last checkpoint. The run's folder must be on a file system that all nodes share.
#SBATCH --job-name=kdcache-train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --time=24:00:00
# Two minutes before the time limit: kdcache ends and says how to continue.
#SBATCH --signal=TERM@120
set -euo pipefail

# --kill-on-bad-exit: the others do not wait for a process that is lost.
exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" kdcache train "$@"
