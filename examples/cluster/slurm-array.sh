#!/bin/bash
# A build on a Slurm cluster without Ray: an array of independent tasks of one GPU each, which start as GPUs become free.
# Each makes its share of the shards, and the one that ends last seals the cache. Arguments as for `kdcache build`:
#
#   sbatch examples/cluster/slurm-array.sh --teacher /models/teacher --corpus '/data/text/*.jsonl' --out /data/caches/lm
#
# A task that failed or ran out of time: submit the whole array again. What is there is not made again, and a task
# with nothing left to do ends at once. Teacher, corpus and cache must be on file systems that all nodes share, or in
# object storage.
#SBATCH --job-name=kdcache
#SBATCH --array=1-32
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus=1
#SBATCH --requeue
#SBATCH --time=24:00:00
# Two minutes before the time limit: kdcache commits what it has and says how to resume.
#SBATCH --signal=TERM@120
set -euo pipefail

exec kdcache build --workers 0 --part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" "$@"
