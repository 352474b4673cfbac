"""What each main program hands to its functions, seen from outside.

Training: a run over three hand-made sources is compared with `train_by_hand`, a loop of our own.
Its independent parts are the pairs and their content ids, R_k, P(k), the draws, mining, the loss
and the curves, warm-up and cosine, clipping; AdamW is torch's. Vectors come from GVE's forward, one
item at a time, which tests/test_model.py compares with transformers.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import moving_square, write_tiny, write_video
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from data import Collator  # noqa: E402
from model import GVE  # noqa: E402
from support.files import load_jsonl, write_json, write_jsonl  # noqa: E402

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
    for i in range(4):
        path = folder / "data" / "clips" / f"{i}.mp4"
        clips.append(write_video(path, moving_square(8 + i, 84, 112, seed=40 + i), fps=4))
    return pictures, clips


def list_rows(pictures, clips):
    """List the rows of the three sources: [query, positive, hard negative, ...]."""
    words = [
        ["what rolls", "a red ball", "a blue ball"],
        ["which way", "to the left", "A red  ball"],
        ["where is it", "on the table", "under the table"],
        ["what colour", "a Red ball", "green"],  # the first row's answer, in another form
        ["how many", "two of them", "three of them"],
        ["when", "at night", "on the table"],  # another row's answer as hard negative
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
    """Number the items so that equal contents share a number: texts by their words in lower case."""
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
    sizes = {"words": (6, 4, 1), "pictures": (5, 4, 1), "clips": (4, 2, 0)}
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


def loss_by_hand(q, p, n, p_ids, n_ids, s):
    """Return the mean over rows of -log of the positive's share, in one or both directions."""
    candidates = torch.cat([p, n])
    ids = [*p_ids, *n_ids]

    def is_negative(i, j):
        too_good = float((q[i] @ candidates[j] - q[i] @ p[i]).detach()) > s.margin
        return ids[j] != p_ids[i] and (s.margin < 0 or not too_good)

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


def gap_by_hand(q, p, n, p_ids, n_ids):
    """Return the mean of a positive's score less that of its hardest negative."""
    candidates = torch.cat([p, n])
    gaps = []
    for i in range(len(q)):
        hardest = -1.0
        for j, number in enumerate([*p_ids, *n_ids]):
            if number != p_ids[i]:
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
        self.drawn = [0] * len(sources)

    def __call__(self, step, probabilities):
        k = int(np.random.default_rng([self.seed, step]).choice(len(self.sources), p=probabilities))
        source = self.sources[k]
        of_pass, start = divmod(self.drawn[k], source.samples)
        rows = np.random.default_rng([self.seed, k]).permutation(len(source.rows))
        rows = rows[: source.samples]
        rows = np.random.default_rng([self.seed, k, of_pass]).permutation(rows)
        rows = rows[start : start + source.batch].tolist()
        self.drawn[k] += len(rows)
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
        seen = {source.id_of(source.rows[row][1])}
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


def probabilities_by_hand(relevance, sigma, progress, sources, s):
    """Return P of one step: of the pyramid, or of the stages from level 1 to level 4."""
    if s.schedule == "pyramid":
        weights = np.exp(np.array(relevance) / sigma)
        return weights / weights.sum()
    # Level 1 lasts for its share of the pairs, then comes level 3; levels 2 and 4 have none.
    sizes = {source.name: source.samples for source in sources}
    below = sizes["words"] + sizes["pictures"]
    if progress < below / sum(sizes.values()):
        return np.array([sizes["words"] / below, sizes["pictures"] / below, 0.0])
    return np.array([0.0, 0.0, 1.0])


def other_losses(q, p, n, ids, s):
    """Return the losses that a fault in the wiring would give, {fault: loss}."""
    unique = [*range(len(p))], [*range(len(p), len(p) + len(n))]
    return {
        "ids": float(loss_by_hand(q, p, n, *unique, s)),
        "margin": float(loss_by_hand(q, p, n, *ids, dataclasses.replace(s, margin=-1.0))),
        "negatives": float(loss_by_hand(q, p, n[:0], ids[0], [], s)),
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
            p = probabilities_by_hand(relevance, sigma, step / s.steps, world.sources, s)
            share = share + p / len(of_epoch)
            plan.append(draws(step, p))
        about = {"R": relevance, "R_error": errors, "P": share, "sigma": sigma}
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
            positives = [source.rows[row][1] for row in rows]
            q = embed([source.rows[row][0] for row in rows], source.instruction)
            p = embed(positives)
            n = embed(others)
            ids = [source.id_of(item) for item in positives], [*map(source.id_of, others)]
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
        for key in ("R", "R_error", "P", "passes"):
            if line[key] is None and line["schedule"] == "staged":
                continue  # nothing was probed
            assert list(line[key]) == names
            assert list(line[key].values()) == near(list(by_hand[key])), (line["epoch"], key)
        levels = {str(level): 0.0 for level in (1, 2, 3, 4)}
        for (_, level), p in zip(TASKS.values(), by_hand["P"], strict=True):
            levels[str(level)] += p
        assert line["level_P"] == near(levels)

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
    for fault in ("ids", "margin", "negatives", "symmetric"):
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
        with pytest.raises(ValueError, match=f"'{name}'"):
            train.main(parse(*words, "--resume", "auto", change))
    train.main(parse(*words, "--resume", "auto"))
    assert_trained_by_hand(tmp_path, by_hand)
    assert states() == ["step-00000008", "step-00000009"]


def test_gve_json_holds_the_run(world, plain_run, by_hand):
    out, flags = plain_run
    info = json.loads((out / "gve.json").read_text())
    assert info["config"] == {**dataclasses.asdict(flags), "world": 1}
    assert (info["step"], info["seed"]) == (PLAIN.steps, PLAIN.seed)
    assert (info["pooling"], info["prompt_style"]) == ("last_token", "user")
    assert info["base"] == world.base
    for source, drawn in zip(world.sources, by_hand["drawn"], strict=True):
        assert info["data"][source.name] == {"rows": len(source.rows), "drawn": drawn}
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


class Watch:
    """Note the arguments of each call of a function that a main program makes, and make it."""

    def __init__(self, monkeypatch, module, *names):
        self.calls = {}
        for name in names:
            self.calls[name] = []
            monkeypatch.setattr(module, name, self.noting(name, getattr(module, name)))

    def noting(self, name, function):
        def noted(*args, **options):
            self.calls[name].append((args, options))
            return function(*args, **options)

        return noted

    def options(self, name):
        """Return the keyword arguments of a function's calls."""
        return [options for _, options in self.calls[name]]

    def arguments(self, name):
        """Return the positional arguments of a function's calls."""
        return [args for args, _ in self.calls[name]]


def test_train_hands_on_the_flags_that_change_no_number(world, tmp_path, monkeypatch):
    watch = Watch(monkeypatch, train, "TrainLoader", "encode", "peak_flops")
    models = Watch(monkeypatch, train.GVE, "from_pretrained")
    short = dataclasses.replace(PLAIN, steps=3, epochs=1, symmetric=False)
    words = words_of(world, short, tmp_path, "--workers", "1", "--micro-batch", "5", "--checkpointing")
    train.LOSSES["twice"] = lambda *args, **options: 2 * train.contrastive_loss(*args, **options)
    flags = parse(*words, "--micro-tokens", "999", "--log-every", "2")
    flags.loss = "twice"
    gve = train.main(flags)
    del train.LOSSES["twice"]

    (loader,) = watch.options("TrainLoader")
    assert (loader["workers"], loader["micro_batch"], loader["micro_tokens"]) == (1, 5, 999)
    assert [options["workers"] for options in watch.options("encode")] == [1] * 6
    assert [options["dtype"] for options in models.options("from_pretrained")] == ["float64"] * 2
    assert [str(args[0]) for args in models.arguments("from_pretrained")] == [
        world.base,
        world.prober,
    ]
    assert watch.arguments("peak_flops") == [(torch.device("cpu"), "float64")]
    assert gve.core.language_model.is_gradient_checkpointing

    steps = events(load_jsonl(tmp_path / "log.jsonl"), "step")
    assert [line["step"] for line in steps] == [2, 3]
    by_hand = train_by_hand(world, dataclasses.replace(short, steps=3))
