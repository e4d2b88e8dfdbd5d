"""inject, ranks of a whole model, what trains, merging."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import GPT2Config, GPT2LMHeadModel, RobertaForSequenceClassification

import loralib as lora
from loralib.heads import default_head
from loralib.model import lora_layers


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.query, self.key = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.classifier = nn.Linear(6, 2)

    def forward(self, ids):
        h = self.embed(ids)
        h = self.query(h) + self.key(h)
        return self.classifier(h + self.conv(h[:, None]).mean(1))


def adapted(targets=("embed", "query", "conv"), r=4):
    model = lora.inject(Net(), list(targets), r=r, lora_alpha=8, scaling="alpha/b", modules_to_save=["classifier"])
    for layer in model.modules():
        if isinstance(layer, lora.LoRALayer):
            nn.init.normal_(layer.lora_A)
            nn.init.normal_(layer.lora_B)
    return model


IDS = torch.arange(12).view(3, 4) % 9


def test_inject_keeps_the_parameters_and_the_output():
    model = Net()
    before, weights = model(IDS), dict(model.named_parameters())
    assert lora.inject(model, ["embed", "query", "conv"], r=4) is model
    assert torch.equal(model(IDS), before)
    for name, parameter in weights.items():
        assert dict(model.named_parameters())[name] is parameter
    assert isinstance(model.query, lora.Linear) and isinstance(model.embed, lora.Embedding)


def test_targets_match_as_in_peft():
    assert type(lora.inject(Net(), r".*e(y|mbed)|key", r=1).key) is lora.Linear
    assert type(lora.inject(Net(), "key", r=1).query) is nn.Linear


@pytest.mark.filterwarnings("ignore:target_modules names 'quer'")
@pytest.mark.parametrize("targets", [["quer"], [], "nothing.*", "attention"])
def test_no_match_names_what_could_have(targets):
    with pytest.raises(ValueError, match="classifier, conv, embed, key, query"):
        lora.inject(Net(), targets, r=2)


@pytest.mark.parametrize("name", ["attention", "out_proj"])
def test_a_name_of_which_nothing_can_be_adapted_is_refused_beside_others(name):
    """out_proj of nn.MultiheadAttention is a Linear that attention never calls: adapting it would do nothing."""
    with pytest.raises(
        ValueError, match=f"target_modules names '{name}', and .* which cannot be adapted; leave it out"
    ):
        lora.inject(Net(), ["query", name], r=2)


def test_a_name_that_is_no_modules_is_said():
    with pytest.warns(UserWarning, match="target_modules names 'quer', which ends no module's name"):
        lora.inject(Net(), ["key", "quer"], r=2)
    with pytest.warns(UserWarning, match="exclude_modules names 'quer'"):
        lora.inject(Net(), ["key"], r=2, exclude_modules=["quer"])
    with pytest.raises(ValueError, match=r"layers_to_transform = \[\] leaves out all"):
        lora.inject(Net(), ["key"], r=2, layers_to_transform=[])


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 2)])
        self.classifier = self.heads[0]

    def forward(self, x):
        return self.classifier(self.body(x))


def test_a_module_of_two_names_is_judged_by_both():
    model = lora.inject(Twice(), "all-linear", r=2, modules_to_save=["classifier"])
    lora.mark_only_lora_as_trainable(model)
    assert type(model.classifier) is nn.Linear and model.classifier.weight.requires_grad
    assert isinstance(model.body, lora.Linear) and not model.body.weight.requires_grad
    left_out = lora.inject(Twice(), "all-linear", r=2, exclude_modules=["classifier"])
    assert type(left_out.heads[0]) is nn.Linear and isinstance(left_out.body, lora.Linear)


def test_an_adapter_of_a_module_of_two_names_comes_back(tmp_path):
    plain = Twice()
    model = lora.inject(copy.deepcopy(plain), "all-linear", r=2, modules_to_save=["classifier"])
    nn.init.normal_(model.body.lora_B)
    nn.init.normal_(model.classifier.weight)
    lora.save_adapter(model, tmp_path)
    lora.load_adapter(plain, tmp_path)
    x = torch.randn(3, 4)
    torch.testing.assert_close(plain(x), model(x))


@pytest.mark.parametrize("r", [0, -1, True, 2.0])
def test_inject_needs_a_rank(r):
    with pytest.raises(ValueError, match="r is"):
        lora.inject(Net(), ["query"], r=r)


def test_a_module_to_save_must_exist_and_is_never_adapted():
    with pytest.raises(ValueError, match="'head'"):
        lora.inject(Net(), ["query"], r=2, modules_to_save=["head"])
    model = lora.inject(Net(), ".*", r=2, modules_to_save=["classifier"])
    assert type(model.classifier) is nn.Linear and type(model.key) is lora.Linear


def test_a_batch_of_mixed_ranks_is_each_example_alone():
    model = adapted()
    lora.set_rank(model, torch.tensor([0, 2, 4]))
    mixed = model(IDS)
    for i, b in enumerate((0, 2, 4)):
        with lora.use_rank(model, b):
            assert torch.allclose(model(IDS[i : i + 1])[0], mixed[i], atol=1e-5)
    assert lora.get_rank(model).tolist() == [0, 2, 4]


def test_layers_of_different_r_run_at_what_they_have():
    model = adapted(("query",), r=4)
    lora.inject(model, ["key"], r=2, lora_alpha=8, scaling="alpha/b")
    nn.init.normal_(model.key.lora_B)
    assert lora.max_rank(model) == 4
    lora.set_rank(model, 3)
    assert (lora.get_rank(model), model.query.get_rank(), model.key.get_rank()) == (3, 3, 2)
    high = model(IDS)
    lora.set_rank(model, torch.tensor([3, 3, 3]))
    assert torch.allclose(model(IDS), high, atol=1e-5)


def test_use_rank_puts_the_state_back_also_after_an_exception():
    model = adapted()
    lora.set_gate(model, torch.ones(4))
    before = model(IDS)
    with pytest.raises(KeyError), lora.use_rank(model, 1):
        assert lora.get_rank(model) == 1
        raise KeyError
    assert lora.get_rank(model) is None
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("ranks", [None, [1, 2, 4]])
def test_the_matryoshka_gate_combines_the_updates_of_all_ranks(reduce, ranks):
    model = adapted(("query",))
    lora.set_matryoshka_gate(model, ranks, reduce)
    x = torch.randn(3, 6)
    found = model.query(x) - model.query.base(x)
    updates = []
    for b in ranks or [1, 2, 3, 4]:
        model.query.set_rank(b)
        updates.append(model.query(x) - model.query.base(x))
    assert torch.allclose(found, getattr(torch.stack(updates), reduce)(0), atol=1e-4)


def test_weights_of_ranks_are_the_weighted_updates_also_of_a_smaller_layer():
    model = adapted(("query",), r=4)
    lora.inject(model, ["key"], r=2, lora_alpha=8, scaling="alpha/b")
    nn.init.normal_(model.key.lora_B)
    lora.declare_layout(model, 0)  # its layers are called here without it
    weights, x = torch.tensor([[0.5, 0.25, 0.0, 0.25], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]), torch.randn(3, 6)
    lora.set_rank(model, weights)
    assert lora.get_rank(model) is None
    for layer in (model.query, model.key):
        found = layer(x) - layer.base(x)
        updates = []
        for b in (1, 2, 3, 4):
            with lora.use_rank(model, b):
                updates.append(layer(x) - layer.base(x))
        assert torch.allclose(found, torch.einsum("ib,bio->io", weights, torch.stack(updates)), atol=1e-4)


@pytest.mark.parametrize("weights", [torch.ones(3, 3), torch.ones(3, 5), torch.ones(0, 4)])
def test_weights_of_other_ranks_are_refused(weights):
    with pytest.raises(ValueError, match=r"weights of the ranks 1..4 have shape \(batch, 4\)"):
        lora.set_rank(adapted(), weights)


def test_weights_of_ranks_are_not_rounded_under_autocast():
    model = adapted(("query",), r=4)
    weights = torch.full((3, 4), 1 / 3)
    lora.set_rank(model, weights)
    gate = model.query.state.gate
    with torch.autocast("cpu", torch.bfloat16):
        lora.set_rank(model, weights)
    assert torch.equal(model.query.state.gate, gate) and model.query.state.gate.dtype == torch.float32


def test_weights_of_ranks_cannot_be_frozen():
    model = adapted()
    with pytest.raises(ValueError, match="frozen"):
        lora.set_rank(model, torch.ones(3, 4), frozen=True)
    assert lora.get_rank(model) == 4


def test_the_matryoshka_gate_of_a_smaller_layer_counts_all_ranks():
    model = adapted(("query",), r=4)
    lora.inject(model, ["key"], r=2, lora_alpha=8, scaling="alpha/b")
    gates = []
    for ranks in (None, [1, 2, 3, 4]):
        lora.set_matryoshka_gate(model, ranks)
        gates.append(model.key.state.gate)
    assert torch.equal(*gates) and torch.equal(gates[0], torch.tensor([8 + 3 * 4.0, 3 * 4.0]))
    with pytest.raises(ValueError, match="rank is 5"):
        lora.set_matryoshka_gate(model, [5])


def test_a_gate_is_not_rounded_in_bf16():
    layer = lora.Linear(4, 4, r=3, lora_alpha=16, dtype=torch.bfloat16)
    layer.set_rank(torch.tensor([3]))
    assert layer.state.gate[0].tolist() == pytest.approx([16 / 3] * 3, rel=1e-6)


@pytest.mark.parametrize(
    "gate", [torch.ones(3), torch.ones(3, 5), torch.ones(1, 1, 4), torch.ones(4, dtype=torch.long), 1.0]
)
def test_a_wrong_gate_is_refused(gate):
    with pytest.raises((TypeError, ValueError), match="gate"):
        lora.set_gate(adapted(), gate)


def test_without_layers_there_is_one_clear_error():
    with pytest.raises(ValueError, match="inject"):
        lora.set_rank(Net(), 1)


def test_set_rank_changes_nothing_where_one_layer_is_merged():
    model = adapted()
    model.conv.merge()
    with pytest.raises(RuntimeError, match="layer 'conv' is merged"):
        lora.set_rank(model, 2)
    assert model.embed.get_rank() == 4


@pytest.mark.parametrize("change", [lambda m: lora.set_gate(m, torch.ones(4)), lora.set_matryoshka_gate])
def test_a_gate_changes_nothing_where_one_layer_is_merged(change):
    model = adapted()
    model.conv.merge()
    states = [layer.state for _, layer in lora_layers(model)]
    with pytest.raises(RuntimeError, match="layer 'conv' is merged"):
        change(model)
    assert all(layer.state is state for (_, layer), state in zip(lora_layers(model), states, strict=True))


@pytest.mark.parametrize(
    ("bias", "also"),
    [
        ("none", set()),
        ("lora_only", {"query.bias", "conv.bias"}),
        ("all", {"query.bias", "conv.bias", "attention.out_proj.bias"}),
    ],
)
def test_what_trains(bias, also):
    model = adapted()
    lora.mark_only_lora_as_trainable(model, bias)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    factors = {f"{m}.lora_{f}" for m in ("embed", "query", "conv") for f in "AB"}
    assert trains == factors | {"classifier.weight", "classifier.bias"} | also
    state = set(lora.lora_state_dict(model, bias))
    assert state == factors | also | ({"classifier.bias"} if bias == "all" else set())


@pytest.mark.parametrize(
    ("name", "config", "head"),
    [
        ("CLIPForImageClassification", "CLIPConfig", ["classifier"]),
        ("WhisperForAudioClassification", "WhisperConfig", ["projector", "classifier"]),
        ("BlipForQuestionAnswering", "BlipConfig", []),
    ],
)
def test_a_model_within_a_classifier_is_no_head(name, config, head):
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config)())
    assert default_head(model) == head


def test_a_transformers_classifier_keeps_its_head(roberta_config):
    model = lora.inject(RobertaForSequenceClassification(roberta_config), ["query", "value"], r=2)
    lora.mark_only_lora_as_trainable(model)
    trains = {n.split(".")[0] for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trains == {"classifier"}


@pytest.mark.parametrize("b", [0, 1, 3])
@pytest.mark.parametrize("inplace", [False, True])
def test_merge_gives_a_plain_model_with_equal_outputs(b, inplace):
    model = adapted()
    with lora.use_rank(model, b):
        wanted = model(IDS)
    weights = copy.deepcopy(model.state_dict())
    plain = lora.merge(model, b, inplace=inplace)
    assert torch.allclose(plain(IDS), wanted, atol=1e-5)
    assert not any(type(m).__module__.startswith("loralib") for m in plain.modules())
    assert plain.state_dict().keys() == Net().state_dict().keys()
    assert (plain is model) == inplace
    if not inplace:
        assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_merge_of_a_gpt2_keeps_conv1d_and_the_tied_embedding():
    config = GPT2Config(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.arange(6)[None]
    stock = model(ids).logits
    lora.inject(model, ["c_attn", "wte"], r=2)
    lora.set_rank(model, 0)
    assert torch.allclose(model(ids).logits, stock, atol=1e-6)
    lora.set_rank(model, 2)
    for _, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, lora.LoRALayer)]:
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    wanted = model(ids).logits
    plain = lora.merge(model, 2)
    assert type(plain.transformer.h[0].attn.c_attn).__name__ == "Conv1D"
    assert torch.allclose(plain(ids).logits, wanted, atol=1e-4)


def test_importing_loralib_needs_torch_alone():
    code = (
        "import sys; import torch; before = set(sys.modules); import loralib; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "loralib.inject(torch.nn.Sequential(torch.nn.Linear(2, 2)), ['0'], r=1); loralib.learn_layout; "
        "new |= {m.split('.')[0] for m in set(sys.modules) - before}; assert 'torch._dynamo' not in sys.modules; "
        "assert not new & {'transformers', 'peft', 'matplotlib', 'safetensors', 'numpy', 'scipy', 'sklearn'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ranks_per_example_are_compiled_once():
    """Shapes do not depend on the ranks drawn: one graph, forward and backward, serves them all."""
    model = nn.Sequential(lora.Linear(6, 5, r=4, lora_alpha=8), nn.Tanh(), lora.Linear(5, 3, r=4, lora_alpha=8))
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(model, backend=counter), torch.randn(7, 6)
    for step in range(4):
        lora.set_rank(model, lora.RankSampler(4, seed=step)(step, 7))
        found = compiled(x)
        torch.testing.assert_close(found, model(x))
        found.sum().backward()
    assert counter.frame_count == 1
