"""An adapter's files, without its model: writing, reading, cutting and describing a directory; reading a .bin.

A directory holds ``adapter_config.json`` and ``adapter_model.safetensors`` in PEFT's format, and ``dylora.json`` with
what PEFT has no word for (r_max, the scaling rule, label names, whatever the caller adds).
"""

import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checks import check_int
from ..files import text_writer, write_together
from ..gate import scale
from ..titles import before_ordering
from . import fields, peft_format
from .fingerprint import of_factors
from .keys import factor_in
from .kinds import head_outputs
from .refusing import refuse_bad_numbers, refuse_facts_of_other_weights, refuse_half_pairs
from .spreading import digest_of_strengths, refuse_other_strengths, take_strengths_of, up_to

CONFIG, WEIGHTS, EXTRA = "adapter_config.json", "adapter_model.safetensors", "dylora.json"
STRENGTH = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


@dataclass
class AdapterFiles:
    """What a directory holds: the tensors, PEFT's configuration, and ``dylora.json`` (nothing where PEFT wrote it).

    ``rank`` is the rank of the weights, ``scaling`` the rule of their strength. In files that PEFT wrote that is one
    strength for every rank, or rsLoRA's.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    facts: dict[str, Any]
    rank: int
    scaling: str

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """A layer's rank and alpha by PEFT's configuration, whose patterns are regular expressions for endings of
        names."""
        values = []
        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            patterns = (self.config.get(pattern) or {}).items()
            matching = (v for key, v in patterns if re.match(rf"(.*\.)?({key})$", name))
            values.append(next(matching, self.config[default]))
        return values[0], values[1]

    def scaling_of(self, name: str) -> str:
        """A layer's rule of strength."""
        return (self.facts.get("scalings") or {}).get(name, self.scaling)

    def strength(self, name: str) -> float:
        """The factor of a layer's update at the rank of the weights."""
        R, alpha = self.rank_and_alpha(name)
        return alpha / (math.sqrt(R) if self.config.get("use_rslora") else R)

    def factors(self) -> Iterator[tuple[str, str, str, torch.Tensor]]:
        """(key, layer's name, "A" or "B", tensor) of every factor."""
        for key, value in self.tensors.items():
            if found := factor_in(key.removeprefix(peft_format.PREFIX)):
                yield key, *found, value

    def components(self, name: str, A: torch.Tensor) -> int:
        """How many components a layer has. Raises ValueError where its rank in the configuration is no number of
        them."""
        projections = self.facts.get("projections", {}).get(name, 1)
        R, _ = self.rank_and_alpha(name)
        size = projections * (A.shape[2:].numel() if self.has_own_convolutions else 1)  # a component's, as PEFT counts
        r, left = divmod(R, size)
        if left or not R:
            raise ValueError(
                f"{self.path} says rank {R} for {name}, which is no multiple of the {size} that a component takes; "
                "save the adapter anew."
            )
        return r

    @property
    def has_own_convolutions(self) -> bool:
        """Whether a component of a convolution is one of ours, as many of PEFT's as its kernel has elements; PEFT's own
        files have PEFT's, cut or not."""
        return bool(self.facts) and not self.facts.get("peft_convolutions")

    def refuse_unordered(self, rank: int) -> None:
        """Raise ValueError for cutting what was saved before its training ordered the components."""
        if rank < self.rank and before_ordering(self.facts):
            raise ValueError(
                f"{self.path} was saved before its components were ordered, and is of use at rank {self.rank} alone: "
                "go on with its training, or use dylora squeeze."
            )

    def parameters(self) -> tuple[int, int]:
        """How many numbers the factors hold, and the modules saved beside them."""
        size = sum(value.numel() for *_, value in self.factors())
        return size, sum(value.numel() for value in self.tensors.values()) - size


def write_adapter(directory: str | os.PathLike, tensors: dict[str, torch.Tensor], config: dict, facts: dict) -> None:
    """Write the three files. The weights carry rank and strength too: should a kill leave them beside another
    configuration, ``read_directory`` goes by theirs. ``dylora.json`` knows the factors that it is of: others may write
    theirs over these, and leave it."""
    strength = {key: config[key] for key in STRENGTH if key in config}
    strength |= {"scaling": facts["scaling"], "rank": facts["rank"], **digest_of_strengths(facts)}
    metadata = {"format": "pt", "dylora": json.dumps(strength)}
    facts = facts | {"factors": of_factors(tensors)}
    write_together(
        directory,
        {
            EXTRA: text_writer(json.dumps(facts, indent=2) + "\n"),
            CONFIG: text_writer(json.dumps(config, indent=2) + "\n"),
            WEIGHTS: lambda file: file.write_bytes(safetensors_bytes(tensors, metadata)),
        },
    )


def safetensors_bytes(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file; equal contents give equal bytes, which safetensors' own writer, whose metadata has no order,
    does not."""
    from safetensors.torch import save

    raw = save(tensors, metadata)
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def read_directory(path: str | os.PathLike) -> AdapterFiles:
    """Read an adapter's directory, ours or PEFT's own. Raises FileNotFoundError or ValueError with one sentence."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    path = Path(path)
    if not (path / CONFIG).exists():
        raise FileNotFoundError(f"{path} holds no {CONFIG}; give an adapter's directory.")
    config, facts = read_configs(path)
    fields.check(config, fields.CONFIG, path / CONFIG, needed=("r", "lora_alpha"))
    peft_format.refuse_what_is_no_plain_lora(config, path)
    file, strength = path / WEIGHTS, {}
    if file.exists():
        try:
            with safe_open(file, "pt") as opened:
                strength = json.loads((opened.metadata() or {}).get("dylora", "{}"))
            tensors = load_file(file)
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{file} is damaged ({error}); save the adapter anew or fetch it again.") from None
    elif (path / "adapter_model.bin").exists():
        tensors = read_bin(path / "adapter_model.bin")
    else:
        raise FileNotFoundError(f"{path} holds no {WEIGHTS}; the adapter is incomplete.")
    tensors = {key: _in_16_bits(value) for key, value in tensors.items()}
    refuse_bad_numbers(tensors, path)
    refuse_half_pairs(tensors, path)
    fields.check(strength, fields.CONFIG | fields.FACTS, file)
    if not strength and file.exists():
        refuse_facts_of_other_weights(facts, tensors, path / EXTRA)
    take_strengths_of(strength, facts, path / EXTRA)
    scaling = strength.pop("scaling", None) or facts.get("scaling")
    rank = strength.pop("rank", None) or facts.get("rank")
    config |= strength
    usual = "alpha/sqrt(b)" if config.get("use_rslora") else "alpha/r"  # as DyLoraConfig takes PEFT's own files
    sizes = [value.shape[0] for key, value in tensors.items() if (found := factor_in(key)) and found[1] == "A"]
    whole = max(sizes, default=config["r"])  # a rank_pattern may say more than r
    files = AdapterFiles(path, tensors, config, facts, rank or whole, scaling or usual)
    for name, counts in (facts.get("components_at") or {}).items():
        if counts[-1] > files.rank_and_alpha(name)[0] or len(counts) != files.rank:
            raise ValueError(
                f"{path / EXTRA} has components_at for other ranks than the weights; save the adapter anew."
            )
    refuse_other_strengths(files, path / EXTRA)
    return files


def _in_16_bits(value: torch.Tensor) -> torch.Tensor:
    """For floats in 8 bits, which have no arithmetic: bf16 holds them exactly."""
    return value.bfloat16() if value.is_floating_point() and value.element_size() == 1 else value


def read_bin(path: Path) -> dict[str, torch.Tensor]:
    """A state dict through torch.load(weights_only=True), names without DistributedDataParallel's ``module.``."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # pickles of other content fail in any way
        raise ValueError(f"{path} is no plain state dict, is damaged or holds code, and was not loaded.") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(
            f"{path} is no state dict of tensors; save one with torch.save(lora.lora_state_dict(model), path)."
        )
    # Tied tensors share their memory in such a file, which safetensors refuses to write.
    return {name.removeprefix("module."): value.clone().contiguous() for name, value in state.items()}


def hash_of_weights(path: str | os.PathLike) -> str | None:
    """A hash of an adapter's weights file; None where there is none."""
    file = Path(path, WEIGHTS)
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else None


def read_configs(path: str | os.PathLike) -> tuple[dict, dict]:
    """The contents of adapter_config.json and, where it is there, dylora.json. Raises ValueError for what is no
    JSON."""
    config = _read_json(Path(path, CONFIG))
    if config.get("peft_type") != "LORA":  # first: another kind of adapter has other fields
        raise ValueError(f"{path} is a {config.get('peft_type')!r} adapter; loralib reads peft_type 'LORA'.")
    fields.check(config, fields.CONFIG, Path(path, CONFIG))
    return config, read_facts(path)


def read_facts(path: str | os.PathLike | None) -> dict:
    """What dylora.json in an adapter's directory tells; nothing for a ``.bin``, a directory without it, or None."""
    file = Path(path or "", EXTRA)
    facts = _read_json(file) if path and file.is_file() else {}
    fields.check(facts, fields.FACTS, file)
    return facts


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON ({error}); the adapter must be saved anew.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {content!r} where a table belongs; the adapter must be saved anew.")
    return content


def scaling_of_file(path: str | os.PathLike) -> str:
    """The scaling rule of an adapter's directory; a ``.bin``, which says none, has the paper's."""
    return read_directory(path).scaling if Path(path).is_dir() else "alpha/b"


def cut_adapter(
    source: str | os.PathLike,
    target: str | os.PathLike,
    rank: int,
    extra: dict | None = None,
    check: Callable[..., object] | None = None,
) -> tuple[dict, dict]:
    """Copy an adapter's directory cut to ``rank``, without its base model: what ``save_adapter(..., rank)`` would
    write.

    ``extra`` is added to ``dylora.json``; ``check(config, source)`` may refuse the configuration that would be written.
    Returns the contents of both configurations. Raises FileNotFoundError or ValueError; ``target`` is then untouched.
    """
    files = cut(read_directory(source), rank)
    facts = files.facts | (extra or {})
    if check is not None:
        check(files.config, source)
    write_adapter(target, files.tensors, files.config, facts)
    return files.config, facts


def cut(files: AdapterFiles, rank: int) -> AdapterFiles:
    """What a directory would hold, cut to ``rank``. Where importance spread the ranks over the layers, each layer has
    then a rank of its own, and one without a component is left out. Raises ValueError for a rank that is not there."""
    check_int("rank", rank, 1, files.rank, f"the adapter in {files.path} can be cut to 1..{files.rank}.")
    files.refuse_unordered(rank)
    tensors = {key: value for key, value in files.tensors.items() if not factor_in(key)}
    sizes: dict[str, tuple[int, float]] = {}
    ranks: dict[str, int] = {}
    spread, strengths = (files.facts.get(name) or {} for name in ("components_at", "strength_at"))
    theirs = False
    for key, name, factor, value in sorted(files.factors(), key=lambda found: found[2]):  # all A come before all B
        projections = files.facts.get("projections", {}).get(name, 1)
        dim = "AB".index(factor)
        R, _ = files.rank_and_alpha(name)
        if dim == 0:
            ranks[name] = files.components(name, value)
            theirs |= value.ndim > 2 and not files.has_own_convolutions
        if value.shape[dim] != R:
            raise ValueError(f"{files.path} says rank {R} for {name}, and {key} has {value.shape[dim]}; mend its r.")
        r = ranks[name]
        b = spread[name][rank - 1] if name in spread else min(rank, r)
        b = r if rank == files.rank else b  # a layer may hold more than the rank, where importance chose
        if not b:
            continue
        by_projection = value.unflatten(dim, (projections, -1))
        kept = by_projection.shape[dim + 1] // r * b
        tensors[key] = by_projection.narrow(dim + 1, 0, kept).flatten(dim, dim + 1).contiguous()
        if name in strengths and factor == "B":
            tensors[key] = tensors[key] * strengths[name][b - 1]
        rule, R_b = files.scaling_of(name), R // r * b
        strength = files.strength(name) * scale(b, r, 1, rule) / scale(r, r, 1, rule)
        alpha = strength * (math.sqrt(R_b) if files.config.get("use_rslora") else R_b)
        sizes[name] = R_b, peft_format.tidy(alpha)
    if not sizes:
        raise ValueError(f"{files.path} holds no LoRA factors.")
    config, facts = files.config | peft_format.patterns(sizes), dict(files.facts)
    facts |= {"peft_convolutions": True} if theirs else {}
    if len(sizes) < len(ranks):
        config["target_modules"] = sorted(sizes)
        if "base_sample_of" not in facts:  # the sample is the last adapted layer's, which may be gone
            facts.pop("base_sample", None)
    if rank < files.rank:
        facts.pop("spread", None)
        facts |= {"spread": True} if facts.pop("components_at", None) else {}
        facts |= {"strength_at": {name: up_to(rank, own) for name, own in strengths.items()}} if strengths else {}
    if files.config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS") and not facts.keys() & {"num_labels", "labels"}:
        found = head_outputs(files.tensors)
        facts |= {"num_labels": found} if found else {}
    facts |= {"rank": rank, "scaling": files.scaling, "r_max": files.facts.get("r_max", files.rank)}
    kept_tensors = {key: tensors[key] for key in files.tensors if key in tensors}
    return AdapterFiles(files.path, kept_tensors, config, facts, rank, files.scaling)


def describe_adapter(path: str | os.PathLike) -> dict:
    """What an adapter's directory says of itself, its sizes, and the norm of each component's update.

    The norm of component j is ``|B[:, j]| |A[j]|`` (its rank-1 update's Frobenius norm, without scaling), as root mean
    square over the layers; PEFT's components are counted where they differ from the layer's own.
    """
    files = read_directory(path)
    pairs: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for _, name, factor, value in files.factors():
        pairs[name][factor] = value
    squares = defaultdict(list)
    for pair in pairs.values():
        A, B = pair["A"].float(), pair["B"].float()
        for j, square in enumerate(A.flatten(1).square().sum(1) * B.reshape(*B.shape[:2], -1).square().sum((0, 2))):
            squares[j].append(float(square))
    factors, head = files.parameters()
    return files.facts | {
        "base": files.config.get("base_model_name_or_path"),
        "rank": files.rank,
        "scaling": files.scaling,
        "lora_alpha": files.facts.get("lora_alpha", files.config["lora_alpha"]),
        "target_modules": files.config.get("target_modules"),
        "modules_to_save": files.config.get("modules_to_save"),
        "adapter_parameters": factors,
        "head_parameters": head,
        "norms": [(sum(values) / len(values)) ** 0.5 for _, values in sorted(squares.items())],
    }
