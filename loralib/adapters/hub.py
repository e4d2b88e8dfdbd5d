"""Adapters by their name on the Hugging Face hub, beside directories."""

import os
import re
from pathlib import Path

TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    "chat_template.*",
)
# What is fetched of a repository: the adapter, what goes with it, and a run's results.
FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "dylora.json"),
    *("rank_results.json", "predictions_*.npz"),
    *TOKENIZER,
)


def base_of(config: dict, asked: str | None) -> tuple[str | None, dict]:
    """Where an adapter's base model is, and the options that fetch it: where it was ``asked`` for, else what
    adapter_config.json names, at its revision."""
    if asked:
        return asked, {}
    revision = config.get("revision")
    return config.get("base_model_name_or_path"), {"revision": revision} if revision else {}


def local(path: str | os.PathLike, token: str | None = None, revision: str | None = None) -> Path:
    """``path`` if it is there; else the hub's repository of that name ("owner/name"), fetched into the cache.

    Raises FileNotFoundError for what is neither, and where the hub cannot be reached.
    """
    if Path(path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=list(FILES), token=token, revision=revision))
    except RepositoryNotFoundError:
        reason = "and the hub has no such repository (or it is private: hf auth login)"
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = f"and the hub cannot be reached ({type(error).__name__})"
    raise FileNotFoundError(
        f"{path} is no directory here, {reason}; give an adapter's directory or its name."
    ) from None
