"""The mixin before TRL's trainer of language models: it trains, measures every rank, saves, goes on, and loads the best."""

import json
import math

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import loralib as lora
from loralib.trainer import DyLoRAMixin

pytestmark = pytest.mark.slow


class LanguageTrainer(DyLoRAMixin, SFTTrainer):
    pass


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def rows(n: int, seed: int) -> Dataset:
    """Prompts of words, and the words after them: of many lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        words = torch.randint(
            0, 60, (int(torch.randint(2, 12, (1,), generator=generator)),), generator=generator
        ).tolist()
        found.append(
            {"prompt": "".join(f"w{i} " for i in words), "completion": " ".join(f"w{(i + 1) % 60}" for i in words)}
        )
    return Dataset.from_list(found)


def language_model(r: int | None = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if r:
        lora.inject(model, ["q_proj", "v_proj", "down_proj"], r=r)
        lora.mark_only_lora_as_trainable(model)
    return model


def trainer(out, schedule=None, **more) -> LanguageTrainer:
    options = {
        "output_dir": str(out), "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "use_cpu": True, "bf16": False,
        "report_to": "none", "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    return LanguageTrainer(
        model=language_model(), args=SFTConfig(**options | more), train_dataset=rows(24, 0), eval_dataset=rows(10, 1),
        processing_class=tokenizer(), schedule=schedule,
    )  # fmt: skip


def losses_of_tokens(model, data) -> float:
    """The mean loss of the tokens of the completions, example by example, in double precision."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in data:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
            logits = model(input_ids=ids).logits[0, :-1].double()
            kept = labels != -100
            total -= float(logits.log_softmax(-1)[kept, labels[kept]].sum())
            count += int(kept.sum())
    return total / count


@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2}], ids=["", "accumulated"])
def test_it_trains_measures_saves_goes_on_and_loads_the_best(more, tmp_path):
    t = trainer(tmp_path / "a", load_best_model_at_end=True, metric_for_best_model="r4_loss", **more)
    t.train()
    assert lora.get_rank(t.model) == 4 and not list(tmp_path.glob("a/**/model.safetensors"))
    assert json.loads((tmp_path / "a/checkpoint-4/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    again = trainer(tmp_path / "b", load_best_model_at_end=True, metric_for_best_model="r4_loss", **more)
    again.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-4"))
    ours, theirs = lora.lora_state_dict(t.model), lora.lora_state_dict(again.model)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_loss_is_that_of_the_tokens_however_batches_are_cut(tmp_path):
    t = trainer(tmp_path)
    t.train()
    found = [t.evaluate()]
    for size in (1, 3):
        t.args.per_device_eval_batch_size = size
        found.append(t.evaluate())
    for rank in (1, 2, 3, 4):
        expected = losses_of_tokens(lora.merge(t.model.eval(), rank), t.eval_dataset)
        for metrics in found:
            assert metrics[f"eval_r{rank}_loss"] == pytest.approx(expected, rel=1e-5)
            assert metrics[f"eval_r{rank}_perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_the_passes_that_ask_what_a_loss_divides_by_leave_no_figures(tmp_path):
    t = trainer(tmp_path, max_steps=1, eval_strategy="no", save_strategy="no", logging_strategy="no")
    t.train()
    assert t.knows_loss and not any(t._metrics["eval"].values())


def test_pairs_of_preferences_run_at_a_rank_a_step(tmp_path):
    class Preferring(DyLoRAMixin, DPOTrainer):
        pass

    def pairs(n: int, seed: int) -> Dataset:
        made, other = rows(n, seed), rows(n, seed + 10)
        return Dataset.from_dict(
            {"prompt": made["prompt"], "chosen": made["completion"], "rejected": other["completion"]}
        )

    def preferring(**schedule):
        args = DPOConfig(
            str(tmp_path), per_device_train_batch_size=4, max_steps=4, learning_rate=1e-2, use_cpu=True, bf16=False,
            report_to="none", disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        return Preferring(
            model=language_model(), ref_model=language_model(None), args=args, train_dataset=pairs(16, 0), eval_dataset=pairs(6, 1),
            processing_class=tokenizer(), schedule=lora.RankSchedule(**schedule),
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"8 rows for 4 examples, .*RankSchedule\(sampling='step'\)"):
        preferring().train()
    t = preferring(sampling="step")
    before = t.evaluate()
    t.train()
    after = t.evaluate()
    for b in (1, 4):  # an adapter that is zero prefers neither
        assert before[f"eval_r{b}_loss"] == pytest.approx(math.log(2), rel=1e-5)
        assert after[f"eval_r{b}_loss"] != pytest.approx(math.log(2), rel=1e-5)


def test_a_packed_row_has_one_rank(tmp_path):
    t = trainer(tmp_path, packing=True, packing_strategy="wrapped", max_length=16)
    t.train()
    assert math.isfinite(t.evaluate()["eval_r1_loss"])


def test_a_padding_free_batch_runs_with_a_rank_a_step_and_is_refused_with_one_an_example(tmp_path):
    packed = {"packing": True, "max_length": 32}  # TRL's usual packing is padding-free
    with pytest.raises(ValueError, match=r"padding-free batch is one row, .* RankSchedule"):
        trainer(tmp_path, **packed)
    t = trainer(tmp_path, schedule=lora.RankSchedule(sampling="step"), **packed)
    t.train()
    assert math.isfinite(t.evaluate()["eval_r1_loss"])
