"""What each main program hands to its functions, seen from outside.

Training: a run over three hand-made sources is compared with `train_by_hand`, a loop of our own.
Its independent parts are the pairs and their content ids, R_k, P(k), the draws, mining, the loss
and the curves, warm-up and cosine, clipping; AdamW is torch's. Vectors come from GVE's forward, one
item at a time, which tests/test_model.py compares with transformers.
"""

import collections
import dataclasses
import functools
import inspect
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mutants
import numpy as np
import pytest
import torch
from conftest import moving_square, write_tiny, write_video
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import caption  # noqa: E402
import data  # noqa: E402
import embed  # noqa: E402
import eval as evaluate  # noqa: E402
import model  # noqa: E402
import synth  # noqa: E402
import tables  # noqa: E402
import train  # noqa: E402
import uvrb  # noqa: E402
from data import Collator  # noqa: E402
from model import GVE  # noqa: E402
from support.files import load_jsonl, write_json, write_jsonl  # noqa: E402
from support.flags import parse_flags  # noqa: E402

TASKS = {"words": ("T2T", 1), "pictures": ("T2I", 1), "clips": ("T2V", 3)}  # task, level


@dataclasses.dataclass
class Pairs:
    """One source, as the loop by hand knows it."""

    name: str
    rows: list  # of [query, positive, hard negative, ...]: items with absolute paths
    ids: dict  # {item as JSON: a number that items of equal content share}
    samples: int  # rows of one pass
    batch: int  # rows of a global batch
    negatives: int  # hard negatives per row
    instruction: str

    def id_of(self, item):
        return self.ids[json.dumps(item)]


def text(words):
    return {"text": words}


def write_media(folder):
    """Write five pictures and four clips, larger than the run's limit of tokens."""
    pictures = []
    for i in range(5):
        path = folder / "pictures" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(moving_square(1, 84, 112, seed=30 + i)[0]).save(path)
        pictures.append(str(path))
    clips = []
    (folder / "data" / "clips").mkdir(parents=True)
    for i, seed in enumerate((0, 1, 2, 5)):  # whose squares stand out from the ground
        path = folder / "data" / "clips" / f"{i}.mp4"
        clips.append(write_video(path, moving_square(8 + i, 84, 112, seed), fps=4))
    return pictures, clips


def list_rows(pictures, clips):
    """List the rows of the three sources: [query, positive, hard negative, ...]."""
    words = [
        ["what rolls", "a red ball", "a blue ball", "one more than is used"],
        ["which way", "to the left", "A red  ball", "and another"],
        ["what COLOUR", "on the table", "under the table"],
        ["what colour", "a Red ball", "green"],  # the first row's answer, in another form
        ["how many", "two of them", "three of them"],
        ["when", "at night", "on the table"],  # another row's answer as hard negative
        ["What  Colour", "violet", "black"],  # a question of three rows, in three forms
        ["what of it " * 30, "nothing", "something"],  # longer than the limit
    ]
    shown = []
    for i, query in enumerate(("red", "green and blue", "a square", "the last but one", "none")):
        shown.append(
            [text(query), {"image": pictures[i % 4]}, {"image": pictures[(i + 1 + i // 2) % 5]}]
        )
    moving = []
    for i, query in enumerate(("it moves", "it moves again", "to the right", "slowly")):
        moving.append([text(query), {"video": clips[i]}])
    return {"words": [list(map(text, row)) for row in words], "pictures": shown, "clips": moving}


def number_contents(rows):
    """Number the items: equal contents share a number, texts by their words in lower case."""
    ids = {}
    numbers = {}
    for row in rows:
        for item in row:
            content = " ".join(item.get("text", json.dumps(item)).lower().split())
            ids[json.dumps(item)] = numbers.setdefault(content, len(numbers))
    return ids


def relative(item, pictures, clips):
    """Return an item as it stands in a training file: pictures lie outside of the data's folder."""
    if item.get("image") in pictures:
        return {"image": "../pictures/" + Path(item["image"]).name}
    if item.get("video") in clips:
        return {"video": "clips/" + Path(item["video"]).name}
    return item


@dataclasses.dataclass
class World:
    folder: Path
    base: str
    prober: str
    sources: list  # of Pairs

    @property
    def places(self):
        """Return the flags that name folders."""
        flags = ["--base", self.base, "--prober", self.prober, "--data", self.folder / "data"]
        flags += ["--mixture", self.folder / "mixture.json", "--root", self.folder / "pictures"]
        return [*map(str, flags)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wiring")
    for seed, name in enumerate(("base", "prober")):
        write_tiny(folder / name, seed=seed)
        style = {"base": "user", "prober": "system"}[name]
        write_json(folder / name / "gve.json", {"prompt_style": style, "min_tokens": 4})

    pictures, clips = write_media(folder)
    rows = list_rows(pictures, clips)
    sizes = {"words": (7, 4, 1), "pictures": (5, 4, 1), "clips": (4, 2, 0)}
    sources = []
    mixture = []
    for name, (samples, batch, negatives) in sizes.items():
        instruction = f"Find the {name}."
        ids = number_contents(rows[name])
        sources.append(Pairs(name, rows[name], ids, samples, batch, negatives, instruction))

        lines = []
        for query, positive, *others in rows[name]:
            others = [relative(item, pictures, clips) for item in others]
            positive = relative(positive, pictures, clips)
            lines.append({"query": query, "positive": positive, "negatives": others})
        write_jsonl(folder / "data" / f"{name}.jsonl", lines)
        entry = {"name": name, "task": TASKS[name][0], "path": f"{name}.jsonl"}
        # The flag --batch-scale is 2.
        entry |= {"samples": samples, "negatives": negatives, "batch_size": batch // 2}
        mixture.append(entry | {"instruction": instruction})
    write_json(folder / "mixture.json", mixture)
    return World(folder, str(folder / "base"), str(folder / "prober"), sources)


# The loop by hand


@dataclasses.dataclass
class Settings:
    """A run's settings, under the names of train.py's flags."""

    steps: int = 9
    epochs: int = 3
    sigma_max: float = 0.7
    probe_pairs: int = 3
    batch_scale: float = 2.0
    lr: float = 0.02
    warmup: float = 0.4
    weight_decay: float = 0.7
    clip: float = 0.5
    dropout: float = 0.0
    temperature: float = 0.05
    margin: float = 0.02
    symmetric: bool = True
    pooling: str = "last_token"
    remine: bool = False
    frames: int = 4
    max_tokens: int = 6
    max_length: int = 140
    schedule: str = "pyramid"
    seed: int = 7

    def flags(self):
        words = []
        for name, value in dataclasses.asdict(self).items():
            name = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words.append(f"--{name}={value}")
        return words


class Embedder:
    """Vectors of items, each embedded alone, with gradients."""

    def __init__(self, gve, settings):
        self.gve = gve
        limits = {name: getattr(settings, name) for name in ("frames", "max_tokens", "max_length")}
        self.collate = Collator(gve.processor, prompt_style=gve.prompt_style, **limits)

    def __call__(self, items, instruction=None):
        vectors = [self.gve(self.collate([item], instruction)) for item in items]
        return torch.cat(vectors) if vectors else torch.zeros(0, self.gve.dim, dtype=torch.float64)


def is_right(i, j, q_ids, p_ids, n_ids):
    """Is candidate j, a positive or a hard negative, right for row i by its content or its query?

    Right are the content of the row's positive, and the positive of a row with the same query.
    """
    same_query = j < len(p_ids) and q_ids[j] == q_ids[i]
    return same_query or [*p_ids, *n_ids][j] == p_ids[i]


def loss_by_hand(q, p, n, q_ids, p_ids, n_ids, s):
    """Return the mean over rows of -log of the positive's share, in one or both directions."""
    candidates = torch.cat([p, n])

    def is_negative(i, j):
        if is_right(i, j, q_ids, p_ids, n_ids):
            return False
        above = float((q[i] @ candidates[j] - q[i] @ p[i]).detach())
        return s.margin < 0 or above <= s.margin

    total = 0
    for i in range(len(q)):
        own = (q[i] @ p[i]) / s.temperature
        logits = [own]
        for j in range(len(candidates)):
            if is_negative(i, j):
                logits.append(q[i] @ candidates[j] / s.temperature)
        loss = torch.stack(logits).logsumexp(0) - own
        if s.symmetric:
            logits = [own]
            for k in range(len(q)):
                if is_negative(k, i):
                    logits.append(q[k] @ p[i] / s.temperature)
            loss = (loss + torch.stack(logits).logsumexp(0) - own) / 2
        total = total + loss
    return total / len(q)


def gap_by_hand(q, p, n, q_ids, p_ids, n_ids):
    """Return the mean of a positive's score less that of its hardest negative."""
    candidates = torch.cat([p, n])
    gaps = []
    for i in range(len(q)):
        hardest = -1.0
        for j in range(len(candidates)):
            if not is_right(i, j, q_ids, p_ids, n_ids):
                hardest = max(hardest, float(q[i] @ candidates[j]))
        gaps.append(float(q[i] @ p[i]) - hardest)
    return sum(gaps) / len(gaps)


def rate_by_hand(step, s):
    """Return the learning rate of step 0, 1, ...: a straight rise, then half a cosine."""
    rise = round(s.warmup * s.steps)
    if step < rise:
        return s.lr * (step + 1) / rise
    return s.lr * (1 + math.cos(math.pi * (step - rise) / (s.steps - rise))) / 2


class Draws:
    """Rows without replacement, pass by pass, by the generators that train.Sampler documents."""

    def __init__(self, sources, seed):
        self.sources = sources
        self.seed = seed
        self.drawn = [0] * len(sources)  # rows
        self.steps = [0] * len(sources)

    def __call__(self, step, probabilities):
        k = int(np.random.default_rng([self.seed, step]).choice(len(self.sources), p=probabilities))
        source = self.sources[k]
        of_pass, start = divmod(self.drawn[k], source.samples)
        rows = np.random.default_rng([self.seed, k]).permutation(len(source.rows))
        rows = rows[: source.samples]
        rows = np.random.default_rng([self.seed, k, of_pass]).permutation(rows)
        rows = rows[start : start + source.batch].tolist()
        self.drawn[k] += len(rows)
        self.steps[k] += 1
        return k, rows


def mine_by_hand(embed, source, rows, s):
    """Return {row: its hardest allowed positives of the other rows, the hardest first}."""
    rows = sorted(rows)
    with torch.no_grad():
        q = embed([source.rows[row][0] for row in rows], source.instruction)
        p = embed([source.rows[row][1] for row in rows])
    found = {}
    for i, row in enumerate(rows):
        order = sorted(range(len(rows)), key=lambda j: -float(q[i] @ p[j]))  # noqa: B023
        query = source.id_of(source.rows[row][0])
        seen = set()  # the answers to its query, and what was found
        for other in rows:
            if source.id_of(source.rows[other][0]) == query:
                seen.add(source.id_of(source.rows[other][1]))
        found[row] = []
        for j in order:
            item = source.rows[rows[j]][1]
            too_good = s.margin >= 0 and float(q[i] @ p[j]) > float(q[i] @ p[i]) + s.margin
            if source.id_of(item) not in seen and not too_good:
                seen.add(source.id_of(item))
                found[row].append(item)
    return found


def relevance_by_hand(embed, sources, s):
    """Return R_k and its standard error over N_p pairs of each source."""
    means = []
    errors = []
    for k, source in enumerate(sources):
        rows = np.random.default_rng([s.seed, k]).permutation(len(source.rows))[: s.probe_pairs]
        with torch.no_grad():
            q = embed([source.rows[row][0] for row in rows], source.instruction)
            p = embed([source.rows[row][1] for row in rows])
        cosines = (q * p).sum(1).numpy()
        means.append(cosines.mean())
        errors.append(cosines.std() / math.sqrt(len(cosines) - 1))
    return means, errors


def probabilities_by_hand(relevance, sigma, progress, draws, sources, s):
    """Return P of one step: of the pyramid, or of the stages from level 1 to level 4."""
    if s.schedule == "pyramid":
        weights = np.exp(np.array(relevance) / sigma)
        for k, steps in enumerate(draws.steps):
            # One pass is two batches of each of the three sources, so each has a third of the run.
            if steps == s.steps / 3:
                weights[k] = 0
        return weights / weights.sum()
    # Level 1 lasts for its share of the batches, then comes level 3; levels 2 and 4 have none.
    sizes = {source.name: source.samples / source.batch for source in sources}
    below = sizes["words"] + sizes["pictures"]
    if progress < below / sum(sizes.values()):
        return np.array([sizes["words"] / below, sizes["pictures"] / below, 0.0])
    return np.array([0.0, 0.0, 1.0])


def other_losses(q, p, n, ids, s):
    """Return the losses that a fault in the wiring would give, {fault: loss}."""
    q_ids, p_ids, n_ids = ids
    unique = [*range(len(p))], [*range(len(p), len(p) + len(n))]
    return {
        "q_ids": float(loss_by_hand(q, p, n, unique[0], p_ids, n_ids, s)),
        "ids": float(loss_by_hand(q, p, n, q_ids, *unique, s)),
        "margin": float(loss_by_hand(q, p, n, *ids, dataclasses.replace(s, margin=-1.0))),
        "negatives": float(loss_by_hand(q, p, n[:0], q_ids, p_ids, [], s)),
        "symmetric": float(loss_by_hand(q, p, n, *ids, dataclasses.replace(s, symmetric=False))),
    }


def train_by_hand(world, s):
    """Train as train.py should -> {"epochs": [...], "steps": [...], "drawn", "weights"}."""
    torch.manual_seed(s.seed)
    gve = GVE.from_pretrained(
        world.base, dtype="float64", lora={"lora_dropout": 0.0}, pooling=s.pooling
    ).train()
    embed = Embedder(gve, s)
    weights = list(gve.lora_parameters().values())
    optimizer = torch.optim.AdamW(weights, lr=1.0, weight_decay=s.weight_decay)
    draws = Draws(world.sources, s.seed)
    seen = {"epochs": [], "steps": [], "others": []}

    for epoch in range(s.epochs):
        # The prober: a checkpoint at first, then the model as it stands.
        prober = embed
        if epoch == 0:
            prober = Embedder(GVE.from_pretrained(world.prober, dtype="float64"), s)
        relevance, errors = relevance_by_hand(prober, world.sources, s)
        sigma = 0.1 + (s.sigma_max - 0.1) * epoch / (s.epochs - 1)
        of_epoch = range(epoch * s.steps // s.epochs, (epoch + 1) * s.steps // s.epochs)
        plan = []
        share = 0
        for step in of_epoch:
            p = probabilities_by_hand(relevance, sigma, step / s.steps, draws, world.sources, s)
            share = share + p / len(of_epoch)
            plan.append(draws(step, p))
        about = {"R": relevance, "R_error": errors, "P": share, "sigma": sigma}
        about["used"] = list(draws.steps)
        about["drawn"] = [sum(number == k for number, _ in plan) for k in range(len(world.sources))]
        passes = [n / source.samples for n, source in zip(draws.drawn, world.sources, strict=True)]
        seen["epochs"].append(about | {"passes": passes})

        mined = {}
        for k, source in enumerate(world.sources):
            rows = set().union(*[rows for number, rows in plan if number == k])
            if s.remine and source.negatives:
                mined[k] = mine_by_hand(prober, source, rows, s)

        for step, (k, rows) in zip(of_epoch, plan, strict=True):
            source = world.sources[k]
            others = []
            for row in rows:
                own = mined.get(k, {}).get(row, [])
                others += [*own, *source.rows[row][2:]][: source.negatives]
            queries = [source.rows[row][0] for row in rows]
            positives = [source.rows[row][1] for row in rows]
            q = embed(queries, source.instruction)
            p = embed(positives)
            n = embed(others)
            ids = [[source.id_of(item) for item in items] for items in (queries, positives, others)]
            loss = loss_by_hand(q, p, n, *ids, s)
            optimizer.zero_grad()
            loss.backward()

            gradients = [w.grad for w in weights]
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
            if s.clip and norm > s.clip:
                for g in gradients:
                    g *= s.clip / (norm + 1e-6)  # as torch does
            rate = rate_by_hand(step, s)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            q, p, n = q.detach(), p.detach(), n.detach()
            curves = {
                "loss": loss.item(),
                "score": float((q @ torch.cat([p, n]).T).mean()),
                "positive": float((q * p).sum(1).mean()),
                "gap": gap_by_hand(q, p, n, *ids),
                "lr": rate,
                "grad_norm": norm,
            }
            seen["steps"].append({"source": source.name, "rows": len(rows), **curves})
            seen["others"].append(other_losses(q, p, n, ids, s))

    seen["drawn"] = draws.drawn
    seen["weights"] = {}
    for name, w in gve.lora_parameters().items():
        name = name.removeprefix("backbone.").replace(".default.", ".")
        seen["weights"][name] = w.detach()
    return seen


# Training


def parse(*words):
    return train.parse_flags(train.Flags, [*map(str, words)], presets=train.PRESETS)


def words_of(world, settings, out, *more):
    words = [*world.places, "--out", out, *settings.flags(), "--dtype", "float64"]
    return [*words, "--workers", "0", "--features=", "--log-every", "1", "--device", "cpu", *more]


def events(log, name):
    return [line for line in log if line["event"] == name]


def near(values):
    """Compare numbers that the log holds with five or six digits."""
    return pytest.approx(values, rel=2e-5, abs=2e-5)


def assert_trained_by_hand(out, expected):
    """Compare a run's log and weights with those of train_by_hand."""
    log = load_jsonl(out / "log.jsonl")
    names = list(TASKS)
    for line, by_hand in zip(events(log, "epoch"), expected["epochs"], strict=True):
        assert line["sigma"] == pytest.approx(by_hand["sigma"])
        for key in ("R", "R_error", "P", "passes", "used", "drawn"):
            if line[key] is None and line["schedule"] == "staged":
                continue  # nothing was probed
            assert list(line[key]) == names
            assert list(line[key].values()) == near(list(by_hand[key])), (line["epoch"], key)

    steps = events(log, "step")
    assert [line["step"] for line in steps] == list(range(1, len(expected["steps"]) + 1))
    for line, by_hand in zip(steps, expected["steps"], strict=True):
        for key, value in by_hand.items():
            wanted = value if isinstance(value, str) else near(value)
            assert line[key] == wanted, (line["step"], key)

    saved = load_file(out / "adapter_model.safetensors")
    assert saved.keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        error = float((saved[name] - weight).abs().max() / weight.abs().max().clamp(min=1e-9))
        assert error < 1e-5, f"{name}: off by {error:.1e} of its largest weight"


PLAIN = Settings()


@pytest.fixture(scope="module")
def by_hand(world):
    return train_by_hand(world, PLAIN)


def test_the_loop_by_hand_meets_every_case_that_the_run_is_to_show(by_hand):
    """The comparisons below could not fail over a run in which nothing of this happens."""
    steps = by_hand["steps"]
    assert {step["source"] for step in steps} == set(TASKS)
    norms = [step["grad_norm"] for step in steps]
    assert min(norms) < PLAIN.clip < max(norms)
    assert len({step["rows"] for step in steps}) > 2  # short batches
    for fault in ("q_ids", "ids", "margin", "negatives", "symmetric"):
        changed = []
        for step, others in zip(steps, by_hand["others"], strict=True):
            changed.append(abs(step["loss"] - others[fault]))
        assert max(changed) > 1e-2, fault

    # Each epoch's prober has another opinion.
    probers = np.array([epoch["R"] for epoch in by_hand["epochs"]])
    assert np.abs(np.diff(probers, axis=0)).max(1).min() > 1e-3


@pytest.fixture(scope="module")
def plain_run(world, tmp_path_factory):
    """Return the folder of a run and its flags."""
    out = tmp_path_factory.mktemp("plain")
    flags = parse(*words_of(world, PLAIN, out))
    train.main(flags)
    return out, flags


def test_a_run_is_the_loop_by_hand(plain_run, by_hand):
    out, _ = plain_run
    assert_trained_by_hand(out, by_hand)


def test_a_run_that_stops_and_resumes_is_the_loop_by_hand(world, by_hand, tmp_path, monkeypatch):
    words = words_of(world, PLAIN, tmp_path, "--save-every", "2", "--keep", "2")
    steps = 0

    def stop_at_step_6(parameters, sums):
        nonlocal steps
        steps += 1
        if steps == 6:
            raise KeyboardInterrupt
        return sum_over_ranks(parameters, sums)

    sum_over_ranks = train.sum_over_ranks
    monkeypatch.setattr(train, "sum_over_ranks", stop_at_step_6)
    with pytest.raises(KeyboardInterrupt):
        train.main(parse(*words))
    monkeypatch.undo()

    def states():
        return [path.name for path in sorted((tmp_path / "state").glob("step-*"))]

    assert states() == ["step-00000003", "step-00000004"]
    for change in ("--lr=0.03", "--warmup=0.3", "--clip=0.4", "--weight-decay=0.1", "--seed=8"):
        name = change.removeprefix("--").partition("=")[0].replace("-", "_")
        with pytest.raises(ValueError, match=rf"\b{name}\b"):
            train.main(parse(*words, "--resume", "auto", change))
    train.main(parse(*words, "--resume", "auto"))
    assert_trained_by_hand(tmp_path, by_hand)
    assert states() == ["step-00000008", "step-00000009"]


def test_a_run_resumes_on_its_own_data_and_base_alone(world, plain_run, tmp_path):
    out, _ = plain_run
    data = tmp_path / "data"
    shutil.copytree(world.folder / "data", data)
    shutil.copytree(world.folder / "pictures", tmp_path / "pictures")
    shutil.copy(world.folder / "mixture.json", tmp_path)
    moved = ["--data", data, "--mixture", tmp_path / "mixture.json", "--resume", "auto"]
    moved += ["--root", tmp_path / "pictures"]
    words = words_of(world, PLAIN, out)

    train.main(parse(*words, *moved))  # a finished run, whose folders have moved
    with pytest.raises(ValueError, match="base"):
        train.main(parse(*words, *moved, "--base", world.prober))
    lines = (data / "words.jsonl").read_text()
    (data / "words.jsonl").write_text(lines.replace("violet", "indigo"))
    with pytest.raises(ValueError, match="source words"):
        train.main(parse(*words, *moved))


def test_gve_json_holds_the_run(world, plain_run, by_hand):
    out, flags = plain_run
    info = json.loads((out / "gve.json").read_text())
    assert info["config"] == {**dataclasses.asdict(flags), "world": 1}
    assert (info["step"], info["seed"]) == (PLAIN.steps, PLAIN.seed)
    assert (info["pooling"], info["prompt_style"]) == ("last_token", "user")
    assert info["base"] == world.base
    for source, drawn in zip(world.sources, by_hand["drawn"], strict=True):
        data = info["data"][source.name]
        assert (data["rows"], data["drawn"]) == (len(source.rows), drawn)
    (start,) = events(load_jsonl(out / "log.jsonl"), "start")
    for source in world.sources:
        task, level = TASKS[source.name]
        facts = {"task": task, "level": level, "samples": source.samples}
        assert start["sources"][source.name] == {**facts, "rows": len(source.rows)}
    for key in ("loss", "lr", "grad_norm"):
        assert info["metrics"][key] == near(by_hand["steps"][-1][key])


OTHER = dataclasses.replace(
    PLAIN,
    steps=6,
    epochs=2,
    warmup=0.5,
    weight_decay=0.0,
    clip=0.0,
    temperature=0.1,
    margin=-1.0,
    symmetric=False,
    pooling="mean",
    remine=True,
    schedule="staged",
    seed=3,
)


def test_a_run_with_every_setting_turned_is_the_loop_by_hand_as_well(world, tmp_path, monkeypatch):
    """One direction, no margin, no clipping, mined negatives, the mean token, stages; the kernel's
    loss, GradCache and stored features, which change nothing."""
    batches = []

    def to_device(batch, device):
        batches.append(tuple(batch["input_ids"].shape))
        return moved(batch, device)

    moved = train.to_device
    monkeypatch.setattr(train, "to_device", to_device)
    more = ["--fused", "on", "--grad-cache", "--micro-batch", "2", "--micro-tokens", "150"]
    features = tmp_path / "features"
    words = words_of(world, OTHER, tmp_path / "run", *more, "--features", features)
    train.main(parse(*words))
    assert_trained_by_hand(tmp_path / "run", train_by_hand(world, OTHER))

    assert max(n for n, _ in batches) == 2
    assert all(n == 1 or n * width <= 150 for n, width in batches)
    assert any(n == 1 for n, _ in batches)
    assert list(features.rglob("*.safetensors"))


def test_mined_negatives_come_back_from_their_file(world, tmp_path):
    flags = parse(*words_of(world, OTHER, tmp_path))
    sources = train.load_sources(flags)
    gve = GVE.from_pretrained(world.base)
    plan = [(0, np.array([0, 3, 1])), (1, np.array([2, 0])), (2, np.array([1]))]
    train.mine_epoch(gve, sources, plan, flags, tmp_path / "mined.jsonl")
    again = train.load_sources(flags)
    train.read_mined(again, tmp_path / "mined.jsonl")
    assert [sorted(source.mined) for source in again] == [[0, 1, 3], [0, 2], []]
    assert [source.mined for source in again] == [source.mined for source in sources]


class Watch:
    """Note the arguments of each call of a function that a main program makes, and make it."""

    def __init__(self, monkeypatch, module, *names):
        self.calls = {}  # {function: its calls' arguments by name}
        for name in names:
            self.calls[name] = []
            monkeypatch.setattr(module, name, self.noting(name, getattr(module, name)))

    def noting(self, name, function):
        signature = inspect.signature(function)

        def noted(*args, **options):
            arguments = signature.bind(*args, **options)
            arguments.apply_defaults()
            by_name = dict(arguments.arguments)
            by_name |= by_name.pop("options", {})  # of functions that take any
            self.calls[name].append(by_name)
            return function(*args, **options)

        return noted

    def values(self, name, *keys):
        """Return the arguments of these names of each call of a function, a tuple per call."""
        return [tuple(call[key] for key in keys) for call in self.calls[name]]


def test_train_hands_on_the_flags_that_change_no_number(world, tmp_path, monkeypatch):
    watch = Watch(monkeypatch, train, "TrainLoader", "encode", "peak_flops", "contrastive_loss")
    curves = Watch(monkeypatch, train, "curve_sums")
    models = Watch(monkeypatch, train.GVE, "from_pretrained")
    monkeypatch.setitem(train.LOSSES, "another", train.contrastive_loss)
    short = dataclasses.replace(PLAIN, steps=3, epochs=1)
    limits = ["--micro-batch", "5", "--micro-tokens", "999", "--workers", "1"]
    limits += ["--min-tokens", "5", "--positions", "1d"]
    words = words_of(world, short, tmp_path, *limits, "--checkpointing", "--log-every", "2")
    flags = parse(*words)
    flags.loss = "another"
    gve = train.main(flags)

    limits = watch.values("TrainLoader", "workers", "micro_batch", "micro_tokens")
    assert limits == [(1, 5, 999)]
    assert watch.values("encode", "workers") == [(1,)] * 6
    assert watch.values("peak_flops", "dtype") == [("float64",)]
    assert len(watch.calls["contrastive_loss"]) == 3
    assert all(len(q) == len(q_ids) for q, q_ids in curves.values("curve_sums", "q", "q_ids"))
    loaded = models.values("from_pretrained", "path", "dtype")
    assert loaded == [(world.base, "float64"), (world.prober, "float64")]
    assert models.values("from_pretrained", "min_tokens", "positions")[0] == (5, "1d")
    assert gve.core.language_model.is_gradient_checkpointing
    steps = events(load_jsonl(tmp_path / "log.jsonl"), "step")
    assert [line["step"] for line in steps] == [2, 3]


def test_a_dry_run_tries_a_micro_batch_and_writes_nothing(world, tmp_path, capsys):
    more = ["--dry-run", "--micro-batch", "2", "--micro-tokens", "999"]
    train.main(parse(*words_of(world, PLAIN, tmp_path / "out", *more)))
    printed = capsys.readouterr().out
    assert re.findall(r"(\d+) (videos|texts) of", printed) == [("2", "videos"), ("2", "texts")]
    assert f"2 texts of {PLAIN.max_length} tokens" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("style", ["system", "user"])
def test_the_prompt_letter_by_letter(world, style):
    gve = GVE.from_pretrained(world.base, prompt_style=style)
    embed = Embedder(gve, PLAIN)
    ids = embed.collate.prepare({"text": "A ball"}, "Find it.")["ids"]
    head = {
        "system": "<|im_start|>system\nFind it.<|im_end|>\n<|im_start|>user\n",
        "user": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nFind it.\n",
    }
    tail = "A ball<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    assert gve.processor.tokenizer.decode(ids) == head[style] + tail


# Evaluation and encoding


PROMPT = {  # Table 5's, as the paper prints them
    "MSRVTT": "Find the clip that corresponds to the described scene in the given video.",
    "MS-TI": "Find the video clip that corresponds to the given text and the given image.",
}


@pytest.fixture(scope="module")
def benchmark(world, tmp_path_factory):
    """A benchmark of two datasets and one that is not asked for, whose clips lie elsewhere."""
    root = tmp_path_factory.mktemp("bench") / "inner" / "uvrb"
    corpus = [{"id": f"v{i}", "video": f"{i}.mp4"} for i in range(4)]
    for name in ("MSRVTT", "MS-TI", "DiDeMo"):
        queries = []
        instances = []
        for i in range(4):
            query = {"id": f"q{i}", "text": f"{name} {i}" + " more" * (2 * (i == 3))}
            instance = {"qid": f"q{i}", "pos": [f"v{i}"]}
            if name == "MS-TI":
                query["image"] = str(world.folder / "pictures" / f"{i}.png")
                instance["neg"] = [f"v{(i + 1) % 4}"] + ["v3"] * (i == 0)
            queries.append(query)
            instances.append(instance)
        folder = root / name / "jsonl"
        folder.mkdir(parents=True)
        write_jsonl(folder / "queries.jsonl", queries)
        write_jsonl(folder / "corpus.jsonl", corpus)
        write_jsonl(folder / "instances.jsonl", instances)
    sizes = {name: {"queries": 4, "corpus": 4} for name in ("MSRVTT", "MS-TI", "DiDeMo")}
    write_json(root / "benchmark.json", {"name": "mine", "datasets": sizes})
    return root


def test_eval_hands_on_its_flags(world, benchmark, tmp_path, monkeypatch):
    watch = Watch(monkeypatch, evaluate, "encode", "VectorCache", "show", "score", "join_ranks")
    models = Watch(monkeypatch, GVE, "from_pretrained")
    roots = [str(world.folder / "data" / "clips"), str(world.folder / "pictures")]
    words = ["--ckpt", world.base, "--uvrb", benchmark, "--out", tmp_path, "--device", "cpu"]
    words += ["--root", *roots, "--datasets", "MSRVTT", "MS-TI", "--prompt-style", "system"]
    words += "--name mine --frames 4 --max-tokens 6 --batch-tokens 333 --workers 1".split()
    words += "--bootstrap 20 --rankings --min-tokens 5 --positions 1d --base other".split()
    evaluate.main(parse_flags(evaluate.Flags, [*map(str, words)]))

    # The corpora together and without a prompt, then each dataset's queries with its own.
    assert watch.values("encode", "instruction") == [(None,), *[(p,) for p in PROMPT.values()]]
    corpora, msrvtt, ms_ti = [items for (items,) in watch.values("encode", "items")]
    videos = [{"video": str(world.folder / "data" / "clips" / f"{i}.mp4")} for i in range(4)]
    assert corpora == 2 * videos
    assert [item["text"] for item in msrvtt][:3] == [f"MSRVTT {i}" for i in range(3)]
    assert all(item.keys() == {"text", "image"} for item in ms_ti)
    limits = watch.values("encode", "frames", "max_tokens", "max_length", "batch_tokens", "workers")
    assert limits == [(4, 6, 8192, 333, 1)] * 3
    assert {str(call["cache"].folder) for call in watch.calls["encode"]} == {
        str(tmp_path / "cache")
    }
    loaded = models.values("from_pretrained", "path", "device", "prompt_style")
    assert loaded == [(world.base, torch.device("cpu"), "system")]
    settings = models.values("from_pretrained", "base", "min_tokens", "positions")
    assert settings == [("other", 5, "1d")]
    assert watch.values("join_ranks", "device") == [("cpu",)]
    assert watch.values("score", "bootstrap") == [(20,)] * 2

    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["datasets"]) == ["MSRVTT", "MS-TI"]
    assert (results["benchmark"], results["model"]) == ("mine", "mine")
    protocol = results["protocol"]
    assert (protocol["frames"], protocol["max_tokens"], protocol["batch_tokens"]) == (4, 6, 333)
    assert (protocol["min_tokens"], protocol["positions"]) == (5, "1d")
    assert {"MSRVTT", "MS-TI"} <= results["ci95"].keys()
    chance = (1 / 3 + 3 / 2) / 4  # a pool of three, three of two
    assert results["datasets"]["MS-TI"]["chance"] == pytest.approx(chance)
    for name, depths in (("MSRVTT", {4}), ("MS-TI", {2, 3})):
        for row in load_jsonl(tmp_path / "rankings" / f"{name}.jsonl"):
            assert row["scores"] == sorted(row["scores"], reverse=True)
            assert len(row["ranked"]) in depths
    shown = watch.values("show", "results", "folder", "roots")
    assert shown == [([results], str(benchmark), roots)]
    assert watch.calls["show"][0]["names"][0] == "Table 1"


def test_each_number_of_frames_is_encoded_and_recorded(world, benchmark, tmp_path, monkeypatch):
    watch = Watch(monkeypatch, evaluate, "encode")
    words = ["--ckpt", world.base, "--uvrb", benchmark, "--out", tmp_path, "--device", "cpu"]
    words += ["--root", world.folder / "data" / "clips", "--datasets", "MSRVTT", "--workers", "0"]
    words += ["--max-tokens", "6", "--frames", "4", "2"]
    evaluate.main(parse_flags(evaluate.Flags, [*map(str, words)]))
    assert watch.values("encode", "frames", "max_tokens") == [(4, 6), (4, 6), (2, 6), (2, 6)]
    for frames in (2, 4):
        results = json.loads((tmp_path / f"{frames}x6" / "results.json").read_text())
        assert results["protocol"]["frames"] == frames


def test_a_function_of_ones_own_gets_the_prompts_in_batches(
    world, benchmark, tmp_path, monkeypatch
):
    seen = tmp_path / "seen.jsonl"
    code = f"""
import json
def embed(items, instruction):
    with open({str(seen)!r}, "a") as file:
        file.write(json.dumps({{"n": len(items), "instruction": instruction}}) + "\\n")
    return [[1.0, len(items[0].get("text", ""))]] * len(items)
"""
    (tmp_path / "own.py").write_text(code)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the file runs as a program of its own
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    for name in ("__main__", "__mp_main__"):
        monkeypatch.setitem(sys.modules, name, sys.modules["__main__"])
    roots = [world.folder / "data" / "clips", world.folder / "pictures"]
    words = ["--encoder", f"{tmp_path}/own.py:embed", "--uvrb", benchmark, "--root", *roots]
    words += ["--datasets", "MS-TI", "--batch-size", "3", "--out", tmp_path / "out"]
    evaluate.main(parse_flags(evaluate.Flags, [*map(str, words)]))
    calls = [(row["n"], row["instruction"]) for row in load_jsonl(seen)]
    assert calls == [(3, None), (1, None), (3, PROMPT["MS-TI"]), (1, PROMPT["MS-TI"])]


def test_embed_hands_on_its_flags(world, tmp_path, monkeypatch):
    watch = Watch(monkeypatch, embed, "encode", "join_ranks")
    models = Watch(monkeypatch, embed.GVE, "from_pretrained")
    (tmp_path / "list").mkdir()
    path = tmp_path / "list" / "items.jsonl"
    picture = world.folder / "pictures" / "0.png"
    write_jsonl(path, [{"text": "a"}, {"id": "b", "image": str(picture)}])
    words = [path, "--ckpt", world.base, "--out", tmp_path / "out", "--root", picture.parent]
    words += ["--instruction", "Find it.", "--prompt-style", "system", "--device", "cpu"]
    words += "--frames 4 --max-tokens 6 --batch-tokens 333 --workers 1 --seconds 50".split()
    words += "--min-tokens 5 --positions 1d --base other".split()
    embed.main(parse_flags(embed.Flags, [*map(str, words)]))

    keys = "instruction frames max_tokens batch_tokens workers seconds".split()
    assert watch.values("encode", *keys) == [("Find it.", 4, 6, 333, 1, 50)]
    ((items, cache),) = watch.values("encode", "items", "cache")
    assert items == [{"text": "a"}, {"image": str(picture)}]
    assert cache.folder == tmp_path / "out" / "cache"
    loaded = models.values("from_pretrained", "path", "device", "prompt_style")
    assert loaded == [(world.base, torch.device("cpu"), "system")]
    settings = models.values("from_pretrained", "base", "min_tokens", "positions")
    assert settings == [("other", 5, "1d")]
    assert watch.values("join_ranks", "device") == [("cpu",)]
    assert [row["id"] for row in load_jsonl(tmp_path / "out" / "items.jsonl")] == ["0", "b"]


# Synthesis


def number_of(item):
    """Return the number of the clip that an item tells of, else shows."""
    text = json.dumps(item)
    told = re.search(r"clip (\d)", text) or re.search(r"(\d)\.mp4", text)
    return int(told[1])


def fake_vectors(gve, items, instruction=None, **options):
    """Give clip i and everything about it one axis of four, texts a little off it."""
    vectors = torch.zeros(len(items), 4)
    for row, item in enumerate(items):
        if item == synth.PLACEHOLDER:
            continue
        i = number_of(item)
        vectors[row, i] = 1
        vectors[row, (i + 1) % 4] = 0.3 if "text" in item else 0.2
    return torch.nn.functional.normalize(vectors, dim=1), {}


def fake_captioner(requests):
    """Answer in each style with another text about the request's clip, the last one shown."""
    for request in requests:
        (style,) = request["want"]
        i = number_of(request["media"][-1])
        yield caption.Reply(f"a {style} text about clip {i}", None, 1, 2)


def test_synth_hands_on_its_flags(world, tmp_path, monkeypatch, capsys):
    names = ["encode", "run_sharded", "make_requests", "DecoderPool", "print_dry_run"]
    names.append("keep_replies")
    monkeypatch.setattr(synth, "encode", fake_vectors)
    opened = []

    def open_captioner(name, **options):
        opened.append((name, options))
        return fake_captioner

    monkeypatch.setattr(synth, "open_captioner", open_captioner)
    watch = Watch(monkeypatch, synth, *names)
    models = Watch(monkeypatch, synth.GVE, "from_pretrained")

    rows = []
    for i in range(4):
        text = f"raw words about clip {i}"
        rows.append(
            {"id": f"id{i}", "video": str(world.folder / f"data/clips/{i}.mp4"), "text": text}
        )
    rows[3]["text"] = ""
    write_jsonl(tmp_path / "videos.jsonl", rows)
    words = ["--videos", tmp_path / "videos.jsonl", "--root", world.folder / "data" / "clips"]
    words += ["--out", tmp_path / "out", "--prober", world.prober, "--device", "cpu"]
    words += "--captioner openai:http://there:1/v1#m --prompts short --part 3".split()
    words += "--frames 4 --max-tokens 6 --max-new-tokens 77 --concurrency 5".split()
    words += "--workers 1 --seconds 50 --min-motion 0.001 --consistency 0.5".split()
    words += "--duplicate 1.01 --seed 5 --shares T2T=1 T2I=1 T2V=2 I2V=1 V2V=0".split()
    words += "TI2V=1 TV2V=0 --negatives T2V=1 I2V=2 TI2V=0".split()

    def run(*more):
        synth.main(parse_flags(synth.Flags, [*map(str, [*words, *more])]))

    run("--dry-run")
    assert not (tmp_path / "out").exists()
    ((n, shares, *rest),) = [tuple(call.values()) for call in watch.calls["print_dry_run"]]
    assert (n, shares["T2V"], rest) == (4, 2.0, ["short", 4, 6])
    # Four videos in five styles: 2 x 6 vision tokens and 7 words to read, 2 to 70 words to write.
    costs = [20, round(20 * (12 + 1.35 * 7)), round(20 * 1.35 * 36)]
    assert f"video: calls, tokens read, tokens written: {costs}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="other shards"):
        run("--shard", "1/2")
    run("--stages", "1")
    assert not (tmp_path / "out" / "2-captions").exists()
    assert not opened
    run("--stages", "2")
    assert not (tmp_path / "out" / "3-pairs").exists()
    run()

    assert set(synth.TABLE7) == {"T2T", "T2I", "T2V", "I2V", "V2V", "TI2V", "TV2V"}
    assert {name for (name,) in watch.values("keep_replies", "captioner")} == {
        "openai:http://there:1/v1#m 77"
    }
    assert "were tuned on mini" not in capsys.readouterr().out  # they dropped nothing

    # Models and limits
    keys = "device concurrency frames max_tokens max_new_tokens workers seconds".split()
    wanted = dict(zip(keys, ("cpu", 5, 4, 6, 77, 1, 50), strict=True))
    assert opened == [("openai:http://there:1/v1#m", wanted)] * len(opened)
    assert set(models.values("from_pretrained", "path", "device")) == {(world.prober, "cpu")}
    for call in watch.calls["encode"]:
        assert (call["frames"], call["max_tokens"], call["seconds"]) == (4, 6, 50)
        if any("text" not in item for item in call["items"]):  # texts hang no decoder
            assert call["workers"] == 1
    assert {(w, s) for w, s in watch.values("DecoderPool", "workers", "seconds")} == {(1, 500)}

    # Stage 1: all four clips, in parts of three and one.
    parts = [[len(part) for part in parts] for (parts,) in watch.values("run_sharded", "parts")]
    assert parts[:2] == [[3, 1], [3, 1]]
    pool = load_jsonl(tmp_path / "out" / "pool.jsonl")
    assert [row["fate"] for row in pool] == ["kept"] * 4
    assert [row["consistency"] for row in pool[:3]] == [pytest.approx(0.995, abs=2e-3)] * 3

    # Stage 2: five styles each for a clip, with its raw words, and for its key frame.
    raws = set(watch.values("make_requests", "kind", "prompts", "raw"))
    videos = {("video", "short", row["text"]) for row in rows}
    assert raws == videos | {("image", "short", ""), ("TI2V", "short", "")}

    # Stage 3: everything in a pair is about its own clip, but for negatives and references.
    pairs = [
        row for file in (tmp_path / "out" / "3-pairs").glob("*.jsonl") for row in load_jsonl(file)
    ]
    assert {pair["task"] for pair in pairs} == {"T2T", "T2I", "T2V", "I2V", "TI2V"}
    assert sum(pair["task"] == "T2I" for pair in pairs) == 4
    for pair in pairs:
        i = int(pair["of"].removeprefix("id"))
        assert number_of(pair["positive"]) == i
        kind = {"T2T": "text", "T2I": "image"}.get(pair["task"], "video")
        assert pair["positive"].keys() == {kind}
        negatives = pair.get("negatives", [])
        if pair["task"] == "TI2V":
            shown = number_of(pair["query"]["image"])
            assert (shown != i, pair["reference"]) == (True, f"id{shown}")
            assert f"clip {i}" in pair["query"]["text"]
            # The text alone ranks the target first, so that the image is not needed.
            assert pair["why"].startswith("needs no reference")
            continue
        assert number_of(pair["query"]) == i
        if pair["task"] == "T2T":
            assert pair["query"] != pair["positive"]
        if pair["task"] in ("T2V", "I2V"):
            assert pair["fate"] == "kept"
            # The nearest clips: those with the axes beside its own.
            assert {number_of(item) for item in negatives} <= {(i + 1) % 4, (i - 1) % 4}
            assert len(negatives) == {"T2V": 1, "I2V": 2}[pair["task"]]
    mixture = json.loads((tmp_path / "out" / "uvrd" / "mixture.json").read_text())
    mixture = {entry["task"]: entry for entry in mixture}
    assert mixture["T2V"]["negatives"] == 1
    assert mixture["I2V"]["negatives"] == 2
    assert mixture["T2V"]["samples"] == 8
    assert mixture["I2V"]["samples"] == 4


def test_a_captioner_s_name_decides_what_is_opened(monkeypatch):
    opened = []
    for name in ("transformers_captioner", "server_captioner"):
        open_it = functools.partial(lambda *args, **options: opened.append((args, options)), name)
        monkeypatch.setattr(caption, name, open_it)
    for name in ("mini", "hf:a/b", "openai:https://there#m"):
        caption.open_captioner(name, device="cpu", concurrency=5, frames=4)
    mini = str(ROOT / "mini" / "base")
    assert opened == [
        (("transformers_captioner", mini), {"device": "cpu", "frames": 4}),
        (("transformers_captioner", "a/b"), {"device": "cpu", "frames": 4}),
        (("server_captioner", "https://there", "m"), {"concurrency": 5, "frames": 4}),
    ]


# The benchmark and its tables


def test_uvrb_hands_on_its_flags(monkeypatch, capsys):
    found = []
    asked = []

    def check(*args):
        asked.append(args)
        return found

    monkeypatch.setattr(uvrb, "check", check)
    flags = parse_flags(uvrb.Flags, "check there --root a b --decode --show 7".split())
    with pytest.raises(SystemExit) as done:
        uvrb.main(flags)
    assert (asked, done.value.code) == ([("there", ["a", "b"], True, 7)], 0)
    found.append("there/x.jsonl:1: bad")
    with pytest.raises(SystemExit) as done:
        uvrb.main(flags)
    assert done.value.code == 1
    assert "1 problems in there" in capsys.readouterr().out


def test_sizes_that_a_benchmark_does_not_declare_are_unknown(benchmark):
    _, datasets = uvrb.benchmark(benchmark)
    sizes = [(datasets[name].queries, datasets[name].corpus) for name in ("MSRVTT", "CMRB")]
    assert sizes == [(4, 4), (None, None)]


def test_eval_shows_the_tables_that_are_asked_for(tmp_path, monkeypatch):
    watch = Watch(monkeypatch, evaluate, "show")
    monkeypatch.setattr(evaluate, "show", lambda *args: watch.calls["show"].append(args))
    own = own_result("a", 0.1)
    write_json(tmp_path / "a.json", own)
    write_json(tmp_path / "b.json", {"model": "b"})
    with pytest.raises(ValueError, match="b.json: no results.json"):
        tables.read_results(tmp_path / "b.json")
    words = "--table 3 7 --figure 2 --uvrb there --root r --out o --results".split()
    evaluate.main(parse_flags(evaluate.Flags, [*words, str(tmp_path / "a.json")]))
    evaluate.main(parse_flags(evaluate.Flags, ["--results", str(tmp_path / "a.json")]))
    names = ["Table 3", "Table 7", "Figure 2"]
    assert watch.calls["show"] == [
        (names, [own], "o", "there", ["r"]),
        (["Table 1", "Table 2"], [own], "runs/tables", "runs/mini/uvrb", []),
    ]


def test_table_4_counts_a_benchmark(world, benchmark):
    roots = [world.folder / "data" / "clips", world.folder / "pictures"]
    rows = {row["dataset"]: row for row in tables.measured(benchmark, roots)}
    # 8 to 11 frames at 4 per second; texts of 2, 2, 2 and 4 words; the median pool.
    common = {"queries": 4, "duration_s": "2.4", "words": 2.5}
    assert rows["MSRVTT"] == {"dataset": "MSRVTT", "corpus": 4, **common}
    assert rows["MS-TI"] == {"dataset": "MS-TI", "corpus": 2, **common}


def own_result(name, n, **protocol):
    """Return a result of UVRB's datasets and abilities, all scores of it different."""
    scores = {dataset: 0.01 * i + n for i, dataset in enumerate(uvrb.DATASETS)}
    means = uvrb.abilities(scores)
    datasets = {}
    for dataset, score in scores.items():
        datasets[dataset] = {"score": score, "complete": True, "n": 1, "chance": 0, "ceiling": 1}
    return {
        "benchmark": "UVRB",
        "model": name,
        "protocol": {"checkpoint": f"runs/{name}", **protocol},
        "datasets": datasets,
        "abilities": {ability: means[ability] for ability in uvrb.ABILITIES},
        "AVG-D": means["AVG-D"],
        "AVG-A": means["AVG-A"],
    }


def test_tables_show_ones_own_numbers_in_their_places():
    paper = tables.published()
    a = own_result("a", 0.1, training={"lr": 0.5}, parameters=1234, pairs=100, frames=8)
    b = own_result("b", 0.3, training={"lr": 0.7}, pairs=1000, frames=16, max_tokens=200)
    a["protocol"]["max_tokens"] = 200

    for row, dataset in zip(tables.table_5(paper).yours, uvrb.TABLE_4, strict=True):
        assert (row["dataset"], row["prompt"]) == (dataset.name, dataset.prompt)
        assert (row["task"], row["metric"]) == (dataset.task, dataset.metric)
    for row, (name, printed) in zip(
        tables.table_5(paper).published, paper["datasets"].items(), strict=True
    ):
        assert (row["dataset"], row["task"]) == (name, printed["task"])
    for row in tables.table_8(paper).published:
        for size in ("3B", "7B"):
            off = row[f"Tables 6+7, {size}"] / row[size]
            assert off == pytest.approx(1, abs=0.07), (row["data"], size)
    rows = {row["setting"]: row for row in tables.table_9(paper, [a, b]).mixed}
    assert (rows["lr"]["a"], rows["lr"]["b"]) == (0.5, 0.7)
    sizes = [(row["full_name"], row["parameters"]) for row in tables.table_10(paper, [a, b]).yours]
    assert sizes == [("runs/a", 1234), ("runs/b", None)]
    assert tables.kind_of({"name": "x", "task": "I2V"}) == "video"

    assert tables.with_numbers(["Table 1", "Table 11", "Figure 12"], [a]) == [
        "Table 1",
        "Figure 12",
    ]
    (mine,) = tables.score_table("Table 2", paper, [a]).yours
    assert mine["AVG"] == pytest.approx(a["AVG-A"])
    assert a["AVG-A"] != pytest.approx(a["AVG-D"])
    figure = tables.figure_2(paper, [a])
    assert (figure.yours[0]["AVG-D"], figure.yours[0]["AVG-A"]) == (a["AVG-D"], a["AVG-A"])
    model = figure.published[0]["model"]
    printed = (paper["table1"][model]["AVG"], paper["table2"][model]["AVG"])
    assert (figure.published[0]["AVG-D"], figure.published[0]["AVG-A"]) == printed

    # Data scaling is one curve of all checkpoints, and has a fit; frames have neither.
    (row, _) = tables.curves("Figure 6", paper, [a, b]).yours
    assert (row["model"], row[100], row[1000]) == ("yours", a["AVG-D"], b["AVG-D"])
    assert row["per decade"] == pytest.approx(b["AVG-D"] - a["AVG-D"])
    b["protocol"]["checkpoint"] = "runs/a"
    row = tables.curves("Figure 12", paper, [a, b]).yours[0]
    assert (row["model"], row[8] is None, "a" in row) == ("runs/a", False, False)


def test_correlations_with_the_average_stop_at_their_floor_and_use_table_2s():
    paper = tables.published()
    cells = tables.correlations("Figure 8", paper)
    assert min(value.pearson for value in cells.values()) == 0.03
    results = [own_result(str(n), 0.1 * n) for n in range(3)]
    results[0]["AVG-A"], results[2]["AVG-A"] = results[2]["AVG-A"], results[0]["AVG-A"]
    rows = {row["pair"]: row for row in tables.correlation_table("Figure 8", paper, results).mixed}
    assert rows["TXT"]["yours Spearman"] == pytest.approx(-1)


def test_the_paper_s_gains_and_its_sum_of_all_pairs_are_recomputed():
    paper = tables.published()
    checks = [check for check in tables.recompute(paper) if check.where == "section 5.2"]
    assert len(checks) > 4
    assert tables.build("Table 7", paper, [], None, ()).published == paper["table7_uvrd"]
    known, _ = tables.disagreements(paper)

    # One fault in each kind of published value that follows from others.
    paper["table8_totals"]["all"]["3B"] += 10**6
    paper["figure12_frames"]["values"]["CG"]["GVE-3B"][0] += 0.1
    paper["figure6_data_scaling"]["gain_per_decade"]["AVG-D"]["GVE-3B"]["relative"] = 0.5
    for claim in paper["claims"]:
        claim[3] += 0.5
    wrong, _ = tables.disagreements(paper)
    new = wrong.keys() - known.keys()
    gain = ("section 5.2", "GVE-3B AVG-D", "relative gain per decade")
    assert {("Table 8", "all", "3B"), ("Figure 12", "GVE-3B at 8", "CG"), gain} <= new
    assert sum(where == "text" for where, _, _ in wrong) == len(paper["claims"])


def test_a_table_in_four_styles():
    groups = [[{"model": "a", "R@1": 0.5}], [{"model": "b_2", "n": 1000}]]

    def lines(style):
        return tables.render("Title", groups, style).splitlines()

    text = ["model   R@1      n", "a      .500      -", "b_2       -  1,000"]
    assert [line for line in lines("txt") if line.strip("-")] == ["Title", *text]
    table = ["| model | R@1 | n |", "| --- | ---: | ---: |", "| a | .500 | - |"]
    assert lines("md") == ["Title", "", *table, "| b_2 | - | 1,000 |"]
    assert lines("csv") == ["model,R@1,n", "a,.500,-", 'b_2,-,"1,000"']
    assert lines("tex")[:2] == ["% Title", "\\begin{tabular}{lrr}"]
    assert "b\\_2 & - & 1,000 \\\\" in lines("tex")


def test_pictures_show_the_rows_of_their_tables(tmp_path, monkeypatch):
    shown = {}

    def keep(picture, path, **options):
        shown[path.name] = picture

    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", keep)
    rows = []
    for n, name in enumerate(("a", "b")):
        abilities = {tag: (n + 1) * 0.01 * i for i, tag in enumerate(uvrb.ABILITIES)}
        rows.append({"model": name, "AVG-D": 0.3 + n, "AVG-A": 0.4 + n, **abilities})
    tables.plot("Figure 2", "two models", tables.Table(yours=rows), tmp_path / "2.png")
    assert shown["2.png"].get_suptitle() == "two models"
    radar, bars = shown["2.png"].axes
    for line, row in zip(radar.lines, rows, strict=True):
        values = [row[name] for name in uvrb.ABILITIES]
        assert line.get_ydata().tolist() == [*values, values[0]]
    assert [bar.get_width() for bar in bars.patches] == [0.3, 1.3, 0.4, 1.4]

    rows = [{"model": "a", "score": "AVG-D", 4: 0.1, 8: 0.2, 16: None}]
    rows.append({"model": "b", "score": "AVG-D", 4: 0.3, 8: None, 16: 0.5})
    tables.plot("Figure 12", "frames", tables.Table(yours=rows), tmp_path / "12.png")
    a, b = shown["12.png"].axes[0].lines
    assert (a.get_xdata().tolist(), a.get_ydata().tolist()) == ([4, 8], [0.1, 0.2])
    assert (b.get_xdata().tolist(), b.get_ydata().tolist()) == ([4, 16], [0.3, 0.5])

    rows = [{"pair": "CMP-TXT", "All": 0.1, "All Spearman": 0.7, "CLIP Spearman": None}]
    tables.plot("Figure 7", "pairs", tables.Table(mixed=rows), tmp_path / "7.png")
    grid = shown["7.png"].axes[0].images[0].get_array()
    assert grid[1, 0] == 0.7
    assert np.isfinite(grid).sum() == 1
    rows = [{"pair": "CMP", "All Spearman": 0.7, "CLIP Spearman": 0.2}]
    tables.plot("Figure 8", "bars", tables.Table(mixed=rows), tmp_path / "8.png")
    heights = [bar.get_height() for bar in shown["8.png"].axes[0].patches]
    assert heights == [0.7, 0.2]


# Functions whose faults no other test saw


def test_a_query_that_lost_one_of_its_positives_does_not_count():
    dataset = uvrb.DATASETS["MSRVTT"]
    rows = [{"id": str(i), "item": {"text": str(i)}, "where": "x:1"} for i in range(4)]
    positives = [[0], [1, 2], [3]]
    bench = uvrb.Bench("MSRVTT", dataset, rows[:3], rows, positives, None, (3, 4), [])
    encoded = evaluate.Encoded(bench, torch.eye(4)[:3], torch.eye(4), {}, {2: "lost"})
    part = evaluate.leave_out_lost(encoded)
    assert (part.queries, part.corpus, part.positives) == ([0, 2], [0, 1, 3], [[0], [2]])


def test_an_interval_leaves_out_a_fortieth_on_either_side():
    draws = {"MSRVTT": [i / 1000 for i in range(1001)]}
    bounds = evaluate.intervals(draws, {"MSRVTT": 0.5})
    assert bounds == {"MSRVTT": pytest.approx([0.025, 0.975])}


def test_paths_may_be_pathlib_s_and_kinds_are_encoded_one_after_the_other():
    items = [
        {"video": {"path": Path("a.mp4"), "start": 1}},
        {"image": Path("a.png"), "text": "x"},
        {"text": "long"},
        {"text": ""},
    ]
    plain = [data.with_plain_paths(item) for item in items]
    assert plain[:2] == [
        {"video": {"path": "a.mp4", "start": 1}},
        {"image": "a.png", "text": "x"},
    ]
    assert sorted(plain, key=embed.kind_and_length) == plain[::-1]


def test_a_base_is_found_from_here_from_its_adapter_and_in_this_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "here", tmp_path / "adapter" / "inside"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    found = [
        model.find_base(tmp_path / "adapter", base) for base in ("here", "inside", "mini/base")
    ]
    assert found == ["here", str(tmp_path / "adapter" / "inside"), str(ROOT / "mini" / "base")]


def test_a_clip_has_at_most_its_tokens(world):
    gve = GVE.from_pretrained(world.base)
    clip = str(world.folder / "data" / "clips" / "0.mp4")  # 3 x 4 tokens a frame
    grids = []
    for most in (6, 200):
        collate = Collator(gve.processor, frames=4, max_tokens=most)
        grids.append(collate.prepare({"video": clip})["video_grid_thw"].tolist())
    assert grids == [[[2, 4, 4]], [[2, 6, 8]]]

    # A checkpoint's own least number reaches its collator; decoders are counted.
    gve = GVE.from_pretrained(world.base, min_tokens=20)
    sample = gve.collator(frames=4, max_tokens=30).prepare({"video": clip})
    _, height, width = sample["video_grid_thw"][0].tolist()
    assert 20 <= height * width / 4 <= 30
    tally = collections.Counter()
    items = [{"video": clip}, {"video": {"path": clip, "end": 1}}]
    embed.encode(gve, items, frames=2, max_tokens=30, tally=tally)
    assert list(tally.values()) == [2]


def test_small_helpers_of_tables_benchmarks_and_the_loss(tmp_path):
    rows = [{"model": "a", "x": None, "y": 0}, {"model": "b", "x": None}]
    assert tables.columns_with_numbers(rows) == ["y"]

    write_jsonl_of(tmp_path / "Own" / "jsonl", {"queries": 2, "corpus": 3})
    assert '"queries": 2, "corpus": 3' in uvrb.definition_of(tmp_path, "Own")

    first, second, third = train.number_rows(torch.tensor([[1.0, 0], [0, 1], [1, 0]])).tolist()
    assert (first == third, first == second) == (True, False)


def write_jsonl_of(folder, sizes):
    """Write files of so many rows, {name: rows}."""
    folder.mkdir(parents=True)
    for name, n in sizes.items():
        write_jsonl(folder / f"{name}.jsonl", [{"id": str(i)} for i in range(n)])


def test_equal_values_are_known_by_their_first_place():
    assert embed.first_places(torch.tensor([5, 3, 5, 3, 3])).tolist() == [0, 1, 0, 1, 1]


def test_a_row_is_named_by_its_line(world, tmp_path):
    sources = train.load_sources(parse(*words_of(world, PLAIN, tmp_path)))
    loader = train.TrainLoader(sources, None)
    assert loader.describe((1, 2)).endswith("data/pictures.jsonl:3")


def test_a_protocol_tells_how_the_checkpoint_was_trained(world, plain_run, by_hand):
    out, flags = plain_run
    gve = GVE.from_pretrained(out)
    eval_flags = evaluate.Flags(ckpt=str(out), batch_tokens=33)
    protocol = evaluate.protocol_of(gve, eval_flags, 4, 6)
    pairs = 0
    for source, drawn in zip(world.sources, by_hand["drawn"], strict=True):
        pairs += min(len(source.rows), drawn)
    assert sum(by_hand["drawn"]) > pairs  # some were seen twice
    assert (protocol["pairs"], protocol["step"]) == (pairs, PLAIN.steps)
    assert (protocol["frames"], protocol["max_tokens"], protocol["batch_tokens"]) == (4, 6, 33)
    assert (protocol["base"], protocol["training"]["lr"]) == (world.base, PLAIN.lr)
    assert "user turn" in protocol["prompt"]


def test_synth_drops_the_inconsistent_and_the_later_of_two_alike():
    def rows(*scores):
        return [{"id": str(i), "fate": "kept", "consistency": s} for i, s in enumerate(scores)]

    def kept(rows):
        return [row["id"] for row in rows if row["fate"] == "kept"]

    some = rows(0.5, 0.1, 0.3, 0.2)
    synth.drop_inconsistent(some, "0.25")
    assert kept(some) == ["0", "2"]
    assert some[3]["why"].startswith("consistency: 0.2")
    some = rows(0.5, 0.1, 0.3, 0.2)
    synth.drop_inconsistent(some, "q0.3")  # the quantile lies at 0.19
    assert kept(some) == ["0", "2", "3"]

    # Brighter to the right and downward, and the other way round: all signs differ.
    slope = torch.arange(32.0) + torch.arange(32.0)[:, None]
    up = slope.expand(4, 3, 32, 32)
    part = torch.cat([-slope[:12], slope[12:]]).expand(4, 3, 32, 32)  # mostly like the first
    films = [up, -up, up + 9, -2 * up, part]
    alike = rows(*[1] * 5)
    for row, film in zip(alike, films, strict=True):
        row["hash"] = synth.fingerprint(film)
    synth.drop_duplicates(alike, 0.6)
    assert kept(alike) == ["0", "1", "4"]
    for row, first in zip(alike[2:4], "01", strict=True):
        assert row["why"].startswith(f"duplicate: of {first}")
    half = torch.cat([-slope[:16], slope[16:]]).expand(4, 3, 32, 32)
    bits = [int(synth.fingerprint(film), 16) for film in (up, half)]
    assert (bits[0] ^ bits[1]).bit_count() / 448 == pytest.approx(0.5, abs=0.1)


def test_synth_gives_a_caption_the_cosine_of_its_best_shot():
    row = {"fate": "kept", "text": "a", "video": "a.mp4", "cuts": [1.0, 2.0], "seconds": 3.0}
    asked = []

    class Prober:
        def embed(self, items):
            asked.extend(items)
            cosines = {0.0: 0.3, 1.0: 0.9, 2.0: 0.1}
            vectors = [[1.0, 0.0]] * len(items)
            if "video" in items[0]:
                vectors = [[cosines[item["video"]["start"]], 0.0] for item in items]
            return torch.tensor(vectors), {}

    synth.score_captions([row], torch.tensor([[0.5, 0.0]]), Prober())
    assert row["consistency"] == 0.9
    spans = [(item["video"]["start"], item["video"]["end"]) for item in asked[1:]]
    assert spans == [(0, 1.0), (1.0, 2.0), (2.0, 3.0)]


def test_synth_draws_frames_and_clips_and_joins_answers():
    video = synth.Video("a", "a.mp4", "", 12.0, [1.0, 2.0, 3.0], [], 0, torch.zeros(4))
    rng = random.Random(0)
    times = {video.draw_frame(rng)["image"]["time"] for _ in range(40)}
    assert times == {1.0, 2.0, 3.0}
    assert video.draw_clip(rng) == {"video": {"path": "a.mp4", "start": 0, "end": 10}}
    video.clips = [[1, 4], [2, 6]]
    assert {video.draw_clip(rng)["video"]["start"] for _ in range(40)} == {1, 2}

    # A fraction of pairs per video is the chance of one more.
    flags = synth.Flags(shares=["T2V=1.5", "T2T=0", "T2I=0", "I2V=0", "V2V=0", "TI2V=0", "TV2V=0"])
    counts = []
    for i in range(400):
        video.id = str(i)
        counts.append(len(synth.draw_tasks(video, flags)))
    assert set(counts) == {1, 2}
    assert np.mean(counts) == pytest.approx(1.5, abs=0.1)

    # Two clips of three shots, each inside its own.
    times = np.arange(120) / 4
    sample = synth.Sample(None, times, np.full(120, 0.25), 120, 30.0, [84, 112])
    spans = set()
    for seed in range(20):
        clips = synth.draw_clips(sample, [(0, 40), (40, 80), (80, 120)], random.Random(seed))
        assert len(clips) == 2
        for start, end in clips:
            assert start // 10 == (end - 1e-6) // 10
            spans.add(start // 10)
    assert spans == {0, 1, 2}

    # The middle of the longest shot first; no second frame that looks like one chosen.
    film = torch.cat([torch.zeros(4, 3, 32, 32), torch.full((6, 3, 32, 32), 100.0)])
    assert synth.choose_key_frames(film, [(0, 4), (4, 10)]) == [7, 2]

    kept = caption.Answer("kept", {"concise": "a b c"}, None, [1, 2])
    dropped = caption.Answer("dropped", None, "schema", [3, 4])
    failed = caption.Answer("failed", None, "no reply", [0, 0])
    row = synth.merge_answers([kept, dropped, failed])
    assert (row["fate"], row["why"], row["tokens"]) == ("failed", "no reply", [4, 6])
    assert synth.merge_answers([kept, dropped])["fate"] == "dropped"
    assert synth.merge_answers([kept])["captions"] == {"concise": "a b c"}

    # Equal scores are no reason to rank lower; opposite vectors have a negative cosine.
    assert synth.rank_of(1, torch.tensor([0.5, 0.3, 0.3, 0.1])) == 2
    assert synth.cosine(torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 0.5])) == -0.5

    captions = [
        {"of": "a", "kind": "video", "fate": "kept", "captions": {"x": "clip 1", "y": "clip 2"}},
        {"of": "a", "kind": "image", "fate": "kept", "captions": {"x": "clip 3"}},
    ]

    class Prober:
        def embed(self, items):
            return [item["text"] for item in items], {}

    vectors = synth.caption_embedder(captions, Prober())
    assert vectors("a") == ["clip 1", "clip 2"]
    assert vectors("b") == []


def test_captioner_media_are_as_large_as_allowed_and_threads_keep_the_order():
    frames = np.zeros((2, 140, 280, 3), np.uint8)  # 5 x 10 tokens
    small = caption.shrink(frames, 8)
    assert small.shape[0] == 2
    assert 0.7 * 8 < small.shape[1] * small.shape[2] / 28**2 <= 8
    assert caption.shrink(frames, 50) is frames
    shown = caption.Shown("video", frames, 4.0)
    times = {"fps": 0.5, "total_num_frames": 2, "duration": 4.0}
    assert caption.video_metadata(shown) == times | {"frames_indices": [0, 1]}
    done = caption.map_in_threads(lambda x: 2 * x, range(9), 3, 4)
    assert list(done) == [0, 2, 4, 6, 8, 10, 12, 14, 16]


def test_a_captioner_answers_a_batch_as_it_answers_each_alone(world):
    options = {"frames": 2, "max_tokens": 6, "max_new_tokens": 6, "device": "cpu", "workers": 0}
    ask = caption.transformers_captioner(world.base, **options)
    media = [{"video": str(world.folder / "data" / "clips" / "0.mp4")}]
    texts = ("Say it.", "Describe the video in many more words.", "What?")
    requests = []
    for prompt in texts:
        request = {"media": media, "prompt": prompt, "want": {"x": (1, 3)}, "plain": True}
        requests.append(request)
    together = [(reply.text, reply.tokens_read) for reply in ask(requests)]
    alone = []
    for request in requests:
        (reply,) = ask([request])
        alone.append((reply.text, reply.tokens_read))
    assert together == alone


def test_synth_measures_by_its_thresholds(world):
    clip = str(world.folder / "data" / "clips" / "1.mp4")
    assert synth.measure(clip, "x", synth.Flags(min_motion=0.001))["fate"] == "kept"
    assert synth.measure(clip, "x", synth.Flags(min_motion=0.9))["why"].startswith("static")


def test_model_py_prints_the_sizes_of_a_checkpoint(world, capsys):
    model.main(parse_flags(model.Flags, [world.base]))
    full = sum(p.numel() for p in GVE.from_pretrained(world.base).parameters())
    # Rank 16: q 64 -> 64, k and v 64 -> 32, gate and up 64 -> 96, down 96 -> 64; two layers.
    lora = 2 * 16 * (64 + 64 + 2 * (64 + 32) + 3 * (64 + 96))
    wanted = f"dim 64; {full + lora:,} parameters, {lora:,} trained in 24 LoRA tensors"
    assert capsys.readouterr().out.strip() == wanted


# Faults that these and all other tests are to catch


def test_the_lines_and_tests_that_the_mutants_name_are_there():
    assert not mutants.faults_of_the_list()
    files = {mutant.file for mutant in mutants.MUTANTS}
    root = {path.name for path in ROOT.glob("*.py")}
    assert root | {"kernels/infonce.py", "kernels/windows.py"} <= files
    assert len(mutants.MUTANTS) >= 60


@pytest.mark.slow
@pytest.mark.timeout(2 * 3600)
def test_every_mutant_is_caught():
    done = subprocess.run([sys.executable, "tests/mutants.py"], cwd=ROOT)
    assert done.returncode == 0
