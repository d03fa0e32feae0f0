#!/usr/bin/env bash
# The path of `megatron-cpt run`, one verb at a time, on a base model and text of your own.
# Usage: by_hand.sh BASE_MODEL SOURCE_TEXT TARGET_TEXT OUTPUT_FOLDER [TRAIN_STEPS]
#   BASE_MODEL: a Llama in a Hugging Face folder with its tokenizer.model
#   *_TEXT:     jsonl (plain, gz or zst), txt or parquet; here English and Japanese
set -euo pipefail
base=$1 source=$2 target=$3 out=$4 steps=${5:-100}
mkdir -p "$out"

# 1. Extend the tokenizer; prove that its two files agree and look at what it gains.
megatron-cpt tokenizer extend "$base" --corpus "$target" --num-pieces 2048 --script ja --divisor 8 --output "$out/tokenizer"
megatron-cpt tokenizer verify "$out/tokenizer" --text "$source" --text "$target"
megatron-cpt tokenizer report "$out/tokenizer" --base "$base" --text "en=$source" --text "ja=$target"

# 2. Write both languages as indexed datasets, a tenth of the works held out.
for pair in "en=$source" "ja=$target"; do
  language=${pair%%=*} text=${pair#*=}
  build=(megatron-cpt data build "$text" --tokenizer "$out/tokenizer" --language "$language" --held-out 0.1)
  "${build[@]}" --output "$out/$language"
  "${build[@]}" --output "$out/$language.held_out" --only-held-out
done

# 3. Give the model rows for the new pieces, tell them what text says of these, and prove that nothing else moved.
megatron-cpt surgery plan --old-tokenizer "$base" --new-tokenizer "$out/tokenizer" --method mean --output "$out/mean"
megatron-cpt surgery calibrate "$out/mean" "$base" --source "$out/en" --target "$out/ja" --output "$out/plan"
megatron-cpt surgery apply "$out/plan" "$base" "$out/model"
megatron-cpt surgery certify "$out/plan" "$base" "$out/model" --text "en=$source" --text "ja=$target" --source en

# 4. Continue pre-training; the job is train_job.yaml with the paths filled in.
megatron-cpt train "$(dirname "$0")/train_job.yaml" --nproc 2 \
  --set "output=$out/train" --set "tokenizer=$out/tokenizer" --set "initial_checkpoint=$out/model" \
  --set "train_steps=$steps" --set optimizer.warmup_steps=0 \
  --set "data.train.0.prefix=$out/ja" --set "data.train.1.prefix=$out/en" \
  --set "data.validation.0.prefix=$out/ja.held_out" --set "data.validation.1.prefix=$out/en.held_out" \
  --set precision=fp32 --set batch.seq_length=128 --set batch.micro_batch_size=4 --set batch.global_batch_size=8 \
  --set parallel.tensor_model_parallel_size=2 --set parallel.sequence_parallel=false \
  --set parallel.overlap_grad_reduce=false --set parallel.overlap_param_gather=false

# 5. Back to Hugging Face, proven equal.
checkpoint=$(ls -d "$out"/train/checkpoints/iter_* | tail -n 1)
megatron-cpt checkpoint convert "$checkpoint" "$out/hf" --to hf --tokenizer "$out/tokenizer"
megatron-cpt checkpoint verify "$checkpoint" "$out/hf"
# These numbers include the text that was trained on; those of held-out text alone are the job's own validation,
# at the end of $out/train/metrics.jsonl.
megatron-cpt evaluate "$out/hf" --text "ja=$target" --text "en=$source" --seq-length 128
