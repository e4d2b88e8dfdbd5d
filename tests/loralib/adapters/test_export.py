"""What leaves the house: heads whose labels nobody told, tokenizers whole, nothing lost beside."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loralib.adapters.export import export_adapter, export_merged
from loralib.adapters.hub import TOKENIZER
from loralib.cli import main


@pytest.fixture
def plain(roberta_checkpoint, tmp_path):
    """A classifier's adapter as PEFT writes it: nothing says how many labels there are."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint, num_labels=3)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "plain")
    return model.eval(), tmp_path / "plain"


def test_a_head_of_which_nothing_is_told_has_the_outputs_that_its_file_has(plain, tmp_path):
    model, path = plain
    export_adapter(path, tmp_path / "cut", 2)
    assert json.loads((tmp_path / "cut" / "dylora.json").read_text())["num_labels"] == 3
    assert "num_labels=3" in (tmp_path / "cut" / "README.md").read_text()
    export_merged(path, tmp_path / "merged", 4)
    merged, ids = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval(),
        torch.arange(5, 9)[None],
    )
    torch.testing.assert_close(merged(ids).logits, model(ids).logits)


def test_nothing_beside_is_touched_and_the_chat_template_comes_along(plain, tmp_path, roberta_checkpoint, capsys):
    _, path = plain
    (tmp_path / ".merged.adapter").mkdir()
    (tmp_path / ".merged.adapter" / "notes.txt").write_text("precious")
    assert main(["merge", str(path), "--rank", "77", "--to", str(tmp_path / "merged")]) == 2
    tokenizer = AutoTokenizer.from_pretrained(roberta_checkpoint)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(path)
    for name in ("export", "merge"):
        assert main([name, str(path), "--rank", "2", "--to", str(tmp_path / name)]) == 0
        assert AutoTokenizer.from_pretrained(tmp_path / name).chat_template == tokenizer.chat_template
    assert (tmp_path / ".merged.adapter" / "notes.txt").read_text() == "precious"


def test_squeeze_says_first_what_it_cannot_have(plain, tmp_path, capsys):
    _, path = plain
    for words, sentence in (
        (["--data", "nothere.csv"], "--data nothere.csv does not exist"),
        (["--importance", "nothere.csv", "--rank", "1"], "--importance nothere.csv does not exist"),
        (["--rank", "9"], f"the adapter in {path} can be cut to 1..4"),
    ):
        assert main(["squeeze", str(path), *words, "--to", str(tmp_path / "to")]) == 2
        assert sentence in capsys.readouterr().err


def test_a_disk_that_takes_no_more_leaves_an_earlier_merge_whole(plain, tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    _, path = plain
    export_merged(path, tmp_path / "merged", 4)
    before = {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()}
    save = PreTrainedModel.save_pretrained

    def full(self, directory, **options):
        save(self, directory, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        export_merged(path, tmp_path / "merged", 1)
    assert {file.name: file.read_bytes() for file in (tmp_path / "merged").iterdir()} == before
    assert sorted(file.name for file in tmp_path.iterdir() if file.name.startswith(".")) == []
    monkeypatch.undo()
    shards = tmp_path / "shards"
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", lambda *args: save(*args, max_shard_size="20KB"))
    export_merged(path, shards, 1)
    assert list(shards.glob("model-*-of-*.safetensors")) and not (shards / "model.safetensors").exists()
    monkeypatch.undo()
    export_merged(path, shards, 1)
    assert (shards / "model.safetensors").exists() and not list(shards.glob("model-*"))


@pytest.mark.parametrize("command", ["export", "merge"])
def test_what_changed_since_the_command_wrote_it_is_not_written_over(command, plain, tmp_path, capsys):
    def run(rank):
        return main([command, str(plain[1]), "--rank", str(rank), "--to", str(tmp_path / "out")])

    def files():
        return {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    assert run(2) == 0 and run(1) == 0
    (tmp_path / "out" / "notes.txt").write_text("nobody else's business")
    assert run(2) == 0 and (tmp_path / "out" / "notes.txt").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    changed = [("README.md", card + "Mine."), ("vocab_of_mine.txt", "word")]
    for name, text in changed:
        (tmp_path / "out" / name).write_text(text)
        before = files()
        assert run(4) == 2 and files() == before
        assert f"holds a {name} that is not as dylora {command} left it" in capsys.readouterr().err
        (tmp_path / "out" / name).write_text(card) if name == "README.md" else (tmp_path / "out" / name).unlink()
    if command == "export":
        torch.manual_seed(1)
        base = AutoModelForSequenceClassification.from_pretrained(
            plain[0].base_model.model.config._name_or_path, num_labels=3
        )
        trained_on = PeftModel.from_pretrained(base, tmp_path / "out", is_trainable=True)
        torch.nn.init.normal_(next(p for n, p in trained_on.named_parameters() if "lora_B" in n))
        trained_on.save_pretrained(tmp_path / "out")
        before = files()
        assert run(1) == 2 and files() == before


def test_a_merged_model_has_a_tokenizer(plain, tmp_path, roberta_checkpoint):
    base = tmp_path / "base"
    shutil.copytree(roberta_checkpoint, base)
    for file in (file for pattern in TOKENIZER for file in base.glob(pattern)):
        file.unlink()
    text = "w1 w2 w3 w4"
    wanted = AutoTokenizer.from_pretrained(roberta_checkpoint)(text)["input_ids"]
    export_merged(plain[1], tmp_path / "merged", 4, str(roberta_checkpoint))
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")(text)["input_ids"] == wanted
    assert f'AutoTokenizer.from_pretrained("{tmp_path / "merged"}")' in (tmp_path / "merged/README.md").read_text()
    export_merged(plain[1], tmp_path / "without", 4, str(base))  # of the base alone, which has none
    assert f'AutoTokenizer.from_pretrained("{base}")' in (tmp_path / "without/README.md").read_text()
    AutoTokenizer.from_pretrained(roberta_checkpoint).save_pretrained(plain[1])
    export_merged(plain[1], tmp_path / "own", 4, str(base))
    assert AutoTokenizer.from_pretrained(tmp_path / "own")(text)["input_ids"] == wanted


def test_the_bases_revision_is_the_one_that_is_loaded(plain, tmp_path, roberta_checkpoint, monkeypatch):
    config = json.loads((plain[1] / "adapter_config.json").read_text()) | {"revision": "v1"}
    (plain[1] / "adapter_config.json").write_text(json.dumps(config))
    export_adapter(plain[1], tmp_path / "cut", 2)
    assert 'revision="v1"' in (tmp_path / "cut/README.md").read_text()
    asked, load = [], AutoModelForSequenceClassification.from_pretrained

    def loading(name, **options):
        asked.append(options.pop("revision", None))
        return load(name, **options)

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", loading)
    export_merged(plain[1], tmp_path / "merged", 2)
    export_merged(plain[1], tmp_path / "elsewhere", 2, str(roberta_checkpoint))  # which has no revisions
    assert asked == ["v1", None]


def test_weights_that_cannot_be_written_are_one_sentence(plain, tmp_path, monkeypatch, capsys):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(*_, **__):
        raise SafetensorError("I/O error: File too large")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert main(["merge", str(plain[1]), "--rank", "2", "--to", str(tmp_path / "merged")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "dylora: weights could not be read or written (I/O error: File too large)."
