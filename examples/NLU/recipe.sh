# What the recipes share; each of them sets task, model, lr, epochs, batch (per device), global_batch and length, and
# sources this file with the user's arguments, which come last and so override everything.
#
# NPROC: number of processes (default: the visible GPUs, else one). PYTHON: the interpreter (default: the repository's
# .venv if it is there, else python).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python
  [ -x "$here/../../.venv/bin/python" ] && python="$here/../../.venv/bin/python"
fi

if [ -z "${NPROC:-}" ]; then
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    NPROC=$(printf '%s' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c '[^ -]' || true)
  else
    NPROC=$( { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
  fi
  [ "$NPROC" -ge 1 ] || NPROC=1
fi
# As many examples at once as the batch allows and the global batch divides by, unless the user says how many.
chosen() { # chosen FLAG DEFAULT: the last value that the user gave FLAG, else DEFAULT
  local value=$2 previous=
  for argument in "${arguments[@]}"; do
    [ "$previous" = "$1" ] && value=$argument
    [[ "$argument" == "$1="* ]] && value=${argument#*=}
    previous=$argument
  done
  printf '%s' "$value"
}
arguments=("$@" "")
global_batch=$(chosen --global_batch_size "$global_batch")
if [ -z "$(chosen --per_device_train_batch_size "")" ]; then
  while [ "$batch" -gt 1 ] && [ $((global_batch % (batch * NPROC))) -ne 0 ]; do batch=$((batch - 1)); done
fi

launch=("$python")
[ "$NPROC" -eq 1 ] || launch=("$python" -m transformers_dylora.launch --nproc_per_node "$NPROC")

# MRPC, RTE and STS-B start from the MNLI adapter, as in the released recipes.
start=()
if [ "${from_mnli:-no}" = yes ] && [[ " $* " != *" --lora_path"* ]]; then
  if [ ! -f ./mnli/model/adapter_config.json ]; then
    echo "$task starts from the MNLI adapter, and ./mnli/model holds none: run ${recipe_of_mnli:?} first, or add --lora_path none to start from scratch." >&2
    exit 1
  fi
  start=(--lora_path ./mnli/model)
fi

exec "${launch[@]}" "$here/examples/text-classification/run_glue.py" \
  --model_name_or_path "$model" --task_name "$task" --do_train --do_eval \
  --max_seq_length "$length" --per_device_train_batch_size "$batch" --global_batch_size "$global_batch" \
  --per_device_eval_batch_size 32 --learning_rate "$lr" --num_train_epochs "$epochs" \
  --output_dir "./$task/model" --overwrite_output_dir --logging_steps 10 \
  --eval_strategy epoch --save_strategy epoch --warmup_ratio 0.06 \
  --apply_lora --lora_r 8 --seed 0 --weight_decay 0.1 \
  ${start[@]+"${start[@]}"} "$@"
