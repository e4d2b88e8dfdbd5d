#!/usr/bin/env bash
# DyLoRA on GLUE's cola with RoBERTa-base, settings of the released DyLoRA recipe. Arguments are passed on to run_glue.py.
task=cola model=roberta-base
lr=4e-4 epochs=80 batch=32 global_batch=64 length=512
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
