"""List the rows of training files that cannot be used, or describe a run over a mixture.

    python extras/check_data.py mixtures/gve-3b.json --root DIR    # decodes every medium: hours
    python extras/check_data.py DIR/webvid.jsonl
    python extras/check_data.py mixtures/gve-3b.json --root DIR --describe    # seconds

--describe reads each training file of a mixture once and prints its rows, steps and passes, and the
GPU memory of a run (Tables 6 to 9). Memory is an estimate for LoRA on a bf16 base with gradient
checkpointing, bytes per rank for one micro-batch of t tokens:

    2 W + 16 A + t (2 L D + 40 I)

W base weights; A LoRA weights in fp32 (weight, gradient, two moments); L layers of width D, whose
inputs are kept; I the width of their MLP. Of one recomputed layer autograd holds 19.1 I bytes per
token, counted with saved-tensor hooks at both models' widths (24.7 I where PEFT casts the input of
each adapted projection to fp32). 40 I leaves room for the temporaries of the backward pass. If
graphs of several micro-batches are kept, as without GradCache, each of their tokens adds 2 L D. The
estimate has not been checked on a GPU.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, for a script

from data import Source, load_mixture
from support.decoders import DecoderPool, Failed
from support.flags import flag, parse_flags
from support.media import load_image, load_video


@dataclasses.dataclass
class Flags:
    path: str = flag(..., "training file (*.jsonl) or mixture (*.json)", positional=True)
    root: list[str] = flag([], "folders that media may lie in, beside the file's own")
    workers: int = flag(2, "decoding processes; 0: decode in this one")
    describe: bool = flag(False, "decode nothing, describe a run over the mixture")


# Unusable rows


def check(path, roots=(), workers=0, seconds=60):
    """Yield "file:line: reason" for each unusable row of a training file or of a mixture's files.

    Every medium is decoded, by `workers` processes: with workers, a clip that crashes its decoder
    or takes longer than `seconds` costs its row alone. A row of a mixture must also have as many
    hard negatives as its source promises.
    """
    is_mixture = str(path).endswith(".json")
    if is_mixture:
        sources = load_mixture(path, roots)
    else:
        sources = [Source("file", "T2V", str(path), negatives=sys.maxsize)]  # load all negatives

    def check_row(key):
        k, row = key
        source = sources[k]
        items = source.load(row, roots)  # its errors name the row
        try:
            negatives = len(items) - 2
            if is_mixture and negatives < source.negatives:
                raise ValueError(f"{negatives} negatives, the mixture promises {source.negatives}")
            for item in items:
                if "video" in item:
                    load_video(item["video"])
                if "image" in item:
                    load_image(item["image"])
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{source.where(row)}: {error}") from error

    def where(key):
        k, row = key
        return sources[k].where(row)

    # A generator, since a mixture may have millions of rows.
    keys = ((k, row) for k, source in enumerate(sources) for row in range(len(source)))
    pool = DecoderPool(check_row, where, workers=workers, seconds=seconds)
    for _, result in pool.map(keys):
        if isinstance(result, Failed):
            yield result.reason


# A run over a mixture

# The gve presets of train.py.
BATCH_SCALE = 32
EPOCHS = 3
MICRO_TOKENS = 32768


class Backbone(NamedTuple):
    """Sizes of a Qwen2.5-VL language model, the letters of the memory formula."""

    weights: float  # W, with the vision tower
    layers: int  # L
    width: int  # D
    mlp_width: int  # I
    kv_width: int  # of keys and of values


BACKBONES = {
    "3B": Backbone(3.75e9, 36, 2048, 11008, 256),
    "7B": Backbone(7.75e9, 28, 3584, 18944, 512),
}


def lora_weights(layers, width, mlp_width, kv_width, rank=16):
    """Count the LoRA weights A of Table 9: on q, k, v, up, gate and down of every layer.

    A projection from n to m features has rank * (n + m) of them.
    """
    query = width + width
    keys_and_values = 2 * (width + kv_width)
    mlp = 3 * (width + mlp_width)
    return layers * rank * (query + keys_and_values + mlp)


def memory(model, tokens):
    """Return GiB per rank of model "3B" or "7B" for a micro-batch of so many tokens."""
    weights, layers, width, mlp_width, kv_width = BACKBONES[model]
    state = 2 * weights + 16 * lora_weights(layers, width, mlp_width, kv_width)
    activations = tokens * (2 * layers * width + 40 * mlp_width)
    return (state + activations) / 2**30


def print_source(name, task, samples, rows, passes, batch, steps, file):
    """Print one line of the list of sources; all arguments are text."""
    print(f"{name:<26} {task:<6} {samples:>9} {rows:>9} {passes:>6} {batch:>6} {steps:>6}  {file}")


def describe(path, roots=()):
    """Print each source of a mixture, then the run of a gve preset over those whose files are here.

    Returns an error text if no file is here. "passes": how often the rows of a source are seen
    under proportional sampling; the pyramid draws by relevance, and logs its own.
    """
    print_source("source", "task", "samples", "rows", "passes", "batch", "steps", "file")
    n_absent = 0
    present = []
    total_steps = 0
    for entry in json.loads(Path(path).read_text(encoding="utf-8-sig")):
        name, task, file = entry["name"], entry["task"], entry["path"]
        places = [Path(folder) / file for folder in (Path(path).parent, *roots)]
        found = [place for place in places if place.is_file()]
        if not found:
            n_absent += 1
            samples = f"{entry.get('samples', 0):,}"
            print_source(name, task, samples, "-", "-", "-", "-", f"{file} is not here")
            continue

        source = Source(**{**entry, "path": str(found[0])})
        batch = source.batch_size * BATCH_SCALE
        steps = math.ceil(source.samples / batch)
        present.append(source)
        total_steps += steps
        passes = source.samples / len(source)
        print_source(
            name,
            task,
            f"{source.samples:,}",
            f"{len(source):,}",
            f"{passes:.2f}",
            str(batch),
            f"{steps:,}",
            file,
        )

    if not present:
        return (
            f"{path}: none of its {n_absent} files is here; --root names the folder that holds them"
        )
    pairs = sum(source.samples for source in present)
    print(
        f"\n{len(present)} of {len(present) + n_absent} sources, {pairs:,} pairs, "
        f"{total_steps:,} steps, {EPOCHS} curriculum epochs of {total_steps / EPOCHS:,.0f} steps"
    )
    sizes = [f"{model} {memory(model, MICRO_TOKENS):.0f} GiB" for model in BACKBONES]
    print(
        f"GPU memory, 2 W + 16 A + t (2 L D + 40 I): about {', '.join(sizes)} "
        f"for t = {MICRO_TOKENS:,} tokens (--micro-tokens)"
    )
    if n_absent:
        print(
            f"to train on what is here, delete the other {n_absent} entries from a copy of {path}; "
            "name it with --mixture"
        )


def main(argv=None):
    """Print bad rows, or the description; returns an error text or None."""
    flags = parse_flags(Flags, argv, __doc__)
    problems = 0
    try:
        if flags.describe:
            return describe(flags.path, flags.root)
        for problem in check(flags.path, flags.root, flags.workers):
            print(problem)
            problems += 1
    except (json.JSONDecodeError, TypeError, KeyError, AttributeError) as error:
        return f"check_data.py: {flags.path}: not a mixture of sources: {error!r}"
    except (ValueError, OSError) as error:
        return f"check_data.py: {error}"
    if problems:
        return f"{flags.path}: {problems} unusable rows"


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # half an emoji in a file's name
    sys.exit(main())
