"""Runs that are killed must go on to what they would have come to; a long one must not grow. See ``scripts/soak.sh``.

A run on a tiny model is killed (SIGKILL) at a file operation drawn at random, or at a random time. The same command is then
given again: it must end well, with the adapter and the table of the run that was left in peace, to the bit. Every outcome is a
line of ``runs/soak/done.jsonl``; what stands there is not tried again.
"""

import contextlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from scripts.pages import page

from .. import tiny
from . import world

ROOT = Path(__file__).parents[2]
HOME = ROOT / "runs" / "soak"
DONE = HOME / "done.jsonl"
STEPS = ["--max_steps", "8", "--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2"]
# (kind, how many kills, flags, processes, "operation" or "time")
KINDS = [
    ("at a file operation", 60, [], 1, "operation"),
    ("at any time", 20, [], 1, "time"),
    ("bf16", 5, ["--bf16"], 1, "operation"),
    ("frozen", 5, ["--as_released", "--lora_path", "none"], 1, "operation"),
    ("two workers", 5, ["--dataloader_num_workers", "2"], 1, "operation"),
    ("two processes", 5, ["--per_device_train_batch_size", "4"], 2, "time"),
]


class Killer:
    """Counts the operations on files of a directory, and kills this process at one of them."""

    def __init__(self, directory: Path, at: int | None):
        self.directory, self.at, self.count = str(directory), at, 0

    def __call__(self, event: str, args: tuple) -> None:
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if (
            writes or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "torch.save")
        ) and self.directory in str(args[0]):
            self.count += 1
            if self.count == self.at:
                os.kill(os.getpid(), signal.SIGKILL)


def child(argv: list[str], directory: Path, at: int | None, result) -> None:
    """A run in a process of its own; torch writes files past Python, so that before and after count as operations."""
    killer = Killer(directory, at)
    save = torch.save

    def counted(content, file, *args, **kwargs):
        killer("torch.save", (file,))
        save(content, file, *args, **kwargs)
        killer("torch.save", (file,))

    torch.save = counted
    sys.addaudithook(killer)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            world.run_glue().main(argv)
            result.put(("ended", killer.count))
        except BaseException as error:
            result.put((f"{type(error).__name__}: {error}", killer.count))


def run(argv: list[str], directory: Path, at: int | None = None, after: float | None = None) -> tuple[str, int]:
    """("ended", operations), ("killed", 0), or (the error, operations)."""
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    process = context.Process(target=child, args=(argv, directory, at, result))
    process.start()
    process.join(after)
    if process.is_alive():
        process.kill()
    process.join()
    return result.get() if process.exitcode == 0 else ("killed", 0)


def run_two(argv: list[str], after: float | None = None) -> tuple[str, int]:
    """The same in two processes under torchrun."""
    line = [sys.executable, "-m", "transformers_dylora.launch", "--nproc_per_node", "2", str(world.SCRIPT), *argv]
    process = subprocess.Popen(
        line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, said = process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        subprocess.run(["pkill", "-9", "-f", argv[argv.index("--output_dir") + 1]], check=False)
        process.wait()
        return "killed", 0
    return ("ended" if process.returncode == 0 else said[-300:]), 0


def same_result(one: Path, other: Path) -> bool:
    """Whether two runs came to the same adapter and the same table."""
    a, b = (load_file(directory / "adapter_model.safetensors") for directory in (one, other))
    tables = [json.loads((directory / "rank_results.json").read_text())["splits"] for directory in (one, other)]
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a) and tables[0] == tables[1]


def note(**what) -> None:
    with open(DONE, "a") as file:
        file.write(json.dumps(what) + "\n")
    print(what, flush=True)


def done() -> list[dict]:
    return [json.loads(line) for line in DONE.read_text().splitlines()] if DONE.exists() else []


def kills(folder: Path) -> None:
    tried = {(line["kind"], line["number"]) for line in done() if "number" in line}
    for kind, count, flags, processes, how in KINDS:
        left = [number for number in range(count) if (kind, number) not in tried]
        if not left:
            continue
        start = run if processes == 1 else lambda argv, directory, at=None, after=None: run_two(argv, after)
        whole, out = HOME / "whole", HOME / "out"
        shutil.rmtree(whole, ignore_errors=True)
        began = time.monotonic()
        outcome, operations = start([*world.train(folder, whole), *STEPS, *flags], whole)
        seconds = time.monotonic() - began
        assert outcome == "ended", outcome
        for number in left:
            draw = random.Random(f"{kind} {number}")
            at = draw.randint(1, operations) if how == "operation" else None
            after = draw.uniform(0.3, 1.0) * seconds if how == "time" else None
            argv = [*world.train(folder, out), *STEPS, *flags]
            first = "ended"
            while first == "ended":  # too late for this time: sooner
                shutil.rmtree(out, ignore_errors=True)
                first, _ = start(argv, out, at, after)
                after = after and after * 0.8
            again, _ = start(argv, out)
            right = again == "ended" and same_result(out, whole)
            place = f"operation {at} of {operations}" if at else f"{after:.2f} s of {seconds:.2f}"
            outcome = "survived" if right else "refused" if again.startswith("UsageError") else "lost"
            note(kind=kind, number=number, at=place, first=first, outcome=outcome, said="" if right else again)


class Memory(TrainerCallback):
    """The resident memory of this process every 250 steps, in MiB."""

    def __init__(self):
        self.seen: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 250 == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.seen.append(round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1))


def long_run(folder: Path, steps: int = 5000) -> None:
    """One training of 5,000 steps with evaluations and checkpoints on the way; its memory after the first fifth and at the end."""
    if any(line["kind"] == "long run" for line in done()):
        return
    memory, script = Memory(), world.run_glue()
    new_trainer = script.new_trainer

    def watched(**options):
        trainer = new_trainer(**options)
        trainer.add_callback(memory)
        return trainer

    script.new_trainer = watched
    argv = [
        *world.train(folder, HOME / "long"),
        "--max_steps",
        str(steps),
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "500",
    ]
    argv += ["--save_strategy", "steps", "--save_steps", "500", "--save_total_limit", "2", "--overwrite_output_dir"]
    with contextlib.redirect_stdout(io.StringIO()):
        script.main(argv)
    settled = memory.seen[len(memory.seen) // 5 :]
    growth = settled[-1] / settled[0] - 1
    note(
        kind="long run", steps=steps, memory=memory.seen, growth=growth, outcome="survived" if growth < 0.02 else "lost"
    )


def cases() -> None:
    """All cases of the tables, through pytest."""
    if any(line["kind"] == "cases" for line in done()):
        return
    report = HOME / "cases.xml"
    line = [
        sys.executable,
        "-m",
        "pytest",
        "tests/reliability/test_cases.py",
        "-k",
        "test_a_case",
        f"--junitxml={report}",
    ]
    subprocess.run(line, cwd=ROOT, env=os.environ | {"DYLORA_ALL_CASES": "1"}, check=False)
    found = {"refused": 0, "right": 0, "lost": 0}
    for case in xml.parse(report).getroot().iter("testcase"):
        outcome = next((p.get("value") for p in case.iter("property") if p.get("name") == "outcome"), "lost")
        found[outcome if case.find("failure") is None else "lost"] += 1
    note(kind="cases", **found)


def report() -> str:
    """results/reliability.md."""
    lines = done()
    table = ["| what | tried | refused | survived | lost |", "|---|---|---|---|---|"]
    tried = next(line for line in lines if line["kind"] == "cases")
    total = tried["refused"] + tried["right"] + tried["lost"]
    table.append(
        f"| inputs of the tables in `tests/reliability` | {total} | {tried['refused']} | {tried['right']} | {tried['lost']} |"
    )
    for kind, *_ in KINDS:
        outcomes = [line["outcome"] for line in lines if line["kind"] == kind]
        counts = [outcomes.count(outcome) for outcome in ("refused", "survived", "lost")]
        table.append(f"| killed: {kind} | {len(outcomes)} | {' | '.join(map(str, counts))} |")
    long = next(line for line in lines if line["kind"] == "long run")
    memory = long["memory"]
    return f"""# Reliability

`bash scripts/soak.sh` tries every input of the tables in `tests/reliability`, kills runs on a tiny model with SIGKILL, and gives the
same command again. *Survived*: the right numbers; after a kill the adapter and the table of a run that was left in peace, to
the bit. *Refused*: one sentence. *Lost*: anything else. torch {torch.__version__}, one thread.

{chr(10).join(table)}

A training of {long["steps"]:,} steps with an evaluation and a checkpoint every 500 held {memory[len(memory) // 5]:.0f} MiB after a
fifth of it and {memory[-1]:.0f} MiB at its end ({100 * long["growth"]:+.1f} percent).
"""


def main() -> int:
    HOME.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(HOME / "cache")}
    import datasets

    datasets.config.HF_DATASETS_CACHE = HOME / "cache"
    torch.set_num_threads(1)
    folder = HOME / "template"
    if not folder.exists():
        world.build(HOME / "world", tiny.checkpoint(HOME / "tiny"))
    kills(folder)
    cases()
    long_run(folder)
    (ROOT / "results" / "reliability.md").write_text(page(report().split("\n")))
    return int(any(line["outcome"] == "lost" for line in done() if "outcome" in line))


if __name__ == "__main__":
    sys.exit(main())
