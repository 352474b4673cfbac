"""train.py: ranks against one process, frozen weights, damaged clips, mining, the schedule."""

import ctypes
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import full_disk
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import train  # noqa: E402
from support.files import load_jsonl, write_jsonl  # noqa: E402


def run(*command, cwd=ROOT, **env):
    """Run Python on the words of a command in a process of its own; env: more variables."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **env}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


def parse(*words):
    return train.parse_flags(train.Flags, list(map(str, words)), presets=train.PRESETS)


def go(*words):
    """Run the command in this process: a new import of torch for each case would take minutes."""
    return train.main(parse(*words))


def launch(world):
    """Return the words that start a script on `world` ranks."""
    if world == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", world]


def flags_for(tiny, mixture, out, *more):
    """Return train.py's flags for a small run into `out`.

    more: further flags. Strings may hold several, written as in a shell; paths stay whole.
    """
    folder = Path(mixture).parent
    words = ["--base", tiny, "--mixture", mixture, "--data", folder, "--out", out]
    words += ["--features", folder / "features"]
    usual = "--prober '' --workers 0 --log-every 1 --epochs 3 --dropout 0.1"
    for part in (usual, *more):
        if isinstance(part, str):
            words += shlex.split(part)
        else:
            words.append(part)
    return words


def record(out):
    """Run train.main and keep each step's summed loss and the gradients that the optimiser sees.

    Two environment variables disturb the run: FATE, "signal rank step", sends that rank the signal
    at that step; SLOW lets each clip take that many seconds more.
    """
    rank = os.environ.get("RANK", "0")
    number, doomed_rank, last_step = os.environ.get("FATE", "never never never").split()
    delay = float(os.environ.get("SLOW", 0))
    sum_over_ranks = train.sum_over_ranks
    open_clip = data.open_clip
    losses = []
    gradients = []

    def record_sums(parameters, sums):
        if rank == doomed_rank and str(len(losses)) == last_step:
            os.kill(os.getpid(), int(number))
        summed = sum_over_ranks(parameters, sums)
        losses.append(torch.tensor(summed["loss"], dtype=torch.float64))
        gradient = torch.cat([p.grad.flatten() for p in parameters])
        gradients.append(gradient.double())
        return summed

    def load_slowly(video, frames):
        time.sleep(delay)
        return open_clip(video, frames)

    train.sum_over_ranks = record_sums
    data.open_clip = load_slowly
    train.install_signal_handlers()
    go(*sys.argv[2:])
    if rank == "0":
        torch.save({"loss": torch.stack(losses), "grad": torch.stack(gradients)}, out)


# Run as a script, this file is train.py with a recorder; the tests start their ranks with it.
if __name__ == "__main__":
    torch.set_num_threads(1)
    record(sys.argv[1])
    sys.exit()


def weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def assert_same_weights(folder, other):
    """Compare the adapters of two checkpoints bit for bit."""
    ours = weights(folder)
    expected = weights(other)
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(ours[name], tensor), name


def events(log, name):
    """Return the lines of a log that tell of one kind of event."""
    return [line for line in log if line["event"] == name]


def steps_of(out):
    """Return (step, loss, learning rate, source) of each step in a run's log."""
    steps = []
    for line in events(load_jsonl(out / "log.jsonl"), "step"):
        step = (line["step"], line["loss"], line["lr"], line["source"])
        steps.append(step)
    return steps


# (ranks, with GradCache or without): every other case must equal the first.
CASES = [
    (1, False),
    (3, False),
    (1, True),
    (2, True),
    (3, True),
]


@pytest.fixture(scope="module")
def one_and_many(tiny, mixture, tmp_path_factory):
    """The same float64 run on 1, 2 and 3 ranks: 9 steps, batches of 4, 3 and 1 rows, no dropout.

    -> {case: {"loss" (9,), "grad" (9, weights), "log": lines}}
    """
    folder = tmp_path_factory.mktemp("ranks")
    seen = {}
    for world, cached in CASES:
        out = folder / f"{world}-{cached}"
        recorded = folder / f"{world}-{cached}.pt"
        same = "--dtype float64 --dropout 0 --steps 9 --schedule uniform --lr 0.01"
        flags = flags_for(tiny, mixture, out, same)
        if cached:
            flags += ["--grad-cache", "--micro-batch", "3", "--micro-tokens", "170"]

        done = run(*launch(world), __file__, recorded, *flags)
        assert done.returncode == 0, done.stderr[-3000:]
        seen[world, cached] = torch.load(recorded)
        seen[world, cached]["log"] = load_jsonl(out / "log.jsonl")
    return seen


@pytest.mark.parametrize(("world", "cached"), CASES[1:])
def test_ranks_and_grad_cache_give_the_loss_and_gradients_of_one_process(
    one_and_many, world, cached
):
    one = one_and_many[1, False]
    many = one_and_many[world, cached]
    assert len(one["grad"]) == 9
    assert len(many["grad"]) == 9
    assert one["loss"].abs().min() >= 0
    assert (one["loss"] > 0.1).sum() >= 5

    # A gradient is measured beside its step's largest entry. The loss of a one-row batch is 0.
    largest = one["grad"].abs().amax(-1, keepdim=True)
    scales = {
        "loss": one["loss"].abs().clamp(min=1e-3),
        "grad": largest.clamp(min=1e-12),
    }
    for name, scale in scales.items():
        difference = (one[name] - many[name]).abs()
        error = (difference / scale).max()
        assert error < 1e-9, f"{name}: relative error {error:.2e} on {world} ranks"


def test_the_run_held_the_uneven_cases(one_and_many):
    log = one_and_many[1, False]["log"]
    steps = events(log, "step")
    assert {line["source"] for line in steps} == {"t2v", "ti2v", "t2t"}

    # Some source was exhausted: its short last batch was drawn.
    (end,) = events(log, "end")
    assert max(end["passes"].values()) > 1

    rows = {(line["source"], line["rows"]) for line in steps}
    assert ("ti2v", 1) in rows, rows  # fewer rows than ranks
    assert ("t2v", 3) in rows, rows  # hard negatives in a short batch


def test_the_rate_counts_the_time_of_steps_before_an_epochs_end(
    tiny, mixture, tmp_path, capsys, monkeypatch
):
    """Of a clock that moves by a second whenever it is read, twice in a step."""
    monkeypatch.setattr(train.time, "perf_counter", itertools.count().__next__)
    flags = "--steps 6 --epochs 2 --schedule uniform --log-every 6"
    go(*flags_for(tiny, mixture, tmp_path, flags))
    (rate,) = re.findall(r"^step 6/6: .*, (\S+) steps/s, ", capsys.readouterr().err, re.M)
    assert float(rate) == pytest.approx(1 / 2, rel=0.1)


def test_the_same_run_twice_is_bit_identical_with_dropout(tiny, mixture, tmp_path, capsys):
    same = "--steps 4 --schedule uniform"
    go(*flags_for(tiny, mixture, tmp_path / "a", same, "--log-every 2"))

    # Where there is no terminal, a line now and then stands for the bar.
    said = capsys.readouterr().err
    logged = events(load_jsonl(tmp_path / "a" / "log.jsonl"), "step")
    assert [line["step"] for line in logged] == [2, 4]
    told = re.findall(
        r"^step (\d)/4: loss (.*), source (\w+), (\S+) steps/s, (\S+) left$", said, re.M
    )
    assert [words[:3] for words in told] == [
        (str(line["step"]), f"{line['loss']:.3f}", line["source"]) for line in logged
    ]
    assert told[1][4] == "00:00"
    assert "\rtrain" not in said and "it/s]" not in said.split("step 2/4")[1]

    go(*flags_for(tiny, mixture, tmp_path / "b", same))
    assert_same_weights(tmp_path / "a", tmp_path / "b")

    # Dropout was at work: without it, some weights differ.
    go(*flags_for(tiny, mixture, tmp_path / "c", same, "--dropout 0"))
    dropped = weights(tmp_path / "a")
    whole = weights(tmp_path / "c")
    assert not all(torch.equal(dropped[name], whole[name]) for name in whole)


def test_a_checkpoint_names_its_pooling_and_the_rows_it_was_trained_on(
    tiny, mixture, tmp_path, monkeypatch
):
    drawn = []

    def note_drawn(folder, *rest, save=train.save_state):
        info = json.loads((tmp_path / "gve.json").read_text())
        drawn.append(sum(source["drawn"] for source in info["data"].values()))
        save(folder, *rest)

    monkeypatch.setattr(train, "save_state", note_drawn)
    same = "--steps 4 --epochs 1 --schedule uniform --save-every 1 --pooling mean"
    go(*flags_for(tiny, mixture, tmp_path, same))
    gve = train.GVE.from_pretrained(tmp_path)
    assert gve.pooling == "mean" and gve.info["pooling"] == "mean"

    log = load_jsonl(tmp_path / "log.jsonl")
    rows = [line["rows"] for line in events(log, "step")]
    assert drawn == list(np.cumsum(rows))  # not the whole epoch's, which is drawn at its start


def test_grad_cache_replays_dropout(tiny, mixture, tmp_path):
    same = "--dtype float64 --steps 4 --schedule uniform --micro-batch 2 --dropout 0.3"

    def train_with(name, more):
        go(*flags_for(tiny, mixture, tmp_path / name, same, more))
        return weights(tmp_path / name)

    kept = train_with("kept", "")
    cached = train_with("cached", "--grad-cache")
    whole = train_with("whole", "--micro-batch 64")

    changed = []
    for name, tensor in kept.items():
        largest = tensor.abs().max()
        assert (tensor - cached[name]).abs().max() <= 1e-9 * largest, name
        if (tensor - whole[name]).abs().max() > 1e-3 * largest:
            changed.append(name)
    assert changed  # other micro-batches draw other masks


def test_only_lora_moves_and_in_bfloat16_at_3e_5_every_lora_tensor_does(tiny, mixture, tmp_path):
    start = train.GVE.from_pretrained(tiny, dtype="bfloat16").state_dict()
    torch.manual_seed(42)
    untrained = train.GVE.from_pretrained(tiny, dtype="bfloat16", lora={"lora_dropout": 0.1})
    fresh = {}
    for name, p in untrained.lora_parameters().items():
        fresh[name] = p.detach().clone()

    more = "--dtype bfloat16 --lr 3e-5 --steps 3 --warmup 0"
    gve = go(*flags_for(tiny, mixture, tmp_path, more))

    # The base's weights, under the names that they have without peft.
    frozen = {}
    for name, p in gve.named_parameters():
        if ".lora_" not in name:
            name = name.removeprefix("backbone.base_model.model.").replace(".base_layer", "")
            frozen["backbone." + name.removeprefix("backbone.")] = p
    assert len(frozen) == len(start)
    for name, p in frozen.items():
        assert torch.equal(p, start[name]), name

    moved = gve.lora_parameters()
    assert moved.keys() == fresh.keys()
    for name, p in moved.items():
        assert p.dtype == torch.float32, name
        assert not torch.equal(p, fresh[name]), f"{name} stood still"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--frames", "7"], "even"),
        (["--preset", "gve-3b", "--data", "nowhere"], "MSMARCO.*nowhere/msmarco.jsonl"),
        (["--data", "nowhere", "--mixture", ""], "python -m mini render"),
        (["--base", "nowhere/at/all"], "nowhere/at/all"),
        (["--prober", "nowhere/at/all"], "nowhere/at/all"),
        (["--mixture", "twice"], "share a name: .'t2v', 'ti2v', 't2t'.$"),
    ],
)
def test_wrong_values_are_named(tiny, mixture, tmp_path, words, message):
    if words == ["--mixture", "twice"]:
        words = ["--mixture", mixture, mixture]
    if "--data" not in words:
        words = [*flags_for(tiny, mixture, tmp_path), *words]
    with pytest.raises(ValueError, match=message):
        go(*words)


REFUSED = {
    "epochs": (0, -1),
    "steps": (-1,),
    "sigma_max": (0, -1, "nan"),
    "probe_pairs": (0,),
    "batch_scale": (0, -1, "inf"),
    "micro_batch": (0,),
    "micro_tokens": (-1,),
    "lr": (0, -1, "nan"),
    "warmup": (-0.1, 1.1),
    "weight_decay": (-1,),
    "clip": (-1, "nan"),
    "dropout": (-0.1, 1),
    "temperature": (0, -0.03, "nan"),
    "margin": ("nan",),
    "frames": (0, 7, -2),
    "max_tokens": (0,),
    "max_length": (0,),
    "workers": (-1,),
    "save_every": (-1,),
    "keep": (0, -1),
    "log_every": (0,),
    "seed": (-1,),
    "base": ("",),
    "out": ("",),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_number_that_no_run_can_have_is_refused_at_once_with_what_is_accepted(name):
    flag_name = "--" + name.replace("_", "-")
    for value in REFUSED[name]:
        with pytest.raises(ValueError, match=rf"^{flag_name} \S+ \(accepted: ") as refused:
            parse(f"{flag_name}={value}")
        assert str(refused.value).count("accepted") == 1


def test_all_wrong_flags_are_named_in_one_line_and_the_limits_themselves_are_accepted():
    with pytest.raises(ValueError, match="--keep 0 .accepted: at least 1., --lr -1.0 .accepted"):
        parse("--keep=0", "--lr=-1")
    words = "--epochs=1 --steps=0 --warmup=0 --dropout=0 --clip=0 --margin=-1 --frames=2 --seed=0"
    parse(*words.split(), "--keep=1", "--log-every=1", "--workers=0", "--warmup=1")


def source_of(folder, rows, **more):
    """Write a training file of rows -> its data.Source."""
    path = folder / f"{more.get('name', 'rows')}.jsonl"
    write_jsonl(path, rows)
    return data.Source(**{"name": "rows", "task": "T2T", "path": str(path), **more})


def look_at(sources, *words):
    """Return the warnings of a look at sources; words: flags."""
    flags = parse("--data=nowhere", *words)
    sampler = train.Sampler(sources, flags.batch_scale, flags.seed)
    return train.check_sources(sources, sampler, flags)


def text_row(query, positive, *negatives):
    row = {"query": {"text": query}, "positive": {"text": positive}}
    return row | {"negatives": [{"text": text} for text in negatives]}


def test_media_outside_the_allowed_folders_are_counted_and_the_flag_is_named(media, tmp_path):
    rows = []
    for i in range(300):
        clip = str(media / f"{'abcd'[i % 4]}.mp4")
        rows.append({"query": {"text": f"q{i}"}, "positive": {"video": clip, "text": str(i)}})
    source = source_of(tmp_path, rows, name="clips")
    message = "source clips: 100 of 100 rows looked at name media outside .*--root.*clips.jsonl:1: "
    with pytest.raises(ValueError, match=message) as raised:
        look_at([source])
    assert str(media / "a.mp4") in str(raised.value)  # the file, and the folders that are allowed
    assert str(tmp_path) in str(raised.value)
    assert look_at([source], "--root", media) == []

    # A few are replaced, with a word; other troubles are named as what they are.
    rows = [text_row(f"q{i}", f"p{i}") for i in range(40)]
    rows[3]["positive"] = {"video": str(media / "a.mp4")}
    (warning,) = look_at([source_of(tmp_path, rows, name="few")])
    assert warning.startswith("source few: 1 of 40 name media outside the allowed folders")
    gone = [{"query": {"text": "a"}, "positive": {"video": "gone.mp4"}}] * 3
    with pytest.raises(ValueError, match="source gone: none of 3 can be used.*does not exist"):
        look_at([source_of(tmp_path, gone, name="gone")])


@pytest.mark.parametrize(
    "rows, more, flags, message",
    [
        ([("a", "b")], {}, [], "source rows: a pass over it is one row"),
        ([("a", "b"), ("c", "d")], {"samples": 1}, [], "one row"),
        ([("a", "b"), ("c", "d")], {"batch_size": 1}, [], "global batch of 1"),
        ([("a", "b"), ("c", "d")], {"batch_size": 2}, ["--batch-scale=.5"], "global batch of 1"),
        ([("a", "b"), ("c", " B ")], {}, [], "2 of 2 have the same query or the same positive"),
        ([("a", "b"), ("a", "c")], {}, [], "2 of 2 have the same query or the same positive"),
        # Its hard negatives are not used.
        ([("a", "b", "x")], {"negatives": 0}, [], "one row"),
    ],
)
def test_a_source_whose_loss_would_always_be_0_is_refused_by_name(
    tmp_path, rows, more, flags, message
):
    source = source_of(tmp_path, [text_row(*row) for row in rows], **more)
    with pytest.raises(ValueError, match=message):
        look_at([source], *flags)


def test_hard_negatives_make_up_for_few_rows_and_a_weak_source_is_warned_of(tmp_path):
    one = source_of(tmp_path, [text_row("a", "b", "x")], negatives=1, batch_size=1)
    assert look_at([one]) == []
    rows = [text_row("a", "b"), text_row("c", "d")]
    assert look_at([source_of(tmp_path, rows, negatives=1, batch_size=1)], "--remine") == []

    repeated = [text_row(f"q{i}", f"p{i % 4}") for i in range(500)]
    (warning,) = look_at([source_of(tmp_path, repeated, batch_size=8)])
    assert warning.startswith("source rows: different pairs: 4, global batch: 8")
    assert look_at([source_of(tmp_path, repeated, batch_size=4)]) == []
    many = [text_row(f"q{i}", f"p{i}") for i in range(300)]
    assert look_at([source_of(tmp_path, many, batch_size=256)]) == []


def test_a_log_on_a_full_disk_is_named_and_a_shortened_one_goes_on_from_whole_lines(
    tmp_path, capsys
):
    log = train.RunLog(tmp_path, rank=0)
    log.event("start", x="y" * 3000)
    with pytest.raises(OSError, match="File too large: '.*/log.jsonl'"), full_disk(4000):
        log.event("step", x="y" * 3000)
    length = len((tmp_path / "log.jsonl").read_text().splitlines()[0]) + 1

    # A state knows the length at which it was saved.
    train.RunLog(tmp_path, 0, length).event("resume")
    names = [line["event"] for line in load_jsonl(tmp_path / "log.jsonl")]
    assert names == ["start", "resume"]
    (tmp_path / "log.jsonl").write_text('{"event": "start"}\n{"event": "st')
    train.RunLog(tmp_path, 0, length).event("resume")
    names = [line["event"] for line in load_jsonl(tmp_path / "log.jsonl")]
    assert names == ["start", "resume"]
    assert "log.jsonl has lost lines" in capsys.readouterr().out
    (tmp_path / "log.jsonl").unlink()
    train.RunLog(tmp_path, 0, length).event("resume")
    assert [line["event"] for line in load_jsonl(tmp_path / "log.jsonl")] == ["resume"]
    train.RunLog(tmp_path, 0).event("start")
    assert [line["event"] for line in load_jsonl(tmp_path / "log.jsonl")] == ["start"]


def test_ranks_that_read_different_files_are_told_which(tiny, mixture, tmp_path, monkeypatch):
    def gather(facts):
        other = json.loads(json.dumps(facts))
        other["ti2v"]["rows"] = 99
        return [facts, other]

    monkeypatch.setattr(train, "all_gather_object", gather)
    message = "rank 0 and rank 1 read different data: source ti2v: rows 5 -> 99$"
    with pytest.raises(ValueError, match=message):
        go(*flags_for(tiny, mixture, tmp_path / "out"))


def test_hard_negatives_of_an_epoch_that_are_gone_are_named(mixture, tmp_path):
    sources = train.load_mixture(mixture)
    path = tmp_path / "mined-1.jsonl"
    with pytest.raises(ValueError, match="mined-1.jsonl: .* 3 sources; the file has 0"):
        train.read_mined(sources, path)
    write_jsonl(path, [{}, {}])
    with pytest.raises(ValueError, match="the file has 2"):
        train.read_mined(sources, path)
    write_jsonl(path, [{}, {4: [{"text": "x"}]}, {}])
    train.read_mined(sources, path)
    assert [source.mined for source in sources] == [{}, {4: [{"text": "x"}]}, {}]


def test_the_command_ends_with_one_line_for_a_wrong_flag_or_value():
    done = run("train.py", "--lr-rate", "1")
    assert done.returncode == 2
    assert "unrecognized arguments: --lr-rate" in done.stderr
    assert "Traceback" not in done.stderr

    done = run("train.py", "--data", "nowhere", "--mixture", "nowhere/m.json")
    assert done.returncode == 1
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("error: nowhere/m.json: no such mixture")


# The two tests of unusable rows train twice: on a file with unusable rows ("bad"), and on the file
# that a person would write in its place ("good"). Both must give the same losses.


def replace_by_hand(rows, unusable):
    """Put the next usable row of the file in an unusable one's place; the first follows the last.

    unusable: row numbers.
    """
    repaired = []
    for i in range(len(rows)):
        while i in unusable:
            i = (i + 1) % len(rows)
        repaired.append(rows[i])
    return repaired


TASKS = {"text": "T2V", "image": "TI2V", "clip": "V2V"}
DAMAGED = {  # 5 % of 3 x 40 rows
    "text": [3, 31],
    "image": [18, 19],
    "clip": [7, 39],
}


def usable_rows(source, media):
    """Return 40 pairs whose query is a text, a text with an image, or a clip."""
    rows = []
    for i in range(40):
        name = "abcd"[i % 4]
        word = ("ball", "cube", "ring", "star")[i % 4]
        clip = {"path": str(media / f"{name}.mp4"), "start": 0.04 * i}
        query = {"text": f"{word} {i}"}
        if source == "image":
            query["image"] = str(media / "i.png")
        elif source == "clip":
            query = {"video": clip}
        rows.append({"query": query, "positive": {"video": clip}})
    return rows


def write_mixture(folder, sources, batch_size):
    """Write a mixture and its files -> its path. sources: {name: (task, rows)}."""
    folder.mkdir()
    mixture = []
    for name, (task, rows) in sources.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
        source = {
            "name": name,
            "task": task,
            "path": f"{name}.jsonl",
            "batch_size": batch_size,
        }
        mixture.append(source)
    path = folder / "mixture.json"
    path.write_text(json.dumps(mixture))
    return path


def write_damaged(folder, media):
    """Write the mixture whose DAMAGED rows have clips that end after 700 bytes -> its path."""
    start_of_clip = (media / "a.mp4").read_bytes()[:700]
    sources = {}
    for name, task in TASKS.items():
        rows = usable_rows(name, media)
        for i in DAMAGED[name]:
            rows[i]["positive"] = {"video": f"{name}{i}.mp4"}
        sources[name] = (task, rows)
    mixture = write_mixture(folder, sources, batch_size=8)

    for name, numbers in DAMAGED.items():
        for i in numbers:
            (folder / f"{name}{i}.mp4").write_bytes(start_of_clip)
    return mixture


def write_repaired(folder, media):
    """Write the mixture whose DAMAGED rows were replaced by hand -> its path."""
    sources = {}
    for name, task in TASKS.items():
        rows = replace_by_hand(usable_rows(name, media), DAMAGED[name])
        sources[name] = (task, rows)
    return write_mixture(folder, sources, batch_size=8)


def losses_of(out):
    losses = [loss for _, loss, _, _ in steps_of(out)]
    return np.array(losses)


def test_damaged_clips_spread_over_the_sources_cost_what_replacing_their_rows_by_hand_would(
    tiny, media, tmp_path
):
    mixtures = {
        "bad": write_damaged(tmp_path / "bad", media),
        "good": write_repaired(tmp_path / "good", media),
    }

    def flags(name):
        out = tmp_path / name / "out"
        more = "--steps 18 --seed 43 --schedule uniform --dtype float64 --dropout 0 --lr 0.01"
        return flags_for(tiny, mixtures[name], out, more, "--root", media)

    # Two ranks, for every rank has to know the rule.
    go(*flags("good"))
    two = run(*launch(2), "train.py", *flags("bad"))
    assert two.returncode == 0, two.stderr[-2000:]
    assert "unusable rows replaced: 6" in two.stdout

    # The log has six digits.
    bad = losses_of(tmp_path / "bad" / "out")
    good = losses_of(tmp_path / "good" / "out")
    assert len(bad) == 18
    error = np.abs(bad - good).max()
    assert error <= 1e-6 * good.max()

    end = load_jsonl(tmp_path / "bad" / "out" / "log.jsonl")[-1]
    assert min(end["passes"].values()) >= 1  # every row was met
    listed = []
    for reason in end["bad_rows"]:
        row = re.search(r"(\w+\.jsonl:\d+): ", reason)[1]
        clip = re.search(r"(\w+\.mp4): ", reason)[1]
        listed.append((row, clip))
    expected = []
    for name, numbers in DAMAGED.items():
        for i in numbers:
            expected.append((f"{name}.jsonl:{i + 1}", f"{name}{i}.mp4"))
    assert sorted(listed) == sorted(expected)


def test_clips_that_crash_or_hang_their_decoder_are_replaced_as_well(
    tiny, media, tmp_path, monkeypatch
):
    harm = {3: "crash.mp4", 7: "hang.mp4", 8: "hang.mp4"}  # row number: clip
    for name in ("crash.mp4", "hang.mp4"):
        shutil.copy(media / "a.mp4", tmp_path / name)
    load = data.open_clip

    def load_or_harm(video, frames):
        if "crash.mp4" in str(video):
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang.mp4" in str(video):
            ctypes.PyDLL(None).sleep(1000)  # holds the interpreter's lock
        return load(video, frames)

    monkeypatch.setattr(data, "open_clip", load_or_harm)
    monkeypatch.setitem(train.TrainLoader.__init__.__kwdefaults__, "seconds", 3)

    # The rows with the harmful clips, and the same rows replaced by hand.
    usable = []
    for i in range(12):
        name = "abcd"[i % 4]
        query = {"text": f"number {i}"}
        clip = {"path": str(media / f"{name}.mp4"), "start": i / 10}
        usable.append({"query": query, "positive": {"video": clip}})
    harmful = list(usable)
    for i, name in harm.items():
        clip = str(tmp_path / name)
        harmful[i] = {"query": usable[i]["query"], "positive": {"video": clip}}
    versions = {"bad": harmful, "good": replace_by_hand(usable, harm)}

    losses = {}
    for name, rows in versions.items():
        sources = {"rows": ("T2V", rows)}
        mixture = write_mixture(tmp_path / name, sources, batch_size=6)
        out = tmp_path / name / "out"
        more = "--steps 3 --epochs 1 --schedule uniform --workers 2 --features ''"
        flags = flags_for(tiny, mixture, out, more, "--root", media, tmp_path)
        go(*flags)
        losses[name] = losses_of(out).tolist()
    assert losses["bad"] == losses["good"]
    assert len(losses["good"]) == 3

    end = load_jsonl(tmp_path / "bad" / "out" / "log.jsonl")[-1]
    reasons = []
    for reason in end["bad_rows"]:
        found = re.search(r"rows.jsonl:(\d+): (.*)", reason)
        reasons.append(found.groups())
    assert sorted(reasons) == [
        ("4", "its decoder crashed"),
        ("8", "not decoded within 3 s"),
        ("9", "not decoded within 3 s"),
    ]


def mined(out):
    """Return a run's mined hard negatives, {row: items} for each source of each epoch."""
    lines = []
    for path in sorted(out.glob("mined-*.jsonl")):
        lines += load_jsonl(path)
    return lines


def names_of(items):
    """Return the file names of items that are videos."""
    return [Path(item["video"]).name for item in items]


def test_hard_negatives_are_mined_again_under_the_prober(tiny, media, mixture, tmp_path):
    more = "--steps 9 --epochs 1 --schedule uniform --remine"
    flags = flags_for(tiny, mixture, tmp_path / "one", more)
    kept = tmp_path / "one" / "cache" / "of eval.py"
    kept.mkdir(parents=True)
    go(*flags, "--margin", "-1")
    assert kept.exists()
    t2v, *others = mined(tmp_path / "one")
    assert others == [{}, {}]  # only t2v has hard negatives
    assert len(t2v) == 7

    # Embed its seven texts and the four clips that are their positives.
    gve = train.GVE.from_pretrained(tiny)
    rows = load_jsonl(media / "t2v.jsonl")
    q = gve.embed([row["query"] for row in rows], "Find it.")
    own = [row["positive"]["video"] for row in rows]
    clips = {}
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4"):
        item = {"video": str(media / name)}
        clips[name] = gve.embed([item])[0]

    def above(i, name):
        """Return by how much a clip scores above the positive of row i."""
        positive = clips[own[i]]
        return float(q[i] @ (clips[name] - positive))

    # order[i]: the clips that are not row i's positive, the best first
    order = []
    for i in range(7):
        scores = {name: float(q[i] @ clip) for name, clip in clips.items()}
        del scores[own[i]]
        order.append(sorted(scores, key=scores.get, reverse=True))

    # The best one was mined, and it is not always the one in the file.
    changed = []
    for i, row in enumerate(rows):
        (name,) = names_of(t2v[str(i)])
        assert name == order[i][0]
        if name != row["negatives"][0]["video"]:
            changed.append(i)
    assert changed

    # Mined ones come first, the file's where there are none.
    source = train.load_mixture(mixture)[0]
    source.mined = {0: [{"video": str(media / "d.mp4")}]}
    _, *items = source.load(0, [media])
    assert names_of(items) == ["a.mp4", "d.mp4"]
    _, *items = source.load(1, [media])
    assert names_of(items) == ["b.mp4", "c.mp4"]

    # Under a margin between the best and the second of a row, the best is a false negative. Both
    # have to score above the positive: take the row where the second does so the most.
    heights = [above(i, order[i][1]) for i in range(7)]
    i = int(np.argmax(heights))
    best, second, _ = order[i]
    assert above(i, second) > 0
    margin = (above(i, best) + above(i, second)) / 2
    middle = parse(*flags, f"--margin={margin}")
    found = train.mine_source(gve, source, range(7), middle)
    assert names_of(found[i])[0] == second

    # Asked for three, it finds all clips but the positive: seven rows have four clips.
    source.negatives = 3
    no_margin = parse(*flags, "--margin=-1")
    found = train.mine_source(gve, source, range(7), no_margin)
    for i in range(7):
        assert names_of(found[i]) == order[i]

    def nan_vectors(batch, *rest, **options):
        n = len(batch["input_ids"])
        return torch.full((n, gve.dim), torch.nan)

    gve.embed = nan_vectors
    gve.forward = nan_vectors
    with pytest.raises(FloatingPointError, match="not finite"):
        train.mine_source(gve, source, range(7), middle)


def test_mining_is_the_same_on_two_ranks_and_after_a_stop(tiny, mixture, tmp_path):
    same = "--steps 6 --epochs 2 --schedule uniform --remine --dtype float64 --dropout 0"
    go(*flags_for(tiny, mixture, tmp_path / "one", same))
    flags = flags_for(tiny, mixture, tmp_path / "two", same)
    two = run(*launch(2), __file__, tmp_path / "two.pt", *flags)
    assert two.returncode == 0, two.stderr[-2000:]
    assert mined(tmp_path / "one") == mined(tmp_path / "two")

    # A SIGTERM in the second epoch.
    flags = flags_for(tiny, mixture, tmp_path / "stopped", same)
    stopped = run(__file__, tmp_path / "stopped.pt", *flags, FATE="15 0 3")
    assert stopped.returncode == 128 + 15
    go(*flags, "--resume", "auto")
    assert_same_weights(tmp_path / "stopped", tmp_path / "one")


@pytest.mark.parametrize("more", ["--no-grad-cache", "--grad-cache"])
def test_a_dry_run_prints_its_memory_and_writes_nothing(tiny, mixture, tmp_path, capsys, more):
    limits = "--dry-run --max-length 300 --max-tokens 20 --micro-tokens 1000"
    go(*flags_for(tiny, mixture, tmp_path / "out", limits, more))
    line = r"(\d+ \w+ of \d+) tokens in a forward: \d+\.\d{3} GiB"
    printed = re.findall(line, capsys.readouterr().out)

    # A video has 4 grids of 4 x 5 tokens and 60 of prompt; a forward holds 1,000 at most.
    assert printed == ["7 videos of 140", "3 texts of 300"]
    assert not list(tmp_path.iterdir())


def test_log_and_checkpoint_hold_what_the_record_needs(one_and_many):
    log = one_and_many[1, False]["log"]
    names = " ".join(line["event"] for line in log)
    assert names == "start" + 3 * " epoch step step step" + " end"

    curves = {"loss", "score", "positive", "gap", "lr", "grad_norm", "rows"}
    costs = {"items_per_s", "waiting", "memory_gib", "tflops"}
    for line in events(log, "step"):
        assert curves | costs <= line.keys()
        assert line["tflops"] > 0

    epochs = events(log, "epoch")
    assert [line["sigma"] for line in epochs] == [0.1, 0.55, 1.0]
    for line in epochs:
        assert abs(sum(line["P"].values()) - 1) < 1e-3
        assert sum(line["drawn"].values()) == line["steps"] == 3


def test_the_log_has_each_line_s_own_flops_whatever_the_ranks_and_grad_cache(one_and_many):
    flops = {}  # of each run's steps, all ranks together
    for (world, cached), recorded in one_and_many.items():
        of_steps = []
        for line in events(recorded["log"], "step"):
            seconds = line["rows"] / line["items_per_s"]
            of_steps.append(world * line["tflops"] * seconds)
        flops[world, cached] = of_steps

    # Neither GradCache nor ranks need more.
    first = flops.pop((1, False))
    reference = flops[1, True]
    for others in flops.values():
        assert others == pytest.approx(reference, rel=1e-4)
    assert reference != sorted(reference)  # a line's own steps, not all so far

    # The first run alone has seen the clips: their features were kept.
    assert sum(first) > 1.03 * sum(reference)


def test_sampler_deals_each_row_once_per_pass_and_is_restored_by_its_position(mixture):
    sources = train.load_mixture(mixture)
    sampler = train.Sampler(sources, seed=1)
    order = np.random.default_rng(5).integers(0, 3, 60)
    drawn = [(k, sampler.draw(k)) for k in order]

    for k, source in enumerate(sources):
        rows = np.concatenate([numbers for number, numbers in drawn if number == k])
        n = len(source)
        whole_passes = len(rows) // n
        assert whole_passes >= 2
        passes = rows[: whole_passes * n].reshape(whole_passes, n)
        for numbers in passes:
            assert sorted(numbers) == list(range(n))
        assert (passes[0] != passes[1]).any()  # reshuffled

    # A new sampler at the position after 40 steps goes on as the first one did.
    again = train.Sampler(sources, seed=1)
    for k, rows in drawn[:40]:
        again.drawn[k] += len(rows)
    assert again.taken() == [list(order[:40]).count(k) for k in range(3)]
    for k, rows in drawn[40:]:
        assert (again.draw(k) == rows).all()

    # The seed matters.
    first = {tuple(train.Sampler(sources, seed=seed).draw(0).tolist()) for seed in range(5)}
    assert len(first) > 1


# By hand from the formula: P for R = .3 / .5 / .7.
@pytest.mark.parametrize(
    "sigma_t, expected",
    [(0.1, [0.02, 0.12, 0.87]), (0.55, [0.22, 0.32, 0.46]), (1.0, [0.27, 0.33, 0.40])],
)
def test_source_probabilities_of_the_paper(sigma_t, expected):
    relevance = [0.3, 0.5, 0.7]
    levels = [1, 2, 3]
    p = train.source_probabilities("pyramid", relevance, sigma_t, [1, 1, 1], levels)
    assert np.abs(p - expected).max() < 0.006
    assert abs(p.sum() - 1) < 1e-12


def test_an_unknown_schedule_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="'pyramyd'.*" + ", ".join(train.SCHEDULES)):
        train.source_probabilities("pyramyd", [0.3, 0.5], 0.1, [1, 1], [1, 2])
    with pytest.raises(ValueError, match="'pyramyd'.*" + ", ".join(train.SCHEDULES)):
        train.draw_epoch("pyramyd", [0.3, 0.5], 0.1, [1, 1], [1, 2], quotas=[1, 1], seed=0)


def test_quotas_that_end_before_the_epoch_are_an_error():
    draw = ("pyramid", [0.3, 0.5], 0.1, [1, 1], [1, 2])
    with pytest.raises(ValueError, match="step 3 of 4: all quotas are used up"):
        train.draw_epoch(*draw, quotas=[2, 2], seed=0, taken=[2, 0], steps=range(1, 4))


class Rows:
    """As much of a source as the sampler asks for."""

    batch_size = 2

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return self.samples


def test_without_quotas_an_epoch_draws_by_relevance_alone_whatever_the_sizes():
    """Two sources of unequal size and equal relevance are drawn equally often: 200 times each."""
    how = dict(sizes=[10, 1000], levels=[1, 2], quotas=[4, 396], seed=3)
    numbers, share = train.draw_epoch("pyramid-free", [0.4, 0.4], 0.1, **how)
    assert share.tolist() == pytest.approx([0.5, 0.5])
    assert abs(numbers.count(0) - 200) < 4 * 10  # four standard deviations
    again, _ = train.draw_epoch("pyramid-free", [0.4, 0.4], 0.1, **how)
    assert again == numbers


# R .4, .5, .1 at sigma .1: weights 1, e, e^-3.
@pytest.mark.parametrize(
    "schedule, weights",
    [("pyramid", [1, math.e, math.e**-3]), ("reverse", [1, 1 / math.e, math.e**3])],
)
def test_an_epoch_draws_by_relevance_among_the_sources_that_have_quota_left(schedule, weights):
    for seed in range(20):
        left = [2, 1, 3]
        expected = []
        shares = []
        for step in range(6):
            # The inverse of the cumulative distribution, at the generator's first number
            open_weights = [w if n else 0 for w, n in zip(weights, left, strict=True)]
            p = np.array(open_weights) / sum(open_weights)
            u = np.random.default_rng([seed, step]).random()
            k = int((np.cumsum(p) <= u).sum())
            left[k] -= 1
            expected.append(k)
            shares.append(p)
        assert left == [0, 0, 0]

        how = dict(
            schedule=schedule,
            relevance=[0.4, 0.5, 0.1],
            sigma_t=0.1,
            sizes=[500, 10, 3000],  # far from the quotas
            levels=[1, 1, 4],
            quotas=[2, 1, 3],
            seed=seed,
        )
        numbers, share = train.draw_epoch(**how)
        assert numbers == expected
        assert share.tolist() == pytest.approx(np.mean(shares, axis=0).tolist())

        # Cut into two epochs
        first, _ = train.draw_epoch(**how, steps=range(4))
        taken = [first.count(k) for k in range(3)]
        rest, _ = train.draw_epoch(**how, steps=range(4, 6), taken=taken)
        assert first + rest == expected


def test_quotas_are_shares_of_one_pass_and_sum_to_the_steps():
    samples, batch = [10, 7, 100], [4, 4, 10]
    assert train.source_quotas(samples, batch).tolist() == [3, 2, 10]
    assert train.source_quotas(samples, batch, 30).tolist() == [6, 4, 20]
    # 1.4, .93 and 4.67: two are missing to 7, and the second and third are nearest to the next
    assert train.source_quotas(samples, batch, 7).tolist() == [1, 1, 5]
    assert train.source_quotas(samples, batch, 1).tolist() == [0, 0, 1]


# The steps of one pass over Tables 6 and 7: the sum of ceil(samples / global batch)
@pytest.mark.parametrize("preset, steps", [("gve-3b", 11_163), ("gve-7b", 12_122)])
@pytest.mark.parametrize("schedule", ["pyramid", "reverse"])
def test_the_papers_mixtures_are_gone_through_exactly_once(preset, steps, schedule):
    entries = json.loads(Path("mixtures", f"{preset}.json").read_text())
    samples = [entry["samples"] for entry in entries]
    batch = [32 * entry["batch_size"] for entry in entries]
    levels = [train.LEVEL[entry["task"]] for entry in entries]
    relevance = [0.9 - 0.15 * level + 0.01 * (k % 7) for k, level in enumerate(levels)]
    quotas = train.source_quotas(samples, batch)
    assert quotas.sum() == steps

    # The sampler deals the batches; shuffled rows would only cost time here.
    sources = [Rows(n) for n in samples]
    sampler = train.Sampler(sources, seed=42)
    sampler.batch = batch
    sampler.order = lambda k, pass_number: range(samples[k])
    for epoch in range(3):
        numbers, _ = train.draw_epoch(
            schedule,
            relevance,
            train.sigma(epoch, 3),
            samples,
            levels,
            quotas=quotas,
            seed=42,
            taken=sampler.taken(),
            steps=train.epoch_steps(epoch, 3, steps),
        )
        for k in numbers:
            sampler.draw(k)
    assert sampler.drawn == samples
    assert sampler.passes() == [1.0] * len(samples)


def test_sources_of_a_task_share_the_mean_r_of_their_pairs():
    r = train.relevance_by_task([0.2, 0.5, 0.8], [100, 50, 300], ["T2V", "T2I", "T2V"])
    assert r == pytest.approx([0.65, 0.5, 0.65])


def test_sigma_and_the_other_schedules():
    assert train.sigma(0, 3) == pytest.approx(0.1)
    assert train.sigma(1, 3) == pytest.approx(0.55)
    assert train.sigma(2, 3) == pytest.approx(1.0)
    assert train.sigma(0, 1) == 0.1

    def shares(schedule, progress=0.0):
        sizes = [100, 300, 400, 200]
        levels = [1, 1, 3, 4]
        p = train.source_probabilities(schedule, None, 1, sizes, levels, progress=progress)
        return p.tolist()

    assert shares("proportional") == pytest.approx([0.1, 0.3, 0.4, 0.2])
    assert shares("uniform") == [0.25] * 4

    # The levels 1, 3 and 4 hold 40, 40 and 20 % of the pairs.
    assert shares("staged", 0.0) == pytest.approx([0.25, 0.75, 0, 0])
    assert shares("staged", 0.39) == shares("staged", 0.0)
    assert shares("staged", 0.4) == [0, 0, 1, 0]
    assert shares("staged", 0.79) == [0, 0, 1, 0]
    assert shares("staged", 0.8) == [0, 0, 0, 1]
    assert shares("staged", 0.999) == [0, 0, 0, 1]


def test_relevance_by_task_reaches_the_draw(tiny, mixture, tmp_path, monkeypatch):
    entries = json.loads(Path(mixture).read_text())
    entries[1]["task"] = "T2V"  # as the first: 7 and 5 pairs
    other = Path(mixture).with_name("two-of-a-task.json")
    other.write_text(json.dumps(entries))
    probed = ([0.2, 0.8, 0.5], [0.0, 0.0, 0.0])
    monkeypatch.setattr(train, "probe_sources", lambda *_: probed)
    go(*flags_for(tiny, other, tmp_path, "--steps 1 --epochs 1 --relevance task"))
    (line,) = events(load_jsonl(tmp_path / "log.jsonl"), "epoch")
    shared = (7 * 0.2 + 5 * 0.8) / 12
    assert list(line["R"].values()) == pytest.approx([shared, shared, 0.5], abs=1e-5)
    weights = np.exp(np.array([shared, shared, 0.5]) / 0.1)
    assert list(line["P"].values()) == pytest.approx((weights / weights.sum()).tolist(), abs=1e-4)


def test_help_shows_the_defaults_of_the_preset(capsys):
    def help_of(*words):
        with pytest.raises(SystemExit):
            parse(*words, "--help")
        return " ".join(capsys.readouterr().out.split())

    large = help_of("--preset", "gve-3b")
    assert "(default Qwen/Qwen2.5-VL-3B-Instruct)" in large
    assert "cosine to zero (default 3e-05)" in large
    assert "(default mixtures/gve-3b.json)" in large
    assert "samples / global batch) (default 0)" in large
    assert "samples / global batch) (default 640)" in help_of()


@pytest.mark.parametrize("name", ["gve-3b", "gve-7b"])
def test_presets_hold_table_9(name):
    flags = parse("--preset", name)
    assert flags.lr == 3e-5
    assert flags.weight_decay == 0.1
    assert flags.epochs == 3
    assert flags.temperature == 0.03
    assert flags.seed == 42
    assert flags.dtype == "bfloat16"
    assert flags.checkpointing is True
    assert flags.frames == 8
    assert flags.dropout == 0.1
    assert flags.batch_scale == 32


def test_learning_rate_rises_then_falls_as_a_cosine():
    rates = [train.learning_rate(step, 100, 1.0, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)
