#!/usr/bin/env bash
# DyLoRA on GLUE's mrpc with RoBERTa-base, settings of the released DyLoRA recipe. Arguments are passed on to run_glue.py.
task=mrpc model=roberta-base
lr=4e-4 epochs=30 batch=16 global_batch=128 length=512
from_mnli=yes recipe_of_mnli="bash roberta_base_mnli.sh"
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
