#!/usr/bin/env bash
# The whole path on the built-in bilingual world, then a look at what it made.
# Usage: quickstart.sh [OUTPUT_FOLDER]
set -euo pipefail
output=${1:-runs/quickstart}

megatron-cpt run quickstart --set "output=$output"
megatron-cpt tokenizer verify "$output/tokenizer" --text "$output/text/ja.held_out.jsonl"
megatron-cpt surgery show "$output/surgery/plan"
megatron-cpt data inspect "$output/shards/ja.train" --document 0
megatron-cpt checkpoint show "$output/hf"
megatron-cpt evaluate "$output/hf" --text "ja=$output/text/ja.held_out.jsonl" --text "en=$output/text/en.held_out.jsonl"
