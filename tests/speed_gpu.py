"""Measure training and encoding on one GPU, at the size of the 3B model -> one Markdown record.

    python tests/speed_gpu.py --out records/DATE-gpu.md                          # all stages
    python tests/speed_gpu.py --stages train profile --out records/DATE-gpu.md   # some of them
    python tests/speed_gpu.py --tiny --out tiny.md      # every line on a CPU, in about 2 minutes

The model is Qwen2.5-VL-3B at its true sizes with random weights, and the clips are rendered, so
that nothing is downloaded. Each stage writes its own section of the record and replaces an earlier
one of that name: separate calls build one file. If a stage fails, the next still runs. The stages
and their time, where SECONDS is the flag (300):

    make      model folder, clips, training file. A fixed amount of work: about 16 minutes of
              rendering over the number of cores, then 7.5 GB of weights to make and write
    train     train.py as it is, gve-3b preset: 4 steps or SECONDS, then at most 150 s for the step
              under way and saving
    encode    embed.encode and sentence-transformers; each measurement about a sixth of SECONDS
    dry-run   the forecast of `train.py --dry-run` beside the memory that `train` took; at most
              SECONDS + 150 s
    bf16      ten steps in bfloat16 beside the same ten in float32, four layers; 320 pairs each
    profile   the ten largest items of ten training steps of 64 pairs, and of encoding 256 clips

`make` comes first, once; the others need only its files (dry-run shows more after train). Every
process computes with one CPU thread, as under torchrun. The tokenizer here has a token per byte, so
that texts are about four times as long as with the real one; clips have their usual length.

It fits half an hour on a bare machine, in commands of less than ten minutes (the minutes below are
estimates). From requirements.txt it needs the lines from torch to filelock, scipy and pytest. Where
pip reaches no index, bring wheels of the missing ones (av alone: 36 MB).

    pip install --no-index --no-deps wheels/*.whl
    python tests/speed_gpu.py --out R.md --commit C --stages make encode bf16                # 7
    python tests/speed_gpu.py --out R.md --commit C --stages train dry-run --seconds 240     # 7
    python tests/speed_gpu.py --out R.md --commit C --stages profile                         # 3

C is the commit, for a copy without .git. If the files in WORK do not outlast a command, each
command must name `make` first, which takes 2 to 3 minutes. --clips names a folder of clips that
`make` rendered elsewhere (0.6 GB), which saves the rendering.
"""

import collections
import dataclasses
import datetime
import gc
import importlib.metadata
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import SPECIAL, byte_tokenizer, tiny_config  # noqa: E402  # one thread, no hub
from real_size import real_config  # noqa: E402
from speed_embed import read_items  # noqa: E402

import train  # noqa: E402
from data import TrainLoader, load_mixture  # noqa: E402
from embed import encode  # noqa: E402
from mini import world  # noqa: E402
from mini.bench import write_video  # noqa: E402
from model import (  # noqa: E402
    CHAT_TEMPLATE,
    FRAME_TOKENS,
    GVE,
    RELEASED_MIN_TOKENS,
    to_device,
    write_sentence_transformers,
)
from support.decoders import DecoderPool, Failed  # noqa: E402
from support.files import git_commit, read_jsonl, whole_file, write_json, write_jsonl  # noqa: E402
from support.flags import flag, parse_flags  # noqa: E402
from support.flops import peak_flops, step_flops  # noqa: E402

WIDTH, HEIGHT = 640, 360  # of a clip, in pixels
SCENES = 5  # of a clip; a scene lasts two seconds
INSTRUCTION = "Find the video that this caption describes."
GRACE = 150  # seconds that train.py gets to finish its step and save


@dataclasses.dataclass
class Sizes:
    """The amounts of data and work in each stage."""

    clips: int  # that are made; training takes all of them as one global batch
    train_steps: int
    micro_tokens: int  # per forward in training; the preset's own in full size
    most_encoded: int  # clips in one measurement of encoding, at most
    batch_tokens: tuple  # tokens per forward in encoding
    matmul: int  # rows and columns of the square matrices whose product is timed
    pairs: int  # in a step of stage bf16
    layers: int  # that stage bf16 keeps
    profiled_pairs: int  # in a step of stage profile
    profiled_clips: int


FULL = Sizes(
    clips=1024,
    train_steps=4,
    micro_tokens=32768,
    most_encoded=1024,
    batch_tokens=(4096, 32768),
    matmul=8192,
    pairs=32,
    layers=4,
    profiled_pairs=64,
    profiled_clips=256,
)
TINY = Sizes(
    clips=16,
    train_steps=3,
    micro_tokens=4096,
    most_encoded=8,
    batch_tokens=(4096,),
    matmul=256,
    pairs=8,
    layers=2,
    profiled_pairs=4,
    profiled_clips=4,
)


@dataclasses.dataclass
class Flags:
    """Which stages to run, where, and for how long."""

    out: str = flag(..., "record to write, a Markdown file")
    stages: list[str] = flag([], "stages to run, in this order; none: all")
    work: str = flag("runs/speed-gpu", "folder of the model, the training file and the run")
    clips: str = flag("", "folder of the clips; empty: WORK/clips")
    seconds: float = flag(300, "limit of a stage, as said above")
    workers: int = flag(max(1, os.cpu_count() - 2), "decoding processes in encoding")
    tiny: bool = flag(False, "a tiny model and few clips: try every line without a GPU")
    commit: str = flag("", "for the record; empty: the commit that git reports")

    def __post_init__(self):
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown:
            raise ValueError(f"unknown stages {unknown}; accepted: {', '.join(STAGES)}")
        # Absolute: train.py may start in another folder.
        self.work = os.path.abspath(self.work)
        self.clips = os.path.abspath(self.clips or f"{self.work}/clips")
        self.commit = self.commit or git_commit() or "unknown"
        self.model = f"{self.work}/model"
        self.mixture = f"{self.work}/train/mixture.json"
        self.run = f"{self.work}/run"
        self.size = TINY if self.tiny else FULL
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# The record


def describe_machine(flags):
    """Return the table at the top of the record, lines of Markdown without the date."""
    device = platform.processor() or platform.machine()
    if flags.device.type == "cuda":
        device = torch.cuda.get_device_name(flags.device)
    rows = {
        "device": f"{device}, {os.cpu_count()} cores",
        "model": "tiny, random" if flags.tiny else "Qwen2.5-VL-3B, random, bfloat16",
        "commit": flags.commit,
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
    }
    return ["| | |", "| --- | --- |"] + [f"| {name} | {value} |" for name, value in rows.items()]


def version(package):
    """Return a package's version, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def read_sections(flags):
    """Read the sections of an earlier call's record -> {stage: text}.

    Raises ValueError if that record is of another machine or commit.
    """
    path = Path(flags.out)
    if not path.exists():
        return {}
    head, *parts = path.read_text().split("\n## ")
    if "\n".join(describe_machine(flags)) not in head:
        raise ValueError(f"{path} is of another machine or commit; name another --out")
    sections = {}
    for part in parts:
        stage, _, text = part.partition("\n\n")
        sections[stage] = text.strip()
    return sections


def write_section(flags, stage, lines):
    """Write a stage's lines into the record, in place of those of an earlier call."""
    sections = read_sections(flags)
    sections[stage] = "\n".join(lines)
    today = datetime.datetime.now(datetime.UTC).date()
    text = "\n".join([f"# {today}: speed on one device", "", *describe_machine(flags), ""])
    for name in STAGES:
        if name in sections:
            text += f"\n## {name}\n\n{sections[name]}\n"
    path = Path(flags.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.write(text)


def table(head, rows):
    """Return the lines of a Markdown table; head and rows are lists of texts."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def percent(share):
    """Format a share as per cent; None, an unknown share, as a dash."""
    return "-" if share is None else f"{100 * share:.1f} %"


# Clocks


def timed(device, work):
    """Call work() and wait for the device -> (result, seconds)."""
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - began


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def least_seconds(calls, device, work):
    """Call work() once to warm up, then `calls` times -> the seconds of the fastest call."""
    work()
    return min(timed(device, work)[1] for _ in range(calls))


def matmul_rate(flags):
    """Measure the FLOPs per second of a bfloat16 product of two square matrices."""
    n = flags.size.matmul
    a = torch.randn(n, n, device=flags.device, dtype=torch.bfloat16)
    b = torch.randn_like(a)
    return 2 * n**3 / least_seconds(10, flags.device, lambda: a @ b)


class Yardstick:
    """The two rates, in FLOPs per second, of which a measured rate is given as a share."""

    def __init__(self, flags):
        self.data_sheet = peak_flops(flags.device, "bfloat16")  # None: not known
        self.matmul = matmul_rate(flags)
        sheet = f"{self.data_sheet / 1e12:.0f}" if self.data_sheet else "-"
        n = flags.size.matmul
        self.line = (
            f"bf16 product of {n} x {n}, measured in this run: {self.matmul / 1e12:.3g} TFLOP/s; "
            f"data sheet: {sheet}. MFU counts FLOPs as support/flops.py does: no recomputation."
        )

    def cells(self, flops_per_second):
        """Return the cells TFLOP/s, MFU, share of the measured product."""
        mfu = flops_per_second / self.data_sheet if self.data_sheet else None
        measured = percent(flops_per_second / self.matmul)
        return [f"{flops_per_second / 1e12:.4g}", percent(mfu), measured]


# make: a model folder, clips, a training file


def make(flags):
    rng = random.Random(0)
    clips = Path(flags.clips)
    jobs = []
    rows = []
    for i in range(flags.size.clips):
        scenes = [world.sample_scene(rng, test=False) for _ in range(SCENES)]
        caption, _ = world.concise(scenes[0], rng)
        name = f"{i:04}.mp4"
        rows.append({"query": {"text": caption}, "positive": {"video": name}})
        if not (clips / name).exists():
            jobs.append((clips / name, scenes))

    clips.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    with multiprocessing.get_context("fork").Pool() as pool:
        for _ in pool.imap_unordered(render_clip, jobs):
            pass
    rendering = time.perf_counter() - began

    folder = Path(flags.mixture).parent
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "t2v.jsonl", rows)
    # The paper's batch of 32 on each of 32 GPUs; train_words scales it by --batch-scale.
    entry = {"name": "clips", "task": "T2V", "path": "t2v.jsonl", "batch_size": 32}
    write_json(flags.mixture, [entry | {"instruction": INSTRUCTION}])

    _, making = timed(flags.device, lambda: make_model(flags))
    megabytes = sum(file.stat().st_size for file in clips.glob("*.mp4")) / 1e6
    return [
        f"{len(rows)} clips of {2 * SCENES} s, {WIDTH} x {HEIGHT}, H.264, {megabytes:.0f} MB: "
        f"{len(jobs)} of them rendered now, in {rendering:.0f} s. "
        f"Model made and written in {making:.0f} s.",
    ]


def render_clip(job):
    """Render scenes, one after the other, to a file. job: (path, scenes)."""
    path, scenes = job
    frames = []
    for scene in scenes:
        for frame in world.render_scene(scene):
            large = Image.fromarray(frame).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            frames.append(np.asarray(large))
    write_video(path, world.encode_mp4(np.stack(frames)))


def make_model(flags):
    """Write a random model as a Hugging Face folder, which sentence-transformers loads, too."""
    tokenizer = byte_tokenizer()
    config = tiny_config(tokenizer, tokens_per_second=2)
    if not flags.tiny:
        config = real_config("3b")
        ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
        config.image_token_id = ids["<|image_pad|>"]
        config.video_token_id = ids["<|video_pad|>"]
        config.vision_start_token_id = ids["<|vision_start|>"]
        config.vision_end_token_id = ids["<|vision_end|>"]

    torch.manual_seed(0)
    with flags.device:  # a GPU draws 4 billion random numbers much faster
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(flags.model)

    token_pixels = 28 * 28
    size = {
        "shortest_edge": RELEASED_MIN_TOKENS * token_pixels,
        "longest_edge": FRAME_TOKENS * token_pixels,
    }
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(size=dict(size)),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(size=dict(size)),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(flags.model)
    folder = Path(flags.model)
    write_sentence_transformers(folder, config.text_config.hidden_size, "last_token")


# train: the real train.py


def train_words(flags, pairs, **more):
    """Return the command line of train.py for global batches of `pairs` pairs.

    more: further flags, or other values of these.
    """
    words = {
        "preset": "gve-3b",
        "base": flags.model,
        "data": Path(flags.mixture).parent,
        "mixture": flags.mixture,
        "root": flags.clips,
        "out": flags.run,
        "schedule": "uniform",  # no probing: there is one source
        "epochs": 1,
        "batch-scale": pairs / 32,
        "micro-tokens": flags.size.micro_tokens,
        "log-every": 1,
        **more,
    }
    line = []
    for name, value in words.items():
        line += [f"--{name}", str(value)]
    return line


def run_train(words, seconds):
    """Run train.py; after `seconds`, ask it to save and stop after the step under way.

    Returns how it ended, "" for a whole run.
    """
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
    ended = f"train.py ended with status {process.returncode}, {time.monotonic() - began:.0f} s"
    print(ended, flush=True)
    if process.returncode in (0, 128 + signal.SIGTERM):
        return ""
    return f"{ended}: the figures are of its first steps"


def step_events(flags):
    """Return the step events of the last training run; [] if there was none."""
    path = Path(flags.run) / "log.jsonl"
    if not path.exists():
        return []
    return [event for _, event in read_jsonl(path) if event["event"] == "step"]


def measure_training(flags):
    yardstick = Yardstick(flags)
    torch.cuda.empty_cache()  # the GPU is train.py's now
    Path(flags.run, "log.jsonl").unlink(missing_ok=True)
    batch = flags.size.clips
    words = train_words(flags, batch, steps=flags.size.train_steps)
    ended = run_train([*words, "--no-dry-run"], flags.seconds)

    events = step_events(flags)
    if not events:
        raise ValueError(f"train.py made no step in {flags.seconds:.0f} s (--seconds)")
    steps = events[1:] or events
    note = "the first left out" if len(events) > 1 else "warm-up and loading included"
    if ended:
        note += f". **{ended}**"
    seconds = [event["rows"] / event["items_per_s"] for event in steps]
    pairs = sum(event["rows"] for event in steps)
    waiting = sum(event["waiting"] * s for event, s in zip(steps, seconds, strict=True))
    tflops = sum(event["tflops"] * s for event, s in zip(steps, seconds, strict=True))
    spent, mfu, measured = yardstick.cells(1e12 * tflops / sum(seconds))
    rows = [
        ["MFU", mfu, "35 %, then 45 %"],
        ["share of the measured product", measured, ""],
        ["TFLOP/s", spent, ""],
        ["pairs/s", f"{pairs / sum(seconds):.4g}", ""],
        ["s a step", f"{sum(seconds) / len(steps):.4g}", ""],
        ["waiting for data", percent(waiting / sum(seconds)), ""],
        ["peak memory, GiB", f"{steps[-1]['memory_gib']:.2f}", ""],
        ["loss, first to last", f"{events[0]['loss']:.3f} to {events[-1]['loss']:.3f}", ""],
    ]
    return [
        f"train.py, gve-3b preset, one rank: batches of {batch} T2V pairs, GradCache, "
        f"checkpointing, 8 frames x at most {FRAME_TOKENS} tokens. Steps: {len(steps)}, {note}.",
        yardstick.line,
        "",
        *table(["", "measured", "goal"], rows),
    ]


# encode: embed.encode, its parts, and sentence-transformers


def clip_items(flags):
    """List the clips as items to embed."""
    paths = sorted(Path(flags.clips).glob("*.mp4"))
    return [{"video": str(path.resolve())} for path in paths]


def encode_clips(gve, items, flags, batch_tokens):
    """Embed clips by embed.encode -> vectors (n, D). Raises ValueError if any clip failed."""
    vectors, failed = encode(gve, items, batch_tokens=batch_tokens, workers=flags.workers)
    if failed:
        raise ValueError(f"{len(failed)} clips failed, the first: {next(iter(failed.values()))}")
    return vectors


def measure_encoding(flags):
    yardstick = Yardstick(flags)
    gve = GVE.from_pretrained(flags.model, device=flags.device, dtype=torch.bfloat16)
    clips = clip_items(flags)

    # The warm-up tells how many clips can be encoded in the time of a measurement.
    warm = clips[: min(64, flags.size.most_encoded)]
    tokens = flags.size.batch_tokens[-1]
    _, seconds = timed(flags.device, lambda: encode_clips(gve, warm, flags, tokens))
    most = max(len(warm), int(flags.seconds / 6 / seconds * len(warm)))
    items = clips[: min(flags.size.most_encoded, most)]

    parts = time_parts(gve, items, flags)
    rows = []
    for tokens in flags.size.batch_tokens:
        vectors, whole = timed(flags.device, lambda n=tokens: encode_clips(gve, items, flags, n))
        whole /= len(items)  # seconds a clip
        cells = yardstick.cells(parts["flops"] / whole)
        rows.append([f"embed.encode, {tokens} tokens a forward", *speed(whole), *cells])

    # The parts are shares of the last row, which has as many tokens a forward as they have.
    for name, seconds, flops in parts["rows"]:
        cells = yardstick.cells(flops / seconds) if flops else ["", "", ""]
        rows.append([f"{name}, alone", *speed(seconds), *cells, percent(seconds / whole)])
    rows += time_sentence_transformers(flags, items[: len(warm)], vectors)
    head = ["", "clips/s", "ms a clip", "TFLOP/s", "MFU", "of the measured product", "of encode"]
    filled = [row + [""] * (len(head) - len(row)) for row in rows]
    return [
        f"{len(items)} clips, 8 frames x at most {FRAME_TOKENS} tokens, {parts['tokens']} tokens "
        f"a clip, bfloat16, {flags.workers} decoding processes. Goal for MFU: 40 %, then 55 %.",
        yardstick.line,
        "Decoding runs beside the model in other processes: shares of encode may add up to more "
        "than 100 %. sentence-transformers reads frames with our reader, in one thread.",
        "",
        *table(head, filled),
    ]


def speed(seconds):
    """Return the cells clips/s and ms a clip, from the seconds of a clip."""
    return [f"{1 / seconds:.4g}", f"{1000 * seconds:.4g}"]


def time_parts(gve, items, flags):
    """Time decoding, the vision tower and the language model, each alone.

    Returns {"rows": [(name, seconds a clip, FLOPs a clip or 0)], "flops": of a clip, "tokens": of a
    clip}.
    """
    collate = gve.collator()
    pool = DecoderPool(lambda i: collate.prepare(items[i]), workers=flags.workers)

    def decode():
        return [sample for _, sample in pool.map(range(len(items)), lend_threads=True)]

    samples, decoding = timed(flags.device, decode)
    failed = [sample.reason for sample in samples if isinstance(sample, Failed)]
    if failed:
        raise ValueError(f"{len(failed)} clips failed, the first: {failed[0]}")

    # One batch, of as many clips as encode puts into a forward
    tokens = len(samples[0]["ids"])
    n = min(len(samples), max(1, flags.size.batch_tokens[-1] // tokens))
    batch = collate.batch(samples[:n], raw=True)
    forward = step_flops(gve, backward=False)
    with torch.no_grad():
        moved = to_device(batch, flags.device)
        encoded = gve.encode_vision(moved)
        vision = least_seconds(5, flags.device, lambda: gve.encode_vision(moved))
        language = least_seconds(5, flags.device, lambda: gve(encoded))
    moving = least_seconds(5, flags.device, lambda: to_device(batch, flags.device))

    whole = forward(batch) / n
    of_language = forward(batch | {"video_features": encoded["video_features"]}) / n
    rows = [
        ("decode", decoding / len(samples), 0),
        ("copy to the device", moving / n, 0),
        ("vision tower", vision / n, whole - of_language),
        ("language model", language / n, of_language),
    ]
    return {"rows": rows, "flops": whole, "tokens": tokens}


def time_sentence_transformers(flags, items, vectors):
    """Time sentence-transformers on the same folder -> rows of measure_encoding's table."""
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        return [["sentence-transformers: not installed"]]
    model = SentenceTransformer(
        flags.model, device=str(flags.device), model_kwargs={"dtype": torch.bfloat16}
    )
    paths = [item["video"] for item in items]

    def embed(items):
        return model.encode(items, batch_size=32, convert_to_tensor=True)

    embed(read_items(paths[:4]))  # warm up
    _, with_reading = timed(flags.device, lambda: embed(read_items(paths)))
    read = read_items(paths)
    theirs, alone = timed(flags.device, lambda: embed(read))
    theirs = torch.nn.functional.normalize(theirs.float().cpu(), dim=1)
    apart = 1 - (theirs * vectors[: len(paths)]).sum(1)
    return [
        ["sentence-transformers", *speed(with_reading / len(paths))],
        ["sentence-transformers, frames read beforehand", *speed(alone / len(paths))],
        [f"1 - cosine to ours: mean {apart.mean():.1e}, max {apart.max():.1e}"],
    ]


# dry-run: the forecast beside what training took


def compare_dry_run(flags):
    words = [*train_words(flags, flags.size.clips), "--dry-run"]
    command = [sys.executable, "train.py", *words]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=flags.seconds + GRACE
    )
    if done.returncode:
        raise ValueError(f"train.py --dry-run: {done.stderr[-2000:]}")
    taken = [event["memory_gib"] for event in step_events(flags)]
    last = f"{max(taken):.2f} GiB at peak" if taken else "no figure: it has not run in WORK"
    return ["```", done.stdout.strip(), "```", "", f"Stage train took: {last}."]


# bf16: ten steps beside the same ten in float32


STEPS = 10
# Largest relative differences allowed in a step. On a CPU, four layers of the true width with texts
# alone were up to 0.6 % and 2.3 % apart.
LOSS_APART = 0.02
NORM_APART = 0.1  # of the gradient


def compare_precisions(flags):
    lora = {}  # the tensors from which both start
    low = train_few_steps(flags, torch.bfloat16, lora)
    high = train_few_steps(flags, torch.float32, lora)
    apart = np.abs(np.array(low) / np.array(high) - 1)  # (STEPS, 2), of loss and norm
    rows = []
    for step in range(STEPS):
        cells = [step + 1]
        for a, b, relative in zip(low[step], high[step], apart[step], strict=True):
            cells += [f"{a:.5g}", f"{b:.5g}", percent(relative)]
        rows.append(cells)
    loss, norm = apart.max(0)
    verdict = "they do" if loss <= LOSS_APART and norm <= NORM_APART else "THEY DO NOT"
    head = ["step", "loss, bf16", "float32", "apart", "gradient norm, bf16", "float32", "apart"]
    return [
        f"The first {flags.size.layers} layers of the language model, {flags.size.pairs} T2V pairs "
        f"a step, plain loss, no dropout. In each step loss and gradient norm must lie within "
        f"{percent(LOSS_APART)} and {percent(NORM_APART)} of float32's: {verdict}.",
        "",
        *table(head, rows),
    ]


def train_few_steps(flags, dtype, lora):
    """Train LoRA for ten steps -> [(loss, gradient norm)].

    lora: {name: tensor} to start from; an empty dict is filled with those drawn here.
    """
    gve = GVE.from_pretrained(
        flags.model, dtype=dtype, device=flags.device, lora={"lora_dropout": 0.0}
    )
    language = gve.core.language_model
    language.layers = language.layers[: flags.size.layers]
    language.config.num_hidden_layers = flags.size.layers
    parameters = gve.lora_parameters()
    for name, tensor in parameters.items():
        tensor.data.copy_(lora.setdefault(name, tensor.detach().clone()))

    pairs = flags.size.pairs
    [source] = load_mixture(flags.mixture)
    plan = []
    for step in range(STEPS):
        plan.append((0, (np.arange(pairs) + step * pairs) % len(source)))
    load = TrainLoader([source], gve.collator(), roots=[flags.clips], micro_tokens=8192, workers=4)
    # Ten times the preset's learning rate, at which ten steps would hardly move anything.
    optimizer = torch.optim.AdamW(parameters.values(), lr=10 * train.PAPER["lr"])

    gve.train()
    curve = []
    for batch in load(plan):
        vectors = []
        for group in (batch.query, batch.positive):
            chunks = [gve(to_device(micro, flags.device)) for micro in group.micro_batches]
            vectors.append(torch.cat(chunks)[group.order.to(flags.device)])
        q, p = vectors
        ids = batch.positive.ids.to(flags.device)
        loss = train.contrastive_loss(q, p, p[:0], ids, ids[:0], tau=train.PAPER["temperature"])
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item()))
    return curve


# profile: the ten largest items


def profile_both(flags):
    size = flags.size
    words = train_words(flags, size.profiled_pairs, steps=10, out=f"{flags.work}/profiled")
    options = parse_flags(train.Flags, words, presets=train.PRESETS)
    lines = [f"Ten training steps of {size.profiled_pairs} pairs, loading included:", ""]
    lines += largest_items(flags, lambda: train.main(options))

    gve = GVE.from_pretrained(flags.model, device=flags.device, dtype=torch.bfloat16)
    items = clip_items(flags)[: size.profiled_clips]
    tokens = size.batch_tokens[-1]
    encode_clips(gve, items[:8], flags, tokens)  # warm up
    lines += ["", f"Encoding {len(items)} clips:", ""]
    lines += largest_items(flags, lambda: encode_clips(gve, items, flags, tokens))
    return lines


def largest_items(flags, work):
    """Profile work() -> a table of the ten items that take most of the device's time."""
    on_gpu = flags.device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CPU
    if on_gpu:  # its kernels alone: there would be millions of CPU events
        activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity]) as profile:
        _, seconds = timed(flags.device, work)

    spent = collections.Counter()
    calls = collections.Counter()
    for item in profile.key_averages():
        name = item.key.replace("|", "/")
        name = name if len(name) < 100 else name[:97] + "..."
        spent[name] += item.self_device_time_total if on_gpu else item.self_cpu_time_total
        calls[name] += item.count
    whole = sum(spent.values())
    if not whole:
        raise ValueError("the profiler saw nothing on the device")
    rows = []
    for name, microseconds in spent.most_common(10):
        share = percent(microseconds / whole)
        rows.append([f"`{name}`", calls[name], f"{microseconds / 1000:.4g}", share])
    busy = percent(whole / 1e6 / seconds)
    note = f"{seconds:.1f} s by the clock; the device was busy for {busy} of that time."
    return [note, "", *table(["item", "calls", "ms", "of the device's time"], rows)]


STAGES = {
    "make": make,
    "train": measure_training,
    "encode": measure_encoding,
    "dry-run": compare_dry_run,
    "bf16": compare_precisions,
    "profile": profile_both,
}


def main(flags):
    """Run the stages that flags name -> names of those that failed."""
    read_sections(flags)  # raises before any work if the record is of another machine or commit
    failed = []
    for stage in flags.stages or STAGES:
        began = time.perf_counter()
        print(f"\n== {stage}", flush=True)
        try:
            lines = STAGES[stage](flags)
        except Exception as error:  # one failed stage must not cost the others
            traceback.print_exc()
            lines = ["```", f"failed: {error!r}", "```"]
            failed.append(stage)
        seconds = time.perf_counter() - began
        lines += ["", f"The stage took {seconds:.0f} s."]
        print("\n".join(lines), flush=True)
        write_section(flags, stage, lines)
        gc.collect()  # models contain reference cycles
        torch.cuda.empty_cache()  # the next stage may need the memory in another process
    return failed


if __name__ == "__main__":
    try:
        failures = main(parse_flags(Flags, doc=__doc__))
    except (ValueError, OSError) as problem:
        sys.exit(f"error: {problem}")
    if failures:
        sys.exit(f"error: failed: {', '.join(failures)}")
