"""An adapter's files, without its model: writing, reading, cutting and describing a directory; reading a .bin.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's format, and ``dylora.json`` with what PEFT
has no word for (r_max, the scaling rule, label names, whatever the caller adds).
"""

import json
import os
import pickle
import re
from collections import defaultdict
from pathlib import Path

import torch

from ..files import text_writer, write_together
from . import peft_format

CONFIG, WEIGHTS, EXTRA = "adapter_config.json", "adapter_model.safetensors", "dylora.json"
STRENGTH = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def write_adapter(directory: str | os.PathLike, tensors: dict[str, torch.Tensor], config: dict, facts: dict) -> None:
    """Write the three files. The weights carry rank and strength too: should a kill leave them beside another
    configuration, ``load_adapter`` goes by theirs."""
    from safetensors.torch import save_file

    strength = {key: config[key] for key in STRENGTH} | {"scaling": facts["scaling"], "rank": facts["rank"]}
    metadata = {"format": "pt", "dylora": json.dumps(strength)}
    write_together(
        directory,
        {
            EXTRA: text_writer(json.dumps(facts, indent=2) + "\n"),
            CONFIG: text_writer(json.dumps(config, indent=2) + "\n"),
            WEIGHTS: lambda file: save_file(tensors, file, metadata=metadata),
        },
    )


def read_directory(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    if not (path / CONFIG).exists():
        raise FileNotFoundError(f"{path} holds no {CONFIG}; give an adapter's directory.")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        facts = json.loads((path / EXTRA).read_text(encoding="utf-8")) if (path / EXTRA).exists() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} has a configuration that is no JSON ({error}); the adapter must be saved anew."
        ) from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} is a {config.get('peft_type')!r} adapter; loralib reads peft_type 'LORA'.")
    if config.get("use_dora"):
        raise ValueError(f"{path} is a DoRA adapter, which is no plain low-rank update; loralib cannot load it.")
    config["scaling"] = facts.get("scaling") or ("alpha/sqrt(b)" if config.get("use_rslora") else "alpha/b")
    config["base_sample"] = facts.get("base_sample")
    file = path / WEIGHTS
    if not file.exists():
        older = path / "adapter_model.bin"
        if older.exists():
            return read_bin(older), config
        raise FileNotFoundError(f"{path} holds no {WEIGHTS}; the adapter is incomplete.")
    try:
        with safe_open(file, "pt") as opened:
            config |= json.loads((opened.metadata() or {}).get("dylora", "{}"))
        return load_file(file), config
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); save the adapter anew or fetch it again.") from None


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    """A state dict through torch.load(weights_only=True), names without DistributedDataParallel's ``module.``."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path} is no plain state dict, is damaged or holds code, and was not loaded ({reason})."
        ) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(
            f"{path} is no state dict of tensors; save one with torch.save(lora.lora_state_dict(model), path)."
        )
    return {name.removeprefix("module."): value for name, value in state.items()}


def scaling_of(path: str | os.PathLike) -> str:
    """The scaling rule of an adapter's directory; a ``.bin``, which says none, has the paper's."""
    return read_directory(Path(path))[1]["scaling"] if Path(path).is_dir() else "alpha/b"


def read_configs(path: str | os.PathLike) -> tuple[dict, dict]:
    """The contents of adapter_config.json and dylora.json in an adapter's directory."""
    return tuple(json.loads((Path(path) / name).read_text(encoding="utf-8")) for name in (CONFIG, EXTRA))


def read_facts(path: str | os.PathLike | None) -> dict:
    """What dylora.json in an adapter's directory tells; nothing for a ``.bin``, a directory without it, or None."""
    file = Path(path or "", EXTRA)
    return json.loads(file.read_text(encoding="utf-8")) if path and file.is_file() else {}


def rank_and_alpha(config: dict, name: str) -> tuple[int, float]:
    """A layer's rank and alpha in PEFT's configuration, whose patterns are regular expressions for endings of names."""
    found = []
    for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        own = (v for key, v in (config.get(pattern) or {}).items() if re.match(rf"(.*\.)?({key})$", name))
        found.append(next(own, config[default]))
    return found[0], found[1]


def cut_adapter(source: str | os.PathLike, target: str | os.PathLike, rank: int, extra: dict | None = None) -> dict:
    """Copy an adapter's directory cut to ``rank``, without its base model: what ``save_adapter(..., rank)`` would write.

    ``extra`` is added to ``dylora.json``, whose content is returned. Raises FileNotFoundError or ValueError; ``target`` is
    then untouched.
    """
    source, target = Path(source), Path(target)
    tensors, config = read_directory(source)
    facts = json.loads((source / EXTRA).read_text(encoding="utf-8")) if (source / EXTRA).exists() else {}
    scaling = config.pop("scaling")
    config.pop("base_sample", None)
    at = config.pop("rank", None) or facts.get("rank", config["r"])
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= at:
        raise ValueError(f"rank is {rank!r}; the adapter in {source} can be cut to 1..{at}.")
    sizes, found = {}, {}
    for key, value in tensors.items():
        name, is_factor, factor = key.removeprefix(peft_format.PREFIX).partition(".lora_")
        if not is_factor:
            found[key] = value
            continue
        projections = facts.get("projections", {}).get(name, 1)
        dim = 0 if factor.removeprefix("embedding_").startswith("A") else 1
        expansion = projections * (value.shape[2:].numel() if dim == 0 else 1)
        R, alpha = rank_and_alpha(config, name)
        r = R // expansion if dim == 0 else sizes[name][2]
        b = min(rank, r)
        by_projection = value.unflatten(dim, (projections, -1))
        kept = by_projection.shape[dim + 1] // r * b
        found[key] = by_projection.narrow(dim + 1, 0, kept).flatten(dim, dim + 1).contiguous()
        # alpha/b and alpha/sqrt(b) keep their alpha; a strength of alpha/r does not change with the rank.
        sizes[name] = R // r * b, peft_format.tidy(alpha * b / r) if scaling == "alpha/r" else alpha, r
    config |= peft_format.patterns({name: (R, alpha) for name, (R, alpha, _) in sizes.items()})
    facts |= {"rank": rank, "scaling": scaling}
    facts.setdefault("r_max", at)
    facts |= extra or {}
    write_adapter(target, found, config, facts)
    return facts


def describe_adapter(path: str | os.PathLike) -> dict:
    """What an adapter's directory says of itself, its sizes, and the norm of each component's update.

    The norm of component j is ``|B[:, j]| |A[j]|`` (its rank-1 update's Frobenius norm, without scaling), as root mean
    square over the layers; PEFT's components are counted where they differ from the layer's own.
    """
    path = Path(path)
    tensors, config = read_directory(path)
    facts = json.loads((path / EXTRA).read_text(encoding="utf-8")) if (path / EXTRA).exists() else {}
    factors = {key: value for key, value in tensors.items() if ".lora_" in key}
    squares = defaultdict(list)
    for key_A, A in factors.items():
        if ".lora_A" not in key_A and ".lora_embedding_A" not in key_A:
            continue
        B = factors[key_A.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        for j, square in enumerate(A.flatten(1).square().sum(1) * B.reshape(*B.shape[:2], -1).square().sum((0, 2))):
            squares[j].append(float(square))
    size = sum(value.numel() for value in factors.values())
    return facts | {
        "base": config.get("base_model_name_or_path"),
        "rank": config.get("rank") or facts.get("rank", config["r"]),
        "scaling": config["scaling"],
        "lora_alpha": facts.get("lora_alpha", config["lora_alpha"]),
        "target_modules": config.get("target_modules"),
        "modules_to_save": config.get("modules_to_save"),
        "adapter_parameters": size,
        "head_parameters": sum(value.numel() for value in tensors.values()) - size,
        "norms": [(sum(values) / len(values)) ** 0.5 for _, values in sorted(squares.items())],
    }
