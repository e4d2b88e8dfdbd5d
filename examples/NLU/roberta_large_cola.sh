#!/usr/bin/env bash
# DyLoRA on GLUE's cola with RoBERTa-large, settings of microsoft/LoRA's recipe. Arguments are passed on to run_glue.py.
task=cola model=roberta-large
lr=3e-4 epochs=20 batch=4 global_batch=32 length=128
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
