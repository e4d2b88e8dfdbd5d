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
# The pages of results are those of the repository.
for name in README tables choosing; do
  sed -E 's/\]\((tables|choosing)\.md/](study-\1.md/g; s/\]\(README\.md/](study.md/g' "results/study/$name.md" > "docs/results/study-$name.md"
done
mv docs/results/study-README.md docs/results/study.md
cp results/study/curves.png docs/results/
cp results/lm/README.md docs/results/language-model.md
cp results/lm/*.png docs/results/
cp results/reliability.md docs/results/
# Material's notice about another project's plans is none of the reader's.
export NO_MKDOCS_2_WARNING=1
exec "$python" -m mkdocs build --strict "$@"
