"""Arguments: a value that is not allowed, two that contradict each other, and what looks odd but is right."""

from .judge import Case
from .world import evaluate, train


def flags(*more, start=train):
    return lambda folder: [*start(folder, folder / "out"), *more]


def without(*names):
    """The training command without these flags and their values."""

    def argv(folder):
        line = train(folder, folder / "out")
        for name in names:
            place = line.index(name)
            del line[place : place + (2 if place + 1 < len(line) and not line[place + 1].startswith("--") else 1)]
        return line

    return argv


# (flag, values that are not allowed, what the sentence must hold); each value is a case
NUMBERS = [
    ("--per_device_train_batch_size", ["0", "-1"], "give a number from 1"),
    ("--per_device_eval_batch_size", ["0"], "give a number from 1"),
    ("--gradient_accumulation_steps", ["0"], "give a number from 1"),
    ("--num_train_epochs", ["nan", "-1", "inf"], "--num_train_epochs is"),
    ("--learning_rate", ["nan", "inf", "-1"], "--learning_rate is"),
    ("--weight_decay", ["nan", "-0.1"], "--weight_decay is"),
    ("--max_grad_norm", ["nan", "-1"], "--max_grad_norm is"),
    ("--adam_beta1", ["2", "nan"], "--adam_beta1 is"),
    ("--adam_beta2", ["-1"], "--adam_beta2 is"),
    ("--adam_epsilon", ["nan"], "--adam_epsilon is"),
    ("--seed", ["-1", "99999999999"], "--seed is"),
    ("--dataloader_num_workers", ["-1"], "--dataloader_num_workers is"),
    ("--warmup_ratio", ["nan", "1.5", "-0.1"], "--warmup_ratio is"),
    ("--lora_alpha", ["inf", "nan", "0", "-1"], "--lora_alpha is .* above 0"),
    ("--lora_dropout", ["2", "nan", "-0.1"], "--lora_dropout is .* from 0 to below 1"),
    ("--cls_dropout", ["2", "-1"], "--cls_dropout is .* from 0 to below 1"),
    ("--lora_r", ["0", "-4", "99999"], "--lora_r|rank"),
    ("--lora_r_min", ["9", "0"], "--lora_r_min is .* give 1 to --lora_r"),
    ("--full_rank_share", ["nan", "1", "-0.5"], "--full_rank_share is"),
    ("--max_seq_length", ["0", "1", "2", "-3"], "--max_seq_length"),
    ("--max_train_samples", ["0", "-1"], "--max_train_samples is .* give 1 or more"),
    ("--max_val_samples", ["0"], "--max_val_samples is .* give 1 or more"),
    ("--eval_ranks", ["a", "4", "0", "1,x", "-1"], "--eval_ranks is .* give ranks from 1 to 3"),
    ("--global_batch_size", ["7", "0", "-8"], "--global_batch_size .* is no multiple of 8"),
    ("--lora_scaling", ["alpha"], "invalid choice: 'alpha'"),
    ("--rank_sampling", ["token"], "invalid choice: 'token'"),
    ("--rank_distribution", ["normal"], "invalid choice: 'normal'"),
    ("--lora_r", ["two"], "invalid int value: 'two'"),
    ("--task_name", ["boolq"], "choose one of cola"),
    ("--task_name", [""], "Give either --task_name"),
    ("--model_name_or_path", ["/nowhere/model"], "'/nowhere/model' is no directory"),
    ("--dataset_dir", ["/nowhere"], "--dataset_dir /nowhere is no directory"),
    ("--lora_path", ["/nowhere"], "--lora_path /nowhere does not exist"),
    ("--resume_from_checkpoint", ["true", "/nowhere"], "there is no checkpoint"),
    ("--lora_target_modules", ["nothing"], "matches no layer .* it has dense, key"),
]
PAIRS = [
    ("a rank never drawn", ["--lora_frozen", "--rank_sampling", "fixed"], "frozen training needs drawn ranks"),
    ("a share without draws", ["--full_rank_share", "0.5", "--rank_sampling", "fixed"], "--full_rank_share is 0.5 with"),
    ("as released and not", ["--as_released", "--rank_sampling", "matryoshka"], "--as_released means --rank_sampling step"),
    ("as released, in words that are defaults", ["--as_released", "--rank_sampling", "example"], "--as_released means --rank_sampling step"),
    ("as released and not frozen", ["--as_released", "--lora_frozen", "False"], "--as_released means --lora_frozen True"),
    ("paces that the optimizer cannot keep", ["--rank_distribution", "halving", "--optim", "schedule_free_adamw"], "--lora_paced False"),
    ("as released, scaled otherwise", ["--as_released", "--lora_scaling", "alpha/r"], "leave out one of it and --lora_scaling"),
    ("a reduction without a gate", ["--matryoshka_reduce", "mean"], "matryoshka"),
    ("a metric that is none", ["--metric_for_best_model", "r9_accuracy", "--load_best_model_at_end", "--eval_strategy",
     "steps", "--save_strategy", "steps"], "'r9_accuracy'; choose one of loss, r1_loss"),
    ("fp16 without a GPU", ["--fp16"], "--fp16 needs a GPU"),
    ("FSDP without a GPU", ["--fsdp", "full_shard"], "--fsdp needs GPUs"),
    ("losses alone", ["--prediction_loss_only", "true"], "leaves no predictions to score"),
    ("a last batch that is all", ["--dataloader_drop_last", "true", "--gradient_accumulation_steps", "9"], "fewer than one update"),
    ("batches that are rebalanced", ["--train_sampling_strategy", "batch_rebalance"], "batch_rebalance"),
    ("metrics batch by batch", ["--batch_eval_metrics", "true"], "--batch_eval_metrics"),
    ("an unknown flag", ["--lora_rank", "4"], "--lora_rank is no flag; did you mean --"),
]  # fmt: skip

CASES = [
    *(
        Case(f"{flag} {value}", flags(flag, value), refused=message, quick=k == 0)
        for flag, values, message in NUMBERS
        for k, value in enumerate(values)
    ),
    *(Case(name, flags(*more), refused=message, quick=name in ("as released and not", "an unknown flag")) for name, more, message in PAIRS),
    Case("nothing to do", without("--do_train", "--do_eval"), refused="Nothing to do; add --do_train", quick=True),
    Case("no task and no files", without("--task_name"), refused="Give either --task_name"),
    Case("a task and files", flags("--train_file", "a.csv"), refused="Give either --task_name"),
    Case("an adapter that is not applied", without("--apply_lora"), refused="--lora_path loads an adapter; add --apply_lora"),
    Case("evaluation without an adapter", without("--do_train", "--lora_path"), refused="give it with --lora_path"),
    Case(
        "a number that is no rank for the adapter", flags("--lora_r", "2", start=evaluate),
        refused=r"--lora_r|r = 3|rank 3",
    ),
    Case("another alpha than the adapter's", flags("--lora_alpha", "4", start=evaluate), refused="alpha"),
    Case("other targets than the adapter's", flags("--lora_target_modules", "key", start=evaluate), refused="layer|target"),
    Case("bf16", flags("--bf16", start=evaluate)),
    Case("one example at once", flags("--per_device_eval_batch_size", "1", start=evaluate)),
    Case("all examples at once", flags("--per_device_eval_batch_size", "1000", start=evaluate), quick=True),
    Case("padded to the limit", flags("--pad_to_max_length", start=evaluate)),
    Case("a longer limit than positions", flags("--max_seq_length", "100000", start=evaluate)),
    Case("two workers", flags("--dataloader_num_workers", "2", start=evaluate)),
    Case("columns kept", flags("--remove_unused_columns", "false", start=evaluate)),
    Case("drop_last drops nothing that is measured", flags("--dataloader_drop_last", "true", start=evaluate)),
    Case("some ranks", flags("--eval_ranks", "3,1,3", start=evaluate)),
]  # fmt: skip
