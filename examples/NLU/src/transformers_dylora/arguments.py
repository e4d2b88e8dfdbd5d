"""The command line of dylora train: the installed TrainingArguments, the released flags, and our own."""

import math
import os
import re
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from transformers import HfArgumentParser, TrainingArguments

from loralib.adapters.directory import read_directory, scaling_of_file
from loralib.adapters.hub import local
from loralib.schedule import RankSchedule
from loralib.training.precision import cpu_multiplies_bf16

from .errors import UsageError

LARGEST = 1.7e308
# What numbers of TrainingArguments may be; a nan lies in no range.
RANGES = {
    "per_device_train_batch_size": (1, 10**6),
    "per_device_eval_batch_size": (1, 10**6),
    "gradient_accumulation_steps": (1, 10**9),
    "num_train_epochs": (0, 10**9),
    "learning_rate": (0, LARGEST),
    "weight_decay": (0, LARGEST),
    "max_grad_norm": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, LARGEST),
    "warmup_steps": (0, LARGEST),
    "seed": (0, 2**32 - 1),
    "dataloader_num_workers": (0, 10**4),
    "save_steps": (0, LARGEST),
    "logging_steps": (0, LARGEST),
}
# RankSchedule's words, and the flags that give them.
SCHEDULE_FLAGS = {
    "sampling": "rank_sampling",
    "distribution": "rank_distribution",
    "r_min": "lora_r_min",
    "full_rank_share": "full_rank_share",
    "frozen": "lora_frozen",
    "paced": "lora_paced",
    "reduce": "matryoshka_reduce",
}


# What says nothing without --apply_lora.
OF_ADAPTER = {
    *("lora_r", "lora_alpha", "lora_dropout", "lora_scaling", "lora_target_modules", "eval_ranks", "fit_strengths"),
    *SCHEDULE_FLAGS.values(),
}
SWITCH = {"nargs": "?", "const": True}  # of a flag that may be true, false or left out: alone it is true


def _in_flags(sentence: str) -> str:
    """A sentence of RankSchedule about its fields, in the words of the command line."""
    names = "|".join(SCHEDULE_FLAGS)
    return re.sub(rf"\b({names})(?==| is | has )", lambda match: f"--{SCHEDULE_FLAGS[match[1]]}", sentence)


@dataclass
class DataArguments:
    """Which data, and how it is cut and padded."""

    task_name: str | None = field(
        default=None, metadata={"help": "A GLUE task: cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb or wnli."}
    )
    dataset_dir: str | None = field(
        default=None,
        metadata={
            "help": "Local GLUE data instead of the hub's: DIR or DIR/<task> holds train, validation (MNLI: "
            "validation_matched and validation_mismatched) and test as .jsonl, .parquet or .csv, or what save_to_disk "
            "wrote."
        },
    )
    train_file: str | None = field(default=None, metadata={"help": "Your own training data, CSV or JSON lines."})
    validation_file: str | None = field(default=None, metadata={"help": "Your own validation data, CSV or JSON lines."})
    test_file: str | None = field(default=None, metadata={"help": "Your own test data, CSV or JSON lines."})
    text_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "The one or two columns of your own files that are read. Default: the adapter's; in training "
            "sentence1 and sentence2, else the text columns that there are."
        },
    )
    labels: list[str] | None = field(
        default=None,
        metadata={
            "help": "The labels of your own files, as in no,yes, in the order of the model's outputs. Default: the "
            "adapter's; in training numbers by size, names by the alphabet."
        },
    )
    regression: bool | None = field(
        default=None,
        metadata={
            **SWITCH,
            "help": "Whether the labels of your own files are values and no classes. Default: as the adapter was "
            "trained; in training, if a label has a fraction.",
        },
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={
            "help": "Longer inputs are cut to this many tokens. Default: as the adapter was trained; in training 128."
        },
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad all to max_seq_length. Default: to the longest of a batch."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenise anew instead of using the cache."})
    group_by_length: bool = field(
        default=True, metadata={"help": "Train on batches of examples of like length; false: shuffle only."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first N training examples."})
    max_val_samples: int | None = field(
        default=None, metadata={"help": "Use the first N validation examples.", "aliases": ["--max_eval_samples"]}
    )
    max_test_samples: int | None = field(
        default=None, metadata={"help": "Use the first N test examples.", "aliases": ["--max_predict_samples"]}
    )

    def __post_init__(self):
        own = [path for path in (self.train_file, self.validation_file, self.test_file) if path]
        if bool(self.task_name) == bool(own):
            raise UsageError(
                "Give either --task_name (a GLUE task) or your own --train_file, --validation_file, --test_file."
            )
        if self.dataset_dir and own:
            raise UsageError(f"--dataset_dir holds GLUE tasks and is not read beside {own[0]}; leave it out.")
        if self.regression is not None and self.task_name:
            raise UsageError(f"--regression is for your own files; {self.task_name} has its own labels.")
        for name in ("text_columns", "labels"):
            given = [one for part in getattr(self, name) or () for one in part.split(",") if one]
            setattr(self, name, given or None)
            if given and self.task_name:
                raise UsageError(f"--{name} is for your own files; {self.task_name} has its own.")
        wrong = [name for name in self.text_columns or () if name in ("label", "labels", "idx", "length")]
        if wrong or len(set(self.text_columns or ())) < len(self.text_columns or ()):
            raise UsageError(
                f"--text_columns {' '.join(self.text_columns or ())}: name columns of text, each once; label, labels, "
                "idx and length are others."
            )
        if self.text_columns and len(self.text_columns) > 2:
            raise UsageError(f"--text_columns names {len(self.text_columns)} columns; a classifier reads one or two.")
        if self.labels and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels) or self.regression):
            raise UsageError(f"--labels is {','.join(self.labels)}; name two or more classes, each once.")
        for path in own:
            if not path.endswith((".csv", ".json", ".jsonl")):
                raise UsageError(f"{path} is no .csv, .json or .jsonl file; convert it to one of these.")
        for name in ("max_seq_length", "max_train_samples", "max_val_samples", "max_test_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} is {value}; give 1 or more.")


@dataclass
class ModelArguments:
    """Which model, and its adapter."""

    model_name_or_path: str = field(metadata={"help": "A checkpoint: a directory, or a name on the Hugging Face hub."})
    config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it lies elsewhere."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Its tokenizer, if it lies elsewhere."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    use_auth_token: bool = field(
        default=False, metadata={"help": "Use the token of `hf auth login` for a private model."}
    )
    token: str | None = field(default=None, metadata={"help": "A token of the hub, for a private model."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that a checkpoint brings."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Take the tokenizer's fast version."})
    cls_dropout: float | None = field(default=None, metadata={"help": "Dropout of the classification head."})
    use_deterministic_algorithms: bool = field(
        default=False, metadata={"help": "torch.use_deterministic_algorithms(True)."}
    )

    apply_lora: bool = field(
        default=False,
        metadata={"help": "Train a DyLoRA adapter and the head. Without it run_glue.py trains the whole model."},
    )
    lora_r: int | None = field(
        default=None,
        metadata={
            "help": "r_max: the adapter works at every rank from 1 to this. Default: that of --lora_path; else 8."
        },
    )
    lora_alpha: float | None = field(
        default=None,
        metadata={"help": "alpha of the scaling rule. Default: that of --lora_path; else twice --lora_r."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    lora_scaling: Literal["alpha/b", "alpha/r", "alpha/sqrt(b)"] | None = field(
        default=None,
        metadata={
            "help": "Strength of the update at rank b. Default: that of --lora_path; else alpha/r. The paper's is "
            "alpha/b."
        },
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Which layers to adapt, by the ends of their names, or all-linear. Default: query value, or the "
            "usual ones of the architecture."
        },
    )
    lora_path: str | None = field(
        default=None,
        metadata={
            "help": "Start from this adapter: a directory, a name on the hub, or a .bin of microsoft/LoRA or released "
            "DyLoRA; 'none': from scratch."
        },
    )
    rank_sampling: Literal["example", "step", "matryoshka", "fixed"] | None = field(
        default=None,
        metadata={
            "help": "How training chooses ranks: each example its own (default), one per update (the paper), "
            "MatryoshkaLoRA's fixed gate, or always r_max (plain LoRA)."
        },
    )
    full_rank_share: float | None = field(
        default=None,
        metadata={
            "help": "The share of training, 0 to below 1, that trains all components together; then they are put in "
            "the order of their importance and ranks are drawn. Default: 0.8 where ranks are drawn at one strength, "
            "alpha/r; 0 is the paper's way."
        },
    )
    as_released: bool = field(
        default=False,
        metadata={
            "help": "Train as the released code does: --rank_sampling step --lora_frozen --full_rank_share 0 "
            "--lora_scaling alpha/b."
        },
    )
    rank_distribution: Literal["uniform", "geometric", "halving", "mixed"] | None = field(
        default=None,
        metadata={
            "help": "p_B of the paper; halving: half of the examples at r_max, a quarter at r_min, an eighth at 2 "
            "r_min, and so on; or mixed: a third at r_min, the others at r_min, 2 r_min, 4 r_min, .. r_max at once. "
            "Default: mixed with --rank_sampling example after --full_rank_share, else uniform."
        },
    )
    matryoshka_reduce: Literal["sum", "mean"] | None = field(
        default=None, metadata={"help": "With --rank_sampling matryoshka: sum (default) or mean of the ranks' gates."}
    )
    lora_r_min: int = field(default=1, metadata={"help": "The lowest rank that training draws."})
    lora_frozen: bool | None = field(
        default=None, metadata={**SWITCH, "help": "Update component b alone (paper, eq. 10)."}
    )
    lora_paced: bool | None = field(
        default=None,
        metadata={
            **SWITCH,
            "help": "Once ranks are drawn, component k learns min(r_max, 8)/k times as fast, never slower than usual. "
            "Default: with --rank_distribution halving at one strength, alpha/r.",
        },
    )
    fit_strengths: bool = field(
        default=False,
        metadata={
            "help": "After the training learn, in 60 updates more, how strong each layer's update should be at each "
            "rank."
        },
    )
    eval_ranks: str | None = field(default=None, metadata={"help": "Ranks to measure, as in 1,2,4,8. Default: all."})

    def __post_init__(self):
        if self.lora_path in ("none", "None", ""):
            self.lora_path = None
        if self.lora_path:
            try:
                self.lora_path = str(local(self.lora_path, self.token))
            except FileNotFoundError as error:
                raise UsageError(f"--lora_path: {error}") from error
        if self.lora_path and not os.path.exists(self.lora_path):
            raise UsageError(
                f"--lora_path {self.lora_path} does not exist; give an adapter's directory, its name on the hub, a "
                ".bin file or 'none'."
            )
        if self.lora_path and not self.apply_lora:
            raise UsageError("--lora_path loads an adapter; add --apply_lora.")
        if self.as_released and not self.apply_lora:
            raise UsageError("--as_released trains an adapter; add --apply_lora.")
        for one in fields(self) if not self.apply_lora else ():
            if one.name in OF_ADAPTER and getattr(self, one.name) != one.default:
                raise UsageError(f"--{one.name} is about an adapter; add --apply_lora, or leave it out.")
        if self.lora_target_modules:
            self.lora_target_modules = [n for given in self.lora_target_modules for n in given.split(",") if n]
        if not self.apply_lora:
            return
        if self.cls_dropout is not None and not 0 <= self.cls_dropout < 1:
            raise UsageError(f"--cls_dropout is {self.cls_dropout}; give a number from 0 to below 1.")
        files = self._adapter_files()
        if self.lora_r is None:
            self.lora_r = 8 if files is None else files.config["r"]
        if self.lora_r < 1:
            raise UsageError(f"--lora_r is {self.lora_r}; give 1 or more.")
        self.lora_alpha = self.alpha() if self.lora_alpha is None else self.lora_alpha
        if not 0 < self.lora_alpha < math.inf:
            raise UsageError(f"--lora_alpha is {self.lora_alpha}; give a number above 0.")
        if not 0 <= self.lora_dropout < 1:
            raise UsageError(f"--lora_dropout is {self.lora_dropout}; give a number from 0 to below 1.")
        if not 1 <= self.lora_r_min <= self.lora_r:
            raise UsageError(f"--lora_r_min is {self.lora_r_min}; give 1 to --lora_r, which is {self.lora_r}.")
        self.measured_ranks()
        self.schedule()

    def schedule(self) -> RankSchedule:
        """How ranks are trained. Raises UsageError for flags that contradict each other."""
        given = {name: getattr(self, flag) for name, flag in SCHEDULE_FLAGS.items()}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            if not self.as_released:
                return RankSchedule(**given)
            released = RankSchedule.paper()
            for name in ("sampling", "full_rank_share", "frozen"):
                if given.get(name, getattr(released, name)) != getattr(released, name):
                    raise UsageError(
                        f"--as_released means --{SCHEDULE_FLAGS[name]} {getattr(released, name)}; leave out one of it "
                        f"and --{SCHEDULE_FLAGS[name]} {given[name]}."
                    )
            return RankSchedule.paper(**given)
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError(_in_flags(str(error))) from error

    def alpha(self) -> float:
        """That of the adapter to start from, for --lora_r; else twice --lora_r. A ``.bin`` says none."""
        files = self._adapter_files()
        if files is None:
            return 2 * self.lora_r
        alpha = files.config["lora_alpha"]
        return alpha * self.lora_r / files.config["r"] if files.scaling == "alpha/r" else alpha

    def _adapter_files(self):
        """The adapter to start from, where it is a directory."""
        if not self.lora_path or not os.path.isdir(self.lora_path):
            return None
        try:
            return read_directory(self.lora_path)
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(f"--lora_path: {error}") from error

    def scaling(self) -> str:
        """The scaling rule: the flag's, else that of the adapter to start from, else what --as_released or the default
        means.

        Raises UsageError for an adapter that cannot be read, and for a rule that --as_released does not mean.
        """
        if self.as_released:
            if self.lora_scaling not in (None, "alpha/b"):
                raise UsageError(
                    "--as_released means --lora_scaling alpha/b; leave out one of it and --lora_scaling "
                    f"{self.lora_scaling}."
                )
            files = self._adapter_files()
            if files is not None and files.scaling != "alpha/b":
                raise UsageError(
                    f"--as_released trains at scaling alpha/b, and {self.lora_path} was trained at {files.scaling}: "
                    "train that one with --as_released too, or start from none (--lora_path none)."
                )
            return "alpha/b"
        if self.lora_scaling is not None:
            return self.lora_scaling
        try:
            return scaling_of_file(self.lora_path) if self.lora_path else "alpha/r"
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(f"--lora_path: {error}") from error

    def measured_ranks(self) -> list[int]:
        """The ranks of --eval_ranks, in order. Raises UsageError for what is no rank."""
        if not self.eval_ranks:
            return list(range(1, self.lora_r + 1))
        try:
            ranks = sorted({int(rank) for rank in self.eval_ranks.split(",")})
        except ValueError:
            ranks = [0]
        if not all(1 <= rank <= self.lora_r for rank in ranks):
            raise UsageError(f"--eval_ranks is {self.eval_ranks!r}; give ranks from 1 to {self.lora_r}, as in 1,2,4.")
        return ranks


@dataclass
class GlueTrainingArguments(TrainingArguments):
    """The installed TrainingArguments, and what earlier releases called differently."""

    global_batch_size: int | None = field(
        default=None,
        metadata={"help": "Examples per update over all processes; the accumulation steps follow from it."},
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Start anew in a directory that is not empty."})
    resume_anyway: bool = field(
        default=False, metadata={"help": "Go on with a run although settings that decide its numbers differ."}
    )
    evaluation_strategy: str | None = field(default=None, metadata={"help": "Earlier name of --eval_strategy."})
    warmup_ratio: float | None = field(default=None, metadata={"help": "Share of the steps that warm up."})
    warmup_steps: float | None = field(
        default=None, metadata={"help": "Steps that warm up, below 1 a share of them; before --warmup_ratio."}
    )
    logging_dir: str | None = field(default=None, metadata={"help": "Where TensorBoard's log goes."})
    no_cuda: bool = field(default=False, metadata={"help": "Earlier name of --use_cpu."})
    save_safetensors: bool = field(default=True, metadata={"help": "Accepted; checkpoints are always safetensors."})

    def __post_init__(self):
        self.notes = []
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, (int, float)) and not low <= value <= high:
                above = f"{low} or more" if high == math.inf or high == LARGEST else f"a number from {low} to {high}"
                raise UsageError(f"--{name} is {value}; give {above}.")
        if self.evaluation_strategy is not None:
            self.eval_strategy = self.evaluation_strategy
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio < 1:
            raise UsageError(f"--warmup_ratio is {self.warmup_ratio}; give a share from 0 to below 1.")
        if self.warmup_steps is None:  # a recipe's ratio gives way to the user's steps
            self.warmup_steps = self.warmup_ratio or 0
        if self.no_cuda or not torch.accelerator.is_available():
            self.use_cpu = True  # --bf16 and the gloo backend ask for this word where there is no accelerator
        if self.fp16 and self.use_cpu:
            raise UsageError("--fp16 needs a GPU: without one nothing would compute in it; use --bf16, or neither.")
        if self.bf16 and self.use_cpu and not cpu_multiplies_bf16():
            self.notes.append(
                "--bf16: this processor has no instructions for it, and steps take some 20 times as long as without it."
            )
        if self.use_cpu and (self.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")):
            raise UsageError(
                "--fsdp needs GPUs: accelerate has no FSDP for CPUs; leave it out, processes share a batch."
            )
        if self.label_names:
            raise UsageError("--label_names: the labels are the column label here; leave it out.")
        if self.batch_eval_metrics:
            raise UsageError("--batch_eval_metrics: the scores of all ranks are computed at the end; leave it out.")
        if not self.remove_unused_columns:
            self.remove_unused_columns = True
            self.notes.append(
                "--remove_unused_columns false has no effect: no column but the model's inputs reaches it."
            )
        if not self.save_safetensors:
            self.notes.append("--save_safetensors false has no effect any more: checkpoints are always safetensors.")
        if self.logging_dir is not None:
            os.environ["TENSORBOARD_LOGGING_DIR"] = self.logging_dir
            if find_spec("tensorboard") and self.report_to in (None, "none", ["none"]):
                self.report_to = ["tensorboard"]
            elif not find_spec("tensorboard"):
                self.notes.append(
                    "--logging_dir: TensorBoard is not installed; the log is in trainer_state.json instead."
                )
        super().__post_init__()
        if self.global_batch_size is not None:
            self._accumulate_to_global_batch()

    def _accumulate_to_global_batch(self) -> None:
        at_once = self.per_device_train_batch_size * max(1, self.world_size)
        if self.global_batch_size < 1 or self.global_batch_size % at_once:
            raise UsageError(
                f"--global_batch_size {self.global_batch_size} is no multiple of {self.per_device_train_batch_size} "
                f"per device x {max(1, self.world_size)} processes; change it or --per_device_train_batch_size."
            )
        steps = self.global_batch_size // at_once
        if self.gradient_accumulation_steps not in (1, steps):
            raise UsageError(
                f"--gradient_accumulation_steps {self.gradient_accumulation_steps}: --global_batch_size "
                f"{self.global_batch_size} asks for {steps}; leave out one of them."
            )
        self.gradient_accumulation_steps = steps
        self.notes.append(
            f"global batch {self.global_batch_size} = {self.per_device_train_batch_size} per device x "
            f"{max(1, self.world_size)} processes x {self.gradient_accumulation_steps} accumulation steps"
        )


ABOUT = (
    "Trains an adapter for every rank on a GLUE task or files of your own, and measures each. FILE.yaml holds "
    "settings, which flags override. For example: dylora train --model_name_or_path roberta-base --task_name rte "
    "--learning_rate 5e-4 --output_dir rte/model"
)


class LineParser(HfArgumentParser):
    """HfArgumentParser, but what is wrong comes as one UsageError, without the usage of 150 flags."""

    def error(self, message: str):
        message = re.sub(r"/--[\w-]+", "", message)  # each flag is told once, not with its spelling with dashes too
        raise UsageError(f"{message[0].upper()}{message[1:]}; --help lists all flags.")


@cache
def line_parser() -> LineParser:
    """What reads a command line."""
    return LineParser((ModelArguments, DataArguments, GlueTrainingArguments), description=ABOUT)


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, GlueTrainingArguments]:
    """Parse the command line. Raises UsageError, SystemExit for --help."""
    parser = line_parser()
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
    except UsageError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:  # of transformers' checks
        raise UsageError(" ".join(str(error).split())) from error
    if unknown:
        near = get_close_matches(unknown[0], parser._option_string_actions, n=1)
        raise UsageError(
            f"{unknown[0]} is no flag; {f'did you mean {near[0]}? ' if near else ''}--help lists them all."
        )
    return parsed[0], parsed[1], parsed[2]
