"""What a run over a mixture would be (files, rows, steps, passes, GPU memory; Tables 6 to 9), and the rows that it cannot use.

    python data.py check mixtures/gve-3b.json --root DIR         # decodes every medium of every row
    python data.py mixture mixtures/gve-3b.json --root DIR       # seconds; reads every training file once

Memory is an estimate for LoRA on a bf16 base with gradient checkpointing, GiB per rank for one micro-batch of t tokens:
    2 W + 16 A + t (2 L D + 40 I)
W base weights, A LoRA weights (fp32: weight, gradient, two moments), L layers of width D, whose inputs are kept, I their MLP's
width. Of one recomputed layer autograd holds 19.1 I bytes per token, counted with saved-tensor hooks at both models' widths (24.7
where PEFT casts the input of each adapted projection to fp32); 40 I leaves room for what backward makes on the way. Graphs of
more than one micro-batch kept at a time, as without GradCache, add 2 L D bytes for each of their tokens. No GPU has checked the
estimate yet.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from data import Source, load_mixture
from support.decoders import DecoderPool, Failed
from support.media import load_image, load_video

WIDTHS = {
    "3B": (3.75e9, 36, 2048, 11008, 256),
    "7B": (7.75e9, 28, 3584, 18944, 512),
}  # W, L, D, I, width of keys and values


def lora_weights(layers, width, mlp, keys, r=16):
    """Number of LoRA weights A of Table 9: rank r on q, k, v, up, gate and down of every layer."""
    return layers * r * ((width + width) + 2 * (width + keys) + 3 * (width + mlp))


def memory(model, tokens):
    """GiB per rank of model "3B" or "7B" for a micro-batch of that many tokens, by the formula above."""
    weights, layers, width, mlp, keys = WIDTHS[model]
    state = 2 * weights + 16 * lora_weights(layers, width, mlp, keys)
    return (state + tokens * (2 * layers * width + 40 * mlp)) / 2**30


def describe(path, roots=(), batch_scale=32, epochs=3, micro_tokens=32768):
    """Print each source of a mixture with its rows and steps, then the run over those that are here (the gve presets' numbers).

    Returns an error text if no file is here. "passes": how often the rows of a source are seen under proportional sampling;
    the pyramid draws by relevance, and logs its own.
    """
    present, absent = [], []
    print(
        f"{'source':<26} {'task':<6} {'samples':>9} {'rows':>9} {'passes':>6} {'batch':>6} {'steps':>6}  file"
    )
    for entry in json.loads(Path(path).read_text(encoding="utf-8")):
        found = next(
            (
                file
                for base in (Path(path).parent, *roots)
                if (file := Path(base) / entry["path"]).is_file()
            ),
            None,
        )
        if found is None:
            absent.append(entry)
            print(
                f"{entry['name']:<26} {entry['task']:<6} {entry.get('samples', 0):>9,} {'-':>9} {'-':>6} {'-':>6} {'-':>6}  "
                f"{entry['path']} is not here"
            )
            continue
        source = Source(**{**entry, "path": str(found)})
        batch = source.batch_size * batch_scale
        steps = math.ceil(source.samples / batch)
        present.append((source, steps))
        print(
            f"{source.name:<26} {source.task:<6} {source.samples:>9,} {len(source):>9,} {source.samples / len(source):>6.2f} "
            f"{batch:>6} {steps:>6,}  {entry['path']}"
        )
    if not present:
        return f"{path}: none of its {len(absent)} files is here; --root names the folder that holds them"
    pairs, total = sum(source.samples for source, _ in present), sum(steps for _, steps in present)
    print(
        f"\n{len(present)} of {len(present) + len(absent)} sources, {pairs:,} pairs, {total:,} steps, {epochs} curriculum "
        f"epochs of {total / epochs:,.0f} steps"
    )
    sizes = ", ".join(f"{model} {memory(model, micro_tokens):.0f} GiB" for model in WIDTHS)
    print(
        f"GPU memory, 2 W + 16 A + t (2 L D + 40 I): about {sizes} for t = {micro_tokens:,} tokens (--micro-tokens)"
    )
    if absent:
        print(
            f"to train on what is here, delete the other {len(absent)} entries from a copy of {path}; name it with --mixture"
        )


def check(path, roots=(), workers=0, seconds=60):
    """Yield "file:line: reason" for each unusable row of a training file, or of a mixture's (*.json) files; media are decoded, by
    `workers` processes, which also survive those that crash their decoder or take it so many seconds."""
    mixture = str(path).endswith(".json")
    sources = (
        load_mixture(path, roots)
        if mixture
        else [Source("file", "T2V", str(path), negatives=sys.maxsize)]
    )
    order = ((k, i) for k, source in enumerate(sources) for i in range(len(source)))

    def decode(items, promised):
        if len(items) - 2 < promised:
            raise ValueError(f"{len(items) - 2} negatives, the mixture promises {promised}")
        for item in items:
            for media, load in (("video", load_video), ("image", load_image)):
                if media in item:
                    load(item[media])

    def wrong(key):
        source, row = sources[key[0]], key[1]
        try:
            items = source.load(row, roots)
        except ValueError as error:  # names file and line
            return str(error)
        try:
            decode(items, source.negatives if mixture else 0)
        except (ValueError, FileNotFoundError) as error:
            return f"{source.where(row)}: {error}"

    def name(key):
        return sources[key[0]].where(key[1])

    pool = DecoderPool(wrong, name, workers=workers, seconds=seconds)
    for _, result in pool.map(order):
        if isinstance(result, Failed):
            yield result.reason
        elif result:
            yield result


def main(argv=None):
    """The command line of data.py; returns an error text or None."""
    parser = argparse.ArgumentParser(
        "data.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["check", "mixture"])
    parser.add_argument("file", help="training file (*.jsonl) or mixture (*.json)")
    parser.add_argument(
        "--root", nargs="+", default=[], help="folders that media may lie in, beside the file's own"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="check: decoding processes (default 2); 0 decodes inline",
    )
    given = parser.parse_args(argv)
    try:
        if given.command == "mixture":
            return describe(given.file, given.root)
        problems = len([print(problem) for problem in check(given.file, given.root, given.workers)])
        return f"{given.file}: {problems} unusable rows" if problems else None
    except (ValueError, OSError) as problem:
        return f"data.py: {problem}"
    except (TypeError, KeyError, AttributeError) as problem:
        return f"data.py: {given.file}: not a mixture of sources: {problem!r}"
