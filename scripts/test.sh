#!/usr/bin/env bash
# Lint, format, types and the whole test suite, in .venv (made if missing). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh test
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
if [ -z "${DYLORA_BROWSER:-}" ] && ! command -v chromium >/dev/null && ! command -v chromium-browser >/dev/null; then
  echo "no chromium here: tests/loralib/report/test_page.py is skipped (apt install chromium, or DYLORA_BROWSER=PATH)"
fi
# Two processes of one thread each: the models are tiny, and threads of one would only wait for each other.
export OMP_NUM_THREADS=1
exec "$python" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
