#!/usr/bin/env bash
# Build the wheel and the source package into dist/ and check them: their metadata, and that the wheel, installed in an
# empty environment outside of the repository, trains, saves and cuts an adapter. PYTHON: an interpreter with the test
# extra (default: the repository's .venv, made if missing). Nothing is uploaded; what remains to do is printed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "${PYTHON:-}" ]; then
  python=$PYTHON
else
  . scripts/env.sh test
fi
version=$("$python" -c 'import re; print(re.search(r"\"(.*)\"", open("loralib/version.py").read())[1])')
grep -q "^## $version" CHANGELOG.md || { echo "CHANGELOG.md has no section '## $version'; write it first." >&2; exit 1; }

rm -rf dist build
"$python" -m build --outdir dist . > /dev/null
"$python" -m twine check --strict dist/*

empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
"$python" -m venv "$empty/venv"
"$empty/venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt dist/dylora-"$version"-*.whl
cd "$empty"
./venv/bin/python - <<'PYTHON'
import torch, loralib as lora

model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
lora.inject(model, ["0"], r=4)
lora.mark_only_lora_as_trainable(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
batches = [(torch.randn(8, 8), torch.randn(8, 2)) for _ in range(8)]
for x, y in lora.RankSchedule().resolve(r_max=4).over(batches, model, optimizer):
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
lora.save_adapter(model, "adapter")
PYTHON
./venv/bin/dylora export adapter --rank 2 --to small > /dev/null
[ "$(./venv/bin/dylora --version)" = "dylora $version" ]
echo "dist/ holds dylora $version, checked. To publish it: git tag v$version; twine upload dist/*"
