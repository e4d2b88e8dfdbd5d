"""What ranks share is computed once, and nothing changes."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, RobertaForSequenceClassification

import loralib as lora
from loralib import all_ranks
from loralib.all_ranks import passes, share_between_ranks


def models(roberta_config):
    torch.manual_seed(0)
    yield lora.inject(RobertaForSequenceClassification(roberta_config), ["query", "value"], r=4, lora_alpha=8)
    yield lora.inject(RobertaForSequenceClassification(roberta_config), ["word_embeddings", "dense"], r=4, lora_alpha=8)
    config = GPT2Config(vocab_size=120, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    yield lora.inject(GPT2LMHeadModel(config), ["c_attn"], r=4, lora_alpha=8)


def randomised(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model.eval()


@pytest.mark.parametrize("which", range(3))
def test_all_ranks_are_as_without_sharing(which, roberta_config):
    model = randomised(list(models(roberta_config))[which])
    batches = [
        {"input_ids": torch.randint(3, 100, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
        for _ in range(2)
    ]
    with torch.no_grad():
        wanted = []
        for inputs in batches:
            for b in range(5):
                with lora.use_rank(model, b):
                    wanted.append(model(**inputs).logits)
        found = []
        with share_between_ranks(model) as new_batch:
            for inputs in batches:
                new_batch(inputs)
                for b in range(5):
                    with lora.use_rank(model, b):
                        found.append(model(**inputs).logits)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    assert not any("forward" in m.__dict__ or "base" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("budget", [0, 40, 60, 10_000])
def test_ranks_that_share_a_pass_have_their_own_logits(budget, which, roberta_config, monkeypatch):
    """3 examples of 6 tokens: 1, 2, 3 or all 5 ranks go together."""
    monkeypatch.setattr(all_ranks, "STACKED_TOKENS", budget)
    model = randomised(list(models(roberta_config))[which])
    inputs = {"input_ids": torch.randint(3, 100, (3, 6)), "attention_mask": torch.ones(3, 6, dtype=torch.long)}
    found = []
    with torch.no_grad(), share_between_ranks(model) as new_batch:
        plan = passes(inputs, [0, 1, 2, 3, 4])
        new_batch(*(own for _, _, own in plan))
        for ranks, rank, own in plan:
            assert len(own["input_ids"]) == 3 * len(ranks) and own["input_ids"].numel() <= max(18, budget)
            with lora.use_rank(model, rank):
                found += model(**own).logits.chunk(len(ranks))
        for b, logits in enumerate(found):
            with lora.use_rank(model, b):
                torch.testing.assert_close(logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert [len(ranks) for ranks, _, _ in plan] == {0: [1] * 5, 40: [1, 2, 2], 60: [2, 3], 10_000: [5]}[budget]


def test_passes_can_be_told_not_to_stack():
    inputs = {"input_ids": torch.ones(2, 3), "scale": torch.tensor(2.0)}
    assert [(ranks, rank) for ranks, rank, _ in passes(inputs, [1, 3], stack=False)] == [([1], 1), ([3], 3)]
    assert all(own is inputs for _, _, own in passes(inputs, [1, 3], stack=False))
    assert passes(inputs, [1, 3])[0][2]["scale"] == 2


def test_embeddings_and_the_first_projections_run_once(roberta_config):
    model = next(models(roberta_config)).eval()
    layers = [layer.attention.self for layer in model.roberta.encoder.layer]
    count = {"embeddings": 0, "first key": 0, "second key": 0}

    def counting(name, module):
        forward = type(module).forward

        def run(*args, **kwargs):
            count[name] += 1
            return forward(module, *args, **kwargs)

        module.forward = run

    counting("embeddings", model.roberta.embeddings)
    counting("first key", layers[0].key)
    counting("second key", layers[1].key)
    with torch.no_grad(), share_between_ranks(model) as new_batch:
        inputs = {"input_ids": torch.randint(3, 100, (3, 6))}
        new_batch(inputs)
        for b in range(1, 5):
            with lora.use_rank(model, b):
                model(**inputs)
    assert count == {"embeddings": 1, "first key": 1, "second key": 4}


def test_modules_are_put_back_after_an_exception(roberta_config):
    model = next(models(roberta_config))
    with pytest.raises(KeyError), share_between_ranks(model):
        raise KeyError
    assert not any("forward" in m.__dict__ or "base" in m.__dict__ for m in model.modules())


class InPlace(torch.nn.Module):
    """A residual added in place to what the ranks share."""

    def __init__(self):
        super().__init__()
        self.embed, self.query = torch.nn.Embedding(9, 6), torch.nn.Linear(6, 6)

    def forward(self, ids):
        h = self.embed(ids)
        h += self.query(h)
        return torch.nn.functional.relu(h, inplace=True)


def test_an_edit_in_place_is_noticed():
    model = lora.inject(InPlace().eval(), ["query"], r=3)
    torch.nn.init.normal_(model.query.lora_B)
    inputs = {"ids": torch.arange(6).view(2, 3)}
    with torch.no_grad():
        wanted = []
        for b in range(4):
            with lora.use_rank(model, b):
                wanted.append(model(**inputs).clone())
        with share_between_ranks(model) as new_batch:
            new_batch(inputs)
            for b in range(4):
                with lora.use_rank(model, b):
                    assert torch.equal(model(**inputs), wanted[b])


class Encoder(torch.nn.Module):
    """Takes a mask of its own shape and gives a named tuple of tensors, a number and a nested tuple."""

    def __init__(self):
        super().__init__()
        self.query = torch.nn.Linear(4, 4)

    def forward(self, x, y=None, labels=None):
        h = self.query(x)
        loss = None if labels is None else (h.sum(-1) - labels).square().mean()
        return {"loss": loss, "h": h, "nested": (h + 1, h.mean()), "word": "same"}


def encoder():
    model = lora.inject(Encoder(), ["query"], r=4)
    torch.nn.init.normal_(model.query.lora_B)
    return model.eval()


@pytest.mark.parametrize("budget", [0, 13, 10**6])
@pytest.mark.parametrize("grad", [False, True])
def test_at_ranks_gives_each_rank_its_own_output(budget, grad, monkeypatch):
    monkeypatch.setattr(all_ranks, "STACKED_TOKENS", budget)
    model, x = encoder(), torch.randn(3, 4)
    lora.set_rank(model, 2)
    with torch.set_grad_enabled(grad):
        for b, output in lora.at_ranks(model, {"x": x}, [0, 1, 4, 2]):
            assert lora.get_rank(model) == 2  # back already while the caller looks at the output
            with lora.use_rank(model, b):
                wanted = model(x)
            assert torch.allclose(output["h"], wanted["h"], atol=1e-6) and output["word"] == "same"
            assert torch.allclose(output["nested"][0], wanted["nested"][0], atol=1e-6)
            if output["nested"][1] is not None:  # a number of a pass of one rank; of several it would mix them
                assert torch.allclose(output["nested"][1], wanted["nested"][1])
    assert [b for b, _ in lora.at_ranks(model, {"x": x}, range(1, 5))] == [1, 2, 3, 4]


def test_ranks_are_not_stacked_where_a_loss_is_wanted(monkeypatch):
    monkeypatch.setattr(all_ranks, "STACKED_TOKENS", 10**6)
    model, inputs = encoder(), {"x": torch.randn(3, 4), "labels": torch.randn(3)}
    with torch.no_grad():
        for b, output in lora.at_ranks(model, inputs, [1, 2, 3]):
            with lora.use_rank(model, b):
                assert output["loss"] == model(**inputs)["loss"]


@pytest.mark.parametrize("extra", [torch.ones(1, 4), [torch.ones(3)], torch.ones(7)])
def test_inputs_that_cannot_be_repeated_go_through_rank_by_rank(extra, monkeypatch):
    monkeypatch.setattr(all_ranks, "STACKED_TOKENS", 10**6)
    model = encoder()
    plan = passes({"x": torch.randn(3, 4), "y": extra}, [1, 2])
    assert [ranks for ranks, _, _ in plan] == [[1], [2]]
    assert len(list(lora.at_ranks(model, {"x": torch.randn(3, 4), "y": extra}, [1, 2]))) == 2


def test_an_own_pass_a_close_and_an_error_leave_the_model_as_it_was():
    model, x = encoder(), torch.randn(3, 4)
    lora.set_rank(model, torch.tensor([1, 2, 3]))
    state = model.query.state
    pairs = lora.at_ranks(model, {"x": x}, [1, 2], run=lambda batch: model.query(batch["x"]), stack=False)
    with torch.no_grad():
        b, h = next(pairs)
        assert b == 1 and h.shape == (3, 4) and model.query.state is state
        pairs.close()

        def broken(batch):
            raise KeyError

        with pytest.raises(KeyError):
            list(lora.at_ranks(model, {"x": x}, [1, 2], run=broken))
        with pytest.raises(ValueError, match="rank is 5"):
            list(lora.at_ranks(model, {"x": x}, [5]))
        with pytest.raises(TypeError, match="give ints"):
            list(lora.at_ranks(model, {"x": x}, [torch.tensor([1, 2, 3])]))
    assert model.query.state is state and not {"forward", "base"} & set(vars(model.query))


def test_sharing_is_set_up_once_around_many_batches(roberta_config):
    model = randomised(next(models(roberta_config)))
    batches = [{"input_ids": torch.randint(3, 100, (2, 5))} for _ in range(2)]
    with torch.no_grad():
        alone = [[output.logits for _, output in lora.at_ranks(model, batch, [1, 3])] for batch in batches]
        with lora.share_between_ranks(model):
            forward = model.roberta.embeddings.forward
            for batch, wanted in zip(batches, alone, strict=True):
                found = [output.logits for _, output in lora.at_ranks(model, batch, [1, 3])]
                assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
                assert model.roberta.embeddings.forward is forward
    assert "forward" not in vars(model.roberta.embeddings)


@pytest.mark.parametrize("stack", [False, True])
def test_a_compiled_model_stays_one_graph_and_has_its_own_outputs(stack, roberta_config):
    model = randomised(next(models(roberta_config)))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(3):
        batch = {"input_ids": torch.randint(3, 100, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
        lora.learn_layout(model, **batch)
        with torch.no_grad():
            for rank, output in lora.at_ranks(model, batch, [1, 2, 4], lambda inputs: compiled(**inputs), stack):
                with lora.use_rank(model, rank):
                    torch.testing.assert_close(output.logits, model(**batch).logits)


class Own(torch.nn.Module):
    """Embeddings that are used twice, and edited, before the adapted layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.query = torch.nn.Embedding(9, 6), torch.nn.Linear(6, 4)

    def forward(self, ids):
        first, second = self.embed(ids), self.embed(ids)
        first += 1
        return self.query(first) * second[..., :4], first


def alone_at(model, run, ranks):
    found = []
    for b in ranks:
        with torch.no_grad(), lora.use_rank(model, b):
            found.append(run())
    return found


def test_whoever_edits_what_is_shared_edits_a_copy():
    model = randomised(lora.inject(Own(), ["query"], r=4))
    ids = torch.randint(9, (3, 5))
    wanted = [output[0] for output in alone_at(model, lambda: model(ids), [1, 2, 4])]
    with torch.no_grad():
        for place, (_, output) in enumerate(lora.at_ranks(model, {"ids": ids}, [1, 2, 4], stack=False)):
            assert torch.equal(output[0], wanted[place])
            output[1].numpy()[:] = 7  # which no version counts


def test_a_module_with_a_hook_inside_runs_for_every_rank(roberta_config):
    model = randomised(next(models(roberta_config)))
    seen = []
    model.roberta.embeddings.LayerNorm.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        list(lora.at_ranks(model, {"input_ids": torch.randint(3, 100, (2, 5))}, [1, 2, 4], stack=False))
    assert len(seen) == 3


def test_gradients_inside_of_a_pass_are_each_ranks_own():
    class Field(Own):
        def forward(self, x):
            with torch.enable_grad():
                x = (x * 1).requires_grad_()
                energy = self.query(torch.tanh(self.first(x))).sum()
                return torch.autograd.grad(energy, x)[0]

    model = Field()
    model.first = torch.nn.Linear(6, 6)
    randomised(lora.inject(model, ["query"], r=4))
    x = torch.randn(3, 6)
    wanted = alone_at(model, lambda: model(x), [1, 4])
    with torch.no_grad():
        found = [output for _, output in lora.at_ranks(model, {"x": x}, [1, 4], stack=False)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_the_base_model_beside_every_rank_has_its_own_saved_modules(llama_checkpoint):
    """PEFT's adapters may be switched off within a pass, and the same input then gives something else."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from loralib.peft import DyLoraConfig

    config = DyLoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_checkpoint), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    batch = {"input_ids": torch.randint(3, 60, (2, 5))}

    def both(inputs):
        with model.disable_adapter():
            base = model(**inputs).logits
        return model(**inputs).logits, base

    wanted = alone_at(model.eval(), lambda: both(batch), [1, 2, 4])
    with torch.no_grad():
        found = [output for _, output in lora.at_ranks(model, batch, [1, 2, 4], both, stack=False)]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_outputs_of_another_run_are_cut_where_they_hold_the_batch(roberta_config):
    model = randomised(next(models(roberta_config)))
    batch = {"input_ids": torch.randint(3, 100, (3, 5))}  # 3 examples, and 3 labels
    flipped = False

    def run(inputs):
        logits = model(**inputs).logits
        return logits.T if flipped else logits

    with torch.no_grad():
        for flipped in (False, True):  # noqa: B007  # the same code, two shapes
            wanted = alone_at(model, lambda: run(batch), [1, 2, 4])
            for (_, output), alone in zip(lora.at_ranks(model, batch, [1, 2, 4], run), wanted, strict=True):
                torch.testing.assert_close(output, alone)


class EditsItsInput(torch.nn.Module):
    """A module without an adapter edits its input, which is used again."""

    def __init__(self):
        super().__init__()
        self.first, self.act = torch.nn.Linear(6, 6), torch.nn.ReLU(inplace=True)
        self.query, self.value = torch.nn.Linear(6, 4), torch.nn.Linear(6, 4)

    def forward(self, x):
        h = self.first(x)
        return self.query(self.act(h)) + self.value(h)


def test_what_edits_its_input_runs_at_every_rank():
    torch.manual_seed(0)
    model = randomised(lora.inject(EditsItsInput(), ["query", "value"], r=4))
    inputs = {"x": torch.randn(3, 6)}
    with torch.no_grad():
        found = [output for _, output in lora.at_ranks(model, inputs, range(5), stack=False)]
    for b, output in enumerate(found):
        with lora.use_rank(model, b):
            torch.testing.assert_close(output, model(**inputs))


def test_caches_do_not_grow_from_rank_to_rank_and_none_is_handed_out_for_several(llama_checkpoint):
    from transformers import AutoModelForCausalLM

    model = randomised(lora.inject(AutoModelForCausalLM.from_pretrained(llama_checkpoint), ["q_proj", "v_proj"], r=4))
    ids = torch.randint(3, 90, (3, 5))
    with torch.no_grad():
        cache = model(input_ids=ids).past_key_values
        inputs = {"input_ids": ids[:, :1], "past_key_values": cache}
        for b, output in lora.at_ranks(model, inputs, [1, 2, 4]):
            assert output.past_key_values.get_seq_length() == 6 and cache.get_seq_length() == 5
            with lora.use_rank(model, b):
                wanted = model(input_ids=ids[:, :1], past_key_values=copy.deepcopy(cache))
            torch.testing.assert_close(output.logits, wanted.logits)
        together = [output for _, output in lora.at_ranks(model, {"input_ids": ids}, [1, 2, 4])]
    assert [output.past_key_values for output in together] == [None] * 3


def test_a_copy_that_is_made_meanwhile_is_a_model_of_its_own(roberta_config):
    model = randomised(next(models(roberta_config)))
    batch = {"input_ids": torch.randint(3, 100, (2, 5))}
    with torch.no_grad():
        for rank, output in lora.at_ranks(model, batch, [1, 4]):
            merged, copied = lora.merge(model, rank), copy.deepcopy(model)
            torch.testing.assert_close(merged(**batch).logits, output.logits)
            for parameter in copied.parameters():
                parameter.zero_()
            assert not copied(**batch).logits.any()
