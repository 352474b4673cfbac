"""Where the memory of a LoRA training step goes: arithmetic from shapes, and the measured peak.

    python train.py --dry-run --preset gve-3b       # prints it, from the base's config.json alone

    count = StepMemory(core, grad_cache=True, checkpointing=True, dropout=0.1, device_type="cuda")
    moments = count.micro_batch(BatchShape(items=40, tokens=808, patches=40 * 3136))
    moments["language model"]["base weights"]    # bytes
    print(memory_table(moments))

The model may lie on the meta device, so a config.json is enough and nothing is allocated. A step is
at its peak in one of three moments:

    vision tower      pixels go through the frozen tower, which keeps nothing for a backward pass
    language model    the backward pass is in the last layer: all other layers still hold what they
                      kept, and this one holds its working arrays as well
    loss              the similarities of the whole batch, or the fused kernel's block of them

Three things are there all the time: the frozen weights; the LoRA weights with their gradients and
AdamW's two states, 16 bytes per LoRA weight; and what the step keeps of other micro-batches. Not
counted: the CUDA context and the libraries' workspaces (about 0.5 GiB), gaps between the
allocator's blocks, and the temporaries of the optimiser's step, which comes when the activations
are gone. A loader's batches wait in the host's memory.

The counts per layer are those of transformers' Qwen2.5-VL under sdpa with a mask, PEFT's LoRA and
torch's autograd. tests/test_memory.py compares them with every storage that a real step makes.

Legend: B items, T tokens of an item with padding, P patches, D hidden size, I intermediate size,
N this rank's rows, M candidates of all ranks; width: bytes of a number of the model's dtype.
"""

import ctypes
import dataclasses
import gc
import math
import os
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from tqdm import tqdm

from data import IMAGE_TOKENS, Collator
from kernels.infonce import CPU_BLOCK, WORKSPACE
from model import (
    BACKBONES,
    add_adapter,
    checkpoint_file,
    find_base,
    find_spec,
    load_processor,
)
from support.files import parse_json

CARD = 79.2 * 2**30  # bytes that an 80 GB card has for programs
FILLED = 0.9  # share of a card that tensors may fill; the rest: the CUDA context, gaps
PROMPT_TOKENS = 20  # of an item without text and media, by Qwen's tokenizer
TEXT_TOKENS = 128  # of a text in a real batch: a guess, as the data need not be there
FLOAT = 4  # bytes of a float32
INT = 8  # bytes of an int64
M_MMAP_THRESHOLD = -3  # glibc's malloc.h


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """The shape of a micro-batch, or of all the items of a step that are alike."""

    items: int  # B
    tokens: int  # T, of each item, padding included
    patches: int = 0  # P, of all items together; a vision token is merge_size^2 of them

    def resized(self, items):
        """Return the shape with another number of items."""
        return BatchShape(items, self.tokens, self.patches // self.items * items)

    def limited(self, micro_batch, micro_tokens=0):
        """Return the shape with as many items as train.py's flags of these names admit."""
        items = micro_batch
        if micro_tokens:
            items = min(items, max(1, micro_tokens // self.tokens))
        return self.resized(items)


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Count the bytes of a step's moments -> {moment: {term: bytes}}."""

    model: torch.nn.Module  # a Qwen2.5-VL without its head, LoRA layers in place (GVE.core)
    grad_cache: bool  # no graphs are kept; every micro-batch goes through the layers twice
    checkpointing: bool  # the layers' activations are computed again in the backward pass
    dropout: float  # LoRA's
    device_type: str  # "cuda" or "cpu": they differ in what a dropout keeps

    def micro_batch(self, shape, others=0):
        """Count one micro-batch; others: bytes that the step keeps of its other micro-batches."""
        model = self.model
        tokens = shape.items * shape.tokens
        always = {**weight_bytes(model), "other micro-batches": others}
        moments = {}
        if shape.patches:
            pixels, tower = tower_bytes(model)
            moments["vision tower"] = {
                **always,
                "inputs": pixels * shape.patches + 3 * INT * tokens,  # ids, mask, token types
                "vision tower at work": tower * shape.patches,
            }

        # The layers keep all that backward needs, or their inputs alone where they are computed
        # again. The last one is at work, and counted as such.
        kept, at_work = layer_bytes(model, shape, self.dropout, self.device_type)
        layers = len(model.language_model.layers)
        width = model.dtype.itemsize
        if self.checkpointing:
            # A float32 layer at work has its input in the first norm: do not count it twice.
            inputs_kept = layers if width < FLOAT else layers - 1
            kept_by_layers = inputs_kept * model.config.text_config.hidden_size * width * tokens
        else:
            kept_by_layers = (layers - 1) * kept * tokens
            if width < FLOAT:  # autocast's copies of the LoRA weights
                kept_by_layers += always["LoRA weights"] // FLOAT * width

        # ids, mask, token types, three position ids; cos and sin; a mask of T x T for each item
        head = model.language_model.layers[0].self_attn.head_dim
        inputs = (6 * INT + 2 * head * width + mask_length(shape)) * tokens
        moments["language model"] = {
            **always,
            "inputs": inputs + feature_bytes(model, shape),
            "kept by the layers": kept_by_layers,
            "a layer at work": at_work * tokens,
        }
        return moments

    def kept(self, shape):
        """Count what a step keeps of micro-batches between their forward and backward passes.

        With GradCache: ids, mask, token types and, so that the tower runs once, vision features.
        Without: the graph. shape: of one, or of all items of a role together.
        """
        model = self.model
        tokens = shape.items * shape.tokens
        if self.grad_cache:
            return feature_bytes(model, shape) + 3 * INT * tokens

        text = model.config.text_config
        width = model.dtype.itemsize
        per_layer = text.hidden_size * width
        if not self.checkpointing:
            per_layer, _ = layer_bytes(model, shape, self.dropout, self.device_type)
        last_norm = text.hidden_size * (FLOAT + width)
        per_token = text.num_hidden_layers * per_layer + last_norm + mask_length(shape) + 6 * INT
        return per_token * tokens

    def step(self, roles, loss, micro_batch, micro_tokens):
        """Count a whole step of one rank.

        roles: the shapes of all queries, of all positives and, if there are any, of all hard
        negatives. loss: bytes, from loss_bytes. micro_batch, micro_tokens: train.py's flags.
        """
        kept = sum(self.kept(role) for role in roles)
        moments = {}
        for role in roles:
            # The largest micro-batch goes through while the step keeps all the others.
            shape = role.limited(min(micro_batch, role.items), micro_tokens)
            counted = self.micro_batch(shape, kept - self.kept(shape))
            for moment, terms in counted.items():
                before = moments.get(moment, {})
                if sum(terms.values()) > sum(before.values()):
                    moments[moment] = terms
        resident = weight_bytes(self.model)
        moments["loss"] = {**resident, "other micro-batches": kept, "vectors and loss": loss}
        return moments


def weight_bytes(model):
    """Count what is there all the time -> {term: bytes}."""
    frozen = 0
    trained = 0
    for weight in model.parameters():
        if weight.requires_grad:
            trained += weight.nbytes
        else:
            frozen += weight.nbytes
    return {
        "base weights": frozen,
        "LoRA weights": trained,
        "LoRA gradients": trained,
        "AdamW": 2 * trained,
    }


def mask_length(shape):
    """Return the length of a token's row of the attention mask; in bytes, too, as it is of bool.

    An item that is alone has no padding, and attention then needs no mask.
    """
    return shape.tokens if shape.items > 1 else 0


def layer_bytes(model, shape, dropout, device_type):
    """Count a layer of the language model -> bytes per token (kept for backward, at its peak)."""
    text = model.config.text_config
    attention = model.language_model.layers[0].self_attn
    width = model.dtype.itemsize
    hidden = text.hidden_size * width
    intermediate = text.intermediate_size * width
    heads = text.num_attention_heads * attention.head_dim * width

    # Each norm computes in float32 and keeps its input so. In a float32 model this is the residual
    # stream itself.
    normed = 2 * text.hidden_size
    if hasattr(attention, "q_norm"):  # Qwen3-VL normalises queries and keys, too
        normed += (text.num_attention_heads + text.num_key_value_heads) * attention.head_dim
    norms = normed * max(width, FLOAT)

    # LoRA's A keeps its input: the same array for q, k, v and for up, gate, unless dropout makes
    # one for each. Dropout keeps its mask, of bytes on a GPU and of numbers on a CPU.
    lora_inputs = 2 * hidden
    down_input = intermediate
    if dropout:
        mask_width = 1 if device_type == "cuda" else width
        share = 1 + mask_width / width
        lora_inputs = 5 * hidden * share
        down_input = intermediate * share
    lora_inputs += 6 * lora_rank(model) * width  # what A gives to B, in six projections

    # q, k, v, output and log-sum-exp: no T x T similarities are kept. But where there is a mask,
    # sdpa turns it into numbers, anew in each layer, and k and v are repeated for every head.
    mask = mask_length(shape) * width
    keys = heads
    if not mask:
        keys = text.num_key_value_heads * attention.head_dim * width
    qkv_and_output = 2 * heads + 2 * keys + text.num_attention_heads * FLOAT

    before_mlp = norms + lora_inputs + qkv_and_output + mask
    kept = before_mlp + 3 * intermediate + down_input  # gate, up, the activation of gate

    # At its peak the MLP holds six arrays: gate, up, activation, product, two gradients. Beside it
    # stand the layer's output and its gradient, and what is not among the kept arrays: the residual
    # stream, where the norms keep a float32 copy instead, and under dropout the norm's output.
    beside = 2 * hidden
    if width < FLOAT:
        beside += hidden
    if dropout:
        beside += hidden
    at_work = before_mlp + 6 * intermediate + beside
    return kept, at_work


def lora_rank(model):
    """Return the rank of the LoRA layers, 0 if there are none."""
    for name, weight in model.language_model.layers[0].named_parameters():
        if ".lora_A." in name:
            return weight.shape[0]
    return 0


def tower_bytes(model):
    """Count the vision tower at its peak -> bytes per patch (of pixels, of its working arrays)."""
    geometry = read_geometry(model)
    width = model.dtype.itemsize
    values = geometry.patch_values

    # uint8 from the disk, the same as float32, and converted for a half-precision tower
    pixels = values * (1 + FLOAT)
    if width < FLOAT:
        pixels += values * width

    # In attention: qkv (3), rotated q and k (2), all three gathered into windows (3), the outputs
    # of a window and of all (2), residual stream and norm (2). While q and k are rotated, in
    # float32: qkv, residual stream, norm (5), and six float32 arrays.
    in_attention = 12 * width
    in_rotation = 5 * width + 6 * FLOAT
    tower = geometry.tower_width * max(in_attention, in_rotation)
    heads = model.config.vision_config.num_heads
    tower += 2 * geometry.tower_width // heads * FLOAT  # cos and sin
    return pixels, tower


def feature_bytes(model, shape):
    """Count the vision tower's output."""
    geometry = read_geometry(model)
    tokens = shape.patches // geometry.merge_size**2
    per_token = geometry.feature_layers * model.config.text_config.hidden_size
    return tokens * per_token * model.dtype.itemsize


def read_geometry(model):
    """Return the sizes of a backbone's vision input and tower (model.Geometry)."""
    return BACKBONES[model.config.model_type].read_geometry(model.config)


def loss_bytes(rows, candidates, dim, *, ranks=1, workspace=None):
    """Count the contrastive loss at its peak, forward and backward, in float32.

    rows: N; candidates: M; dim: D. workspace: the fused kernel's bytes for a block of similarities;
    None: the plain loss, which holds all of them several times.
    """
    own = candidates // ranks
    # This rank's vectors as they were made and in the order of their rows, and both gradients
    vectors = 4 * (rows + own) * dim * FLOAT
    gathered = 2 * candidates * dim * FLOAT  # all ranks' candidates and their gradient
    if workspace is not None:
        matrices = workspace + 2 * rows * dim * FLOAT  # float32 sums of the queries' gradient
    else:
        # Query -> candidates: logits, their log-softmax and a mask of bytes. Positive -> queries,
        # on top: scores, logits, log-softmax and a mask.
        matrices = rows * candidates * (2 * FLOAT + 1)
        matrices += rows * ranks * rows * (3 * FLOAT + 1)
    # The training curves: scores of this rank's own vectors, the same masked, a mask
    curves = rows * own * (2 * FLOAT + 1)
    return vectors + max(gathered + matrices, curves)


def largest_that_fits(count, shape, free):
    """Return the most items of a shape whose peak is at most `free` bytes; 0 if not one fits.

    count: StepMemory.
    """
    one, two, three = [peak_bytes(count.micro_batch(shape.resized(n))) for n in (1, 2, 3)]
    if two > free:  # an item alone is special: it has no mask
        return int(one <= free)
    return int(2 + (free - two) // (three - two))  # from two on, each item costs the same


def peak_bytes(moments):
    """Return the bytes of the moment that needs most; moments: {moment: {term: bytes}}."""
    return max(sum(terms.values()) for terms in moments.values())


def memory_table(columns):
    """Write {column: {term: bytes}} as a Markdown table in GiB, with the sum of each column."""
    names = []
    for terms in columns.values():
        names += [name for name in terms if name not in names]
    rows = [["GiB", *columns], ["---"] + ["---:"] * len(columns)]
    for name in names:
        cells = [terms.get(name, 0) for terms in columns.values()]
        if any(cells):
            rows.append([name, *map(gib, cells)])
    totals = [sum(terms.values()) for terms in columns.values()]
    rows.append(["**total**", *map(gib, totals)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def gib(size):
    """Write bytes in GiB."""
    return f"{size / 2**30:.3f}"


# The dry run's tables, from train.py's flags


def print_memory(flags, world, device_type, room, is_fused):
    """Print the arithmetic of the largest micro-batches and of the heaviest source's whole step.

    flags: train.py's. world: ranks. device_type: "cuda" or "cpu". room: bytes of the device's
    memory. is_fused: function (global batch, negatives per row) -> does the fused kernel compute
    the loss?
    """
    core, spec = backbone_on_meta(flags)
    count = step_memory(core, flags, device_type)
    merge = core.config.vision_config.spatial_merge_size**2  # patches per vision token
    shapes = item_shapes(flags, prompt_length(flags.base, spec), merge)
    trained = sum(p.numel() for p in core.parameters() if p.requires_grad)
    total = sum(p.numel() for p in core.parameters())
    tqdm.write(
        f"{flags.base}: {total - trained:,} frozen weights in {flags.dtype}, {trained:,} of LoRA; "
        f"checkpointing {flags.checkpointing}, GradCache {flags.grad_cache}, "
        f"dropout {flags.dropout}, on {device_type}\n\n"
        "The largest micro-batches, by arithmetic:\n"
    )
    columns = {}
    for name in ("videos", "texts"):
        shape = shapes[name].limited(flags.micro_batch, flags.micro_tokens)
        for moment, terms in count.micro_batch(shape).items():
            columns[f"{name}, {shape.items} x {shape.tokens}: {moment}"] = terms
    tqdm.write(memory_table(columns))

    # The step that needs most. Without GradCache it keeps the graphs of all its micro-batches.
    heaviest = {}
    largest = 0
    for source in read_sources(flags):
        rows, moments = count_source(count, shapes, source, flags, world, is_fused)
        if peak_bytes(moments) > largest:
            largest = peak_bytes(moments)
            heaviest = moments
            about = f"{source['name']} ({source['task']}, {rows} rows on each of {world} ranks)"
    if heaviest:
        tqdm.write(
            f"\nA whole step of the source that needs most, {about}; texts beside media or alone "
            f"are taken to have {TEXT_TOKENS} tokens:\n\n{memory_table(heaviest)}"
        )

    fitting = []
    for name in ("videos", "texts"):
        items = largest_that_fits(count, shapes[name], FILLED * room)
        fitting.append(f"{items * shapes[name].tokens:,} of {name}")
    tqdm.write(
        f"\nA micro-batch's tokens that fit {FILLED:.0%} of {gib(room)} GiB (--micro-tokens, "
        f"--micro-batch): {', '.join(fitting)}\n"
    )


def step_memory(core, flags, device_type):
    """Return the count of a step's memory that the flags decide."""
    return StepMemory(
        core,
        grad_cache=flags.grad_cache,
        checkpointing=flags.checkpointing,
        dropout=flags.dropout,
        device_type=device_type,
    )


def find_full(path):
    """Find the full weights of a checkpoint -> (their folder or hub id, is it an adapter's?)."""
    is_adapter = checkpoint_file(path, "adapter_config.json") is not None
    return (find_base(path) if is_adapter else path), is_adapter


def backbone_on_meta(flags):
    """Build the backbone with LoRA from its config alone, without memory -> (backbone, its spec).

    flags.base may be a folder that holds config.json alone, or a LoRA folder whose base is one.
    """
    full, is_adapter = find_full(flags.base)
    spec = find_spec(full)
    config = spec.config_class.from_pretrained(full)
    with torch.device("meta"):
        core = spec.model_class._from_config(config, dtype=getattr(torch, flags.dtype))
        core.requires_grad_(False)
        if is_adapter:
            adapter = PeftConfig.from_pretrained(flags.base)
            adapter.inference_mode = False
            core.name_or_path = full  # PEFT compares the two
            adapter.base_model_name_or_path = full
            get_peft_model(core, adapter)
        else:
            add_adapter(core, spec, {"lora_dropout": flags.dropout})
    return core, spec


def prompt_length(path, spec):
    """Count the tokens of an item without text and media; PROMPT_TOKENS without a tokenizer."""
    try:
        processor = load_processor(path, spec)
    except ValueError:
        return PROMPT_TOKENS
    return len(Collator(processor).prepare({"text": "a"})["ids"]) - 1


def frame_sides(max_tokens):
    """Choose the sides of a frame of at most so many vision tokens -> (high, wide), in tokens."""
    high = math.isqrt(max_tokens)
    return high, max_tokens // high


def item_shapes(flags, prompt, merge):
    """Return the largest items that the flags admit -> {kind: BatchShape of one}.

    prompt: tokens of an item without text and media, to which a medium adds two around its own.
    merge: patches per vision token.
    """
    high, wide = frame_sides(flags.max_tokens)
    video = flags.frames // 2 * high * wide  # a patch is two frames deep
    return {
        "videos": BatchShape(1, video + prompt + 2, video * merge),
        "images": BatchShape(1, IMAGE_TOKENS + prompt + 2, IMAGE_TOKENS * merge),
        "texts": BatchShape(1, flags.max_length),
    }


def read_sources(flags):
    """Read the mixtures' entries and no training files -> list of dict; none without mixtures.

    Raises ValueError for an entry that is no source.
    """
    sources = []
    for mixture in flags.mixture or [f"{flags.data}/mixture.json"]:
        if not os.path.isfile(mixture):
            tqdm.write(f"{mixture}: no such mixture, so no source's whole step is counted")
            continue
        for source in parse_json(Path(mixture).read_bytes(), mixture, list):
            if not isinstance(source, dict) or "2" not in source.get("task", ""):
                raise ValueError(f"{mixture}: no source with a task like T2V: {source}")
            sources.append({"name": "no name", "batch_size": 32, "negatives": 0} | source)
    return sources


def item_of_form(form, shapes):
    """Return the shape of one query or candidate of a task; form: "T", "I", "V", "TI" or "TV"."""
    if "V" in form:
        medium = shapes["videos"]
    elif "I" in form:
        medium = shapes["images"]
    else:
        return BatchShape(1, TEXT_TOKENS)
    text = TEXT_TOKENS if "T" in form else 0
    return BatchShape(1, medium.tokens + text, medium.patches)


def count_source(count, shapes, source, flags, world, is_fused):
    """Count the step of a mixture's entry -> (rows of a rank, {moment: {term: bytes}})."""
    batch = max(1, round(source["batch_size"] * flags.batch_scale))
    rows = math.ceil(batch / world)
    negatives = source["negatives"]
    query, candidate = source["task"].split("2")
    roles = [
        item_of_form(query, shapes).resized(rows),
        item_of_form(candidate, shapes).resized(rows),
    ]
    if negatives:
        roles.append(item_of_form(candidate, shapes).resized(rows * negatives))

    candidates = batch * (1 + negatives)
    workspace = None
    if is_fused(batch, negatives):
        limit = WORKSPACE if count.device_type == "cuda" else 2 * CPU_BLOCK**2 * FLOAT
        workspace = min(limit, rows * candidates * FLOAT)
    dim = count.model.config.text_config.hidden_size
    loss = loss_bytes(rows, candidates, dim, ranks=world, workspace=workspace)
    return rows, count.step(roles, loss, flags.micro_batch, flags.micro_tokens)


# Measuring


class PeakMemory:
    """Measure how far memory rises while a block runs, in bytes.

        with PeakMemory(device) as peak: ...
        peak.rise

    On a GPU these are torch's own allocations; on a CPU the process's resident memory (Linux only:
    elsewhere rise is not a number).
    """

    def __init__(self, device):
        self.device = device
        self.rise = math.nan

    def __enter__(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        elif Path("/proc/self/clear_refs").exists():
            # Give back what was freed earlier, and from now on every large array as soon as it is
            # freed. Else glibc keeps up to a half more, in gaps.
            ctypes.CDLL(None).malloc_trim(0)
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the resident peak
            self.before = read_status("VmRSS")
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.rise = torch.cuda.max_memory_allocated(self.device) - self.before
        elif Path("/proc/self/clear_refs").exists():
            self.rise = read_status("VmHWM") - self.before


def read_status(key):
    """Return the bytes that a line "key: number kB" of /proc/self/status states."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status: no line {key}")
