"""What a training of ranks cannot be put together with."""

from typing import Any

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ..adapters.of_peft import is_peft_model
from ..heads import is_inside, modules_to_save
from ..inside_peft import trained_beside_ranks
from ..layers import adapted_layers

# What PEFT's modules to save and new tokens are called within a name.
OF_PEFT = {"modules_to_save", "trainable_tokens_delta"}


def refuse_what_is_not_saved(model: nn.Module) -> None:
    """Raise ValueError for a parameter that trains though no checkpoint would hold it."""
    heads = modules_to_save(model)
    factors = {id(factor) for _, layer in adapted_layers(model) for factor in (layer.lora_A, layer.lora_B)}

    def is_kept(name: str, parameter: nn.Parameter) -> bool:
        if id(parameter) in factors or is_inside(name, heads):
            return True
        # PEFT saves what its own configuration says.
        return is_peft_model(model) and (".lora_" in name or bool(OF_PEFT & {*name.split(".")}))

    others = [name for name, p in model.named_parameters() if p.requires_grad and not is_kept(f".{name}", p)]
    if others:
        raise ValueError(
            f"{others[0]!r} (one of {len(others)}) would train, and checkpoints hold the adapter and the modules to "
            "save alone: call loralib.mark_only_lora_as_trainable(model) before the training, or name its module in "
            "modules_to_save."
        )


def refuse_scattered_factors(trainer: Any) -> None:
    """Raise ValueError where a training keeps factors in a form that can be neither ordered, paced nor saved."""
    if trainer.args.fsdp and not trainer.is_fsdp_enabled:  # accelerate would go on without a word
        raise ValueError(
            "FSDP needs GPUs: accelerate has none for CPUs; leave it out, several processes share a batch."
        )
    if trainer.bound is None:
        return
    if beside := trained_beside_ranks(trainer.model):
        raise ValueError(
            f"The adapter {beside!r} trains beside the one with ranks, and checkpoints hold the latter alone; "
            "train one at a time (set_adapter, or requires_grad_(False))."
        )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError("FSDP1 keeps no factors, only flat parts of them: use FSDP2 (fsdp_version: 2).")
    if is_deepspeed_zero3_enabled():
        raise ValueError("DeepSpeed's ZeRO stage 3 keeps no whole factors: use stage 1 or 2, or FSDP2.")
    if trainer.is_deepspeed_enabled and (trainer.bound.schedule.full_rank_share or trainer.bound.schedule.paced):
        raise ValueError(
            "DeepSpeed keeps its own copy of what would be ordered or paced; give full_rank_share=0 and paced=False."
        )
    optim = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if trainer.bound.schedule.paced and optim.startswith("schedule_free"):
        raise ValueError(
            f"--optim {optim} keeps a second set of values, so that components cannot learn at paces "
            "of their own; take another, or paced=False (--lora_paced False)."
        )
