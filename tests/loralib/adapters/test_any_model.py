"""Adapters of models that are no language models: names that end alike, several rules of strength, wrapped models,
running statistics; and files that do not belong together."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

import loralib as lora
from loralib.adapters.directory import cut_adapter, read_directory
from loralib.model import lora_layers
from loralib.peft import DyLoraConfig


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv2(self.conv1(x).relu())


class Net(nn.Module):
    """As a ResNet names its layers: conv1 is the ending of layers.0.conv1, and has another kernel."""

    def __init__(self):
        super().__init__()
        self.conv1, self.layers = nn.Conv2d(3, 4, 7, padding=3), nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.conv1(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))


def nested():
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)))


def filled(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def of_peft(base, path, x):
    return PeftModel.from_pretrained(copy.deepcopy(base), path).eval()(x)


CASES = {
    "conv": (Net, dict(target_modules=["conv1"], r=2), torch.randn(2, 3, 8, 8)),
    "ranks": (nested, dict(target_modules=["0", "1", "2.0"], r=2, rank_pattern={"^0": 4}), torch.randn(5, 6)),
    "alphas": (nested, dict(target_modules=["0", "1", "2.0"], r=2, alpha_pattern={"^0": 9}), torch.randn(5, 6)),
    "no others": (nested, dict(target_modules="1", r=2), torch.randn(5, 6)),  # 2.1 is a ReLU
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_whose_name_is_the_ending_of_another_keeps_its_own_rank_and_strength(case, tmp_path):
    make, options, x = CASES[case]
    torch.manual_seed(0)
    base = make().eval()
    model = filled(lora.inject(copy.deepcopy(base), **options))
    lora.save_adapter(model, tmp_path / "a")
    again = copy.deepcopy(base)
    lora.load_adapter(again, tmp_path / "a")
    for b in range(lora.max_rank(model) + 1):
        with lora.use_rank(model, b), lora.use_rank(again, b):
            torch.testing.assert_close(again(x), model(x))
    for b in (1, 2):
        cut_adapter(tmp_path / "a", tmp_path / "cut", b)
        with lora.use_rank(model, b):
            torch.testing.assert_close(of_peft(base, tmp_path / "cut", x), model(x))


@pytest.mark.parametrize("rules", [("alpha/r", "alpha/b"), ("alpha/sqrt(b)", "alpha/b"), ("alpha/b", "alpha/sqrt(b)")])
def test_every_layer_keeps_its_rule_of_strength_cut_or_whole(rules, tmp_path):
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), torch.randn(5, 6)
    model = copy.deepcopy(base)
    for target, rule in zip("01", rules, strict=True):
        lora.inject(model, [target], r=4, lora_alpha=8, scaling=rule)
    filled(model)
    lora.save_adapter(model, tmp_path / "a")
    again = copy.deepcopy(base)
    lora.load_adapter(again, tmp_path / "a")
    assert [layer.scaling for _, layer in lora_layers(again)] == list(rules)
    for b in (1, 2, 4):
        lora.save_adapter(model, tmp_path / "saved", rank=b)
        cut_adapter(tmp_path / "a", tmp_path / "cut", b)
        with lora.use_rank(model, b), lora.use_rank(again, b):
            torch.testing.assert_close(again(x), model(x))
            for path in ("saved", "cut"):
                torch.testing.assert_close(of_peft(base, tmp_path / path, x), model(x))


def test_a_dropout_comes_back(tmp_path):
    base = nested()
    lora.save_adapter(lora.inject(copy.deepcopy(base), ["2.0"], r=2, lora_dropout=0.3), tmp_path)
    lora.load_adapter(base, tmp_path)
    assert base[2][0].lora_dropout.p == 0.3


@pytest.mark.filterwarnings("ignore:.*DataParallel")
def test_what_is_wrapped_is_saved_loaded_and_merged_as_itself(tmp_path):
    torch.manual_seed(0)
    base, x = nested().eval(), torch.randn(5, 6)
    model = filled(lora.inject(copy.deepcopy(base), ["0"], r=4, modules_to_save=["1"]))
    around = nn.DataParallel(model)
    lora.save_adapter(around, tmp_path / "a", rank=2)
    lora.set_rank(around, 2)
    torch.testing.assert_close(of_peft(base, tmp_path / "a", x), model(x))
    torch.testing.assert_close(lora.merge(around)(x), model(x))
    torch.testing.assert_close(lora.merge(torch.compile(model, backend="eager"))(x), model(x))
    lora.save_adapter(model, tmp_path / "whole")
    other = nn.DataParallel(filled(lora.inject(copy.deepcopy(base), ["0"], r=4, modules_to_save=["1"])))
    lora.load_adapter(other, tmp_path / "whole")
    lora.set_rank(other, 2)
    torch.testing.assert_close(other.module(x), model(x))
    with pytest.raises(ValueError, match=r"DataParallel is around the model .* call inject first"):
        lora.inject(nn.DataParallel(copy.deepcopy(base)), ["0"])


def test_torchs_checkpoint_wrapper_leaves_no_trace_in_names(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.manual_seed(0)
    base, x = nested().eval(), torch.randn(5, 6)
    model = filled(lora.inject(copy.deepcopy(base), ["2.0"], r=4))
    model[2] = checkpoint_wrapper(model[2])
    lora.save_adapter(model, tmp_path)
    torch.testing.assert_close(of_peft(base, tmp_path, x), model(x))


def test_a_module_around_keeps_what_the_model_inside_trains_beside_the_adapter(tmp_path):
    class Task(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model, self.beside = lora.inject(nested(), ["2.0"], r=2, modules_to_save=["2.2"]), nn.Linear(3, 3)

    task = Task()
    lora.mark_only_lora_as_trainable(task)
    trains = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert trains == {"model.2.0.lora_A", "model.2.0.lora_B", "model.2.2.weight", "model.2.2.bias"}
    nn.init.ones_(task.model[2][2].weight)
    lora.save_adapter(task, tmp_path)
    again = Task()
    lora.load_adapter(again, tmp_path)
    assert again.model[2][2].weight.eq(1).all()


def test_running_statistics_are_saved_with_their_module_and_told_of_otherwise(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))

    with pytest.warns(UserWarning, match=r"^1 \(one of 1\) keeps running statistics"):
        lora.inject(net(), ["0"], r=2, modules_to_save=["2"])
    model = lora.inject(net(), ["0"], r=2, modules_to_save=["1", "2"])
    filled(model).train()
    for _ in range(3):
        model(torch.randn(8, 6) + 5)
    lora.save_adapter(model.eval(), tmp_path)
    again = net()
    lora.load_adapter(again, tmp_path)
    x = torch.randn(4, 6)
    torch.testing.assert_close(again.eval()(x), model(x))
    assert int(again[1].num_batches_tracked) == 3


@pytest.mark.parametrize("r", [4, 8])
@pytest.mark.parametrize("first", ["ours", "in PEFT"])
def test_the_table_of_another_adapter_beside_pefts_weights_is_named(first, r, tmp_path):
    if first == "ours":
        lora.save_adapter(lora.inject(nested(), ["0"], r=4), tmp_path, extra={"labels": ["a"]})
    else:
        get_peft_model(nested(), DyLoraConfig(r=4, target_modules=["0"], rank_scaling="alpha/b")).save_pretrained(
            tmp_path
        )
    assert read_directory(tmp_path).rank == 4
    get_peft_model(nested(), LoraConfig(r=r, target_modules=["0"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"dylora.json is of other weights than those beside it, .*: remove it"):
        read_directory(tmp_path)
    (tmp_path / "dylora.json").unlink()
    assert read_directory(tmp_path).rank == r and read_directory(tmp_path).scaling == "alpha/r"


def test_biases_that_trained_are_refused_before_a_training(tmp_path, roberta_checkpoint):
    from transformers import AutoModelForSequenceClassification, TrainingArguments

    from loralib.trainer import DyLoRATrainer

    model = lora.inject(AutoModelForSequenceClassification.from_pretrained(roberta_checkpoint), ["query"], r=2)
    lora.mark_only_lora_as_trainable(model, bias="all")
    with pytest.raises(ValueError, match="bias = 'all' trained biases"):
        DyLoRATrainer(model=model, args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))


def test_a_weight_that_is_moved_to_another_dtype_while_merged_comes_back_in_it():
    layer = lora.Linear(4, 4, r=2)
    layer.merge()
    layer.to(torch.bfloat16)
    layer.unmerge()
    assert layer.weight.dtype == torch.bfloat16 and layer(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16


def test_a_config_keeps_its_rule_under_another_adapter_name(tmp_path):
    from loralib.peft import DyLoraConfig

    config = DyLoraConfig(r=4, target_modules=["0"], rank_scaling="alpha/b")
    get_peft_model(nested(), config, adapter_name="mine").save_pretrained(tmp_path)
    assert DyLoraConfig.from_pretrained(tmp_path, subfolder="mine").rank_scaling == "alpha/b"
    facts = json.loads((tmp_path / "mine" / "dylora.json").read_text())
    (tmp_path / "mine" / "dylora.json").write_text(json.dumps(facts | {"components_at": {"0": [1, 2, 3, 4]}}))
    with pytest.raises(ValueError, match="spread over the layers, which PEFT has no place for"):
        DyLoraConfig.from_pretrained(tmp_path, subfolder="mine")


def test_save_pretrained_says_what_it_leaves_out(tmp_path):
    """And what it names instead works; copies save themselves, and a merged model saves without a word."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20)
    model = lora.inject(BertModel(config).eval(), ["query"], r=2)
    nn.init.normal_(model.encoder.layer[0].attention.self.query.lora_B)
    ids = torch.arange(6)[None]
    wanted = model(ids).last_hidden_state
    with pytest.warns(UserWarning, match=r"from_pretrained passes over: keep the adapter with loralib.save_adapter"):
        model.save_pretrained(tmp_path / "whole")
    assert not torch.allclose(BertModel.from_pretrained(tmp_path / "whole").eval()(ids).last_hidden_state, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lora.merge(model).save_pretrained(tmp_path / "plain")
    plain = BertModel.from_pretrained(tmp_path / "plain").eval()
    torch.testing.assert_close(plain(ids).last_hidden_state, wanted)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embeddings.word_embeddings.weight.zero_()
    with pytest.warns(UserWarning, match="from_pretrained passes over"):
        twin.save_pretrained(tmp_path / "twin")
    assert not BertModel.from_pretrained(tmp_path / "twin").embeddings.word_embeddings.weight.any()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(ids).last_hidden_state, wanted)
