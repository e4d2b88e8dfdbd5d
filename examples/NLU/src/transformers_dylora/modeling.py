"""The model of a run: the checkpoint, its adapter, and what trains."""

import re
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import loralib as lora
from loralib.adapters.directory import read_facts
from loralib.adapters.labels import places, reorder_head, told
from loralib.heads import default_head, is_inside
from loralib.targets import ALL_LINEAR, usual_targets

from .arguments import ModelArguments
from .errors import UsageError
from .models.roberta import RobertaForSequenceClassification
from .tasks import TASKS, Task

DEFAULT_TARGETS = ["query", "value"]
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "spiece*", "special_tokens_map.json")
FROM_PADDING = (
    "roberta",
    "xlm-roberta",
    "xlm-roberta-xl",
    "camembert",
    "roberta-prelayernorm",
    "longformer",
    "data2vec-text",
)


def _fetch(what, name: str, **options):
    """``what.from_pretrained(name)``, with one sentence for a name that cannot be had.

    transformers' report on missing weights is held back: the adapter and the head are missing in every checkpoint.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return what.from_pretrained(name, **options)
    except OSError as error:
        if Path(name).is_dir():
            raise UsageError(f"{name} is no whole checkpoint ({_first_line(error)}); fetch or save it anew.") from error
        raise UsageError(
            f"The model {name!r} is no directory with a checkpoint and cannot be fetched from the hub; give a local "
            f"directory with --model_name_or_path, or try the project without any: bash scripts/quickstart.sh"
        ) from error
    except (ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UsageError(f"{name} is no whole checkpoint ({_first_line(error)}); fetch or save it anew.") from error
    finally:
        logging.set_verbosity(verbosity)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def hub_options(args: ModelArguments) -> dict:
    return {
        "cache_dir": args.cache_dir,
        "revision": args.model_revision,
        "token": args.token or args.use_auth_token or None,
        "trust_remote_code": args.trust_remote_code,
    }


def load_tokenizer(args: ModelArguments):
    """The tokenizer, with a padding token. Raises UsageError where there is none to be had."""
    name = args.tokenizer_name or args.model_name_or_path
    directory = Path(name)
    if directory.is_dir() and not any(file for pattern in TOKENIZER_FILES for file in directory.glob(pattern)):
        raise UsageError(f"{name} holds no tokenizer; give one with --tokenizer_name.")
    tokenizer = _fetch(AutoTokenizer, name, use_fast=args.use_fast_tokenizer, **hub_options(args))
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(
                f"The tokenizer of {name} has neither a padding nor an end token; give another, --tokenizer_name."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def positions(config) -> int | None:
    """How many tokens the model has positions for; None where it does not say."""
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int) or found <= 0:
        return None
    # RoBERTa's kin number positions from the padding id + 1 on.
    return found - config.pad_token_id - 1 if config.model_type in FROM_PADDING else found


def longest_input(args: ModelArguments, tokenizer, pair: bool, wanted: int) -> int:
    """How many tokens an input may have: ``wanted``, or less if the tokenizer or the model's positions allow less.

    Raises UsageError where only the special tokens would fit.
    """
    config = _fetch(AutoConfig, args.config_name or args.model_name_or_path, **hub_options(args))
    limits = [wanted, tokenizer.model_max_length, positions(config) or wanted]
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if min(limits) <= special:
        raise UsageError(
            f"--max_seq_length is {wanted}, and {special} special tokens leave no room for text; give {special + 1} or "
            "more."
        )
    return min(limits)


def load_config(args: ModelArguments, task: Task, pad_token_id: int | None = None):
    config = _fetch(AutoConfig, args.config_name or args.model_name_or_path, **hub_options(args))
    config.num_labels = task.num_labels
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {name: i for i, name in enumerate(task.labels)}
    if config.pad_token_id is None and pad_token_id is not None:
        config.pad_token_id = pad_token_id  # a decoder finds the last token of a text by it
    config.problem_type = "regression" if task.regression else "single_label_classification"
    config.finetuning_task = task.name
    if args.cls_dropout is not None:
        config.classifier_dropout = args.cls_dropout
    if args.apply_lora:
        config.apply_lora, config.lora_r, config.lora_alpha = True, args.lora_r, args.lora_alpha
        config.lora_dropout, config.lora_scaling = args.lora_dropout, args.scaling()
    return config


def known_labels(args: ModelArguments) -> tuple[tuple[str, ...], bool | None]:
    """What a model that is only measured knows: its label names, and whether it is a regression (None: it does not
    say).

    An adapter's ``dylora.json`` tells, else the checkpoint's configuration.
    """
    if args.lora_path:
        facts = read_facts(args.lora_path)
        one_output = facts.get("num_labels") == 1 and not facts.get("labels")
        return tuple(facts.get("labels", ())), facts.get("regression", one_output or None)
    config = _fetch(AutoConfig, args.config_name or args.model_name_or_path, **hub_options(args))
    names = told([config.id2label[i] for i in sorted(config.id2label)])
    return names, True if config.problem_type == "regression" or config.num_labels == 1 else None


def known_columns(facts: dict) -> dict[str, tuple[str, ...]]:
    """For ``load_files``: the text columns of one's own data that an adapter was trained on, or those of its GLUE
    task."""
    task = TASKS.get(facts.get("task", ""))
    return {"columns": tuple(facts.get("columns") or ()), "usual": task.columns if task else ()}


def load_model(args: ModelArguments, task: Task, training: bool, pad_token_id: int | None = None):
    """The classifier, adapted if asked, the right parameters trainable; and notes on where its head comes from.

    Labels count by name: a head whose names stand in another order than the task's is put in the task's.
    """
    config = load_config(args, task, pad_token_id)
    width = getattr(config, "hidden_size", None)
    if args.apply_lora and isinstance(width, int) and args.lora_r > width:
        raise UsageError(
            f"--lora_r is {args.lora_r}; {args.model_name_or_path} is {width} wide, give no more than that."
        )
    overlay = args.apply_lora and config.model_type == "roberta" and args.lora_target_modules is None
    kind = RobertaForSequenceClassification if overlay else AutoModelForSequenceClassification
    # Training begins in fp32 whatever the checkpoint was stored in; --bf16 is autocast.
    model, loaded = _fetch(
        kind,
        args.model_name_or_path,
        config=config,
        dtype="float32",
        ignore_mismatched_sizes=True,  # looked at below
        output_loading_info=True,
        **hub_options(args),
    )
    other_size = [key for key, *_ in loaded["mismatched_keys"]]
    fresh = [key for key in loaded["missing_keys"] if "lora_" not in key]
    _check_loaded(args, model, fresh, other_size, loaded["unexpected_keys"])
    notes = []
    needs_head = not training and not args.apply_lora
    if needs_head and fresh:
        raise UsageError(
            f"{args.model_name_or_path} has no trained head ({fresh[0]}); add --do_train, or give a whole classifier."
        )
    if needs_head and other_size:
        raise UsageError(
            f"{args.model_name_or_path} has a head of another size ({other_size[0]}), {task.name} has "
            f"{task.num_labels} outputs; give a classifier for {task.name}, or add --do_train."
        )
    if not fresh and not other_size:
        notes += _head_by_name(args, model, task, needs_head)
    if not args.apply_lora:
        return model, notes
    if not overlay:
        targets, note = _targets(args, model)
        notes += note
        try:
            lora.inject(model, targets, args.lora_r, args.lora_alpha, args.lora_dropout, args.scaling())
        except ValueError as error:
            raise UsageError(f"--lora_target_modules: {error}") from error
    lora.mark_only_lora_as_trainable(model)
    if args.lora_path is None:
        if not training:
            raise UsageError(
                "--do_eval or --do_predict without --do_train measures a trained adapter; give it with --lora_path."
            )
        return model, notes
    try:
        kept = lora.load_adapter(model, Path(args.lora_path), head="fresh" if training else "require")
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"--lora_path: {error}") from error
    head = f"; fresh, since the file has none of this shape: {', '.join(kept)}" if kept else ""
    notes.append(f"adapter loaded from {args.lora_path}{head}")
    notes += _other_task(args, task, bool(kept), training)
    return model, notes


def _targets(args: ModelArguments, model) -> tuple[list[str] | str, list[str]]:
    """The layers to adapt, and a note on what was found.

    Those of the flag; else query and value where the encoder calls them so, or the usual ones of its architecture by
    PEFT's table, or all linear layers.
    """
    if args.lora_target_modules:
        return (ALL_LINEAR if args.lora_target_modules == [ALL_LINEAR] else args.lora_target_modules), []
    endings = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    if endings.issuperset(DEFAULT_TARGETS):
        return DEFAULT_TARGETS, []
    try:
        found = usual_targets(model)
        return found, [f"adapted: {', '.join(found) if isinstance(found, list) else found}, as PEFT does by default"]
    except ValueError:
        return ALL_LINEAR, ["adapted: all linear layers; --lora_target_modules names others"]


def _check_loaded(args: ModelArguments, model, missing: list[str], other_size: list[str], unexpected) -> None:
    """Raise UsageError if the checkpoint's weights are not the model that its configuration says.

    The head may be missing or of another size; what a model lists as not its own (a pooler, another head) may be left
    over.
    """
    heads = default_head(model)
    lost = next((key for key in missing if not is_inside(key, heads)), None)
    if lost:
        raise UsageError(
            f"{args.model_name_or_path} lacks {lost!r}, which a {model.config.model_type} classifier runs through and "
            "which would stay as it was drawn; give a checkpoint that has it."
        )
    odd = next((key for key in other_size if not is_inside(key, heads)), None)
    if odd:
        raise UsageError(
            f"{args.model_name_or_path} holds {odd!r} in another shape than its configuration says; mend one of them."
        )
    left = next((key for key in unexpected if re.search(r"\.(layers?|h|blocks?)\.\d+\.", f".{key}")), None)
    if left:
        raise UsageError(
            f"{args.model_name_or_path} holds {left!r}, for which its configuration has no layer; mend one of them."
        )


def _head_by_name(args: ModelArguments, model, task: Task, needed: bool) -> list[str]:
    """Put the rows of the checkpoint's own head in the task's order; a note where it knows other labels.

    Raises UsageError for other labels where this head is to answer.
    """
    stored = _fetch(AutoConfig, args.config_name or args.model_name_or_path, **hub_options(args)).id2label or {}
    names = told([stored[i] for i in sorted(stored)], task.labels)
    if not names or task.regression:
        return []
    order = places(names, task.labels)
    if order is not None:
        reorder_head(model, order)
        return []
    if needed:
        raise UsageError(
            f"{args.model_name_or_path} knows the labels {', '.join(names)}, {task.name} has {', '.join(task.labels)}; "
            "give a classifier for these, or add --do_train."
        )
    return [
        f"the head of {args.model_name_or_path} knows the labels {', '.join(names)}: here it is no more than a start"
    ]


def _other_task(args: ModelArguments, task: Task, fresh: bool, training: bool) -> list[str]:
    """A note where an adapter was trained for another task or for other labels."""
    facts = read_facts(args.lora_path)
    name, names = facts.get("task"), told(facts.get("labels"), task.labels)
    if training and not fresh and names and task.labels and places(names, task.labels) is None:
        return [f"the adapter's head knows the labels {', '.join(names)}: here it is no more than a start"]
    if not training and name not in (None, "custom", task.name) and task.name != "custom":
        return [f"the adapter was trained on {name}, whose labels have the same names: scored on {task.name}"]
    return []
