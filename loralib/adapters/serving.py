"""What servers of adapters make of an adapter's files, so that nothing is served wrong."""

from pathlib import Path
from typing import Any

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank may be; every adapter is padded to it


def check_for_vllm(config: dict[str, Any], path: str | Path) -> int:
    """The --max-lora-rank that vLLM needs for an adapter with this configuration.

    vLLM reads r, lora_alpha, target_modules and use_rslora. Raises ValueError for what it would refuse (modules saved
    beside the adapter, biases) or pass over in silence (ranks and alphas of single layers).
    """
    for name, why in (
        ("modules_to_save", "vLLM refuses adapters with modules of their own"),
        ("rank_pattern", "vLLM takes one rank for all layers"),
        ("alpha_pattern", "vLLM takes one alpha for all layers, and would run these at another strength"),
    ):
        if config.get(name):
            raise ValueError(f"{path} has {name} = {config[name]!r}: {why}; serve the merged model (dylora merge).")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path} has bias = {config['bias']!r}: vLLM refuses biases; serve the merged model.")
    if config["r"] > VLLM_RANKS[-1]:
        raise ValueError(f"{path} has rank {config['r']}, and vLLM serves at most {VLLM_RANKS[-1]}; cut it to less.")
    return next(rank for rank in VLLM_RANKS if rank >= config["r"])
