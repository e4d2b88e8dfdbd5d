#!/usr/bin/env bash
# DyLoRA on GLUE's wnli with RoBERTa-base, settings of ours: the released recipes have none for it. Arguments are passed on to run_glue.py.
task=wnli model=roberta-base
lr=5e-4 epochs=30 batch=16 global_batch=128 length=512
. "$(dirname "${BASH_SOURCE[0]}")/recipe.sh"
