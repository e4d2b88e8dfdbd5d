#!/usr/bin/env bash
# DyLoRA on GLUE's stsb with RoBERTa-large, settings of microsoft/LoRA's recipe. Arguments are passed on to run_glue.py.
task=stsb model=roberta-large
lr=3e-4 epochs=10 batch=4 global_batch=32 length=128
from_mnli=yes recipe_of_mnli="bash roberta_large_mnli.sh"
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
