"""The model of a run: the checkpoint, its adapter, and what trains."""

from pathlib import Path

from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import loralib as lora
from loralib.model import default_head, is_inside

from .arguments import ModelArguments
from .errors import UsageError
from .models.roberta import RobertaForSequenceClassification
from .tasks import Task

DEFAULT_TARGETS = ["query", "value"]


def _fetch(what, name: str, **options):
    """``what.from_pretrained(name)``, with one sentence for a name that cannot be had.

    transformers' report on missing weights is held back: the adapter and the head are missing in every checkpoint.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return what.from_pretrained(name, **options)
    except OSError as error:
        raise UsageError(
            f"The model {name!r} is no directory with a checkpoint and cannot be fetched from the hub; give a local "
            f"directory with --model_name_or_path, or try the project without any: bash scripts/quickstart.sh"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def hub_options(args: ModelArguments) -> dict:
    return {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.use_auth_token or None}


def load_tokenizer(args: ModelArguments):
    name = args.tokenizer_name or args.model_name_or_path
    return _fetch(AutoTokenizer, name, **hub_options(args))


def load_config(args: ModelArguments, task: Task):
    config = _fetch(AutoConfig, args.config_name or args.model_name_or_path, **hub_options(args))
    config.num_labels = task.num_labels
    if task.labels:
        config.id2label = dict(enumerate(task.labels))
        config.label2id = {name: i for i, name in enumerate(task.labels)}
    config.problem_type = "regression" if task.regression else "single_label_classification"
    config.finetuning_task = task.name
    if args.cls_dropout is not None:
        config.classifier_dropout = args.cls_dropout
    if args.apply_lora:
        config.apply_lora, config.lora_r, config.lora_alpha = True, args.lora_r, args.lora_alpha
        config.lora_dropout, config.lora_scaling = args.lora_dropout, args.scaling()
    return config


def load_model(args: ModelArguments, task: Task, training: bool):
    """The classifier, adapted if asked, the right parameters trainable; and a note on ``--lora_path``, or None."""
    config = load_config(args, task)
    overlay = args.apply_lora and config.model_type == "roberta" and args.lora_target_modules is None
    kind = RobertaForSequenceClassification if overlay else AutoModelForSequenceClassification
    # Training begins in fp32 whatever the checkpoint was stored in; --bf16 is autocast.
    model, loaded = _fetch(
        kind,
        args.model_name_or_path,
        config=config,
        dtype="float32",
        ignore_mismatched_sizes=training,
        output_loading_info=True,
        **hub_options(args),
    )
    fresh = [key for key in loaded["missing_keys"] if "lora_" not in key]
    lost = [key for key in fresh if not is_inside(key, default_head(model))]
    if lost:
        raise UsageError(
            f"{args.model_name_or_path} lacks {lost[0]!r}; it holds no weights of a {config.model_type} model."
        )
    if not args.apply_lora:
        if fresh and not training:
            raise UsageError(
                f"{args.model_name_or_path} has no trained head ({fresh[0]}); add --do_train, or give a whole classifier."
            )
        return model, None
    if not overlay:
        try:
            lora.inject(
                model, args.lora_target_modules or DEFAULT_TARGETS, args.lora_r, args.lora_alpha, args.lora_dropout,
                args.scaling(),
            )  # fmt: skip
        except ValueError as error:
            raise UsageError(f"--lora_target_modules: {error}") from error
    lora.mark_only_lora_as_trainable(model)
    if args.lora_path is None:
        if not training:
            raise UsageError(
                "--do_eval or --do_predict without --do_train measures a trained adapter; give it with --lora_path."
            )
        return model, None
    try:
        fresh = lora.load_adapter(model, Path(args.lora_path), head="fresh" if training else "require")
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"--lora_path: {error}") from error
    head = f"; fresh, since the file has none of this shape: {', '.join(fresh)}" if fresh else ""
    return model, f"adapter loaded from {args.lora_path}{head}"
