"""Fine-tune a classifier on GLUE (or your own files) with DyLoRA, and measure every rank: ``dylora train``,
run_glue.py.

    dylora train --model_name_or_path roberta-base --task_name rte --learning_rate 5e-4 --num_train_epochs 80 \\
        --output_dir rte/model

The recipes (``examples/NLU/roberta_base_rte.sh``, ...) hold the settings of each task. A run reads from top to bottom
in ``run``; its parts are in this package.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data loader workers fork

import numpy as np
import torch
import transformers
from transformers import DataCollatorWithPadding, TrainerCallback, default_data_collator, set_seed

from loralib.adapters.directory import read_facts
from loralib.conflict import warn_of_other_loralib
from loralib.report.results import RankResults
from loralib.report.tables import print_table
from loralib.report.writing import remove_tables
from loralib.trainer import DyLoRATrainer

from . import results
from .arguments import line_parser, parse
from .data import glue_task, held_out, load_files, load_glue, padding_share, tokenize
from .errors import UsageError
from .identity import check_continuation, fingerprint, refuse_beyond, settings_of, step_of, store
from .modeling import known_columns, known_labels, load_model, load_tokenizer, longest_input
from .output_dir import check_output_dir, clear_run, resume_point
from .settings import expanded, given, named, store_config, turned_off
from .stopping import StopBetweenSteps, exit_code, one_sentence

MAX_LENGTH = 128  # tokens of a text, unless the flag or the adapter says otherwise
SHOWN = 10  # labels, in a line about them
FLAGS = {"train": "--do_train", "validation": "--do_eval", "test": "--do_predict"}


def main(argv: list[str] | None = None, program: str = "run_glue.py") -> RankResults | None:
    """Run one command line; returns what rank_results.json holds (None without --do_eval).

    It may begin with a YAML file of settings, which the flags after it override.
    """
    argv = expanded(sys.argv[1:] if argv is None else argv)
    line_parser().prog, line_parser().usage = program, f"{program} [FILE.yaml] FLAGS"
    model_args, data_args, training_args = parse(argv)
    with one_sentence(training_args):
        return run(model_args, data_args, training_args, argv, program)


def train(argv: list[str] | None = None) -> RankResults | None:
    """``dylora train``: as ``main``, but an adapter is trained and then measured unless the flags say otherwise."""
    argv = expanded(sys.argv[1:] if argv is None else argv)
    flags, refused = named(argv, line_parser()), turned_off(argv, line_parser())
    asked = flags & set(FLAGS.values())
    usual = [FLAGS["train"], FLAGS["validation"]] if asked <= refused else []
    usual = [flag for flag in usual if flag not in refused]
    usual += [] if flags & {"--apply_lora", "--help"} else ["--apply_lora"]
    if flags & {"--help"}:
        line_parser().set_defaults(apply_lora=True, do_train=True, do_eval=True)
    return main([*usual, *argv], "dylora train")


def run(model_args, data_args, training_args, argv: list[str], program: str) -> RankResults | None:
    say = print if training_args.should_log else lambda *_: None
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    if training_args.should_log:
        warn_of_other_loralib()
    for note in training_args.notes:
        say(note)
    if not (training_args.do_train or training_args.do_eval or training_args.do_predict):
        raise UsageError(f"Nothing to do; add {', '.join(FLAGS.values())}.")
    if model_args.fit_strengths and not training_args.do_train:
        raise UsageError(
            "--fit_strengths belongs to a training: add --do_train. For an adapter that is there: dylora squeeze "
            "ADAPTER --strengths FILE."
        )
    if training_args.prediction_loss_only:
        raise UsageError("--prediction_loss_only leaves no predictions to score; leave it out.")
    if training_args.should_save:
        names = ("lora_path", "model_name_or_path", "tokenizer_name", "config_name")
        check_output_dir(training_args, {f"--{name}": getattr(model_args, name) for name in names})
    checkpoint, notes = resume_point(training_args)
    for note in [*notes, *([f"going on from {checkpoint}"] if checkpoint else [])]:
        say(note)
    torch.use_deterministic_algorithms(training_args.full_determinism or model_args.use_deterministic_algorithms)
    set_seed(training_args.seed)

    # The data: raw splits, then tokens. Process 0 tokenises, the others read its cache.
    with training_args.main_process_first(desc="loading and tokenising the data"):
        task, raw, notes = load_data(data_args, model_args, training_args)
        tokenizer = load_tokenizer(model_args)
        told = {} if training_args.do_train else read_facts(model_args.lora_path)
        wanted = data_args.max_seq_length or told.get("max_seq_length") or MAX_LENGTH
        length = data_args.max_seq_length = longest_input(model_args, tokenizer, len(task.columns) == 2, wanted)
        notes += length_notes(length, wanted, told.get("max_seq_length"))
        data = {
            kind: tokenized(kind, raw, task, tokenizer, length, data_args)
            if getattr(training_args, flag.strip("-"))
            else {}
            for kind, flag in FLAGS.items()
        }
    for name, split in [*data["train"].items(), *data["validation"].items()]:
        lengths = np.asarray(split["length"])
        cut = f"; {int((lengths == length).sum())} have these {length}, or had more and are cut"
        say(
            f"{name}: {len(split)} examples, {lengths.mean():.0f} tokens on average, {lengths.max()} at most"
            + (cut if lengths.max() == length and not data_args.pad_to_max_length else "")
        )

    for note in notes:
        say(note)

    # The model, its adapter, and the trainer.
    model, notes = load_model(model_args, task, training_args.do_train, tokenizer.pad_token_id)
    for note in notes:
        say(note)
    to_multiple = 8 if (training_args.fp16 or training_args.bf16) and not training_args.use_cpu else None
    trainer = new_trainer(
        model=model,
        args=training_args,
        train_dataset=data["train"].get("train"),
        eval_dataset=next(iter(data["validation"].values()), None),
        processing_class=tokenizer,
        data_collator=default_data_collator
        if data_args.pad_to_max_length
        else DataCollatorWithPadding(tokenizer, pad_to_multiple_of=to_multiple),
        compute_metrics=metrics_of(task),
        schedule=replace(model_args.schedule(), seed=training_args.seed),
        eval_ranks=model_args.measured_ranks() if model_args.apply_lora else None,
        group_by_length=data_args.group_by_length,
        adapter_facts={
            "task": task.name,
            "labels": list(task.labels),
            "regression": task.regression,
            "max_seq_length": length,
        }
        | ({"seed": training_args.seed} if training_args.do_train else {})
        | ({} if data_args.task_name else {"columns": list(task.columns)}),
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{trainable:,} of {sum(p.numel() for p in model.parameters()):,} parameters train")

    if training_args.do_train:
        settings = settings_of(model_args, data_args, training_args, task, data["train"]["train"], data["validation"])
        if checkpoint:
            for note in check_continuation(Path(checkpoint).parent, settings, training_args.resume_anyway):
                say(note)
            refuse_beyond(Path(checkpoint), training_args)
        trainer.add_callback(StopBetweenSteps())
        anew = training_args.overwrite_output_dir and not checkpoint
        trainer.add_callback(Begin(settings, given(argv, line_parser()), anew))
        try:
            trained = trainer.train(resume_from_checkpoint=checkpoint)
        except FloatingPointError as error:
            raise UsageError(str(error)) from error
        if model_args.fit_strengths:
            trainer.fit_strengths()
            say("strengths of each rank's own are learnt")
        trainer.save_model()
        trained_on = trained.global_step > (step_of(checkpoint) if checkpoint else 0)
        if trainer.is_world_process_zero() and (trained_on or model_args.fit_strengths):
            remove_tables(training_args.output_dir)  # of the weights that were there
        trainer.save_state()
        trainer.log_metrics("train", trained.metrics)
        trainer.save_metrics("train", trained.metrics, combined=False)
        if not data_args.pad_to_max_length:
            share = padding_share(data["train"]["train"]["length"], trainer.batches())
            say(f"padding: {100 * share:.1f} percent of the training tokens")

    found = None
    if training_args.do_eval:
        splits = {name: measure(trainer, name, split, task) for name, split in data["validation"].items()}
        if trainer.is_world_process_zero():
            scaling = model_args.scaling() if model_args.apply_lora else None
            found = results.assemble(
                model_args, training_args, task, trainer, splits, scaling, [*program.split(), *argv]
            )
            found = replace(found, data={name: fingerprint(split, task) for name, split in data["validation"].items()})
            results.write_results(training_args.output_dir, found, splits)
            if model_args.apply_lora and training_args.do_train:
                trainer.write_model_card(found)
            print_table(found)
            say(f"the curve: {training_args.output_dir}/rank_curve.png")

    for name, split in data["test"].items():
        logits = all_ranks(trainer.predict(split, metric_key_prefix="test").predictions)
        if trainer.is_world_process_zero():
            name = task.name + ("-mm" if name.endswith("mismatched") else "")
            results.write_predictions(training_args.output_dir, name, task, trainer.eval_ranks, logits)

    if training_args.push_to_hub:
        trainer.push_to_hub()
    trainer.end()
    return found


class Begin(TrainerCallback):
    """After all checks, just before the first step: what an earlier run left makes way, and this one's settings are
    kept."""

    def __init__(self, settings: dict, flags: dict, anew: bool):
        self.settings, self.flags, self.anew = settings, flags, anew

    def on_train_begin(self, args, state, control, **kwargs):
        if args.should_save:
            if self.anew:
                clear_run(Path(args.output_dir))
            store(args.output_dir, self.settings)
            store_config(args.output_dir, self.flags)


def load_data(data_args, model_args, training_args):
    """The task, its raw splits, and notes on them."""
    if data_args.task_name:
        task = glue_task(data_args.task_name)
        return task, load_glue(task, data_args.dataset_dir, model_args.cache_dir), []
    files = {kind: getattr(data_args, f"{kind}_file") for kind in FLAGS}
    labels, regression = ((), None) if training_args.do_train else known_labels(model_args)
    if data_args.regression is not None:
        regression = data_args.regression
    named = tuple(data_args.labels or ())
    columns = {} if training_args.do_train else known_columns(read_facts(model_args.lora_path))
    if data_args.text_columns:
        columns = {"columns": tuple(data_args.text_columns)}
    task, raw = load_files(files, model_args.cache_dir, named or labels, regression, **columns)
    if not training_args.do_train and not (named or labels or regression) and not _numbered(task.labels):
        raise UsageError(
            f"The model tells no names of its outputs, and the labels are {', '.join(task.labels)}: name them in the "
            "order of the outputs, as in --labels no,yes."
        )
    if training_args.do_eval and "validation" in raw and "label" not in raw["validation"].column_names:
        raise UsageError(f"--validation_file {files['validation']} has no column 'label' to measure by; add it.")
    told = [f"the texts: {', '.join(task.columns)}; {described(task, raw)}"]
    if data_args.test_file and not training_args.do_predict:
        told.append("--test_file is read with --do_predict alone")
    if not (training_args.do_train and training_args.do_eval) or "validation" in raw or "train" not in raw:
        return task, raw, told
    whole = len(raw["train"])
    raw |= held_out(raw["train"])
    note = (
        f"{len(raw['validation'])} of the {whole} examples of {files['train']}, drawn at random, are held out to "
        "measure on; --validation_file names your own"
    )
    return task, raw, [*told, note]


def described(task, raw) -> str:
    """What the labels were taken for."""
    if not task.regression:
        shown = ", ".join(task.labels[:SHOWN]) + (", .." if len(task.labels) > SHOWN else "")
        return f"{len(task.labels)} labels: {shown}"
    values = next((split["label"] for split in raw.values() if "label" in split.column_names), None)
    return "the labels are values" + (f", {min(values):g} to {max(values):g}" if values else "")


def length_notes(length: int, wanted: int, trained_at: int | None) -> list[str]:
    """What is to be said of the length that texts are cut to."""
    notes = [f"texts are cut to {length} tokens, the most that the model takes"] if length < wanted else []
    if trained_at not in (None, length):
        notes.append(f"texts are cut to {length} tokens, in the adapter's training to {trained_at}")
    return notes


def _numbered(labels: tuple[str, ...]) -> bool:
    """Whether labels are 0, 1, .., the numbers of outputs."""
    return labels == tuple(map(str, range(len(labels))))


def tokenized(kind: str, raw, task, tokenizer, length: int, data_args) -> dict:
    """The splits of a kind, cut to --max_..._samples and tokenised; a test split without its hidden labels."""
    names = [name for name in task.splits(kind) if name in raw]
    if not names:
        raise UsageError(f"{FLAGS[kind]} needs the split {task.splits(kind)[0]!r}; the data has only {', '.join(raw)}.")
    limit = getattr(
        data_args, {"train": "max_train_samples", "validation": "max_val_samples", "test": "max_test_samples"}[kind]
    )
    found = {}
    for name in names:
        split = raw[name] if limit is None else raw[name].select(range(min(limit, len(raw[name]))))
        if kind == "test" and "label" in split.column_names:
            split = split.remove_columns("label")
        found[name] = tokenize(
            split,
            task,
            tokenizer,
            length,
            data_args.pad_to_max_length,
            data_args.overwrite_cache,
        )
    return found


def new_trainer(**options) -> DyLoRATrainer:
    """The trainer; settings that contradict each other are the user's mistake."""
    try:
        trainer = DyLoRATrainer(**options)
    except (ValueError, ImportError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    best, args, task = trainer.args.metric_for_best_model, trainer.args, options["compute_metrics"].task
    if best is not None and (args.load_best_model_at_end or args.save_strategy == "best"):
        names = [*task.metrics, *(["combined_score"] if len(task.metrics) > 1 else [])]
        prefixes = [*(f"r{b}_" for b in trainer.eval_ranks), "mean_", "aurac_"] if trainer.eval_ranks else [""]
        known = ["loss", *(f"r{b}_loss" for b in trainer.eval_ranks), *(p + name for p in prefixes for name in names)]
        if best.removeprefix("eval_") not in known:
            raise UsageError(f"--metric_for_best_model is {best!r}; choose one of {', '.join(known)}.")
    return trainer


def metrics_of(task):
    from transformers_dylora.metrics import metrics_function  # evaluate takes seconds to import

    return metrics_function(task)


def all_ranks(logits) -> np.ndarray:
    """(samples, ranks, classes), for a model without adapter too, and for one that gives more than its logits."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits if logits.ndim == 3 else logits[:, None]


def measure(trainer, name: str, split, task) -> dict:
    """One pass over a validation split: its table's rows, and the logits, labels and indices for
    predictions_<name>.npz."""
    prefix = results.eval_prefix(name)
    output = trainer.predict(split, metric_key_prefix=prefix)
    return {
        "rows": results.rank_rows(output.metrics, prefix, trainer.eval_ranks, task, len(split), trainer.model),
        "logits": all_ranks(output.predictions),
        "labels": output.label_ids,
        "idx": np.asarray(split["idx"] if "idx" in split.column_names else range(len(split))),
    }


if __name__ == "__main__":
    sys.exit(exit_code(train, "dylora train"))
