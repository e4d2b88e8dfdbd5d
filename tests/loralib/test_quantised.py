"""Bases of bitsandbytes in 4 and 8 bits and of torchao in int8, on a CPU, for real: after inject and inside PEFT.

torchao makes every import of transformers three times as slow, so it stands beside the environment, and one test runs
its cases in a process that sees it.
"""

import contextlib
import copy
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import loralib as lora
from loralib.cli import main
from loralib.layout import LayoutError
from loralib.model import lora_layers
from loralib.peft import DyLoraConfig
from loralib.quantised import dequantised, is_quantised, keep_gradients, row_by_row

from .helpers import IDS
from .helpers import logits_at as out

bnb = pytest.importorskip("bitsandbytes")
BESIDE = Path(sys.prefix) / "torchao"  # scripts/env.sh puts it there
HERE = importlib.util.find_spec("torchao") is not None
KINDS = ["torchao"] if HERE else ["nf4", "int8"]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
TARGETS = ["q_proj", "v_proj", "down_proj"]


def whole(layers=2):
    """A model as wide as a kernel for 4 bits wants it."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=2, vocab_size=120)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)).eval()


def quantised(kind):
    model = whole()
    if kind == "torchao":
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            return loaded(kind, directory)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            if kind == "nf4":
                made = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            else:
                made = bnb.nn.Linear8bitLt(
                    module.in_features, module.out_features, bias=False, has_fp16_weights=False, threshold=6.0
                )
            made.load_state_dict(module.state_dict(), strict=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made)
    return model.to("cpu").eval()


def loaded(kind, directory, **options):
    """As transformers quantises a model while it loads it."""
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    elif kind == "nf4":
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
    else:
        config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, **options).eval()


def adapted(model, door):
    torch.manual_seed(1)
    if door == "peft":
        return get_peft_model(model, DyLoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    lora.inject(model, TARGETS, r=4, lora_alpha=8)
    lora.mark_only_lora_as_trainable(model)
    return model


def strong(model):
    generator = torch.Generator().manual_seed(1)
    for _, layer in lora_layers(model):
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
    return model.eval()


@EVERY_KIND
@pytest.mark.parametrize("door", ["inject", "peft"])
def test_it_trains_to_the_loss_of_a_whole_base(kind, door):
    losses = {}
    for name, base in (("whole", whole()), ("quantised", quantised(kind))):
        model = adapted(base, door)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in lora.RankSchedule().resolve(4, steps=60).over([IDS] * 60, model.train(), optimizer):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses[name] = float(model.eval()(input_ids=IDS, labels=IDS).loss)
        mixed = out(model, torch.tensor([1, 2, 4]))
        for row, rank in enumerate((1, 2, 4)):
            torch.testing.assert_close(mixed[row], out(model, rank)[row], atol=0.05, rtol=0.05)
    assert losses["whole"] < 4.0 and abs(losses["whole"] - losses["quantised"]) < 0.05 * losses["whole"], losses


def gradients(model):
    model.train().zero_grad()
    lora.set_rank(model, 3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [layer.lora_B.grad.clone() for _, layer in lora_layers(model)]


def made_whole(model):
    """The same model with the weights that the quantised ones stand for."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantised(module.weight):
            weight, _ = dequantised(module)
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            plain.weight = nn.Parameter(weight.float(), requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    return model


@EVERY_KIND
@pytest.mark.parametrize("door", ["inject", "peft"])
def test_gradients_are_those_of_the_whole_weights_before_and_after_an_evaluation(kind, door):
    base = quantised(kind)
    model, twin = (strong(adapted(one, door)) for one in (base, made_whole(base)))
    wanted = gradients(twin)
    for _ in range(2):
        for got, expected in zip(gradients(model), wanted, strict=True):
            assert float((got - expected).norm() / expected.norm()) < (0.05 if kind == "int8" else 1e-3)
        model.eval()
        with torch.no_grad():
            model(input_ids=IDS)


@EVERY_KIND
def test_it_is_stock_pefts_lora_at_r_max(kind, tmp_path):
    model = strong(adapted(quantised(kind), "inject"))
    lora.save_adapter(model, tmp_path / "a")
    stock = PeftModel.from_pretrained(quantised(kind), tmp_path / "a").eval()
    keep_gradients(stock.modules())  # packed weights are multiplied in bf16
    torch.testing.assert_close(out(stock), out(model, 4), atol=1e-4, rtol=1e-3)
    inside = PeftModel.from_pretrained(
        quantised(kind), tmp_path / "a", config=DyLoraConfig.from_pretrained(str(tmp_path / "a"))
    ).eval()
    for rank in (0, 1, 3, torch.tensor([1, 4, 2])):
        torch.testing.assert_close(out(inside, rank), out(model, rank), atol=1e-4, rtol=1e-3)
    assert not isinstance(LoraConfig.from_pretrained(str(tmp_path / "a")), DyLoraConfig)


@pytest.mark.skipif(HERE, reason="only LLM.int8 rounds what goes in")
@pytest.mark.parametrize("door", ["inject", "peft"])
def test_rounding_to_8_bits_is_not_taken_for_another_layout(door, monkeypatch):
    """A last digit that depends on the batch becomes a step of 8 bits, and layers grow it."""
    deep = whole(layers=8)
    for parameter in deep.model.layers.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    monkeypatch.setattr(sys.modules[__name__], "whole", lambda: copy.deepcopy(deep))
    model = adapted(quantised("int8"), door)
    assert out(model, torch.tensor([1, 4, 2])).shape[0] == 3
    monkeypatch.setattr("loralib.learning.row_by_row", lambda modules: contextlib.nullcontext())
    with pytest.raises(LayoutError):
        out(adapted(quantised("int8"), door), torch.tensor([1, 4, 2]))


@pytest.mark.skipif(HERE, reason="only LLM.int8 rounds what goes in")
def test_8_bits_are_looked_at_as_the_values_that_they_stand_for():
    layer = bnb.nn.Linear8bitLt(64, 32, bias=True, has_fp16_weights=False)
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    layer, x = layer.to("cpu"), torch.randn(3, 64)
    for _ in range(2):  # a pass moves the scales elsewhere
        with torch.no_grad(), row_by_row([layer]):
            weight, _ = dequantised(layer)
            torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, layer.bias))
        before = layer(x)
        assert torch.equal(layer(x), before) and 0 < float((before - x @ weight.T - layer.bias).norm()) < 0.1


@pytest.mark.skipif(HERE, reason="only LLM.int8 rounds what goes in")
def test_all_ranks_of_a_batch_where_plain_layers_are_in_8_bits_and_have_hooks():
    model = strong(adapted(quantised("int8"), "inject"))
    calls = []
    model.model.layers[0].self_attn.k_proj.forward = record(model.model.layers[0].self_attn.k_proj, calls)
    with torch.no_grad():
        found = dict(lora.at_ranks(model, {"input_ids": IDS}, [1, 2, 3]))
    for b, output in found.items():
        torch.testing.assert_close(output.logits, out(model, b), atol=0.05, rtol=0.05)
    before = len(calls)
    out(model, torch.tensor([1, 2, 3]))
    assert len(calls) > before  # what accelerate puts before a forward is still there


def record(layer, calls):
    forward = layer.forward

    def run(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    return run


@pytest.mark.skipif(HERE, reason="bitsandbytes alone stores 4 bits so")
def test_4_bits_stored_as_bf16_are_quantised_all_the_same(tmp_path):
    base = whole()
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            made = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, quant_type="nf4", quant_storage=torch.bfloat16
            )
            made.load_state_dict(module.state_dict(), strict=False)
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, made)
    model = strong(adapted(base.to("cpu").eval(), "inject"))
    wanted = out(model, 3)
    with pytest.warns(UserWarning, match="makes the quantised layers whole"):
        merged = lora.merge(model, rank=3)
    assert float((out(merged) - wanted).norm() / wanted.norm()) < 0.02
    lora.save_adapter(model, tmp_path / "a")
    lora.load_adapter(whole(), tmp_path / "a")  # told from another base by nothing that is packed


@pytest.mark.skipif(HERE, reason="PEFT's own layers for torchao take one adapter at a time")
@EVERY_KIND
def test_a_batch_of_several_adapters_casts_for_those_without_ranks(kind):
    model = adapted(quantised(kind), "peft")
    model.add_adapter("plain", LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.isfinite(layer.eval()(x, adapter_names=["plain", "default"])).all()


@EVERY_KIND
def test_its_adapter_loads_on_the_whole_base_and_back(kind, tmp_path):
    model = strong(adapted(quantised(kind), "inject"))
    lora.save_adapter(model, tmp_path / "a")
    other = whole()
    lora.load_adapter(other, tmp_path / "a")
    for (_, one), (_, twin) in zip(lora_layers(model), lora_layers(other), strict=True):
        assert torch.equal(one.lora_A, twin.lora_A) and torch.equal(one.lora_B, twin.lora_B)
    lora.save_adapter(other, tmp_path / "b")
    again = quantised(kind)
    lora.load_adapter(again, tmp_path / "b")
    torch.testing.assert_close(out(again, 2), out(model, 2))


@EVERY_KIND
def test_merging_dequantises_and_says_what_it_costs(kind):
    model = strong(adapted(quantised(kind), "inject"))
    wanted = out(model, 3)
    with pytest.warns(UserWarning, match=r"makes the quantised layers whole: [\d.]+ MiB become"):
        merged = lora.merge(model, rank=3)
    layer = merged.model.layers[0].self_attn.q_proj
    assert type(layer) is nn.Linear and layer.weight.is_floating_point()
    torch.testing.assert_close(out(merged), wanted, atol=0.1, rtol=0.1)
    assert float((out(merged) - wanted).norm() / wanted.norm()) < (0.02 if kind == "nf4" else 0.05)
    torch.testing.assert_close(out(model, 3), wanted)  # the model itself stays quantised
    with pytest.raises(RuntimeError, match="quantised, and its weight has no place for the update"):
        lora_layers(model)[0][1].merge()


@pytest.mark.skipif(not HERE, reason="torchao stands beside the environment")
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_torchaos_optimizers_are_ordered_and_frozen(name):
    """Their states are tensors of their own kind, in blocks of the flattened elements."""
    import torchao.optim

    layer = lora.Linear(1024, 1024, r=8)
    nn.init.normal_(layer.lora_B)
    model = nn.Sequential(layer)
    optimizer = getattr(torchao.optim, name)([layer.lora_A, layer.lora_B], lr=1e-3)

    def step():
        optimizer.zero_grad()
        model(torch.randn(4, 1024)).square().mean().backward()
        optimizer.step()

    step()
    before = {p: optimizer.state[p]["exp_avg"].dequantize() for p in (layer.lora_A, layer.lora_B)}
    A, wanted = layer.lora_A.detach().clone(), {}
    lora.order_components(model, optimizer)
    R = layer.lora_A.detach() @ torch.linalg.pinv(A)
    wanted = {layer.lora_A: torch.linalg.pinv(R).mT @ before[layer.lora_A], layer.lora_B: before[layer.lora_B] @ R.mT}
    for p, value in wanted.items():
        found = optimizer.state[p]["exp_avg"].dequantize()
        assert float((found - value).norm() / value.norm()) < (0.02 if name == "AdamW8bit" else 0.2)
    lora.freeze_undrawn(optimizer, model)
    lora.set_rank(model, 3, frozen=True)
    before_A, before_B = layer.lora_A.detach().clone(), layer.lora_B.detach().clone()
    step()
    assert [j + 1 for j in range(8) if not torch.equal(layer.lora_A[j], before_A[j])] == [3]
    assert [j + 1 for j in range(8) if not torch.equal(layer.lora_B[:, j], before_B[:, j])] == [3]


@pytest.mark.skipif(HERE, reason="this process is the other one")
def test_all_this_with_torchao():
    if not BESIDE.is_dir():
        pytest.skip("torchao is not beside the environment; scripts/test.sh puts it there")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(BESIDE)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "12 passed" in done.stdout, done.stdout[-3000:] + done.stderr[-2000:]


@EVERY_KIND
def test_pefts_merging_after_a_pass_is_right_too(kind):
    model = strong(adapted(quantised(kind), "peft"))
    wanted = out(model, 3)  # on a CPU this packs 4-bit weights
    lora.set_rank(model, 3)
    model.merge_adapter()
    assert float((out(model) - wanted).norm() / wanted.norm()) < 0.2  # quantised again, with the update
    model.unmerge_adapter()
    assert float((out(model) - wanted).norm() / wanted.norm()) < 0.2


@EVERY_KIND
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_a_merged_model_is_what_it_was_after_saving_it(targets, kind, tmp_path):
    whole().save_pretrained(tmp_path / "whole")
    model = loaded(kind, tmp_path / "whole")
    lora.inject(model, targets, r=4, lora_alpha=8)
    strong(model)
    merged = lora.merge(model, rank=3)
    wanted = out(merged)
    merged.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    # What stays quantised may compute in bf16 once it is loaded.
    assert float((out(again) - wanted).norm() / wanted.norm()) < 0.02
    layers = [again.model.layers[0].self_attn.q_proj, again.model.layers[0].mlp.up_proj]
    assert [is_quantised(layer.weight) for layer in layers] == [False, targets != "all-linear"]


@pytest.mark.skipif(HERE, reason="bitsandbytes' alone")
def test_a_base_that_is_stored_quantised_is_one_sentence_to_the_command_that_merges(tmp_path, capsys):
    whole().save_pretrained(tmp_path / "whole")
    loaded("nf4", tmp_path / "whole").save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    lora.inject(model, ["q_proj"], r=2)
    lora.save_adapter(model, tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), "--rank", "2", "--to", str(tmp_path / "to")]) == 2
    assert "is stored quantised" in capsys.readouterr().err and not (tmp_path / "to").exists()
    assert (
        main(
            [
                "merge",
                str(tmp_path / "adapter"),
                "--rank",
                "2",
                "--base",
                str(tmp_path / "whole"),
                "--to",
                str(tmp_path / "to"),
            ]
        )
        == 0
    )
