#!/usr/bin/env python
"""Fine-tune a language model on prompts and completions with TRL and DyLoRA, and measure every rank.

    python sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --train train.jsonl --validation validation.jsonl
    --output_dir out

Each line of the files holds {"prompt": .., "completion": ..}. The directory then holds the adapter and the table of all
ranks: `dylora select out`, `dylora report out`, `dylora export out --rank auto --to adapter`.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, set_seed
from trl import SFTConfig, SFTTrainer

import loralib as lora
from loralib.report.tables import print_table
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
    lora_r: int = field(default=16, metadata={"help": "r_max: the adapter works at every rank from 1 to this."})
    eval_ranks: str = field(default="1,2,4,8,16", metadata={"help": "The ranks to measure."})
    targets: str = field(default="q_proj,k_proj,v_proj,o_proj", metadata={"help": "The layers to adapt."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use the first N training examples."})
    max_val_samples: int | None = field(default=None, metadata={"help": "Use the first N validation examples."})


class LanguageTrainer(DyLoRAMixin, SFTTrainer):
    """TRL's trainer, with ranks."""


def rows(file: str, limit: int | None):
    data = load_dataset("json", data_files=file, split="train")
    return data if limit is None else data.select(range(min(limit, len(data))))


def line_parser() -> HfArgumentParser:
    return HfArgumentParser((Arguments, SFTConfig))


def main(argv: list[str] | None = None):
    args, config = line_parser().parse_args_into_dataclasses(argv)
    set_seed(config.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model, gguf_file=args.gguf_file)
    model = AutoModelForCausalLM.from_pretrained(args.model, gguf_file=args.gguf_file, dtype=torch.float32)
    lora.inject(model, args.targets.split(","), r=args.lora_r)
    lora.mark_only_lora_as_trainable(model)
    trainer = LanguageTrainer(
        model=model,
        args=config,
        processing_class=tokenizer,
        train_dataset=rows(args.train, args.max_train_samples),
        eval_dataset=rows(args.validation, args.max_val_samples),
        eval_ranks=[int(b) for b in args.eval_ranks.split(",")],
    )
    trainer.train()
    results = trainer.measure_ranks()
    print_table(results)
    return trainer, results


if __name__ == "__main__":
    main()
