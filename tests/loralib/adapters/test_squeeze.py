"""Somebody's LoRA, ordered and cut: against PEFT's own model, and against its reduction by SVD."""

import copy
import csv
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers_dylora.squeezing import completing

import loralib as lora
from loralib.adapters.directory import cut_adapter, describe_adapter
from loralib.adapters.squeeze import squeeze_adapter
from loralib.cli import main
from loralib.peft import DyLoraConfig

IDS = torch.arange(5, 17).reshape(2, 6)


def foreign(checkpoint, directory, auto=AutoModelForSequenceClassification, std=0.3, **options):
    """An adapter that PEFT made, with strong factors."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"} | options
    model = get_peft_model(auto.from_pretrained(checkpoint), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name or "classifier" in name:
            nn.init.normal_(parameter, std=std)
    model.save_pretrained(directory)
    return model.eval()


def loaded(checkpoint, directory, auto=AutoModelForSequenceClassification):
    return PeftModel.from_pretrained(auto.from_pretrained(checkpoint), directory).eval()


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"query": 2}}, {"alpha_pattern": {"value": 3}}]
)
def test_at_the_whole_rank_it_is_what_it_was_and_below_pefts_reduction(options, roberta_checkpoint, tmp_path):
    model = foreign(roberta_checkpoint, tmp_path / "theirs", **options)
    kept = squeeze_adapter(tmp_path / "theirs", tmp_path / "ours")
    with torch.no_grad():
        wanted = model(IDS).logits
        torch.testing.assert_close(
            loaded(roberta_checkpoint, tmp_path / "ours")(IDS).logits, wanted, atol=1e-5, rtol=1e-4
        )
    assert list(kept) == [1, 2, 3, 4] and kept[4] == pytest.approx(1) and sorted(kept.values()) == list(kept.values())
    for b in (1, 2, 3):
        cut_adapter(tmp_path / "ours", tmp_path / f"cut{b}", b)
        small = loaded(roberta_checkpoint, tmp_path / f"cut{b}")
        config, state = convert_to_lora(model, rank=b)
        lost = whole = 0.0
        for name, module in small.named_modules():
            if not hasattr(module, "get_delta_weight"):
                continue
            key = f"{name}.lora_"
            strength = config.lora_alpha / config.r
            theirs = strength * state[f"{key}B.weight"] @ state[f"{key}A.weight"]
            torch.testing.assert_close(module.get_delta_weight("default"), theirs, atol=1e-4, rtol=1e-3)
            full = model.get_submodule(name).get_delta_weight("default")
            lost += (full - theirs).square().sum().item()
            whole += full.square().sum().item()
        assert kept[b] == pytest.approx(1 - lost / whole, abs=1e-4)


def test_what_cannot_be_ordered_is_refused(roberta_checkpoint, tmp_path):
    foreign(roberta_checkpoint, tmp_path / "dora", use_dora=True)
    with pytest.raises(ValueError, match="use_dora"):
        squeeze_adapter(tmp_path / "dora", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_of_a_plain_lora_keeps_its_strength_and_says_what_is_unknown(roberta_checkpoint, tmp_path, capsys):
    model = foreign(roberta_checkpoint, tmp_path / "theirs")
    assert main(["export", str(tmp_path / "theirs"), "--rank", "4", "--to", str(tmp_path / "whole")]) == 0
    assert "does not say" not in capsys.readouterr().err
    assert main(["export", str(tmp_path / "theirs"), "--rank", "2", "--to", str(tmp_path / "small")]) == 0
    assert (
        "does not say that it was trained for ranks below 4. If it was not, use dylora squeeze"
        in capsys.readouterr().err
    )
    for name, module in model.named_modules():  # the first two components at the strength 12 / 4
        if name.endswith(".query"):
            module.lora_A["default"].weight.data[2:] = 0
    small = loaded(roberta_checkpoint, tmp_path / "small")
    for (name, ours), theirs in zip(small.named_modules(), model.modules(), strict=True):
        if name.endswith(".query"):
            torch.testing.assert_close(ours.get_delta_weight("default"), theirs.get_delta_weight("default"))


def test_the_command_cuts_without_data_and_wants_a_rank(roberta_checkpoint, tmp_path, capsys):
    foreign(roberta_checkpoint, tmp_path / "theirs")
    assert main(["squeeze", str(tmp_path / "theirs"), "--to", str(tmp_path / "small")]) == 2
    assert "Give the rank with --rank or --max-parameters, or --data to choose it by." in capsys.readouterr().err
    idle = ["--rank", "2", "--labels", "no,yes"]
    assert main(["squeeze", str(tmp_path / "theirs"), "--to", str(tmp_path / "small"), *idle]) == 2
    assert "give --data, --importance or --strengths, or leave them out" in capsys.readouterr().err
    for flag, value in (("--max-parameters", "9"), ("--within", "1se")):
        idle = ["--rank", "2", flag, value]
        assert main(["squeeze", str(tmp_path / "theirs"), "--to", str(tmp_path / "small"), *idle]) == 2
        assert f"--rank 2 leaves nothing to choose for {flag}" in capsys.readouterr().err
    idle = ["--max-parameters", "9", "--within", "0.5"]
    assert main(["squeeze", str(tmp_path / "theirs"), "--to", str(tmp_path / "small"), *idle]) == 2
    assert "--within compares the ranks' scores; give the data" in capsys.readouterr().err
    assert main(["squeeze", str(tmp_path / "theirs"), "--to", str(tmp_path / "small"), "--rank", "2"]) == 0
    assert json.loads((tmp_path / "small/adapter_config.json").read_text())["r"] == 2
    card = (tmp_path / "small/README.md").read_text()
    assert "rank 4" in card and "DyLoRA training" not in card
    before = (tmp_path / "small/adapter_model.safetensors").read_bytes()
    assert main(["squeeze", str(tmp_path / "small"), "--to", str(tmp_path / "small"), "--rank", "1"]) == 2
    assert "is the adapter itself" in capsys.readouterr().err
    assert (tmp_path / "small/adapter_model.safetensors").read_bytes() == before


def test_a_classifier_is_measured_and_a_rank_chosen(roberta_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model = foreign(roberta_checkpoint, tmp_path / "theirs", std=2.0)
    rows = [(f"w{i} w{i * i % 90}", "yes" if i % 3 else "no") for i in range(12)]
    with open(tmp_path / "v.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    command = ["squeeze", str(tmp_path / "theirs"), "--to", str(tmp_path / "small"), "--data", str(tmp_path / "v.csv"),
               "--base", str(roberta_checkpoint)]  # fmt: skip
    assert main(command) == 2
    assert "knows 0 (0), 1 (1), 2 (2)" in capsys.readouterr().err
    assert main([*command, "--labels", "no,yes"]) == 2
    assert "has 3 outputs; name each with --labels" in capsys.readouterr().err
    code = main([*command, "--labels", "no,yes,maybe", "--within", "100"])
    assert code == 0, capsys.readouterr().err
    assert "rank 1: v, validation: " in capsys.readouterr().out
    # the table's last row is what PEFT's own model scores
    tokenizer = AutoTokenizer.from_pretrained(roberta_checkpoint)
    with torch.no_grad():
        hits = [model(**tokenizer(t, return_tensors="pt")).logits.argmax().item() == (y == "yes") for t, y in rows]
    card = (tmp_path / "small/README.md").read_text()
    assert f"| 4 | {100 * sum(hits) / 12:.2f} |" in card and "yes" in card


def test_a_head_of_two_layers_has_as_many_outputs_as_labels(tmp_path):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification
    from transformers_dylora.squeezing import outputs

    import loralib as lora
    from loralib.adapters.directory import read_directory

    config = DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=24, num_labels=3)
    model = lora.inject(DistilBertForSequenceClassification(config), ["q_lin"], r=2)
    lora.save_adapter(model, tmp_path / "a")
    files = read_directory(tmp_path / "a")
    assert "pre_classifier" in "".join(files.tensors) and outputs(files) == 3
    files.facts.pop("num_labels")  # as PEFT saves it
    assert outputs(files) == 3


def test_a_language_model_is_measured_by_the_loss_of_its_completions(llama_checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = foreign(llama_checkpoint, tmp_path / "theirs", AutoModelForCausalLM, **options)
    rows = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{i * 7} w{i}"} for i in range(6)]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["squeeze", str(tmp_path / "theirs"), "--to", str(tmp_path / "small"), "--data", str(tmp_path / "v.jsonl"),
               "--base", str(llama_checkpoint), "--rank", "2"]  # fmt: skip
    assert main(command) == 0
    tokenizer = AutoTokenizer.from_pretrained(llama_checkpoint)
    total = count = 0.0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        total += nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    last = next(line for line in (tmp_path / "small/README.md").read_text().splitlines() if line.startswith("| 4 |"))
    assert f"{total / count:.4f}" in last
    other = [*command[:3], str(tmp_path / "other"), *command[4:]]
    assert main([*other, "--labels", "no,yes"]) == 2
    assert "--labels are a classifier's" in capsys.readouterr().err
    (tmp_path / "v.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ""}\n')
    assert main(other) == 2
    assert "has '' for completion in example 1; every example needs text" in capsys.readouterr().err
    (tmp_path / "v.jsonl").write_text('{"a": 1}\n')
    assert main([*command[:3], str(tmp_path / "other"), *command[4:]]) == 2
    assert "needs prompt and completion, or text" in capsys.readouterr().err


def test_ranks_spread_by_importance_hold_as_many_numbers_and_run_in_stock_peft(
    llama_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    foreign(llama_checkpoint, tmp_path / "theirs", AutoModelForCausalLM, **options)
    rows = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{i * 7} w{i}"} for i in range(6)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    importance = ["--base", str(llama_checkpoint), "--importance", str(tmp_path / "t.jsonl")]
    command = ["squeeze", str(tmp_path / "theirs"), *importance]
    sizes = {}
    for b in (1, 2, 4):
        assert main([*command, "--to", str(tmp_path / f"s{b}"), "--rank", str(b)]) == 0
        assert main(["squeeze", str(tmp_path / "theirs"), "--to", str(tmp_path / f"p{b}"), "--rank", str(b)]) == 0
        sizes[b] = describe_adapter(tmp_path / f"p{b}")["adapter_parameters"]
        assert 0 < describe_adapter(tmp_path / f"s{b}")["adapter_parameters"] <= sizes[b]
    assert "in the layers where they matter" in capsys.readouterr().out
    ids = torch.arange(5, 17).reshape(2, 6)
    with torch.no_grad():
        whole = loaded(llama_checkpoint, tmp_path / "theirs", AutoModelForCausalLM)(ids).logits
        kept = loaded(llama_checkpoint, tmp_path / "s4", AutoModelForCausalLM)(ids).logits
        torch.testing.assert_close(kept, whole, atol=1e-4, rtol=1e-4)
        theirs = loaded(llama_checkpoint, tmp_path / "s1", AutoModelForCausalLM)(ids).logits
        ours = AutoModelForCausalLM.from_pretrained(llama_checkpoint)
        lora.load_adapter(ours, tmp_path / "s1")
        torch.testing.assert_close(ours(ids).logits, theirs, atol=1e-4, rtol=1e-4)
    assert "components of all layers" in (tmp_path / "s1/README.md").read_text()
    assert "components of all layers" not in (tmp_path / "p1/README.md").read_text()
    # measured, and with a limit of parameters; a cut adapter is squeezed again
    data = ["--data", str(tmp_path / "t.jsonl"), "--within", "100", "--max-parameters", str(sizes[2])]
    assert main([*command, "--to", str(tmp_path / "chosen"), *data]) == 0
    assert "rank 1: t, validation" in capsys.readouterr().out
    assert main(["squeeze", str(tmp_path / "s2"), "--rank", "1", "--to", str(tmp_path / "again")]) == 0


def test_strengths_learnt_on_training_data_lower_the_loss_and_are_in_a_stock_adapter(
    llama_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    foreign(llama_checkpoint, tmp_path / "theirs", AutoModelForCausalLM, **options)
    rows = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{i * 7} w{i}"} for i in range(6)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["squeeze", str(tmp_path / "theirs"), "--rank", "2"]
    fitted = [*command, "--base", str(llama_checkpoint), "--strengths", str(tmp_path / "t.jsonl")]
    examples, collate, _ = completing(str(tmp_path / "t.jsonl"), AutoTokenizer.from_pretrained(llama_checkpoint), 64)
    batch, found = dict(collate(list(examples))), {}
    for name, line in (("plain", command), ("fitted", fitted)):
        assert main([*line, "--to", str(tmp_path / name)]) == 0
        ours = AutoModelForCausalLM.from_pretrained(llama_checkpoint)
        lora.load_adapter(ours, tmp_path / name)
        with torch.no_grad():
            found[name] = loaded(llama_checkpoint, tmp_path / name, AutoModelForCausalLM)(**batch)
            torch.testing.assert_close(ours(**batch).logits, found[name].logits, atol=1e-4, rtol=1e-4)
    assert found["fitted"].loss < found["plain"].loss - 0.001
    capsys.readouterr()
    assert main([*fitted, "--importance", str(tmp_path / "t.jsonl"), "--to", str(tmp_path / "both")]) == 2
    assert "--strengths is for ranks as they are; give one" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--data", "--importance", "--strengths"])
def test_half_precision_stays_half_after_running(flag, llama_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    options = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    foreign(llama_checkpoint, tmp_path / "theirs", AutoModelForCausalLM, **options)
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    save_file({key: value.half() for key, value in load_file(file).items()}, file)
    (tmp_path / "t.jsonl").write_text('{"text": "w1 w2 w3"}\n{"text": "w4 w5"}\n')
    command = ["squeeze", str(tmp_path / "theirs"), "--base", str(llama_checkpoint), flag, str(tmp_path / "t.jsonl")]
    assert main([*command, "--rank", "2", "--to", str(tmp_path / "small")]) == 0
    found = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.float16}


def test_a_limit_of_parameters_takes_the_largest_rank_that_fits(roberta_checkpoint, tmp_path, capsys):
    foreign(roberta_checkpoint, tmp_path / "theirs")
    whole = describe_adapter(tmp_path / "theirs")["adapter_parameters"]
    command = ["squeeze", str(tmp_path / "theirs"), "--to", str(tmp_path / "small"), "--max-parameters"]
    assert main([*command, str(whole // 4 * 3 + 1)]) == 0
    assert json.loads((tmp_path / "small/adapter_config.json").read_text())["r"] == 3
    assert main([*command, "5"]) == 2
    assert f"No rank has 5 parameters or fewer; the smallest has {whole // 4:,}." in capsys.readouterr().err


def test_a_checkpoint_from_before_its_ordering_is_not_cut(roberta_config, tmp_path, capsys):
    model = lora.inject(AutoModelForSequenceClassification.from_config(roberta_config), ["query"], r=4)
    facts = {"sampling": "example", "full_rank_share": 0.8, "ordered": False}
    lora.save_adapter(model, tmp_path / "early", extra=facts)
    for command in (["export", "--rank", "2"], ["merge", "--rank", "2", "--base", "x"]):
        assert main([command[0], str(tmp_path / "early"), *command[1:], "--to", str(tmp_path / "out")]) == 2
        assert "saved before its components were ordered, and is of use at rank 4 alone" in capsys.readouterr().err
    with pytest.raises(ValueError, match="before its components were ordered"):
        lora.load_adapter(AutoModelForSequenceClassification.from_config(roberta_config), tmp_path / "early", rank=2)
    assert main(["export", str(tmp_path / "early"), "--rank", "4", "--to", str(tmp_path / "whole")]) == 0
    assert "DyLoRA training" not in (tmp_path / "whole/README.md").read_text()
    assert main(["squeeze", str(tmp_path / "early"), "--rank", "2", "--to", str(tmp_path / "small")]) == 0


def test_squeeze_reads_the_columns_of_the_training_and_keeps_what_was_told(
    roberta_checkpoint, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    base = AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint, num_labels=2)
    model = lora.inject(base, ["query"], r=2)
    facts = {"task": "custom", "columns": ["question", "context"], "labels": ["no", "yes"], "sampling": "example",
             "distribution": "mixed", "full_rank_share": 0.8, "frozen": False, "ordered": True, "seed": 5}  # fmt: skip
    lora.save_adapter(model, tmp_path / "ours", extra=facts)
    rows = [
        {"note": "n w", "context": f"w{i}", "question": "w1 " * 200, "label": ("no", "yes")[i % 2]} for i in range(6)
    ]
    (tmp_path / "v.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        "squeeze",
        str(tmp_path / "ours"),
        "--base",
        str(roberta_checkpoint),
        "--data",
        str(tmp_path / "v.jsonl"),
    ]
    assert main([*command, "--rank", "1", "--to", str(tmp_path / "small")]) == 0, capsys.readouterr().err
    told = json.loads((tmp_path / "small/dylora.json").read_text())
    assert {name: told[name] for name in ("columns", "task", "sampling", "seed")} == {
        "columns": ["question", "context"], "task": "custom", "sampling": "example", "seed": 5,
    }  # fmt: skip
    assert "LoRA trained at rank" not in capsys.readouterr().out


def test_layers_of_other_rules_keep_their_strength_too(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = copy.deepcopy(base)
    lora.inject(model, ["0"], r=4, scaling="alpha/r")
    lora.inject(model, ["1"], r=4, scaling="alpha/b")
    for layer in model:
        nn.init.normal_(layer.lora_B)
    lora.save_adapter(model, tmp_path / "ours")
    squeeze_adapter(tmp_path / "ours", tmp_path / "squeezed")
    for b in (1, 2, 4):
        cut_adapter(tmp_path / "squeezed", tmp_path / f"cut{b}", b)
        plain = copy.deepcopy(base)
        lora.load_adapter(plain, tmp_path / f"cut{b}")
        for layer, whole in zip(plain, model, strict=True):
            values, wanted = (torch.linalg.svdvals(one.delta_weight()) for one in (layer, whole))
            torch.testing.assert_close(values[:b], wanted[:b])


def test_what_is_beside_the_weights_comes_along(roberta_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    foreign(roberta_checkpoint, tmp_path / "theirs")
    AutoTokenizer.from_pretrained(roberta_checkpoint).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "the/base", "revision": "v1"})
    )
    (tmp_path / "v.jsonl").write_text(
        "".join(json.dumps({"text": f"w{i}", "label": str(i % 2)}) + "\n" for i in range(6))
    )
    ran = ["--base", str(roberta_checkpoint), "--labels", "0,1"]
    for flags in ([], ["--data", str(tmp_path / "v.jsonl"), *ran], ["--importance", str(tmp_path / "v.jsonl"), *ran]):
        to = tmp_path / f"to{len(flags)}{(flags or ['-'])[0]}"
        assert main(["squeeze", str(tmp_path / "theirs"), "--rank", "2", "--to", str(to), *flags]) == 0
        config = json.loads((to / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("the/base", "v1")
        assert AutoTokenizer.from_pretrained(to)("w1 w2") == AutoTokenizer.from_pretrained(roberta_checkpoint)("w1 w2")


def test_an_export_over_an_earlier_one_keeps_none_of_its_tokenizer(roberta_checkpoint, tmp_path):
    foreign(roberta_checkpoint, tmp_path / "theirs")
    AutoTokenizer.from_pretrained(roberta_checkpoint).save_pretrained(tmp_path / "theirs")
    command = ["export", str(tmp_path / "theirs"), "--rank", "4", "--to", str(tmp_path / "out")]
    assert main(command) == 0 and list((tmp_path / "out").glob("tokenizer*"))
    for file in (tmp_path / "theirs").glob("tokenizer*"):
        file.unlink()
    assert main(command) == 0 and not list((tmp_path / "out").glob("tokenizer*"))


def test_export_asks_of_ranks_that_nothing_was_told_of(roberta_checkpoint, tmp_path, capsys):
    """A DyLoraConfig that a trainer without ranks trained; and a loop of one's own, which is known to have drawn."""
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint),
        DyLoraConfig(r=4, lora_alpha=8, target_modules=["query"], task_type="SEQ_CLS"),
    )
    model.save_pretrained(tmp_path / "never")
    assert main(["export", str(tmp_path / "never"), "--rank", "2", "--to", str(tmp_path / "small")]) == 0
    assert "does not say that it was trained for ranks below 4" in capsys.readouterr().err
    for name, prepare in (("ordered", lora.order_components), ("drawn", draw)):
        model = lora.inject(AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint), ["query"], r=4)
        prepare(model)
        lora.save_adapter(model, tmp_path / name)
        assert main(["export", str(tmp_path / name), "--rank", "2", "--to", str(tmp_path / f"{name}2")]) == 0
        assert "does not say" not in capsys.readouterr().err
    facts = json.loads((tmp_path / "drawn" / "dylora.json").read_text())
    assert facts["sampling"] == "step" and facts["full_rank_share"] == 0


def draw(model):
    lora.mark_only_lora_as_trainable(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    schedule = lora.RankSchedule("step", full_rank_share=0).resolve(r_max=4)
    for batch in schedule.over([{"input_ids": IDS}] * 2, model, optimizer):
        model(**batch).logits.sum().backward()
