#!/usr/bin/env bash
# Every case of tests/reliability, runs that are killed, and a long one; resumable, about half an hour on one core.
# Writes results/reliability.md. Start anew: rm -r runs/soak
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
exec "${PYTHON:-.venv/bin/python}" -m tests.reliability.soak
