#!/usr/bin/env bash
# DyLoRA on GLUE's qnli with RoBERTa-base, settings of the released DyLoRA recipe. Arguments are passed on to run_glue.py.
task=qnli model=roberta-base
lr=4e-4 epochs=25 batch=32 global_batch=256 length=512
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
