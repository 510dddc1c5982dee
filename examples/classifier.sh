#!/usr/bin/env bash
# A BERT classifier and the small biLSTM that learns from it (Tang et al. 2019).
#
#   DATA=folder examples/classifier.sh       with train.tsv, dev.tsv and test.tsv: columns text and label, a header line
#
# MODEL   the encoder to fine-tune as the teacher: a folder or a hub id
# OUT     where everything goes
# EPOCHS  of every student
set -euo pipefail
DATA="${DATA:-data}"
MODEL="${MODEL:-google-bert/bert-base-uncased}"
OUT="${OUT:-runs/classifier}"
EPOCHS="${EPOCHS:-10}"

for part in train dev test; do
  [ -f "$DATA/$part.tsv" ] || { echo "$DATA/$part.tsv is missing: set DATA=folder." >&2; exit 2; }
done

kdcache finetune --model "$MODEL" --corpus "$DATA/train.tsv" --eval-corpus "$DATA/dev.tsv" --out "$OUT/teacher"

for part in train dev; do
  kdcache build --teacher "$OUT/teacher" --task sequence-classification --workers 0 \
    --corpus "$DATA/$part.tsv" --out "$OUT/cache-$part"
done

student() {  # student NAME OPTIONS...
  kdcache train --cache "$OUT/cache-train" --eval-cache "$OUT/cache-dev" --student bilstm \
    --epochs "$EPOCHS" --batch-size 64 --best accuracy --out "$OUT/$1" "${@:2}"
}
student hard --alpha 1
student kl --alpha 0.5 --temperature 2
student mse --alpha 0 --divergence mse

kdcache evaluate --student "$OUT/hard" --student "$OUT/kl" --student "$OUT/mse" \
  --teacher "$OUT/teacher" --corpus "$DATA/test.tsv"
kdcache predict --student "$OUT/mse" --corpus "$DATA/test.tsv" --out "$OUT/predictions.jsonl"
