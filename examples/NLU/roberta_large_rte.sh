#!/usr/bin/env bash
# DyLoRA on GLUE's rte with RoBERTa-large, settings of microsoft/LoRA's recipe. Arguments are passed on to run_glue.py.
task=rte model=roberta-large
lr=4e-4 epochs=20 batch=8 global_batch=64 length=512
from_mnli=yes recipe_of_mnli="bash roberta_large_mnli.sh"
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
