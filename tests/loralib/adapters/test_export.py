"""What leaves the house: heads whose labels nobody told, tokenizers whole, nothing lost beside."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loralib.adapters.export import export_adapter, export_merged
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
    (tmp_path / "merged" / "model-00001-of-00002.safetensors").touch()  # of a larger one
    export_merged(path, tmp_path / "merged", 1)
    assert not (tmp_path / "merged" / "model-00001-of-00002.safetensors").exists()


def test_weights_that_cannot_be_written_are_one_sentence(plain, tmp_path, monkeypatch, capsys):
    from safetensors import SafetensorError
    from transformers import PreTrainedModel

    def full(*_, **__):
        raise SafetensorError("I/O error: File too large")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    assert main(["merge", str(plain[1]), "--rank", "2", "--to", str(tmp_path / "merged")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "dylora: weights could not be read or written (I/O error: File too large)."
