#!/usr/bin/env bash
# A language model's soft targets on a corpus, and a small student trained from them.
#
#   TRAIN='text/*.jsonl' HELD_OUT=held-out.jsonl examples/language_model.sh
#
# MODEL         the teacher: a folder or a hub id
# STUDENT       a folder, a hub id, or a config.json for random weights
# CODEC         dense, topk:K or sample:N
# TEMPERATURES  what students may train at; TEMPERATURE is the one used here
# OUT           where everything goes
set -euo pipefail
TRAIN="${TRAIN:-text/*.jsonl}"
HELD_OUT="${HELD_OUT:-held-out.jsonl}"
MODEL="${MODEL:-HuggingFaceTB/SmolLM2-135M}"
STUDENT="${STUDENT:-$(dirname "$0")/config/student-llama.json}"
CODEC="${CODEC:-topk:64}"
TEMPERATURES="${TEMPERATURES:-1,2}"
TEMPERATURE="${TEMPERATURE:-1}"
MAX_LENGTH="${MAX_LENGTH:-1024}"
WORKERS="${WORKERS:-auto}"
OUT="${OUT:-runs/language-model}"

[ -f "$HELD_OUT" ] || { echo "$HELD_OUT is missing: set TRAIN and HELD_OUT." >&2; exit 2; }

cache() {  # cache NAME CORPUS
  kdcache build --teacher "$MODEL" --corpus "$2" --out "$OUT/cache-$1" --codec "$CODEC" \
    --temperatures "$TEMPERATURES" --max-length "$MAX_LENGTH" --workers "$WORKERS"
}
cache train "$TRAIN"
cache held-out "$HELD_OUT"
kdcache inspect "$OUT/cache-train" --row 0

student() {  # student NAME OPTIONS...
  kdcache train --cache "$OUT/cache-train" --eval-cache "$OUT/cache-held-out" --student "$STUDENT" \
    --batch-size 16 --out "$OUT/$1" "${@:2}"
}
student hard --alpha 1
student distilled --alpha 0.1 --temperature "$TEMPERATURE"

kdcache evaluate --student "$OUT/hard" --student "$OUT/distilled" --cache "$OUT/cache-held-out"
