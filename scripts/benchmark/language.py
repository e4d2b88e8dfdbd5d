"""A language model's training step: all linear layers adapted, the base whole or stored in 8 or 4 bits."""

import logging
import tempfile
from collections.abc import Iterator

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import loralib as lora
from loralib.pacing import usual_paces
from loralib.peft import DyLoraConfig

from .peers import ALPHA, R_MAX
from .rows import Options, Row, timed
from .steps import BUILDS, HALVING, PEFT_LIMIT, PER, drawn, training_step
from .timing import alternate

# SmolLM2-135M's width. The vocabulary is small: it would only add the same time to every contender.
WIDTH = dict(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, vocab_size=1000)
LAYERS = 30
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of each cast of each layer
BASES = {  # name: (bits of the base, precision)
    "fp32": (16, "fp32"),
    "bf16": (16, "bf16"),
    "8-bit base, bf16": (8, "bf16"),
    "4-bit base (nf4), bf16": (4, "bf16"),
}


def stock(layers: int, bits: int, device: str) -> nn.Module:
    """A Llama with random weights, stored in so many bits by bitsandbytes."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**WIDTH, num_hidden_layers=layers))
    if bits != 16:
        config = transformers.BitsAndBytesConfig(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_quant_type="nf4"
        )
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)
            model = transformers.LlamaForCausalLM.from_pretrained(
                directory, quantization_config=config, device_map=device
            )
    return model.to(device).requires_grad_(False)


def contenders(layers: int, bits: int, dtype: str, inputs: dict, device: str) -> dict:
    """{name: one training step}."""
    rows = len(inputs["input_ids"])
    common = dict(r=R_MAX, lora_alpha=ALPHA, target_modules="all-linear")
    found = {}
    for per in PER:
        model = lora.inject(stock(layers, bits, device), "all-linear", R_MAX, ALPHA)
        lora.mark_only_lora_as_trainable(model)
        paces = usual_paces(R_MAX) if per == HALVING else None
        own = training_step(model, inputs, device, dtype, drawn(model, R_MAX, rows, per), paces)
        found[f"DyLoRA, rank per {per}"] = own
    inside = get_peft_model(stock(layers, bits, device), DyLoraConfig(**common))
    draws = drawn(inside, R_MAX, rows, "example")
    found["DyLoRA inside PEFT, rank per example"] = training_step(inside, inputs, device, dtype, draws)
    peer = get_peft_model(stock(layers, bits, device), LoraConfig(**common))
    found["PEFT LoRA"] = training_step(peer, inputs, device, dtype)
    return found


def language_steps(options: Options) -> Iterator[Row]:
    """The step at equal work: the same layers adapted, the same base."""
    layers = 2 if options.quick else 6
    rows, length = (8, 32) if options.quick else (8, 64)
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, (rows, length), device=options.device)
    inputs = {"input_ids": ids, "labels": ids}
    for name, (bits, dtype) in BASES.items():
        times = {}
        for _ in range(BUILDS // 2 if options.quick else BUILDS):
            found = contenders(layers, bits, dtype, inputs, options.device)
            for contender, seconds in alternate(found, 4, options.device).items():
                times.setdefault(contender, []).extend(seconds)
        setting = f"SmolLM2-135M, {layers} of its {LAYERS} layers, batch {rows} x {length}, {name}"
        for contender in times:
            if contender.startswith("DyLoRA"):
                yield from timed("training step, all linear layers", setting, times, contender, PEFT_LIMIT)
