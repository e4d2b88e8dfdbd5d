"""Three people's paths, word for word from the documentation: from a wheel outside of the repository, and in a clone."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from transformers_dylora.tasks import TASKS

import loralib as lora

from ..docs.pages import ROOT, commands, fenced, write_data
from ..nlu.test_data import write

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment with the wheel, and every other package of this one; the repository is not on its path."""
    folder = tmp_path_factory.mktemp("environment")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in tracked:
        wanted = name.startswith(("loralib/", "examples/NLU/src/")) or "/" not in name
        if wanted and (ROOT / name).is_file():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "tree" / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(folder / "tree")]
    subprocess.run(build, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # A directory that a .pth file adds has its own .pth files left alone: this environment's link to the repository, too.
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = folder / "venv" / "bin" / "dylora"
    command.write_text(f"#!{folder}/venv/bin/python\nimport sys\nfrom loralib.cli import main\nsys.exit(main())\n")
    command.chmod(0o755)
    return folder / "venv" / "bin"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A pretrained one, in RoBERTa's shape."""
    from transformers_dylora.minilm import write_roberta

    return write_roberta(tmp_path_factory.mktemp("encoder"))


def run(line, environment, cwd, **more):
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    variables |= {"PATH": f"{environment}:{os.environ['PATH']}", "HF_DATASETS_CACHE": str(cwd / "cache"), **more}
    done = subprocess.run(line, shell=True, cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def of_page(page, *beginnings):
    found = [line for line in commands(ROOT / page) if line.startswith(beginnings)]
    assert found
    return found


def test_a_pip_user_with_a_csv(environment, tmp_path, encoder):
    write_data(tmp_path)
    assert "site-packages" in run("python -c 'import loralib; print(loralib.__file__)'", environment, tmp_path)
    train, export = of_page("README.md", "dylora")
    said = run(train.replace("roberta-base", str(encoder)) + " --report_to none", environment, tmp_path)
    assert "drawn at random, are held out" in said and "AURAC" in said
    said = run("dylora report out", environment, tmp_path)
    assert "report.html" in said and (tmp_path / "out" / "report.html").exists()
    chosen = run("dylora select out", environment, tmp_path)
    assert chosen.startswith("rank ")
    run(export + "", environment, tmp_path)
    card = (tmp_path / "smaller" / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.S)[1]
    (tmp_path / "use.py").write_text(snippet)
    assert run("python use.py", environment, tmp_path).strip() in ("0", "1")


def test_a_peft_user_with_our_trainer(environment, tmp_path, encoder):
    write_data(tmp_path)
    page = "docs/tutorials/first-adapter.md"
    code = "\n".join(fenced(ROOT / page, "python")).replace('"roberta-base"', repr(str(encoder)))
    (tmp_path / "first.py").write_text(code)
    run("python first.py", environment, tmp_path)
    for line in of_page(page, "dylora"):
        run(line + "", environment, tmp_path)
    alone = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("loralib", "transformers_dylora"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({str(encoder)!r}, num_labels=2)
model = PeftModel.from_pretrained(model, "smaller").eval()
print(model(torch.arange(5, 15)[None]).logits.detach().flatten().tolist())
"""
    (tmp_path / "alone.py").write_text(alone)
    theirs = run("python alone.py", environment, tmp_path)
    rank = json.loads((tmp_path / "smaller" / "adapter_config.json").read_text())["r"]
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2)
    lora.load_adapter(model, tmp_path / "out")
    lora.set_rank(model.eval(), rank)
    ours = model(torch.arange(5, 15)[None]).logits.flatten().tolist()
    assert json.loads(theirs) == pytest.approx(ours, abs=1e-5)


def test_a_researcher_in_a_clone(environment, tmp_path, roberta_checkpoint):
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__", "src"))
    for name in ("rte", "cola"):
        write(tmp_path / "glue" / name, TASKS[name])
    here = tmp_path / "examples" / "NLU"
    small = (
        f" --model_name_or_path {roberta_checkpoint} --dataset_dir {tmp_path / 'glue'} --num_train_epochs 1 --lora_r 4"
        " --max_seq_length 32 --global_batch_size 2 --use_cpu --report_to none --disable_tqdm true"
    )
    lines = of_page("docs/tutorials/glue.md", "bash roberta_base_", "dylora report")
    wanted = [line for line in lines if "--output_dir" in line or line.startswith("dylora report")]
    assert len(wanted) == 4
    for line in wanted:
        run(line + ("" if line.startswith("dylora") else small), environment, here, PYTHON="python", NPROC="1")
    table = (here / "report" / "rank_results.md").read_text()
    assert re.search(r"\| rte validation \| .* \| 2 \| [\d.]+ ± ", table) and "average of 2 tasks" in table
    assert {path.suffix for path in (here / "report").iterdir()} == {".md", ".csv", ".png", ".svg", ".pdf", ".html"}
