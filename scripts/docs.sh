#!/usr/bin/env bash
# Build the documentation site into site/, strictly: a broken link or reference fails. PYTHON: an interpreter that has
# the docs extra (default: the repository's .venv, which is made if missing). Arguments go to mkdocs build.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "${PYTHON:-}" ]; then
  python=$PYTHON
else
  . scripts/env.sh docs
fi
# Material's notice about another project's plans is none of the reader's.
export NO_MKDOCS_2_WARNING=1
exec "$python" -m mkdocs build --strict "$@"
