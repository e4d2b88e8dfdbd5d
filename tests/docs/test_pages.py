"""Every page: its links lead somewhere, its Python runs, its command lines are what the real parsers take."""

import importlib.util
import re
import shlex

import pytest
import torch

from ..loralib.helpers import free_port
from .pages import PAGES, ROOT, WRITTEN, commands, fenced, name, write_data

WITH_PYTHON = [page for page in WRITTEN if fenced(page, "python")]
# What a page takes from another: its blocks run first.
BEFORE = {
    "docs/how-to/settings.md": "docs/tutorials/first-adapter.md",
    "examples/LM/README.md": "docs/tutorials/language-model.md",
}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    targets = [(page.parent / link).resolve() for link in links if "://" not in link]
    assert not [target for target in targets if not target.exists()]


@pytest.mark.parametrize("page", WRITTEN, ids=name)
def test_prose_is_in_lines_of_120(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_the_readme_is_a_page_of_one_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 120


@pytest.fixture(scope="module")
def finished(tmp_path_factory, roberta_checkpoint):
    """What `dylora train` leaves, and somebody's LoRA."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification
    from transformers_dylora.run_glue import train

    directory = tmp_path_factory.mktemp("finished")
    write_data(directory)
    train(
        ["--model_name_or_path", str(roberta_checkpoint), "--train_file", str(directory / "train.csv"), "--output_dir",
         str(directory / "out"), "--num_train_epochs", "8", "--learning_rate", "1e-2", "--report_to", "none", "--use_cpu"]
    )  # fmt: skip
    theirs = AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint, num_labels=2)
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    get_peft_model(theirs, config).save_pretrained(directory / "my-lora")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_its_python_runs(page, finished, tmp_path, monkeypatch, roberta_checkpoint, llama_checkpoint):
    import shutil

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    here = {"roberta-base": roberta_checkpoint, "HuggingFaceTB/SmolLM2-135M-Instruct": llama_checkpoint}
    before = BEFORE.get(name(page))
    if "init_process_group" in page.read_text(encoding="utf-8"):
        one = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
        for variable, value in one.items():  # as torchrun sets them
            monkeypatch.setenv(variable, str(value))
    names = {"__name__": "page"}
    for block in [*(fenced(ROOT / before, "python")[:2] if before else []), *fenced(page, "python")]:
        for hub, local in here.items():
            block = block.replace(f'"{hub}"', repr(str(local)))
        exec(compile(block, name(page), "exec"), names)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def flags_after(words, start):
    """The flags of a command line, without what stands before them."""
    return words[words.index(start) + 1 :] if isinstance(start, str) else words[start:]


def without_adapter(flags: list[str]) -> list[str]:
    """The flags with no adapter to start from, since the page's own is not there."""
    return ["none" if i and flags[i - 1] == "--lora_path" else flag for i, flag in enumerate(flags)]


def parsed(line: str, directory) -> bool:
    """Whether a real parser takes the line; SystemExit or UsageError if it refuses, False if no parser is known."""
    from transformers_dylora.arguments import parse
    from transformers_dylora.settings import expanded

    from loralib import cli

    words = shlex.split(line, comments=True)
    program = words[0]
    needed = ["--model_name_or_path", "m", "--output_dir", "o"]
    if program == "dylora" and words[1] == "train":
        own = words[2:] if "..." not in words else [*words[words.index("...") + 1 :], "--task_name", "rte"]
        own = without_adapter(own)
        given = expanded([str(directory / word) if word.endswith(".yaml") else word for word in own])
        parse([*needed, "--apply_lora", *given])  # as the command adds it
    elif program == "dylora":
        cli._parser().parse_args(words[1:])
    elif program == "bash" and (words[1].startswith("roberta_") or "/roberta_" in words[1]):
        recipe = ROOT / "examples" / "NLU" / words[1].split("/")[-1]
        assert recipe.exists(), recipe
        parse([*needed, "--task_name", "rte", "--apply_lora", *without_adapter(words[2:])])
    elif "transformers_dylora.run_glue" in line:
        parse(flags_after(words, "transformers_dylora.run_glue"))
    elif program == "bash" and words[1].startswith("scripts/"):
        assert (ROOT / words[1]).exists()
    elif words[:3] == ["python", "-m", "scripts.study"] or words[:3] == ["python", "-m", "scripts.benchmark"]:
        module = importlib.import_module(f"{words[2]}.__main__")
        module.line_parser().parse_args(list(words[3:]))
    elif program == "python" and words[1] == "sft.py":
        spec = importlib.util.spec_from_file_location("sft", ROOT / "examples" / "LM" / "sft.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.line_parser().parse_args_into_dataclasses([*words[2:], "--report_to", "none", "--use_cpu", "true"])
    elif words[:2] == ["python", "-m"]:
        return importlib.util.find_spec(words[2]) is not None
    else:
        return False
    return True


# What is no command of ours: its first word.
OTHERS = ("pip", "cd", "source", "conda", "eval", "bash -c", "hf", "h =")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_its_command_lines_parse(page, tmp_path, finished):
    for text in fenced(page, "yaml"):
        if match := re.match(r"# (\w+\.yaml)\n", text):
            (tmp_path / match[1]).write_text(text, encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text((finished / "out" / "config.yaml").read_text())
    for line in commands(page):
        if line.startswith(OTHERS):
            continue
        assert parsed(line, tmp_path), f"no parser is known for: {line}"


def test_a_wrong_flag_on_a_page_would_be_found(tmp_path):
    with pytest.raises((SystemExit, ValueError)):
        parsed("dylora export out --rnk 4 --to adapter", tmp_path)
    with pytest.raises((SystemExit, ValueError)):
        parsed("dylora train --task_name rte --lerning_rate 1", tmp_path)
    assert not parsed("frobnicate --all", tmp_path)
