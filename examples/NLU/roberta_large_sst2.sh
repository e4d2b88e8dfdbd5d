#!/usr/bin/env bash
# DyLoRA on GLUE's sst2 with RoBERTa-large, settings of microsoft/LoRA's recipe. Arguments are passed on to run_glue.py.
task=sst2 model=roberta-large
lr=4e-4 epochs=10 batch=8 global_batch=64 length=512
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
