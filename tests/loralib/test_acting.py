"""An adapter acts, or is said not to."""

import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as tf
from torch import nn

import loralib as lora
from loralib.layout import calls
from loralib.model import lora_layers

from .zoo import TINY, ids


def ready(model: nn.Module, targets, r: int = 4) -> nn.Module:
    lora.inject(model, targets, r=r).eval()
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    return model


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_torchs_encoder_layer_runs_its_adapters_in_evaluation_too(nested, masked):
    """Its fast path reads the weights of layers that it does not call; merged weights are what the adapters must amount to."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
    model = ready(nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested), ["linear1", "linear2"])
    x = torch.randn(3, 5, 16)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 4 + [True]]) if masked else None
    keep = ~mask if masked else torch.ones(3, 5, dtype=torch.bool)
    with torch.no_grad():
        for rank in (0, 2, 4):
            lora.set_rank(model, rank)
            merged = lora.merge(model, rank)
            expected = merged.train()(x, src_key_padding_mask=mask)
            found = model(x, src_key_padding_mask=mask)
            assert torch.allclose(found[keep], expected[keep], atol=1e-4)


def test_the_same_for_a_layer_that_was_built_in():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
    layer.linear1 = lora.Linear(16, 24, r=4)
    nn.init.normal_(layer.linear1.lora_B)
    lora.mark_only_lora_as_trainable(layer)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        assert torch.allclose(layer.eval()(x), layer.train()(x), atol=1e-5)


READERS = {
    "Mamba": (
        lambda: tf.MambaForCausalLM(tf.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)),
        "dt_proj", lambda: {"input_ids": torch.randint(5, 50, (2, 6))},
    ),
    "WavLM": (
        lambda: tf.WavLMModel(tf.WavLMConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, conv_dim=(8, 8), conv_stride=(5, 2),
            conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)),
        "q_proj", lambda: {"input_values": torch.randn(2, 800)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("ranks", [2, torch.tensor([1, 2])], ids=["int", "each"])
def test_a_layer_that_is_read_and_not_called_is_refused(name, ranks):
    build, target, batch = READERS[name]
    model = ready(build(), [target])
    lora.set_rank(model, ranks)
    for _ in range(2):  # and so it stays
        with pytest.raises(ValueError, match=rf"{target}.*: {name}\w* reads the weight and does not call the layer"):
            model(**batch())
    assert "__getattr__" not in vars(lora.LoRALayer)


def test_a_layer_whose_double_runs_is_refused():
    config = tf.T5Config(
        vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    inputs = ids(2, 4) | {"decoder_input_ids": torch.randint(5, 50, (2, 3))}
    model = ready(tf.T5ForConditionalGeneration(config), ["shared"])
    with pytest.raises(ValueError, match=r"shared is not called, since encoder.embed_tokens has the same weight"):
        model(**inputs)


def test_layers_that_sit_out_are_named_once():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.left(x)

    model = ready(Two(), ["left", "right"])
    with pytest.warns(UserWarning, match="^right: adapted, and not called in the first pass of Two"):
        model(torch.randn(2, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 4))
        lora.set_rank(model, 1)
        model(torch.randn(2, 4))


def test_a_pass_that_fails_leaves_nothing_behind():
    model = ready(nn.Sequential(nn.Linear(4, 4)), ["0"])
    for _ in range(2):
        with pytest.raises(RuntimeError):
            model(torch.randn(2, 5))
    assert "__getattr__" not in vars(lora.LoRALayer) and not model[0]._forward_pre_hooks
    assert model(torch.randn(2, 4)).shape == (2, 4)


class Stopped(nn.Module):
    """Ends by Ctrl-C in the middle of a call."""

    def __init__(self):
        super().__init__()
        self.layer, self.stop = nn.Linear(6, 6), False

    def forward(self, x):
        x = self.layer(x)
        if self.stop:
            raise KeyboardInterrupt
        return x


def test_a_call_that_was_broken_off_is_no_call_that_runs():
    model, other = (lora.inject(Stopped(), ["layer"], r=4) for _ in range(2))
    for first in (True, False):  # a model's first call is watched
        lora.set_rank(model, torch.tensor([1, 2, 3]))
        if not first:
            model.stop = False
            model(torch.randn(3, 6))
        model.stop = True
        with pytest.raises(KeyboardInterrupt):
            model(torch.randn(3, 6))
        lora.set_rank(other, torch.tensor([1, 2]))
        other(torch.randn(2, 6))
        assert not calls()
    assert "__getattr__" not in vars(lora.layers.LoRALayer)


def test_threads_learn_each_its_own_copy():
    def run(model):
        x, ranks = torch.randn(3, 6), torch.tensor([1, 2, 4])
        lora.set_rank(model, ranks)
        found = model(x)
        for i, b in enumerate(ranks.tolist()):
            with lora.use_rank(model, b):
                torch.testing.assert_close(found[i : i + 1], model(x[i : i + 1]))

    for _ in range(5):
        model = lora.inject(Stopped(), ["layer"], r=4)
        nn.init.normal_(model.layer.lora_B)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, [copy.deepcopy(model) for _ in range(8)]))


def test_a_merged_model_has_no_hooks_left():
    model = ready(tf.RobertaModel(tf.RobertaConfig(**TINY)), ["query"])
    lora.set_rank(model, torch.tensor([1, 2]))
    plain = lora.merge(model, 2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())
    assert not any(m._forward_hooks_always_called or m._forward_pre_hooks_with_kwargs for m in plain.modules())
    assert model._forward_hooks and model._forward_pre_hooks


@pytest.mark.parametrize("targets", [["embed_tokens"], ["q_proj", "v_proj"]])
@pytest.mark.parametrize("kind", ["bart", "t5"])
def test_generating_in_a_fresh_process_judges_no_encoder(kind, targets):
    """``generate`` calls the encoder by itself, and the model for the decoder alone."""
    small = dict(vocab_size=50, d_model=16, decoder_start_token_id=0, pad_token_id=0)
    if kind == "t5":
        targets = [name.split("_")[0] if name != "embed_tokens" else name for name in targets]  # it has q and v
        model = tf.T5ForConditionalGeneration(tf.T5Config(d_kv=8, d_ff=16, num_layers=1, num_heads=2, **small))
    else:
        config = tf.BartConfig(
            encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
            decoder_ffn_dim=16, max_position_embeddings=64, **small,
        )  # fmt: skip
        model = tf.BartForConditionalGeneration(config)
    ready(model, targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?s).*adapted, and not called")
        model.generate(**ids(2, 6), max_new_tokens=3)
        model(**ids(2, 6), decoder_input_ids=ids(2, 6)["input_ids"])
