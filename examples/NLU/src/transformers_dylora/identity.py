"""What makes a run the run it is: the settings that decide its numbers, stored with it, so that it goes on only as
itself."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from loralib.files import write_text

from .arguments import SCHEDULE_FLAGS
from .errors import UsageError

FILE = "run_settings.json"
# Settings of the updates that do not often change.
OF_UPDATES = (
    *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "lr_scheduler_kwargs", "label_smoothing_factor"),
    *("neftune_noise_alpha", "train_sampling_strategy", "dataloader_drop_last"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
OF_MODEL = ("config_name", "tokenizer_name", "use_fast_tokenizer", "model_revision")
LENGTHS = ("num_train_epochs", "max_steps")  # a longer or shorter training of the same run


def settings_of(model_args, data_args, training_args, task, train, validation: dict | None = None) -> dict:
    """The settings that decide the numbers. The batch counts as the examples of an update, however it is split; the
    validation data count where the best model is chosen on them."""
    args = training_args
    found = {
        "task": task.name,
        "labels": list(task.labels),
        "data": fingerprint(train, task),
        "validation data": [fingerprint(split, task) for split in (validation or {}).values()]
        if args.load_best_model_at_end or str(args.save_strategy) == "best"
        else None,
        "model_name_or_path": model_args.model_name_or_path,
        "apply_lora": bool(model_args.apply_lora),
        "lora_path": model_args.lora_path,
        **{name: getattr(model_args, name) for name in OF_MODEL},
        "cls_dropout": model_args.cls_dropout,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": str(args.lr_scheduler_type),
        "warmup_steps": args.warmup_steps,
        "weight_decay": args.weight_decay,
        "optim": str(args.optim),
        "max_grad_norm": args.max_grad_norm,
        **{name: getattr(args, name) for name in OF_UPDATES},
        "examples per update": args.per_device_train_batch_size
        * args.gradient_accumulation_steps
        * max(1, args.world_size),
        "bf16": args.bf16,
        "fp16": args.fp16,
        "max_seq_length": data_args.max_seq_length,
        "group_by_length": data_args.group_by_length,
        **{name: getattr(args, name) for name in LENGTHS},
    }
    if model_args.apply_lora:
        found |= {
            name: getattr(model_args, name) for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        }
        scaling = model_args.scaling()
        settled = model_args.schedule().resolve(model_args.lora_r, scaling).schedule  # a default may be another later
        schedule = {SCHEDULE_FLAGS.get(name, name): value for name, value in asdict(settled).items()}
        found |= {"lora_scaling": scaling, **schedule, "seed": args.seed}
    return json.loads(json.dumps(found, default=str))


def fingerprint(split, task) -> str:
    """A hash of a split's examples: their texts and labels, in order."""
    digest = hashlib.sha256()
    for column in (*task.columns, "label"):
        for chunk in split.with_format("arrow").select_columns([column]).iter(10_000):
            digest.update("\n".join(map(str, chunk[column].to_pylist())).encode())
    return f"{len(split)} examples, {digest.hexdigest()[:16]}"


def stored(directory: str | Path) -> dict | None:
    """The settings of the run in a directory; None where none are kept (no run, or one of an earlier release)."""
    file = Path(directory) / FILE
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(
            f"{file} is no JSON ({error}); remove it, or start anew with --overwrite_output_dir."
        ) from None
    return found if isinstance(found, dict) else None


def store(directory: str | Path, settings: dict) -> None:
    write_text(Path(directory) / FILE, json.dumps(settings, indent=2) + "\n")


def check_continuation(directory: str | Path, settings: dict, anyway: bool) -> list[str]:
    """Raise UsageError if the run in ``directory`` was another than ``settings``; notes on what differs all the same.

    A longer or shorter training is the one change that needs no word.
    """
    before = stored(directory)
    if before is None and not anyway:
        raise UsageError(
            f"{directory} holds no {FILE}, so that the run which is to go on there may be another: give the "
            "checkpoint where its run left it, or add --resume_anyway."
        )
    if before is None:
        return [f"going on with a run whose settings are not known: {directory} holds no {FILE}"]
    unknown = {name for name in SCHEDULE_FLAGS.values() if before.get(name) is None}  # the default of another release
    apart = {
        name: (before[name], value)
        for name, value in settings.items()
        if name in before and before[name] != value and name not in unknown
    }
    longer = [f"{name} {old} is now {new}" for name, (old, new) in apart.items() if name in LENGTHS]
    others = [f"{name} was {old}, now {new}" for name, (old, new) in apart.items() if name not in LENGTHS]
    if others and not anyway:
        raise UsageError(
            f"The run in {directory} cannot go on as another: {'; '.join(others)}. Give its own settings, another "
            "--output_dir, --overwrite_output_dir to start anew, or --resume_anyway."
        )
    return [f"going on with other settings than before: {'; '.join(others)}"] * bool(others) + [
        f"going on longer or shorter than before: {'; '.join(longer)}"
    ] * bool(longer)


def _state(checkpoint: str | Path) -> dict:
    return json.loads(Path(checkpoint, "trainer_state.json").read_text(encoding="utf-8"))


def step_of(checkpoint: str | Path) -> int:
    """After how many updates it was saved."""
    return _state(checkpoint)["global_step"]


def refuse_beyond(checkpoint: Path, args) -> None:
    """Raise UsageError for a checkpoint from after the asked end: nothing would be trained, and its weights be called
    those of the shorter training."""
    step, epoch = step_of(checkpoint), _state(checkpoint).get("epoch") or 0
    beyond = step > args.max_steps if args.max_steps > 0 else epoch > args.num_train_epochs + 1e-6
    if beyond:
        length = (
            f"--max_steps {args.max_steps}" if args.max_steps > 0 else f"--num_train_epochs {args.num_train_epochs:g}"
        )
        raise UsageError(
            f"{checkpoint} is from step {step}, epoch {epoch:g}, after the end of {length}; give a longer training, "
            "another --output_dir, or --overwrite_output_dir to start anew."
        )
