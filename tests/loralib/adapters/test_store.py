"""Adapters on disk: stock PEFT gives the same logits at every rank; damage is one clear error and changes nothing."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaForSequenceClassification,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import loralib as lora
from loralib.adapters.directory import cut_adapter, describe_adapter
from loralib.adapters.squeeze import squeeze_adapter
from loralib.model import lora_layers
from loralib.peft import DyLoraConfig

SCALINGS = ["alpha/b", "alpha/r", "alpha/sqrt(b)"]


def stock(kind, roberta_config):
    torch.manual_seed(1)
    if kind == "roberta":
        return RobertaForSequenceClassification(roberta_config).eval(), ["query", "value"]
    if kind == "roberta with embeddings":
        return RobertaForSequenceClassification(roberta_config).eval(), ["word_embeddings", "key"]
    if kind == "gpt2":
        config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        return GPT2LMHeadModel(config).eval(), ["c_attn", "c_fc"]
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval(), ["q_proj", "v_proj"]


def randomise(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)


def close(x, y):
    return (x - y).abs().max().item() <= 1e-5 * max(1.0, y.abs().max().item())


@pytest.mark.parametrize("kind", ["roberta", "roberta with embeddings", "gpt2", "llama"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_stock_peft_gives_the_same_logits_at_every_rank(kind, scaling, roberta_config, tmp_path):
    model, targets = stock(kind, roberta_config)
    lora.inject(model, targets, r=4, lora_alpha=6, scaling=scaling)
    randomise(model)
    if hasattr(model, "classifier"):
        nn.init.normal_(model.classifier.out_proj.weight)
    ids = torch.randint(3, 40, (3, 7))
    sizes = []
    for b in range(1, 5):
        lora.save_adapter(model, tmp_path / str(b), rank=b)
        with torch.no_grad(), lora.use_rank(model, b):
            wanted = model(ids).logits
            peft = PeftModel.from_pretrained(stock(kind, roberta_config)[0], tmp_path / str(b)).eval()
            assert close(peft(ids).logits, wanted)
        reloaded = stock(kind, roberta_config)[0]
        lora.load_adapter(reloaded, tmp_path / str(b))
        assert lora.max_rank(reloaded) == b
        with torch.no_grad():
            assert close(reloaded(ids).logits, wanted)
        tensors = load_file(tmp_path / str(b) / "adapter_model.safetensors")
        sizes.append(sum(v.numel() for k, v in tensors.items() if "lora_" in k))
    assert [4 * size for size in sizes] == [b * sizes[-1] for b in range(1, 5)]


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.qkv = nn.Linear(16, 12)

    def forward(self, x):
        return self.qkv(self.conv(x).flatten(2).mean(1))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_convolutions_and_merged_projections_too(scaling, tmp_path):
    x = torch.randn(3, 2, 6, 6)
    for b in (1, 2, 3):
        torch.manual_seed(2)
        model = Images()
        base = {k: v.clone() for k, v in model.state_dict().items()}
        lora.inject(model, ["conv"], r=3, lora_alpha=5, scaling=scaling)
        merged = lora.MergedLinear(16, 12, r=3, lora_alpha=5, enable_lora=[True, False, True], scaling=scaling)
        merged.weight, merged.bias, model.qkv = model.qkv.weight, model.qkv.bias, merged
        randomise(model)
        lora.save_adapter(model, tmp_path / str(b), rank=b)
        plain = Images()
        plain.load_state_dict(base)
        lora.set_rank(model, b)
        assert close(PeftModel.from_pretrained(plain, tmp_path / str(b))(x), model(x))
        wanted = {k: v.clone() for k, v in lora.lora_state_dict(model).items()}
        if b == 3:
            for p in wanted:
                model.get_parameter(p).data.zero_()
            lora.load_adapter(model, tmp_path / str(b))
            assert all(torch.equal(v, wanted[k]) for k, v in lora.lora_state_dict(model).items())


def same_directory(one, other):
    tensors = [load_file(d / "adapter_model.safetensors") for d in (one, other)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(v, tensors[1][k]) for k, v in tensors[0].items())
    for name in ("adapter_config.json", "dylora.json"):
        configs = [json.loads((d / name).read_text()) for d in (one, other)]
        for key in configs[0].keys() | configs[1].keys():
            left, right = (c[key] for c in configs)
            assert left == (pytest.approx(right) if isinstance(right, float) else right), key


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", ["roberta with embeddings", "gpt2", "images"])
def test_a_directory_is_cut_without_its_model_as_with_it(kind, scaling, roberta_config, tmp_path):
    if kind == "images":
        model = Images()
        lora.inject(model, ["conv"], r=4, lora_alpha=5, scaling=scaling)
        model.qkv = lora.MergedLinear(16, 12, r=4, lora_alpha=5, enable_lora=[True, False, True], scaling=scaling)
    else:
        model, targets = stock(kind, roberta_config)
        lora.inject(model, targets[:1], r=4, lora_alpha=6, scaling=scaling)
        lora.inject(model, targets[1:], r=2, lora_alpha=3, scaling=scaling)  # layers of another r and alpha
    randomise(model)
    lora.save_adapter(model, tmp_path / "whole", extra={"task": "rte"})
    for b in (1, 3, 4):
        lora.save_adapter(model, tmp_path / f"with{b}", rank=b, extra={"task": "rte"})
        cut_adapter(tmp_path / "whole", tmp_path / f"without{b}", b)
        same_directory(tmp_path / f"with{b}", tmp_path / f"without{b}")
    with pytest.raises(ValueError, match=r"1\.\.4"):
        cut_adapter(tmp_path / "whole", tmp_path / "x", 5)


@pytest.mark.parametrize("kernel", [2, 3])
def test_pefts_convolutions_are_cut_again_as_they_were(kernel, tmp_path):
    net = nn.Sequential(OrderedDict(conv=nn.Conv2d(2, 4, kernel), fc=nn.Linear(4, 4)))
    base = {key: value.clone() for key, value in net.state_dict().items()}
    torch.manual_seed(0)
    theirs = get_peft_model(net, LoraConfig(r=8, target_modules=["conv"]))
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    cut_adapter(tmp_path / "theirs", tmp_path / "8", 8)
    for b in (4, 1):
        cut_adapter(tmp_path / "theirs", tmp_path / f"{b}", b)
        cut_adapter(tmp_path / "8", tmp_path / f"8-{b}", b)
        cut_adapter(tmp_path / f"{b}", tmp_path / f"{b}-{b}", b)
        same_directory(tmp_path / f"{b}", tmp_path / f"8-{b}")
        same_directory(tmp_path / f"{b}", tmp_path / f"{b}-{b}")
    plain = nn.Sequential(OrderedDict(conv=nn.Conv2d(2, 4, kernel), fc=nn.Linear(4, 4)))
    plain.load_state_dict(base)
    with pytest.raises(ValueError, match="in PEFT's way"):
        lora.load_adapter(plain, tmp_path / "4")


def test_a_sample_of_what_has_no_weight_is_no_sample(tmp_path):
    base = Images()
    model = lora.inject(copy.deepcopy(base), ["qkv"], r=2)
    lora.save_adapter(model, tmp_path)
    facts = json.loads((tmp_path / "dylora.json").read_text())
    for name in ("", "nowhere"):
        (tmp_path / "dylora.json").write_text(json.dumps(facts | {"base_sample_of": name}))
        assert lora.load_adapter(copy.deepcopy(base), tmp_path) == []


def test_a_file_without_factors_is_not_cut(tmp_path):
    model = Images()
    lora.inject(model, ["qkv"], r=2)
    lora.save_adapter(model, tmp_path / "ours")
    save_file({"base_model.model.head.weight": torch.ones(2)}, tmp_path / "ours/adapter_model.safetensors")
    (tmp_path / "ours/dylora.json").unlink()
    with pytest.raises(ValueError, match="holds no LoRA factors"):
        cut_adapter(tmp_path / "ours", tmp_path / "cut", 1)
    assert not (tmp_path / "cut").exists()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("inside", [False, True])
def test_rows_of_new_tokens_come_with_pefts_embeddings(inside, tied, tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")

    def base(seed, tokens=70):
        torch.manual_seed(seed)
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(tokens, mean_resizing=False)
        return model

    options = dict(r=4, target_modules=["q_proj", "embed_tokens", *([] if tied else ["lm_head"])])
    theirs = get_peft_model(base(1), LoraConfig(**options)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.tensor([[1, 2, 66, 68, 69]])
    ours = get_peft_model(base(2), DyLoraConfig(**options)) if inside else base(2)
    lora.load_adapter(ours, tmp_path / "theirs")
    assert close(ours.eval()(ids).logits, theirs(ids).logits)
    other = base(3, tokens=66)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    if not inside:
        with pytest.raises(ValueError, match="resize its embeddings first"):
            lora.load_adapter(other, tmp_path / "theirs")
        assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_own_adapters_load(rslora, roberta_config, tmp_path):
    base, _ = stock("roberta", roberta_config)
    options = LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=["query", "value"], use_rslora=rslora, init_lora_weights=False,
        rank_pattern={"layer.0.attention.self.query": 2}, alpha_pattern={"layer.0.attention.self.query": 3},
    )  # fmt: skip
    peft = get_peft_model(base, options).eval()
    peft.save_pretrained(tmp_path)
    model, _ = stock("roberta", roberta_config)
    assert lora.load_adapter(model, tmp_path) == []
    ids = torch.randint(3, 40, (3, 7))
    with torch.no_grad():
        assert close(model(ids).logits, peft(ids).logits)
    assert lora.max_rank(model) == 4


def saved(roberta_config, path, r=4, **options):
    model, targets = stock("roberta", roberta_config)
    lora.inject(model, targets, r=r, **{"lora_alpha": 6, "scaling": "alpha/b", **options})
    randomise(model)
    lora.save_adapter(model, path)
    return model


def other(roberta_config, r=4, **options):
    model, targets = stock("roberta", roberta_config)
    return lora.inject(model, targets, r=r, **{"lora_alpha": 6, "scaling": "alpha/b", **options})


def cut(path):
    data = (path / "adapter_model.safetensors").read_bytes()
    (path / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])


def without_head(path):
    tensors = load_file(path / "adapter_model.safetensors")

    save_file({k: v for k, v in tensors.items() if "classifier" not in k}, path / "adapter_model.safetensors")


DAMAGE = {
    "truncated": (cut, {}, "damaged"),
    "no weights": (lambda p: (p / "adapter_model.safetensors").unlink(), {}, "incomplete"),
    "no configuration": (lambda p: (p / "adapter_config.json").unlink(), {}, "adapter_config.json"),
    "no JSON": (lambda p: (p / "adapter_config.json").write_text("{"), {}, "JSON"),
    "another method": (lambda p: (p / "adapter_config.json").write_text('{"peft_type": "IA3"}'), {}, "IA3"),
    "no head": (without_head, {}, "classifier"),
    "another rank": (lambda p: None, {"r": 2}, "rank 4"),
    "another alpha": (lambda p: None, {"lora_alpha": 7}, "lora_alpha = 6"),
    "another scaling": (lambda p: None, {"scaling": "alpha/r"}, "scaling"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_bad_directory_is_one_error_and_changes_nothing(what, roberta_config, tmp_path):
    saved(roberta_config, tmp_path)
    damage, options, message = DAMAGE[what]
    damage(tmp_path)
    model = other(roberta_config, **options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        lora.load_adapter(model, tmp_path)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_other_base_weights_and_other_models_are_refused(roberta_config, tmp_path):
    saved(roberta_config, tmp_path)
    model = other(roberta_config)
    nn.init.normal_(model.roberta.encoder.layer[-1].attention.self.value.weight)
    with pytest.raises(ValueError, match="other base weights"):
        lora.load_adapter(model, tmp_path)
    gpt2, _ = stock("gpt2", roberta_config)
    with pytest.raises(ValueError, match="another model"):
        lora.load_adapter(gpt2, tmp_path)
    assert not any(isinstance(m, lora.LoRALayer) for m in gpt2.modules())


def test_a_larger_file_loads_cut_to_the_models_rank(roberta_config, tmp_path):
    trained = saved(roberta_config, tmp_path)
    model = other(roberta_config, r=2)
    lora.load_adapter(model, tmp_path, rank=2)
    ids = torch.randint(3, 40, (3, 7))
    with torch.no_grad(), lora.use_rank(trained, 2):
        assert close(model(ids).logits, trained(ids).logits)


def test_a_head_of_another_shape_stays_fresh_on_request(roberta_config, tmp_path):
    saved(roberta_config, tmp_path)
    roberta_config = type(roberta_config).from_dict(roberta_config.to_dict() | {"num_labels": 2})
    model = other(roberta_config)
    before = model.classifier.dense.weight.clone()
    with pytest.raises(ValueError, match="number of labels"):
        lora.load_adapter(model, tmp_path)
    assert lora.load_adapter(model, tmp_path, head="fresh") == ["classifier"]
    assert torch.equal(model.classifier.dense.weight, before)
    assert lora.get_rank(model) == 4 and model.roberta.encoder.layer[0].attention.self.query.lora_B.any()


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_a_bin_with_code_is_refused_and_not_run(roberta_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"query.lora_A": Malicious()}, "evil.bin")
    with pytest.raises(ValueError, match="code"):
        lora.load_adapter(other(roberta_config), "evil.bin")
    assert not (tmp_path / "hacked").exists()


def test_released_bin_files_load_with_distributed_prefixes_and_whole_models(roberta_config, tmp_path):
    trained = saved(roberta_config, tmp_path / "dir")
    torch.save({f"module.{k}": v for k, v in lora.lora_state_dict(trained).items()}, tmp_path / "lora.bin")
    torch.save(trained.state_dict(), tmp_path / "whole.bin")
    model = other(roberta_config)
    assert lora.load_adapter(model, tmp_path / "lora.bin", head="fresh") == ["classifier"]
    assert lora.load_adapter(model, tmp_path / "whole.bin") == []
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("rank", [0, 5, True, 2.0])
def test_a_rank_that_cannot_be_saved(rank, roberta_config, tmp_path):
    with pytest.raises(ValueError, match="rank"):
        lora.save_adapter(other(roberta_config), tmp_path / "x", rank=rank)
    assert not (tmp_path / "x").exists()


WRITER = """
import sys, torch, loralib as lora
model = torch.nn.Sequential(torch.nn.Linear(600, 600), torch.nn.Linear(600, 600))
lora.inject(model, ["0", "1"], r=64)
i = 0
while True:
    i += 1
    for p in model.parameters():
        p.data.fill_(i)
    lora.save_adapter(model, sys.argv[1])
    print(i, flush=True)
"""


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_a_whole_adapter(tmp_path):
    """Killed at many moments; what is on disk always loads and holds one version throughout."""
    for kill in range(6):
        target = tmp_path / str(kill)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(target)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(0.003 * kill)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        values = {
            float(v.flatten()[k]) for v in load_file(target / "adapter_model.safetensors").values() for k in (0, -1)
        }
        assert len(values) == 1 and math.isfinite(values.pop())
        json.loads((target / "adapter_config.json").read_text())


def test_files_of_two_saves_never_mix(roberta_config, tmp_path, monkeypatch):
    """A kill between the renames: the weights go by the strength that was saved with them."""
    model = saved(roberta_config, tmp_path)
    with torch.no_grad():
        wanted = model(IDS).logits
    monkeypatch.setattr(os, "replace", interrupted(os.replace, 2))  # the new configuration, the old weights
    with pytest.raises(KeyboardInterrupt):
        saved(roberta_config, tmp_path, r=2, lora_alpha=60)
    monkeypatch.undo()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == 60
    again, _ = stock("roberta", roberta_config)
    again.classifier.load_state_dict(model.classifier.state_dict())
    lora.load_adapter(again, tmp_path)
    with torch.no_grad():
        assert close(again(IDS).logits, wanted)


IDS = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(0))


def interrupted(function, after):
    """``function`` that works so many times and then is a user's Ctrl-C."""
    calls = []

    def run(*args):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(*args)

    return run


def test_what_a_killed_writer_left_is_cleared_away(roberta_config, tmp_path):
    (tmp_path / ".adapter_config.json.123.tmp").write_text("half")
    saved(roberta_config, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "dylora.json",
    ]


def test_other_base_weights_are_refused_for_a_plain_model_too(roberta_config, tmp_path):
    saved(roberta_config, tmp_path)
    model, _ = stock("roberta", roberta_config)
    nn.init.normal_(model.roberta.encoder.layer[-1].attention.self.value.weight)
    with pytest.raises(ValueError, match="other base weights"):
        lora.load_adapter(model, tmp_path)
    assert not any(isinstance(m, lora.LoRALayer) for m in model.modules())


def test_a_large_weight_is_sampled_within_its_bounds():
    layer = lora.Linear(4096, 11008, r=1, device="meta")
    layer.weight = nn.Parameter(torch.zeros(1).expand(11008, 4096), requires_grad=False)
    from loralib.adapters.fingerprint import fingerprint

    assert fingerprint(layer.weight) == [0.0] * 16


def test_what_is_trained_beside_the_adapter_is_never_dropped(roberta_config, tmp_path):
    base, _ = stock("roberta", roberta_config)
    options = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], bias="lora_only")
    get_peft_model(base, options).save_pretrained(tmp_path / "peft")
    with pytest.raises(ValueError, match="bias"):
        lora.load_adapter(stock("roberta", roberta_config)[0], tmp_path / "peft")
    model = other(roberta_config)
    lora.mark_only_lora_as_trainable(model, bias="all")
    with pytest.raises(ValueError, match="lora_state_dict"):
        lora.save_adapter(model, tmp_path / "ours")


def test_pefts_patterns_are_regular_expressions(roberta_config, tmp_path):
    base, _ = stock("gpt2", roberta_config)
    options = LoraConfig(
        r=2, lora_alpha=4, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True,
        alpha_pattern={r"h\.\d+\.attn\.c_attn": 64},
    )  # fmt: skip
    peft = get_peft_model(base, options).eval()
    peft.save_pretrained(tmp_path)
    model, _ = stock("gpt2", roberta_config)
    lora.load_adapter(model, tmp_path)
    with torch.no_grad():
        assert close(model(IDS).logits, peft(IDS).logits)


@pytest.mark.parametrize("rank", [0, -1, True, "2", 2.5])
def test_a_rank_that_cannot_be_loaded(rank, roberta_config, tmp_path):
    saved(roberta_config, tmp_path)
    with pytest.raises(ValueError, match="rank is"):
        lora.load_adapter(other(roberta_config), tmp_path, rank=rank)


def test_a_merged_model_takes_no_adapter(roberta_config, tmp_path):
    saved(roberta_config, tmp_path)
    model = other(roberta_config)
    model.roberta.encoder.layer[0].attention.self.query.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        lora.load_adapter(model, tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora", True, "gaussian", "orthogonal"])
def test_an_adapter_that_is_no_plain_update_of_its_base_is_refused_by_name(start, roberta_config, tmp_path):
    base, targets = stock("roberta", roberta_config)
    kept = {k: v.clone() for k, v in base.state_dict().items()}
    peft = get_peft_model(
        base, LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=6, target_modules=targets, init_lora_weights=start)
    ).eval()
    randomise(peft) if start not in ("pissa", "olora") else None
    peft.save_pretrained(tmp_path)
    model, _ = stock("roberta", roberta_config)
    model.load_state_dict(kept)
    if start in ("pissa", "olora"):
        with pytest.raises(ValueError, match=f"init_lora_weights = '{start}'.* cannot load it"):
            lora.load_adapter(model, tmp_path)
        return
    lora.load_adapter(model, tmp_path)
    with torch.no_grad():
        assert close(model(IDS).logits, peft(IDS).logits)


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_dora", True), ("bias", "all"), ("alora_invocation_tokens", [1]), ("layer_replication", [[0, 2]]), ("lora_bias", True),
     ("target_parameters", ["w"]), ("trainable_token_indices", [3]), ("something_new", {"a": 1})],
)  # fmt: skip
def test_a_field_of_peft_that_changes_the_numbers_is_refused_by_name(name, value, roberta_config, tmp_path):
    saved(roberta_config, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match=name):
        lora.load_adapter(stock("roberta", roberta_config)[0], tmp_path)


def test_a_rank_that_disagrees_with_the_factors_is_refused(roberta_config, tmp_path):
    """Of an adapter of PEFT's; the weights' file of ours tells its rank itself."""
    saved(roberta_config, tmp_path / "good")
    (tmp_path / "good" / "dylora.json").unlink()
    weights = tmp_path / "good" / "adapter_model.safetensors"
    save_file(load_file(weights), weights)
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    for r in (2 * config["r"], config["r"] // 2):
        (tmp_path / "good" / "adapter_config.json").write_text(json.dumps(config | {"r": r, "rank_pattern": {}}))
        with pytest.raises(ValueError, match=f"says rank {r} for"):
            cut_adapter(tmp_path / "good", tmp_path / "x", 1)
        assert not (tmp_path / "x").exists()


def test_norms_are_not_computed_in_the_files_precision(roberta_config, tmp_path):
    model = saved(roberta_config, tmp_path / "fp32")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 1e-3 if "lora_B" in name else 1
    lora.save_adapter(model, tmp_path / "fp32")
    shutil.copytree(tmp_path / "fp32", tmp_path / "fp16")
    file = tmp_path / "fp16" / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file)
    norms = [describe_adapter(tmp_path / name)["norms"] for name in ("fp32", "fp16")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_neither_saved_nor_loaded_nor_cut(bad, roberta_config, tmp_path):
    model = saved(roberta_config, tmp_path / "good")
    before = (tmp_path / "good" / "adapter_model.safetensors").read_bytes()
    layer = model.roberta.encoder.layer[0].attention.self.query
    value = layer.lora_A.data[0, 0].item()
    layer.lora_A.data[0, 0] = bad
    with pytest.raises(ValueError, match="not finite, and nothing was saved"):
        lora.save_adapter(model, tmp_path / "good")
    assert (tmp_path / "good" / "adapter_model.safetensors").read_bytes() == before
    layer.lora_A.data[0, 0] = value

    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = bad
    save_file(tensors, tmp_path / "good" / "adapter_model.safetensors")
    for use in (
        lambda: lora.load_adapter(model, tmp_path / "good"),
        lambda: cut_adapter(tmp_path / "good", tmp_path / "x", 1),
    ):
        with pytest.raises(ValueError, match=r"not finite .* train it anew"):
            use()
    tensors = {key: tensor.to(torch.int8) for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "good" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"in torch\.int8; an adapter's numbers are floats"):
        lora.load_adapter(model, tmp_path / "good")


def test_a_head_is_put_in_the_models_order_by_its_label_names(roberta_config, tmp_path):
    def classifier(*names):
        config = type(roberta_config).from_dict(roberta_config.to_dict() | {"id2label": dict(enumerate(names))})
        return stock("roberta", config)

    model, targets = classifier("no", "maybe", "yes")
    lora.inject(model, targets, r=2)
    randomise(model)
    lora.save_adapter(model, tmp_path)
    with torch.no_grad():
        wanted = model(IDS).logits
    other, _ = classifier("YES", "no", "maybe")
    lora.load_adapter(other, tmp_path)
    with torch.no_grad():
        assert close(other(IDS).logits, wanted[:, [2, 0, 1]])
    third, _ = classifier("a", "b", "c")
    with pytest.raises(ValueError, match="knows the labels no, maybe, yes, the model a, b, c"):
        lora.load_adapter(third, tmp_path)
    assert not any(isinstance(m, lora.LoRALayer) for m in third.modules())


@pytest.mark.parametrize("heads", [["lm_head"], ["wte"], ["lm_head", "wte"]], ids=str)
def test_a_tied_module_to_save_trains_and_its_export_is_exact(heads, roberta_config, tmp_path):
    model, targets = stock("gpt2", roberta_config)
    lora.inject(model, targets, r=2, modules_to_save=heads)
    lora.mark_only_lora_as_trainable(model)
    randomise(model)
    ids, before = torch.randint(0, 40, (2, 7)), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for name in ("lm_head", "transformer.wte"):
        moved = not torch.equal(model.state_dict()[f"{name}.weight"], before[f"{name}.weight"])
        assert moved == (name.rpartition(".")[2] in heads)
    lora.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        wanted = model(ids).logits
        peer = PeftModel.from_pretrained(stock("gpt2", roberta_config)[0], tmp_path / "adapter").eval()
        assert close(peer(ids).logits, wanted)
        again, _ = stock("gpt2", roberta_config)
        lora.load_adapter(again, tmp_path / "adapter")
        assert close(again(ids).logits, wanted)
        lora.merge(model).save_pretrained(tmp_path / "whole")
        assert close(GPT2LMHeadModel.from_pretrained(tmp_path / "whole").eval()(ids).logits, wanted)


def test_a_tied_module_to_save_is_refused_where_the_tie_is_computed_with():
    config = UMT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, tie_word_embeddings=True)
    model = UMT5ForConditionalGeneration(config)
    with pytest.raises(ValueError, match="computes otherwise without the tie; leave it out"):
        lora.inject(model, ["q"], modules_to_save=["lm_head"])
    assert not lora.model.has_lora(model)


def test_equal_adapters_are_equal_files(roberta_config, tmp_path):
    model, targets = stock("roberta", roberta_config)
    lora.inject(model, targets, r=2)
    seen = set()
    for _ in range(12):  # safetensors' own metadata comes in any order
        lora.save_adapter(model, tmp_path)
        seen.add(tuple(file.read_bytes() for file in sorted(tmp_path.iterdir())))
    assert len(seen) == 1
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as opened:
        assert opened.metadata()["format"] == "pt"
        assert all(
            torch.equal(opened.get_tensor(k), v) for k, v in load_file(tmp_path / "adapter_model.safetensors").items()
        )


@pytest.mark.parametrize("beside", ["lora_magnitude_vector", "lora_B.bias", "lora_C.weight", "lora_A.default.weight"])
def test_what_stands_beside_factors_and_is_none_is_refused(beside, tmp_path):
    """Also where nothing is loaded: a cut without it would be another update."""
    model = lora.inject(nn.Sequential(OrderedDict(fc=nn.Linear(4, 4))), ["fc"], r=4)
    lora.save_adapter(model, tmp_path / "a")
    file = tmp_path / "a/adapter_model.safetensors"
    save_file(load_file(file) | {f"base_model.model.fc.{beside}": torch.ones(4)}, file)
    for use in (
        lambda: lora.load_adapter(model, tmp_path / "a"),
        lambda: cut_adapter(tmp_path / "a", tmp_path / "cut", 2),
        lambda: squeeze_adapter(tmp_path / "a", tmp_path / "squeezed"),
    ):
        with pytest.raises(ValueError, match="is no factor of a plain LoRA"):
            use()
    assert not (tmp_path / "cut").exists() and not (tmp_path / "squeezed").exists()


@pytest.mark.parametrize("name", ["lora_A", "lora_x", "base_layer", "lora_B.base_layer"])
def test_names_like_those_of_a_file_are_names(name, tmp_path):
    # In a file the ending of a key alone tells a factor from what stands before it.
    def model(seed):
        torch.manual_seed(seed)
        inner, head = nn.Linear(4, 4), nn.Linear(4, 4)
        for part in reversed(name.split(".")):
            inner = nn.Sequential(OrderedDict([(part, inner)]))
        return nn.Sequential(OrderedDict([("body", inner), ("lora_head", head)]))

    trained, fresh = model(0), model(0)
    lora.inject(trained, [name], r=4, modules_to_save=["lora_head"])
    ((_, layer),) = lora_layers(trained)
    nn.init.normal_(layer.lora_B)
    lora.save_adapter(trained, tmp_path / "whole")
    assert describe_adapter(tmp_path / "whole")["head_parameters"] == 4 * 4 + 4
    cut_adapter(tmp_path / "whole", tmp_path / "cut", 2)
    x = torch.randn(3, 4)
    for directory, rank in (("whole", 4), ("cut", 2)):
        loaded = copy.deepcopy(fresh)
        lora.load_adapter(loaded, tmp_path / directory)
        with lora.use_rank(trained, rank), torch.no_grad():
            torch.testing.assert_close(loaded(x), trained(x))
