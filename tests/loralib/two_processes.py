"""What test_sharding.py asks, answered by two processes on this machine: ``python two_processes.py DIRECTORY``.

Each answer is how far a model under FSDP2 is from the same in one piece; the first process writes them all.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

import loralib as lora
from loralib.model import lora_layers
from loralib.peft import DyLoraConfig
from loralib.sharding import whole

# Nothing divides by two: parts are of different sizes.
SIZES = dict(hidden_size=36, intermediate_size=70, num_hidden_layers=2, num_attention_heads=3, vocab_size=51)
IDS = torch.arange(40).view(4, 10)
RANKS = torch.tensor([1, 5, 2, 3])
TARGETS = ["q_proj", "v_proj", "down_proj", "embed_tokens"]


def build(door: str, sharded: bool):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=3))
    torch.manual_seed(1)
    if door == "peft":
        model = get_peft_model(model, DyLoraConfig(r=5, lora_alpha=10, target_modules=TARGETS[:3]))
    else:
        lora.inject(model, TARGETS, r=5, lora_alpha=10, modules_to_save=["norm"])
        lora.mark_only_lora_as_trainable(model)
    generator = torch.Generator().manual_seed(2)
    for _, layer in lora_layers(model):
        layer.lora_A.data.copy_(torch.randn(layer.lora_A.shape, generator=generator) * 0.1)
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.1)
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.get_decoder().layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def train(model, ids, ranks, optimizer, steps=3, frozen=False):
    if frozen:
        lora.freeze_undrawn(optimizer, model)
    for _ in range(steps):
        lora.set_rank(model.train(), ranks, frozen=frozen)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((whole(one.detach()) - whole(other.detach())).abs().max())


def of_factors(one, other) -> float:
    pairs = list(zip(lora_layers(one), lora_layers(other), strict=True))
    return max(apart(getattr(a, name), getattr(b, name)) for (_, a), (_, b) in pairs for name in ("lora_A", "lora_B"))


def of_files(one, other) -> float:
    one, other = (load_file(directory / "adapter_model.safetensors") for directory in (one, other))
    return max(apart(one[key], other[key]) for key in one.keys() | other.keys())


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def sentence(use) -> str:
    try:
        use()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was said"


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def own_loop(door: str, directory: Path) -> dict:
    """Train, order, save, merge and load, in one piece and in two."""
    me, count = dist.get_rank(), dist.get_world_size()
    model, parts = build(door, False), build(door, True)
    optimizers = [optimizer_of(model), optimizer_of(parts)]
    train(model, IDS, RANKS, optimizers[0])
    train(parts, IDS[me::count], RANKS[me::count], optimizers[1])
    found = {"trained": of_factors(model, parts)}
    for each, optimizer in zip((model, parts), optimizers, strict=True):
        lora.order_components(each, optimizer)
    found["ordered"] = of_factors(model, parts)
    found["moments"] = max(
        apart(optimizers[0].state[a.lora_A][name], optimizers[1].state[b.lora_A][name])
        for (_, a), (_, b) in zip(lora_layers(model), lora_layers(parts), strict=True)
        for name in ("exp_avg", "exp_avg_sq")
    )
    train(model, IDS, 5, optimizers[0], steps=1)
    train(parts, IDS[me::count], 5, optimizers[1], steps=1)
    found["trained on"] = of_factors(model, parts)
    for each, optimizer, rows in ((model, optimizers[0], slice(None)), (parts, optimizers[1], slice(me, None, count))):
        logits(each)  # a pass without a gradient leaves the outermost parameters whole
        lora.pace_components(optimizer, each, [4, 3, 2, 1.5, 1])
        train(each, IDS[rows], RANKS[rows], optimizer, steps=2)
        lora.pace_components(optimizer, each, None)
    found["trained at paces"] = of_factors(model, parts)
    lora.save_adapter(parts, directory / f"{door}-{me}", rank=3)
    if me == 0:
        lora.save_adapter(model, directory / f"{door}-whole", rank=3)
        found["saved"] = of_files(directory / f"{door}-0", directory / f"{door}-whole")
    else:
        found["other process writes"] = (directory / f"{door}-{me}").exists()
    with torch.no_grad():
        lora.set_rank(parts, 2)
        ahead = logits(parts)
        lora.set_rank(model, 2)
        found["runs"] = apart(ahead, logits(model))
        register_fsdp_forward_method(parts, "generate")  # as Trainer does
        merged = lora.merge(parts, 2)
        prompt = dict(input_ids=IDS[:1, :4], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
        lora.set_rank(model, 2)
        found["generates"] = merged.generate(**prompt).tolist() == model.generate(**prompt).tolist()
        found["merged"] = apart(logits(merged), logits(model))
        found["merged is plain"] = not any(type(p).__name__ == "DTensor" for p in merged.parameters()) and not any(
            "lora" in name for name, _ in merged.named_parameters()
        )
        found["runs after merging a copy"] = apart(logits(parts), logits(model))
    lora.save_adapter(parts, directory / f"{door}-full")
    dist.barrier()
    fresh = build(door, True)
    lora.load_adapter(fresh, directory / f"{door}-full")
    found["loaded"] = of_factors(fresh, parts)
    if door == "inject":
        layer = lora_layers(parts)[0][1]
        found["a layer's merge"] = sentence(layer.merge)
        found["merge in place"] = sentence(lambda: lora.merge(parts, 2, inplace=True))
        logits(parts)  # after a pass the outermost parameters are whole
        found["a layer's merge after a pass"] = sentence(lora_layers(parts)[0][1].merge)
        uneven = build(door, True)
        lora.set_rank(uneven, RANKS[: 1 + me])
        found["one example beside two"] = sentence(lambda: uneven(input_ids=IDS[: 1 + me]))
        found["inject too late"] = sentence(lambda: lora.inject(parts, ["k_proj"], r=2))
    return found


def frozen() -> dict:
    me, count = dist.get_rank(), dist.get_world_size()
    model, parts = build("inject", False), build("inject", True)
    before = build("inject", False)
    drawn = torch.tensor([2, 4, 2, 4])
    train(model, IDS, drawn, optimizer_of(model), frozen=True)
    train(parts, IDS[me::count], drawn[me::count], optimizer_of(parts), frozen=True)
    kept = zip(lora_layers(parts), lora_layers(before), strict=True)
    undrawn = [0, 2, 4]
    still = max(apart(layer.cut(*both(layer), 5)[0][undrawn], was.lora_A[undrawn]) for (_, layer), (_, was) in kept)
    return {"trained": of_factors(model, parts), "undrawn moved by": still}


def strengths() -> dict:
    """Fitted by two processes with a batch each, and by one with both batches; the ranks, of which there are 4, fall
    on the same rows."""
    batches = [{"input_ids": ids, "labels": ids} for ids in (IDS, IDS.flip(0), torch.cat([IDS, IDS.flip(0)]))]
    together, alone = build("inject", False), build("inject", False)
    wrapped = nn.parallel.DistributedDataParallel(together)
    lora.fit_strengths(wrapped, [batches[dist.get_rank()]], updates=5)
    wrapped(**batches[0]).loss.backward()  # which waits for nothing that was left open
    dist.barrier()
    gather, torch.distributed.is_initialized = torch.distributed.is_initialized, lambda: False
    lora.fit_strengths(alone, [batches[2]], updates=5)
    torch.distributed.is_initialized = gather
    tables = [torch.tensor([layer.strength_at for _, layer in lora_layers(model)]) for model in (together, alone)]
    refused = sentence(lambda: lora.fit_strengths(build("inject", True), batches))
    return {"apart": apart(*tables), "moved": float((tables[0] - 1).abs().max()), "under FSDP": refused}


def both(layer):
    return whole(layer.lora_A.detach()), whole(layer.lora_B.detach())


def padded(rows: list[dict]) -> dict:
    longest = max(len(row["input_ids"]) for row in rows)
    found = {
        name: torch.stack([nn.functional.pad(row[name], (0, longest - len(row[name])), value=fill) for row in rows])
        for name, fill in (("input_ids", 1), ("attention_mask", 0))
    }
    return found | {"labels": torch.tensor([row["labels"] for row in rows])}


def trainer(directory: Path) -> dict:
    """DyLoRATrainer under accelerate's FSDP2 and under DDP: the same training, checkpoints and resumption."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    from loralib.trainer import DyLoRATrainer

    def run(name: str, resume=None, **fsdp):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=100)
        config = transformers.RobertaConfig(
            **sizes, num_labels=2, max_position_embeddings=40, hidden_dropout_prob=0, attention_probs_dropout_prob=0
        )
        model = lora.inject(transformers.RobertaForSequenceClassification(config), ["query", "value"], r=4)
        lora.mark_only_lora_as_trainable(model)
        lengths = [int(n) for n in torch.randint(5, 30, (64,))]  # batches of different shapes in the two processes
        data = [
            {"input_ids": torch.randint(3, 100, (n,)), "attention_mask": torch.ones(n).long(), "labels": i % 2}
            for i, n in enumerate(lengths)
        ]
        options = dict(per_device_train_batch_size=4, max_steps=8, save_steps=6, learning_rate=1e-2, use_cpu=True)
        args = transformers.TrainingArguments(
            str(directory / name), **options, lr_scheduler_type="constant", report_to="none", disable_tqdm=True, **fsdp
        )
        if fsdp:  # accelerate has FSDP for accelerators alone: here processes call themselves such
            PartialState().distributed_type = DistributedType.MULTI_XPU
        trained = DyLoRATrainer(
            model=model, args=args, train_dataset=data, eval_dataset=data[:13], data_collator=padded
        )
        trained.train(resume_from_checkpoint=resume)
        trained.save_model()
        loss = trained.evaluate()["eval_r2_loss"]
        return loss, any(type(p).__name__ == "DTensor" for p in model.parameters())

    layers = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["RobertaLayer"]}
    loss, _ = run("ddp")
    fsdp_loss, is_sharded = run("fsdp", fsdp="full_shard", fsdp_config=layers)
    again, _ = run("again", str(directory / "fsdp" / "checkpoint-6"), fsdp="full_shard", fsdp_config=layers)
    dist.barrier()
    return {
        "sharded": is_sharded,
        "loss": abs(loss - fsdp_loss),
        "saved": of_files(directory / "ddp", directory / "fsdp"),
        "resumed": of_files(directory / "again", directory / "fsdp"),
        "resumed loss": abs(again - fsdp_loss),
    }


def answer(me: int, count: int, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(me), WORLD_SIZE=str(count), LOCAL_RANK=str(me))
    dist.init_process_group("gloo", rank=me, world_size=count)
    where = Path(directory)
    found = {"inject": own_loop("inject", where), "peft": own_loop("peft", where)}
    found |= {"frozen": frozen(), "strengths": strengths(), "trainer": trainer(where)}
    (where / f"answers-{me}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["MASTER_PORT"] = sys.argv[2]
    torch.multiprocessing.spawn(answer, (2, sys.argv[1]), 2)
