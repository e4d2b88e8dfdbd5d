#!/usr/bin/env python
"""Fine-tune a language model on prompts and completions with TRL and DyLoRA, and measure every rank.

    python sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --train train.jsonl \\
        --validation validation.jsonl --output_dir out

Each line of the files holds {"prompt": .., "completion": ..}. The directory then holds the adapter and the table of all
ranks: `dylora select out`, `dylora report out`, `dylora export out --rank auto --to adapter`.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from datasets import load_dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, HfArgumentParser, set_seed
from trl import SFTConfig, SFTTrainer

import loralib as lora
from loralib.report.tables import print_table
from loralib.sampling import RankSampler
from loralib.trainer import DyLoRAMixin


@dataclass
class Arguments:
    """What to train, and how; all of TRL's SFTConfig works too."""

    model: str = field(metadata={"help": "A directory, or a name on the Hugging Face hub."})
    train: str = field(metadata={"help": "JSON lines of prompt and completion."})
    validation: str = field(metadata={"help": "The same, to measure every rank on."})
    gguf_file: str | None = field(
        default=None, metadata={"help": "The weights' name in the directory, if they are GGUF."}
    )
    bits: Literal["16", "8", "4"] = field(
        default="16", metadata={"help": "Store the base model in so many bits (bitsandbytes; 4 is nf4)."}
    )
    peft: bool = field(default=False, metadata={"help": "Adapt the model inside PEFT, by DyLoraConfig."})
    lora_r: int = field(default=16, metadata={"help": "r_max: the adapter works at every rank from 1 to this."})
    eval_ranks: str | None = field(
        default=None, metadata={"help": "The ranks to measure, as in 1,2,4. Default: 1, 2, 4, .. and r_max."}
    )
    full_rank_share: float | None = field(
        default=None, metadata={"help": "The share of the updates before components are ordered. Default: 0.8."}
    )
    rank_distribution: Literal["uniform", "geometric", "halving", "mixed"] | None = field(
        default=None, metadata={"help": "How ranks are drawn afterwards, see RankSchedule. Default: mixed."}
    )
    lora_paced: bool | None = field(
        default=None,
        metadata={
            "nargs": "?",
            "const": True,
            "help": "Whether first components learn faster once ranks are drawn. Default: with halving.",
        },
    )
    fit_strengths: bool = field(
        default=False,
        metadata={
            "help": "After the training learn, in 60 updates more, how strong each layer's update is at each rank."
        },
    )
    targets: str = field(
        default="q_proj,k_proj,v_proj,o_proj", metadata={"help": "The layers to adapt, or all-linear."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first N training examples."})
    max_val_samples: int | None = field(default=None, metadata={"help": "Use the first N validation examples."})


class LanguageTrainer(DyLoRAMixin, SFTTrainer):
    """TRL's trainer, with ranks."""


def rows(file: str, limit: int | None):
    data = load_dataset("json", data_files=file, split="train")
    return data if limit is None else data.select(range(min(limit, len(data))))


def load(args: Arguments):
    """The base model, quantised if asked."""
    options = {"gguf_file": args.gguf_file, "dtype": torch.float32}
    if args.bits != "16":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=args.bits == "8", load_in_4bit=args.bits == "4", bnb_4bit_quant_type="nf4"
        )
    return AutoModelForCausalLM.from_pretrained(args.model, **options)


def line_parser() -> HfArgumentParser:
    parser = HfArgumentParser((Arguments, SFTConfig))
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())
    return parser


def main(argv: list[str] | None = None):
    args, config = line_parser().parse_args_into_dataclasses(argv)
    set_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf_file)
    model = load(args)
    targets = args.targets if args.targets == "all-linear" else args.targets.split(",")
    if args.peft:
        from loralib.peft import DyLoraConfig

        options = {"r": args.lora_r, "lora_alpha": 2 * args.lora_r, "target_modules": targets}
        model = get_peft_model(model, DyLoraConfig(**options, task_type="CAUSAL_LM"))
    else:
        lora.inject(model, targets, r=args.lora_r)
        lora.mark_only_lora_as_trainable(model)
    ranks = args.eval_ranks.split(",") if args.eval_ranks else RankSampler(args.lora_r).ladder()
    trainer = LanguageTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=rows(args.train, args.max_train_samples),
        eval_dataset=rows(args.validation, args.max_val_samples),
        eval_ranks=[int(b) for b in ranks],
        schedule=lora.RankSchedule(
            distribution=args.rank_distribution, full_rank_share=args.full_rank_share, paced=args.lora_paced
        ),
    )
    checkpoint = config.resume_from_checkpoint  # a directory, or "true": the last one of the output directory
    trainer.train(resume_from_checkpoint=True if str(checkpoint).lower() == "true" else checkpoint)
    if args.fit_strengths:
        trainer.fit_strengths()
    results = trainer.measure_ranks()
    print_table(results)
    return trainer, results


if __name__ == "__main__":
    main()
