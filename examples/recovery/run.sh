#!/usr/bin/env bash
# Train 4-bit and pruned students of one teacher back towards it, from caches.
#
#   bash examples/recovery/run.sh TEACHER TRAIN.jsonl HELD_OUT.jsonl OUT [KIND...]
#
# TEACHER is the folder of a causal language model, the texts are JSON lines with `text`, KIND is
# int4, nvfp4 or pruned (default: all). Needs `pip install kdcache torchao`. The same command
# goes on where it was stopped. README.md says what came out.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
teacher=$(realpath "$1") train=$(realpath "$2") held_out=$(realpath "$3")
mkdir -p "$4"
out=$(realpath "$4")
shift 4
[ $# -gt 0 ] || set -- int4 nvfp4 pruned
export RECOVERY_TEACHER=$teacher
cd "$(dirname "$0")"  # where students.py is

# The teacher, once: what students learn from, and what they are measured by.
kdcache build --teacher "$teacher" --corpus "$train" --codec "${CODEC:-anchored:10}" \
    --max-length 256 --workers 0 --out "$out/cache"
kdcache build --teacher "$teacher" --corpus "$held_out" --codec hidden:float16 \
    --max-length 256 --workers 0 --out "$out/held-out"

for kind in "$@"; do
    student=students:$kind rate=${RATE:-1e-4}
    if [ "$kind" = pruned ]; then
        [ -d "$out/pruned" ] || python students.py prune "$teacher" "$train" "$out/pruned"
        student=$out/pruned
    fi
    # Soft targets alone: the cross-entropy would train it on the text instead.
    kdcache train --cache "$out/cache" --student "$student" --alpha 0 --learning-rate "$rate" \
        --batch-size 4 --epochs "${EPOCHS:-1}" --out "$out/runs/$kind"
    kdcache evaluate --student "$out/runs/$kind" --cache "$out/held-out" --trust-remote-code \
        --json > "$out/runs/$kind.json"
    if [ "$kind" != pruned ]; then # the quantiser's own weights, of what was trained
        python students.py convert "$kind" "$out/runs/$kind" "$out/$kind"
    fi
done
