"""The dylora command on a real (tiny) run; what it exports is loaded by stock PEFT where loralib cannot be imported."""

import base64
import csv
import http.server
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from loralib.cli import main
from loralib.report.choice import choose
from loralib.report.curves import averages, curves
from loralib.report.results import RankResults

from ..nlu.test_data import write
from ..nlu.test_run_glue import TASKS, command, run_glue, strong_adapter

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(roberta_checkpoint, tmp_path_factory):
    """The directory that commands run in: data, an MNLI run with test predictions, two seeds of RTE, plain LoRA on RTE."""
    folder = tmp_path_factory.mktemp("cli")
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    for task in ("mnli", "rte"):
        write(folder / "glue" / task, TASKS[task])
    strong_adapter(roberta_checkpoint, folder / "glue", folder / "strong")
    argv = command(roberta_checkpoint, folder / "glue", folder / "mnli", "mnli", "--do_predict", "--learning_rate", "0")
    run_glue().main([*argv, "--lora_path", str(folder / "strong")])
    for seed in ("0", "1"):
        run_glue().main(command(roberta_checkpoint, folder / "glue", folder / f"rte{seed}", "rte", "--seed", seed))
    shutil.copytree(roberta_checkpoint, folder / "encoder")
    run_glue().main(command(roberta_checkpoint, folder / "glue", folder / "fixed", "rte", "--rank_sampling", "fixed"))
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def dylora(capsys, *argv):
    code = main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_report_of_one_run(capsys, folder):
    code, out, _ = dylora(capsys, "report", "mnli", "--to", "one")
    assert code == 0 and "mnli, validation_matched" in out and "mnli, validation_mismatched" in out
    assert {p.name for p in Path("one").iterdir()} == {f"rank_results.{e}" for e in ("md", "csv")} | {
        f"rank_curve.{e}" for e in ("png", "svg", "pdf")
    } | {"report.html"}
    svg = Path("one/rank_curve.svg").read_text()
    assert "<svg" in svg and "validation mismatched" in svg
    before = Path("one/rank_curve.svg").read_bytes()
    dylora(capsys, "report", "mnli", "--to", "one")
    assert Path("one/rank_curve.svg").read_bytes() == before


def test_report_of_a_runs_file_goes_beside_it(capsys, folder):
    shutil.copytree("mnli", "by_file")
    code, out, _ = dylora(capsys, "report", "by_file/rank_results.json")
    assert code == 0 and "written to by_file:" in out and Path("by_file/report.html").exists()


def test_report_of_several_runs_has_seeds_tasks_and_baselines(capsys):
    code, out, _ = dylora(capsys, "report", "mnli", "rte0", "rte1", "fixed", "--to", "all")
    assert code == 0 and "standard error" in out
    table = Path("all/rank_results.md").read_text()
    assert (
        "| average of 2 tasks | DyLoRA, components ordered after 80 % of the steps, then rank 1 or ranks 1, 2 and 3 together |"
        in table
        and "| LoRA trained at rank 3 |" in table
    )
    found = curves([RankResults.read(p) for p in ("mnli", "rte0", "rte1", "fixed")])
    rte = next(c for c in found if c.task == "rte" and c.method.startswith("DyLoRA"))
    scores = np.array([RankResults.read(p).curve("validation")[1] for p in ("rte0", "rte1")]) * 100
    assert (
        rte.seeds == 2
        and np.allclose(rte.means, scores.mean(0))
        and np.allclose(rte.errors, scores.std(0, ddof=1) / 2**0.5)
    )
    average = averages(found)
    mnli = next(c for c in found if c.task == "mnli")
    assert len(average) == 1 and np.allclose(average[0].means, (np.array(mnli.means) + rte.means) / 2)
    with open("all/rank_results.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 + 3 * 3 and {r["task"] for r in rows} == {"mnli", "rte"}


def test_the_page_is_self_contained(capsys):
    dylora(capsys, "report", "rte0", "rte1", "--to", "page")
    page = Path("page/report.html").read_text()
    assert not re.search(r"(src|href)=|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])
    assert data[0]["seeds"] == 2 and len(data[0]["means"]) == 3
    assert page.count("<table>") == 2 and "$" not in page.replace("${", "")


def test_select_says_why(capsys):
    code, out, _ = dylora(capsys, "select", "mnli", "--within", "100")
    assert (
        code == 0
        and out.splitlines()[0] == "rank 1"
        and "mnli, validation_matched: smallest rank within 100 points" in out
    )
    stored = RankResults.read("mnli").selected_rank
    code, out, _ = dylora(capsys, "select", "mnli")
    assert out.splitlines()[0] == f"rank {stored.rank}" and "one standard error" in out
    assert choose(RankResults.read("mnli")).standard_error == pytest.approx(stored.standard_error)
    code, out, _ = dylora(capsys, "select", "mnli", "--split", "validation_mismatched", "--max-parameters", "128")
    assert out.splitlines()[0] == "rank 1" and "validation_mismatched" in out


PEFT_ALONE = """
import contextlib, io, json, re, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("loralib", "transformers_dylora"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
card = open(sys.argv[1] + "/README.md").read()
said = io.StringIO()
with contextlib.redirect_stdout(said):
    exec(re.search(r"```python\\n(.*?)```", card, re.S)[1])
assert said.getvalue().strip() in ("entailment", "neutral", "contradiction")  # the prediction of the card's text, by name
import torch
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model.eval()
rows = [json.loads(line) for line in open(sys.argv[2])]
for row in rows:
    inputs = tokenizer(row["premise"], row["hypothesis"], return_tensors="pt")
    with torch.no_grad():
        k = int(model(**inputs).logits.argmax(-1))
    print(model.config.id2label[k])
assert "loralib" not in sys.modules
"""


@pytest.mark.parametrize("kind", ["export", "merge"])
def test_what_is_written_predicts_the_same_without_loralib(kind, capsys, folder):
    code, _, err = dylora(capsys, kind, "mnli", "--rank", "2", "--to", f"{kind}ed")
    assert code == 0, err
    arguments = [f"{kind}ed", "glue/mnli/test_matched.jsonl"]
    done = subprocess.run([sys.executable, "-c", PEFT_ALONE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = Path("mnli/test_results_mnli_r2.txt").read_text().splitlines()[1:]
    assert done.stdout.split() == [line.split("\t")[1] for line in lines]
    card = Path(f"{kind}ed/README.md").read_text()
    assert "0 entailment, 1 neutral, 2 contradiction" in card and "| rank | accuracy |" in card
    if kind == "export":
        assert 'labels = ["entailment", "neutral", "contradiction"]' in card
        sizes = [
            sum(v.numel() for k, v in load_file(f"{d}/adapter_model.safetensors").items() if "lora_" in k)
            for d in ("mnli", "exported")
        ]
        assert sizes[0] * 2 == sizes[1] * 3


def test_the_table_of_another_adapter_chooses_no_rank(capsys, folder):
    shutil.copytree("rte0", "mixed_up")
    shutil.copy("rte1/adapter_model.safetensors", "mixed_up/adapter_model.safetensors")
    code, _, err = dylora(capsys, "export", "mixed_up", "--rank", "auto", "--to", "from_mixed_up")
    assert code == 2 and "is not the one that its rank_results.json is of" in err
    code, _, err = dylora(capsys, "select", "mixed_up", "--within", "9")
    assert code == 2 and "dylora train --do_eval --lora_path mixed_up --output_dir mixed_up" in err
    assert dylora(capsys, "export", "mixed_up", "--rank", "1", "--to", "from_mixed_up")[0] == 0
    assert "Quality at every rank" not in Path("from_mixed_up/README.md").read_text()


def test_auto_takes_the_selected_rank(capsys):
    code, out, _ = dylora(capsys, "export", "mnli", "--rank", "auto", "--within", "100", "--to", "auto")
    assert code == 0 and "rank 1: mnli, validation_matched" in out
    assert json.loads(Path("auto/dylora.json").read_text())["rank"] == 1
    code, _, _ = dylora(capsys, "export", "mnli", "--rank", "3", "--to", "auto")  # an earlier export may be replaced
    assert code == 0 and json.loads(Path("auto/adapter_config.json").read_text())["r"] == 3


@pytest.mark.parametrize("command", ["export", "merge"])
@pytest.mark.parametrize("flag", ["--within 1se", "--max-parameters 9", "--split validation_matched"])
def test_a_flag_of_the_choice_beside_a_rank_is_refused(command, flag, capsys):
    code, _, err = dylora(capsys, command, "mnli", "--rank", "2", *flag.split(), "--to", "unused")
    assert code == 2 and f"--rank 2 leaves nothing to choose for {flag.split()[0]}" in err
    assert not Path("unused").exists()


def test_inspect_shows_the_ordering(capsys):
    code, out, _ = dylora(capsys, "inspect", "mnli")
    assert code == 0 and "r_max            3" in out and "query, value" in out
    tensors = load_file("mnli/adapter_model.safetensors")
    total = []
    for key, A in tensors.items():
        if "lora_A" in key:
            B = tensors[key.replace("lora_A", "lora_B")]
            total.append([torch.outer(B[:, j], A[j]).norm().item() ** 2 for j in range(3)])
    wanted = np.sqrt(np.mean(total, 0))
    assert [float(v) for v in re.findall(r"│\s+\d │ +([\d.]+) │", out)] == pytest.approx(wanted, abs=1e-3)


def test_runs_of_different_models_are_no_seeds_of_one(capsys):
    one = RankResults.read("rte0")
    other = replace(one, model_name_or_path="roberta-large", directory="elsewhere")
    found = curves([one, other])
    assert [c.seeds for c in found] == [1, 1] and "roberta-large" in found[1].method
    assert [c.seeds for c in curves([one, RankResults.read("./rte0")])] == [1]


def test_an_adapter_saved_in_python_knows_its_number_of_labels(capsys, roberta_checkpoint):
    from transformers import AutoModelForSequenceClassification

    import loralib as lora

    model = AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint, num_labels=4)
    lora.inject(model, ["query"], r=2)
    lora.save_adapter(model, "python")
    code, _, err = dylora(capsys, "merge", "python", "--rank", "1", "--to", "python-merged")
    assert code == 0, err
    code, _, _ = dylora(capsys, "export", "python", "--rank", "1", "--to", "python-exported")
    assert code == 0 and "num_labels=4" in Path("python-exported/README.md").read_text()


def test_microsofts_package_beside_ours_is_named(capsys, monkeypatch):
    version = importlib.metadata.version
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "0.1.2" if name == "loralib" else version(name))
        assert "loralib 0.1.2" in dylora(capsys, "select", "mnli")[2]
    assert dylora(capsys, "select", "mnli")[2] == ""


def test_help_has_examples():
    done = subprocess.run([sys.executable, "-m", "loralib.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "dylora export mnli/model --rank auto" in done.stdout
    for name in ("report", "select", "export", "merge", "inspect"):
        done = subprocess.run([sys.executable, "-m", "loralib.cli", name, "--help"], capture_output=True, text=True)
        assert done.returncode == 0 and f"example: dylora {name}" in done.stdout


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as an upload needs; keeps the committed files."""

    files: ClassVar[dict[str, bytes]] = {}

    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if "whoami" in self.path:
            return self._answer({"name": "me", "type": "user", "auth": {"accessToken": {"role": "write"}}, "orgs": []})
        self._answer({"id": "me/mnli", "sha": "0" * 40, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/preupload/main"):
            wanted = json.loads(body)["files"]
            return self._answer(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in wanted
                    ]
                }
            )
        if self.path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self._answer(
                {
                    "commitUrl": f"http://{self.headers['Host']}/me/mnli/commit/{'0' * 40}",
                    "commitOid": "0" * 40,
                    "hookOutput": "",
                }
            )
        if "validate-yaml" in self.path:
            return self._answer({"errors": [], "warnings": []})
        self._answer({"url": f"http://{self.headers['Host']}/me/mnli", "name": "me/mnli", "id": "me/mnli"})

    def log_message(self, *_):
        pass


def test_push_to_hub_publishes_the_adapter_and_its_card(folder, roberta_checkpoint):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        script = Path(__file__).parents[2] / "examples/NLU/examples/text-classification/run_glue.py"
        argv = [
            *command(roberta_checkpoint, "glue", "pushed", "mnli"),
            "--push_to_hub",
            "--hub_model_id",
            "me/mnli",
            "--hub_token",
            "hf_test",
        ]
        environment = os.environ | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        done = subprocess.run([sys.executable, script, *argv], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
    finally:
        server.shutdown()
    assert {
        "adapter_config.json",
        "adapter_model.safetensors",
        "dylora.json",
        "README.md",
        "rank_results.json",
    } <= Hub.files.keys()
    card = Hub.files["README.md"].decode()
    assert 'PeftModel.from_pretrained(model, "me/mnli")' in card and "| rank | accuracy |" in card


def test_a_merged_model_exports(roberta_checkpoint, capsys, tmp_path):
    """torch.export, and ONNX run by onnxruntime."""
    import onnxruntime
    from transformers import AutoModelForSequenceClassification

    code, _, err = dylora(capsys, "merge", "mnli", "--rank", "2", "--to", tmp_path / "merged")
    assert code == 0, err
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids = torch.randint(3, 100, (2, 7))
    with torch.no_grad():
        wanted = model(ids).logits
        exported = torch.export.export(
            model, (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, strict=False
        )
        assert torch.allclose(
            exported.module()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, wanted, atol=1e-5
        )
        torch.onnx.export(model, (ids, torch.ones_like(ids)), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    names = [entry.name for entry in session.get_inputs()]
    inputs = dict(zip(names, (ids.numpy(), torch.ones_like(ids).numpy()), strict=False))
    assert np.allclose(session.run(None, inputs)[0], wanted, atol=1e-5)
