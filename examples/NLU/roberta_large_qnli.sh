#!/usr/bin/env bash
# DyLoRA on GLUE's qnli with RoBERTa-large, settings of microsoft/LoRA's recipe. Arguments are passed on to run_glue.py.
task=qnli model=roberta-large
lr=2e-4 epochs=10 batch=4 global_batch=32 length=512
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
