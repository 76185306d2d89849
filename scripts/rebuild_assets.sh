#!/usr/bin/env bash
# Rebuild the bundled model, its annotator, and the demo that `invdiff ui` opens. About 75 minutes on two CPU cores, a few minutes on a GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
work=${1:-out/assets}
invdiff birds "$work/biased" --num-images 12000 --severity 0.95 --seed 0
invdiff finetune "$work/biased" --output "$work/model" --config scripts/birds-finetune.yaml
invdiff birds "$work/balanced" --num-images 4000 --severity 0.5 --seed 77
invdiff annotator train "$work/balanced" --output "$work/annotator" --attribute subject --attribute background
rm -rf src/invdiff/assets/birds src/invdiff/assets/birds-annotator
cp -r "$work/model" src/invdiff/assets/birds
cp -r "$work/annotator" src/invdiff/assets/birds-annotator
invdiff demo --output "$work/demo"
rm -rf src/invdiff/assets/birds-demo
mkdir -p src/invdiff/assets/birds-demo/audit src/invdiff/assets/birds-demo/module
cp "$work/demo/results.json" src/invdiff/assets/birds-demo
cp "$work"/demo/audit/audit.{json,safetensors} src/invdiff/assets/birds-demo/audit
cp "$work"/demo/module/{config.json,diffusion_pytorch_model.safetensors,README.md,train.json} src/invdiff/assets/birds-demo/module
du -ch src/invdiff/assets/*/*/*.safetensors src/invdiff/assets/*/*.safetensors | tail -1
