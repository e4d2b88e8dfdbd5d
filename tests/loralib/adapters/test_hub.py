"""Adapters by their name on the hub: fetched from a server on this machine that speaks as much of it as that takes."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import loralib as lora
from loralib.adapters.hub import local

SHA = "a" * 40


@pytest.fixture
def hub(tmp_path):
    """(address, directory): what lies in the directory is the repository me/small."""
    directory = tmp_path / "repository"
    directory.mkdir()

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET(head=True)

        def do_GET(self, head=False):
            path = self.path.split("?")[0]
            name = path.partition(f"/me/small/resolve/{SHA}/")[2]
            if "/tree/" in path:
                sizes = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
                tree = [{"type": "file", "path": n, "size": size, "oid": "b" * 40} for n, size in sizes.items()]
                return self.answer(json.dumps(tree).encode(), head)
            if path.startswith("/api/models/me/small"):
                files = [{"rfilename": file.name} for file in sorted(directory.iterdir())]
                return self.answer(json.dumps({"id": "me/small", "sha": SHA, "siblings": files}).encode(), head)
            if name and (directory / name).exists():
                return self.answer((directory / name).read_bytes(), head)
            self.answer(b'{"error": "Repository not found"}', head, 404, {"X-Error-Code": "RepoNotFound"})

        def answer(self, body, head, status=200, more=()):
            self.send_response(status)
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            for name, value in {"Content-Length": len(body), "ETag": etag, "X-Repo-Commit": SHA, **dict(more)}.items():
                self.send_header(name, str(value))
            self.end_headers()
            if not head:
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", directory
    server.shutdown()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))


def run(code, address, tmp_path, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [sys.executable, *code, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )


def test_a_name_is_loaded_exported_and_inspected(hub, tmp_path):
    address, directory = hub
    adapted = lora.inject(model(), ["0"], r=4)
    nn.init.normal_(adapted[0].lora_B)
    lora.save_adapter(adapted, directory)
    (directory / "model.safetensors").write_bytes(b"of no use here")
    load = (
        "import torch, loralib as lora\nfrom torch import nn\ntorch.manual_seed(0)\n"
        "m = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))\nlora.load_adapter(m, 'me/small', rank=2)\n"
        "print(m(torch.arange(6.)).tolist())"
    )
    done = run(["-c", load], address, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    lora.set_rank(adapted, 2)
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), adapted(torch.arange(6.0)))
    for words in (["export", "me/small", "--rank", "1", "--to", "out"], ["inspect", "me/small"]):
        done = run(["-m", "loralib.cli"], address, tmp_path, *words)
        assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 1
    assert not list((tmp_path / "home").rglob("model.safetensors"))  # a base model is not fetched along


def test_a_name_that_is_not_there_is_one_sentence(hub, tmp_path):
    done = run(["-m", "loralib.cli"], hub[0], tmp_path, "export", "me/other", "--rank", "1", "--to", "out")
    assert done.returncode == 2 and "me/other is no directory here, and the hub has no such repository" in done.stderr
    done = run(["-m", "loralib.cli"], "http://127.0.0.1:9", tmp_path, "inspect", "me/small")
    assert done.returncode == 2 and "the hub cannot be reached" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_path_is_never_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("it was looked up"))
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    for path in ("owner/name", "a", "./a/b", "../a", "/a/b", "a/b/c", "x.bin"):
        assert str(local(path)) == str(Path(path))
