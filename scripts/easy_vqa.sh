#!/bin/bash
# Does the guidance help, and is it the guidance? The mini student fine-tuned on easy-VQA without (lambda = 0), with
# (lambda = 10) and with shuffled targets, equal steps, three seeds, measured on the official test split.
#
#     scripts/easy_vqa.sh EASY_VQA_DIR OUT_DIR [STEPS] [TEST_QUESTIONS]
#
# EASY_VQA_DIR is the published folder (train/, test/); everything made goes to OUT_DIR. What is there already is kept, so
# a stopped script goes on where it was. `$LAVENDER` is the program, by default the one of this build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
set=$1 out=$2 steps=${3:-600} questions=${4:-1500}
lavender=${LAVENDER:-target/release/lavender-wgpu}
words=circle,triangle,red,green,blue,yellow  # what the mini teacher knows

[ -e "$out/train.json" ] || python3 scripts/easy_vqa.py "$set" "$out" --words "$words"
$lavender data check --data "$out/train.json" --images "$set" --model models/mini/student
$lavender targets --diffusion models/mini/teacher --data "$out/train-captions.json" --images "$set" --steps 4 \
    --out "$out/targets"

run() { # LABEL SEED KEY=VALUE...
    local dir="$out/runs/$1-$2" label=$1 seed=$2
    shift 2
    if [ ! -e "$out/eval/$label-$seed/figures.json" ]; then
        [ -e "$dir/lora/adapter_model.safetensors" ] || { rm -rf "$dir"; $lavender --quiet train models/mini/train.toml \
            --set model.path=models/mini/student --set data.path="$out/train.json" --set data.images="$set" \
            --set data.targets="$out/targets" --set train.steps="$steps" \
            --set optimizer.schedule=cosine --set optimizer.warmup_steps=20 \
            --set train.seed="$seed" --set run.dir="$dir" "$@"; }
        $lavender --quiet eval --model models/mini/student --lora "$dir" --data "$out/test.json" --images "$set" \
            --limit "$questions" --max-tokens 4 --label "$label" --out "$out/eval/$label-$seed"
    fi
}
for seed in 0 1 2; do
    run autor "$seed" --set loss.lambda=0
    run lavender "$seed" --set loss.lambda=10
    run shuffled "$seed" --set loss.lambda=10 --set control.targets=shuffled
done
$lavender eval compare "$out"/eval/* --baseline autor
