"""From a run's directory to something that others load: an adapter at one rank, or a plain model."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..files import write_text
from ..model import merge
from ..report.results import RankResults
from .card import AUTO, model_card, num_labels
from .directory import EXTRA, cut_adapter, read_facts
from .hub import TOKENIZER
from .serving import check_for_vllm
from .store import load_adapter

EXPORTED, MERGED = "dylora export", "dylora merge"


def export_adapter(
    source: str | Path,
    target: str | Path,
    rank: int,
    results: RankResults | None = None,
    license: str | None = None,
    server: str | None = None,
) -> dict:
    """Write the adapter of ``source`` cut to ``rank`` into ``target``, in PEFT's format, with its tokenizer and a card.

    ``results`` are shown in the card, ``license`` is its licence; ``server`` "vllm" checks that vLLM would serve it
    right (``loralib.adapters.serving``). No base model is needed. Returns the contents of adapter_config.json. Raises
    FileNotFoundError or ValueError, also where ``target`` holds anything but an earlier export; it is untouched then.
    """
    directory = free_directory(target, EXPORTED)
    if directory == Path(source).resolve():
        raise ValueError(f"--to {target} is the adapter itself; give another directory.")
    check = check_for_vllm if server == "vllm" else None
    config, facts = cut_adapter(source, directory, rank, {"made_by": EXPORTED}, check)
    copy_tokenizer(Path(source), directory)
    write_text(directory / "README.md", model_card(config, facts, results, str(target), license=license))
    return config


def export_merged(
    source: str | Path,
    target: str | Path,
    rank: int,
    base: str | None = None,
    results: RankResults | None = None,
    license: str | None = None,
) -> str:
    """Write the base model with the adapter of ``source`` at ``rank`` merged in, its tokenizer and a card into
    ``target``.

    ``base``: where the base model is, default: what the adapter names. Returns it. Needs transformers. Raises as
    ``export_adapter``, and ValueError where the base model cannot be had.
    """
    import transformers

    source, directory = Path(source), free_directory(target, MERGED)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no directory; give a run or an adapter's directory.")
    with tempfile.TemporaryDirectory() as work:
        config, facts = cut_adapter(source, work, rank)  # checks the file and the rank before the base model is fetched
        base, auto = base or config.get("base_model_name_or_path"), AUTO.get(config.get("task_type") or "")
        if base is None or auto is None:
            raise ValueError(
                f"{source} does not say which kind of model it is for; merge it in Python with loralib.merge."
            )
        options = {}
        if config["task_type"] in ("SEQ_CLS", "TOKEN_CLS"):  # the base may carry a head of its own, of another size
            options = {"num_labels": num_labels(facts), "ignore_mismatched_sizes": True}
        transformers.utils.logging.set_verbosity_error()
        try:
            model = getattr(transformers, auto).from_pretrained(base, **options)
        except SafetensorError as error:
            raise ValueError(f"The weights of the base model {base!r} cannot be read ({error}).") from None
        except OSError:
            raise ValueError(
                f"The base model {base!r} is no directory here and not on the hub; name it with --base."
            ) from None
        if facts.get("labels"):
            model.config.id2label = dict(enumerate(facts["labels"]))
            model.config.label2id = {text: i for i, text in enumerate(facts["labels"])}
        load_adapter(model, work)
    plain: Any = merge(model, inplace=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Beside first: should the disk take no more, an earlier model stays whole.
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".") as made:
        plain.save_pretrained(made)
        directory.mkdir(exist_ok=True)
        for weights in directory.glob("model*.safetensors*"):  # of an earlier one, of other shards perhaps
            weights.unlink()
        for file in Path(made).iterdir():
            os.replace(file, directory / file.name)
    write_text(directory / EXTRA, json.dumps(facts | {"made_by": MERGED}, indent=2) + "\n")
    copy_tokenizer(source, directory)
    write_text(directory / "README.md", model_card(config, facts, results, str(target), True, license))
    return base


def free_directory(directory: str | Path, made_by: str) -> Path:
    """``directory`` if writing there loses nothing but what the same command wrote before."""
    path = Path(directory).resolve()
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return path
    if path.is_dir() and read_facts(path).get("made_by") == made_by:
        return path
    raise ValueError(f"--to {directory} holds other files; give a new or empty directory.")


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files; those of an earlier export make way."""
    for pattern in TOKENIZER:
        for file in target.glob(pattern):
            file.unlink()
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
