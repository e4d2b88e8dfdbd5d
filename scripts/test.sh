#!/usr/bin/env bash
# Lint, format and the whole test suite, in .venv (made if missing). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh test
"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest "$@"
