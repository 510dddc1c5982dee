"""Which positions, and what is kept of them: three claims of papers, reproduced in small.

    python benchmarks/positions.py --corpus novels.jsonl.gz --out WORK_DIR --smollm2 DIR \
        --stories DIR [--part gradients,sandbox,shares] [--markdown]

gradients: random sampling's table (RS-KD, arXiv 2503.16870): angle to the full distribution's
gradient, and its norm, of the student's output layer, summed over all positions. SmolLM2-135M is
the teacher; students are itself with the weights of its layers rounded to 4 bits (near) and with
states of random numbers of the same spread (far). Bytes are those of `fidelity.py`.

sandbox: the bigram sandbox of arXiv 2509.01649. A chain over 64 ids, half of whose rows are nearly
uniform; in each sequence five ids have one follower each, drawn for that sequence, which a model
can only copy from what it has read (an induction head). A teacher of two layers learns by labels;
students of the same size learn by labels, from the teacher, from it but for the fifth of the
positions where it is surest, which take their labels (routed), or from it at a fifth of the
positions alone, as `train --positions` chooses them.

shares: a claim of SE-KD (arXiv 2602.01395), that the 20 % of positions with the highest entropy of
the student do as well as all. stories260k is the teacher on novels, its student has two of its
five layers removed; all take the same batches for the same steps, and by student entropy also for
as many as take the processor's time of all positions (time of this process, measured in turns).

Runs are kept in the work folder, so an interrupted benchmark resumes. Errors are standard errors
over seeds. One thread; half an hour of it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import fidelity
import numpy as np
import torch
from recovery import mean_error
from references import random_sampling, top_k
from results import keep, machine, table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kdcache import BuildOptions, Cache, DistilledStudent, TargetStream, build
from kdcache.loss import distillation_loss
from kdcache.loss.anchor import Anchor
from kdcache.loss.passes import logit_entropies
from kdcache.student.positions import PositionFigures, Share
from kdcache.targets import Codec, DenseTargets, SparseTargets
from kdcache.tasks import CAUSAL_LM

SEEDS = range(3)
Found = dict[str, dict[str, list[float]]]


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a run found, made now if it was not before."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(make()))
        print(path.name, path.read_text()[:300], flush=True)
    return json.loads(path.read_text())


# ------------------------------------------------------------------------------------- gradients

CODECS = ("sample:10", "sample:20", "anchored:10", "anchored:20")


def rounded(model: Any, bits: int = 4) -> Any:
    """A model whose layers have weights of so many bits, in groups of 64."""
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            groups = module.weight.data.reshape(-1, 64)
            scale = groups.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            groups.copy_((groups / scale).round() * scale)
    return model


@torch.no_grad()
def states_of(model: Any, rows: list[Any]) -> Tensor:
    """Its states before the output layer, [positions, width]."""
    ids = (torch.from_numpy(row.input_ids).long()[None] for row in rows)
    return torch.cat([model.model(one).last_hidden_state[0] for one in ids])


def gradients(options: argparse.Namespace) -> dict[str, list[list[str]]]:
    """Rows of a table for each student."""
    positions = fidelity.make_positions(
        argparse.Namespace(teacher=options.smollm2, corpus=options.corpus, positions=256)
    )
    model = AutoModelForCausalLM.from_pretrained(options.smollm2, dtype=torch.float32).eval()
    weight = model.lm_head.weight.detach().clone()
    near = states_of(rounded(model), positions.rows)
    far = torch.randn(near.shape, generator=torch.Generator().manual_seed(0)) * near.std()
    draws = torch.Generator().manual_seed(0)
    stored = {name: fidelity.store(positions, Codec.parse(name, (1.0,), 49152)) for name in CODECS}

    def top(k: int) -> Callable[[int, Tensor], Any]:
        def found(_: int, z: Tensor) -> SparseTargets:
            ids, weights = top_k(z.softmax(-1), k)
            weights = weights / weights.sum(-1, keepdim=True)
            return SparseTargets(ids, weights, torch.zeros(len(ids)), False, 1.0)

        return found

    def drawn(n: int) -> Callable[[int, Tensor], Any]:
        def found(_: int, z: Tensor) -> SparseTargets:
            ids, weights = random_sampling(z.softmax(-1), n, draws)
            return SparseTargets(ids, weights, torch.zeros(len(ids)), False, 1.0)

        return found

    def codec(name: str) -> Callable[[int, Tensor], Any]:
        return lambda at, z: stored[name].take(np.arange(at, at + len(z))).at(1.0)

    methods = {f"top-{k}, renormalised": (top(k), 3.0 * k) for k in (12, 50, 300)}
    methods |= {f"{n} random draws": (drawn(n), math.nan) for n in (12, 50)}
    methods |= {
        f"`{name}`": (
            codec(name),
            fidelity.measure(positions, Codec.parse(name, (1.0,), 49152)).size,
        )
        for name in CODECS
    }

    def gradient(states: Tensor, targets: Callable[[int, Tensor], Any], anchor: Anchor) -> Tensor:
        layer = weight.clone().requires_grad_()
        labels = torch.full((fidelity.SLICE,), -100)
        for at, z in positions.slices():
            own = states[at : at + len(z)] @ layer.T
            loss = distillation_loss(
                own,
                labels[: len(z)],
                targets(at, z),
                alpha=0.0,
                count=len(positions),
                anchor=anchor,
            )
            loss.total.backward()
        anchor.update()
        assert layer.grad is not None
        return layer.grad

    result = {}
    for student, states in (("near", near), ("far", far)):
        full = gradient(states, lambda _, z: DenseTargets(z, 1.0), Anchor())
        lines = []
        for name, (targets, size) in methods.items():
            anchor = Anchor()
            found = gradient(states, targets, anchor)
            if name.startswith("`anchored"):  # theta is that of past steps: here of the same draws
                found = gradient(states, targets, anchor)
            cosine = float(
                nn.functional.cosine_similarity(
                    found.double().ravel(), full.double().ravel(), dim=0
                )
            )
            ratio = float(found.norm() / full.norm())
            angle = math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
            shown = f"{size:.1f}" if math.isfinite(size) else ""
            lines.append([name, shown, f"{angle:.1f}", f"{ratio:.3f}"])
            print(student, lines[-1], flush=True)
        result[student] = lines
    return result


# --------------------------------------------------------------------------------------- sandbox

IDS, LENGTH, TRIGGERS, AGAIN = 64, 96, 5, 0.3
WAYS = ("labels", "soft", "routed", "teacher-entropy", "student-entropy")
LOOKS = (1 / 3, 1 / 2, 1.0)  # of the steps, at which a model is measured


class Sandbox:
    """The chain, and sequences of it."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        sharp = torch.where(torch.arange(IDS) % 2 == 0, 0.3, 3.0)[:, None]
        rows = (torch.randn(IDS, IDS, generator=generator) * sharp).softmax(-1)
        self.triggers = torch.randperm(IDS, generator=generator)[:TRIGGERS]
        # Triggers are a third of what follows, so that there is something to copy.
        self.rows = rows * (1 - AGAIN)
        self.rows[:, self.triggers] += AGAIN / TRIGGERS

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Ids [count, LENGTH + 1], and which positions can be copied: bool [count, LENGTH]."""
        follower = torch.full((count, IDS), -1)
        chosen = torch.randint(IDS, (count, TRIGGERS), generator=generator)
        follower[:, self.triggers] = chosen
        ids = torch.randint(IDS, (count, LENGTH + 1), generator=generator)
        for t in range(LENGTH):
            now = ids[:, t]
            free = torch.multinomial(self.rows[now], 1, generator=generator)[:, 0]
            fixed = follower.gather(1, now[:, None])[:, 0]
            ids[:, t + 1] = torch.where(fixed >= 0, fixed, free)
        now = ids[:, :-1]
        earlier = (now[:, :, None] == now[:, None, :]).tril(-1).any(-1)
        return ids, torch.isin(now, self.triggers) & earlier


def small(seed: int) -> Any:
    """A model of two layers."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=IDS,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
        )
    )


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Of all positions, [positions, IDS]."""
    found: Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1)
    return found


def loss_of(how: str, own: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    """The mean loss of logits [n, IDS] by one of `WAYS`; of a share, over its positions."""
    hard = nn.functional.cross_entropy(own, labels, reduction="none")
    if how == "labels":
        return hard.mean()
    p = teacher.softmax(-1)
    soft = -(p * own.log_softmax(-1)).sum(-1)
    entropy = torch.special.entr(p).sum(-1)
    if how == "routed":
        return torch.where(entropy <= entropy.quantile(0.2), hard, soft).mean()
    if how == "soft":
        return soft.mean()
    figures = PositionFigures(len(own), entropy, None, lambda: logit_entropies(own.detach()))
    return soft[Share(how, 0.2).indices(figures)].mean()  # type: ignore[arg-type]


def learn(
    sandbox: Sandbox, seed: int, steps: int, how: str, teacher: Any = None
) -> tuple[Any, dict[str, float]]:
    """A model, and what it knows at some of its steps."""
    model, generator = small(seed), torch.Generator().manual_seed(1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, betas=(0.9, 0.98), weight_decay=0.0)
    found: dict[str, float] = {}
    for step in range(steps):
        decay = min(1.0, 4 * (1 - step / steps))  # over the last quarter
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * decay
        ids, _ = sandbox.draw(32, generator)
        own = logits_of(model, ids)
        with torch.no_grad():
            theirs = own if teacher is None else logits_of(teacher, ids)
        loss_of(how, own, ids[:, 1:].flatten(), theirs).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in [round(look * steps) for look in LOOKS]:
            known_now = known(sandbox, model, teacher)
            found |= {f"{key}@{step + 1}": value for key, value in known_now.items()}
            print(how, seed, found, flush=True)
    return model.eval(), found


@torch.no_grad()
def known(sandbox: Sandbox, model: Any, teacher: Any) -> dict[str, float]:
    """Of what can be copied the share that is right, and KL in nats: from the truth where it can be
    copied and along the chain, and from the teacher at all positions.
    """
    ids, copied = sandbox.draw(256, torch.Generator().manual_seed(7))
    copied, now, labels = copied.flatten(), ids[:, :-1].flatten(), ids[:, 1:].flatten()
    own = logits_of(model, ids).log_softmax(-1)
    chain = ~torch.isin(now, sandbox.triggers)
    truth = sandbox.rows[now[chain]]
    found = {
        "copied right": float((own.argmax(-1) == labels)[copied].float().mean()),
        "KL, copied": float(-own.gather(-1, labels[:, None])[copied].mean()),
        "KL, chain": float((truth * (truth.log() - own[chain])).sum(-1).mean()),
    }
    if teacher is not None:
        theirs = logits_of(teacher, ids).log_softmax(-1)
        found["KL, teacher"] = float((theirs.exp() * (theirs - own)).sum(-1).mean())
    return found


def sandbox_part(options: argparse.Namespace, out: Path) -> Found:
    """What teachers and students know, by way of learning."""
    found: Found = {}
    for seed in SEEDS:
        sandbox, name = Sandbox(seed), f"sandbox-{options.teacher_steps}"
        folder = out / f"{name}-teacher-{seed}"

        def taught(to: Path = folder, box: Sandbox = sandbox, own: int = 100 + seed) -> Any:
            model, values = learn(box, own, options.teacher_steps, "labels")
            model.save_pretrained(to)
            return values

        runs = {"teacher, by labels": kept(out / f"{folder.name}.json", taught)}
        teacher = LlamaForCausalLM.from_pretrained(folder).eval()
        for how in WAYS:
            path = out / f"{name}-{options.steps}-{how}-{seed}.json"

            def one(
                way: str = how, box: Sandbox = sandbox, own: int = seed, by: Any = teacher
            ) -> Any:
                return learn(box, own, options.steps, way, by)[1]

            runs[how] = kept(path, one)
        for how, values in runs.items():
            for key, value in values.items():
                figure, _, steps = key.partition("@")
                found.setdefault(f"{how}, {steps} steps", {}).setdefault(figure, []).append(value)
    return found


# ---------------------------------------------------------------------------------------- shares

ROWS, TOKENS = 16, 128
RULES = ("all", "student-entropy", "teacher-entropy", "random")


def prepare(options: argparse.Namespace, out: Path) -> dict[str, Cache]:
    """Caches to learn from and to measure on, `dense`."""
    caches = {}
    with gzip.open(options.corpus, "rt") as file:
        texts = [json.loads(line)["text"] for line in file]
    for name, some in (("train", texts[::12]), ("held-out", texts[5::160])):
        path = out / f"{name}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in some))
        build(
            BuildOptions(
                *((options.stories,), (str(path),), str(out / name)),
                codec="dense:float16",
                max_length=TOKENS,
                workers=0,
            )
        )
        caches[name] = Cache.open(str(out / name))
    return caches


def rule(name: str, seed: int) -> Any:
    """What `DistilledStudent` takes: a fifth of the positions."""
    if name == "random":
        generator = torch.Generator().manual_seed(seed)
        return lambda figures: (torch.rand(figures.number, generator=generator) < 0.2).float()
    return None if name == "all" else f"{name}:0.2"


def student_of(options: argparse.Namespace, name: str, seed: int) -> DistilledStudent:
    """The teacher without its second and fourth layer."""
    model = AutoModelForCausalLM.from_pretrained(options.stories, dtype=torch.float32)
    model.model.layers = nn.ModuleList(model.model.layers[i] for i in (0, 2, 4))
    model.config.num_hidden_layers = 3
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    chosen = rule(name, seed)
    chosen = Share(name, 0.2) if isinstance(chosen, str) else chosen  # type: ignore[arg-type]
    return DistilledStudent(model, CAUSAL_LM, alpha=0.0, positions=chosen)


def batches(cache: Cache, seed: int) -> Iterator[dict[str, Any]]:
    """Of epoch after epoch."""
    stream = TargetStream(cache, batch_size=ROWS, seed=seed, drop_last=True)
    while True:
        yield from stream


def train(
    options: argparse.Namespace, caches: dict[str, Cache], name: str, seed: int, steps: int
) -> dict[str, float]:
    """Train a student and measure it."""
    student, source = student_of(options, name, seed).train(), batches(caches["train"], seed)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        warm = min(1.0, (step + 1) / 20)
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 1e-3 * warm * decay
        student(**next(source)).loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return measure(student, caches["held-out"])


@torch.no_grad()
def measure(student: DistilledStudent, cache: Cache) -> dict[str, float]:
    """KL and cross-entropy of all held-out positions."""
    student.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for batch in TargetStream(cache, batch_size=16, shuffle=False):
        out, count = student(**batch), float(batch["count"])
        sums += torch.tensor([float(out.soft_loss), float(out.hard_loss), 1.0]).double() * count
    return {"kl": float(sums[0] / sums[2]), "cross-entropy": float(sums[1] / sums[2])}


def speeds(options: argparse.Namespace, cache: Cache) -> dict[str, float]:
    """Processor's seconds of a step on all positions and by the student's entropy, in turns."""
    students = {name: student_of(options, name, 0).train() for name in RULES[:2]}
    source, spent = batches(cache, 0), {name: [0.0] for name in students}
    for _ in range(12):
        for name, student in students.items():
            some = [next(source) for _ in range(2)]
            begin = time.process_time()
            for batch in some:
                student(**batch).loss.backward()
            spent[name] = [*spent[name], (time.process_time() - begin) / 2]
    return {name: sorted(times[3:])[len(times[3:]) // 2] for name, times in spent.items()}


def shares(options: argparse.Namespace, out: Path) -> tuple[Found, dict[str, float]]:
    """Measures by rule, and the seconds of a step."""
    caches, found = prepare(options, out), Found()
    took = kept(out / "speeds.json", lambda: speeds(options, caches["train"]))
    more = round(options.share_steps * took["all"] / took["student-entropy"])
    runs = [(name, options.share_steps) for name in RULES] + [("student-entropy", more)]
    for seed in SEEDS:
        for name, steps in runs:
            path = out / f"shares-{name}-{steps}-{seed}.json"
            value = kept(path, partial(train, options, caches, name, seed, steps))
            for key, number in value.items():
                found.setdefault(f"{name}, {steps} steps", {}).setdefault(key, []).append(number)
    start = measure(student_of(options, "all", 0), caches["held-out"])
    found["before"] = {key: [number] for key, number in start.items()}
    return found, took


# ---------------------------------------------------------------------------------------- report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", required=True, help="the novels, .jsonl.gz")
    parser.add_argument("--out", type=Path, required=True, help="work folder")
    parser.add_argument("--smollm2", help="folder of SmolLM2-135M")
    parser.add_argument("--stories", help="folder of stories260k")
    parser.add_argument("--part", default="gradients,sandbox,shares")
    parser.add_argument("--teacher-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--share-steps", type=int, default=200)
    parser.add_argument("--markdown", action="store_true", help="keep the result in RESULTS.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for part in options.part.split(","):
        lines = [f"`python benchmarks/positions.py --part {part}`; {machine()}.", ""]
        if part == "gradients":
            for student, rows in kept(
                options.out / "gradients.json", lambda: gradients(options)
            ).items():
                header = (f"target, {student} student", "bytes", "angle, degrees", "norm")
                lines += [table(header, rows), ""]
        else:
            found, took = (
                (sandbox_part(options, options.out), {})
                if part == "sandbox"
                else shares(options, options.out)
            )
            names = list(dict.fromkeys(key for values in found.values() for key in values))
            rows = [
                [how, *(mean_error(values[n]) if n in values else "" for n in names)]
                for how, values in found.items()
            ]
            lines.append(table(("learnt", *names), rows))
            lines += [f"\nA step: {name} {value * 1e3:.1f} ms." for name, value in took.items()]
        text = "\n".join(lines)
        print(text)
        if options.markdown:
            keep(f"positions, {part}", text)


if __name__ == "__main__":
    main()
