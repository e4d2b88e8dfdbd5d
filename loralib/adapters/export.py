"""From a run's directory to something that others load: an adapter at one rank, or a plain model."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..files import write_text
from ..merged import merge
from ..report.results import RankResults
from .card import AUTO, model_card, num_labels
from .directory import EXTRA, cut_adapter
from .hub import TOKENIZER, base_of
from .placing import free_directory, written_whole
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
    with written_whole(directory, EXPORTED) as made:
        config, facts = cut_adapter(source, made, rank, check=check)
        copy_tokenizer(Path(source), made)
        write_text(made / "README.md", model_card(config, facts, results, str(target), license=license))
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
        base, of_base = base_of(config, base)
        auto = AUTO.get(config.get("task_type") or "")
        if base is None or auto is None:
            raise ValueError(
                f"{source} does not say which kind of model it is for; merge it in Python with loralib.merge."
            )
        options = {}
        if config["task_type"] in ("SEQ_CLS", "TOKEN_CLS"):  # the base may carry a head of its own, of another size
            options = {"num_labels": num_labels(facts), "ignore_mismatched_sizes": True}
        transformers.utils.logging.set_verbosity_error()
        try:
            model = getattr(transformers, auto).from_pretrained(base, **of_base, **options)
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
    with written_whole(directory, MERGED) as made:  # beside: should the disk take no more, an earlier model stays whole
        try:
            plain.save_pretrained(made)
        except NotImplementedError:  # transformers turns no quantised weights back into what they were stored as
            raise ValueError(
                f"The base model {base!r} is stored quantised, and transformers cannot save it again; name the whole "
                "one with --base."
            ) from None
        write_text(made / EXTRA, json.dumps(facts, indent=2) + "\n")
        tokenizer = str(target) if _save_tokenizer(source, base, of_base, made) else base
        write_text(made / "README.md", model_card(config, facts, results, str(target), True, license, tokenizer))
    return base


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer's files; whether there are any."""
    found = [file for pattern in TOKENIZER for file in source.glob(pattern)]
    for file in found:
        shutil.copyfile(file, target / file.name)
    return bool(found)


def _save_tokenizer(source: Path, base: str, options: dict, target: Path) -> bool:
    """The adapter's tokenizer, which may know more tokens, or the base model's; whether there is one."""
    from transformers import AutoTokenizer

    if copy_tokenizer(source, target):
        return True
    if Path(base).is_dir():  # copied: of a directory without one transformers makes one that knows no word
        return copy_tokenizer(Path(base), target)
    try:
        AutoTokenizer.from_pretrained(base, **options).save_pretrained(target)
    # A model of images or sounds, or one that needs a package more.
    except (OSError, ValueError, ImportError, KeyError):
        return False
    return True
