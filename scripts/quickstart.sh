#!/usr/bin/env bash
# The MNLI recipe on what pip can install: MiniLM as the encoder, a made-up MNLI-format set as the data. Everything goes
# to ./quickstart. Arguments are passed on to run_glue.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh nlu
mkdir -p quickstart && cd quickstart

[ -f encoder/tokenizer_config.json ] || "$python" -m transformers_dylora.minilm encoder
[ -f data/mnli/test_mismatched.jsonl ] || "$python" -m transformers_dylora.toy_mnli data/mnli

PYTHON=$python bash ../examples/NLU/roberta_base_mnli.sh --model_name_or_path encoder --dataset_dir data \
  --max_seq_length 64 --global_batch_size 32 --per_device_eval_batch_size 64 --group_by_length false \
  --learning_rate 2e-3 --num_train_epochs 5 --eval_strategy no --logging_steps 50 --do_predict "$@"

cat <<'NEXT'

Done: quickstart/mnli/model holds the adapter, the table (rank_results.md) and the curve (rank_curve.png). Next:

  source .venv/bin/activate && cd quickstart
  dylora select mnli/model                                  # the smallest rank that is as good as the best
  dylora export mnli/model --rank auto --to adapter         # a PEFT adapter at that rank, with a model card
  bash ../examples/NLU/roberta_base_mnli.sh --output_dir roberta/model    # the real recipe, with model and data from the hub
NEXT
