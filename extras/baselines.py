"""The fourteen baselines of UVRB as encoders for eval.py (arXiv 2510.27571, section 4.1, Table 10).

    python eval.py --encoder extras/baselines.py:ViCLIP --uvrb DIR
    BASELINE=FOLDER_OR_HUB_ID python eval.py --encoder extras/baselines.py:GME-2B --uvrb DIR

A baseline is a row of ROWS. Its family is one function that loads weights and one that embeds
items. BASELINE says where the weights lie, if not at the row's hub id. No code of the hub runs:
weights are safetensors, or pickles that torch.load reads with weights_only=True, and each tensor of
a file must be used or stand in its family's list of unused ones.

Here: the registry and the models of two towers, which are CLIP with more than one frame and
InternVideo2. The models on top of a language model are in baselines_mllm.py.

None of this was tried with the released weights: no hub was in reach. Tests compare each family's
forward with golden values of its upstream modules, tiny and random.

Legend: B batch, F frames, P patches of a frame, T tokens, D a tower's width, E embedding dim.
"""

import atexit
import dataclasses
import functools
import gzip
import hashlib
import html
import json
import math
import os
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights  # PEFT brings it
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, for a script

from model import checkpoint_file, fingerprint_weights, first_line, is_hub_id
from support.media import MediaError, load_image, load_video

# The registry


@dataclasses.dataclass(frozen=True)
class Baseline:
    """One of the fourteen.

    settings: constants of its family, those that the paper leaves open among them. All of them go
    into results.json's protocol.
    """

    name: str  # as in published.json
    hub: str  # hub id of the weights
    family: str  # a key of FAMILIES, or X of load_X and embed_X in baselines_mllm.py
    licence: str
    weights: str = "model.safetensors"  # the file's name if it is neither this nor sharded
    frames: int = 8  # of a video (section 4.1)
    settings: dict = dataclasses.field(default_factory=dict)


# PAPER: silent about queries of text and a medium for models of two towers. "sum" adds the two
# projected vectors, as UniIR's and MMEB's CLIP baselines do; "unit sum" adds their unit vectors.
COMPOSED = ("sum", "unit sum")

# Their texts carry no instruction. The keys of settings:
#   layout       names of the tensors, a key of CLIP_NAMES
#   video        how frames become one vector, a key of CLIP_VIDEO
#   heads        attention heads of the vision and the text tower; the tensors tell all other sizes
#   text_tokens  longer texts lose their tail; start and end token included
#   tokenizer    hub id of the tokenizer for a folder that brings none
#   unescape     whether HTML's entities in texts are resolved
#   resize       a key of RESIZE
#   colours      a key of COLOURS
#   image        "one frame", or "repeated" to the number of frames
#   composed     one of COMPOSED
CLIP = {
    "layout": "huggingface",
    "video": "mean",
    "heads": (12, 8),
    "activation": "quick_gelu",
    "text_tokens": 77,
    "tokenizer": "openai/clip-vit-large-patch14",
    "unescape": False,
    "resize": "crop bicubic",
    "colours": "clip",
    "image": "one frame",
    "composed": "sum",
}

# Upstream cuts its texts at 32 tokens. It also repairs broken Unicode with ftfy, which is left out.
VICLIP = CLIP | {
    "layout": "viclip",
    "video": "joint",
    "heads": (16, 12),
    "text_tokens": 32,
    "unescape": True,
    "resize": "squash bilinear",
    "colours": "imagenet",
}

VIDEOCLIP_XL = VICLIP | {"layout": "videoclip-xl", "text_tokens": 248}

# PAPER: silent about images. Upstream sends them to a second model whose space is another one.
# Upstream's frames are mirrored at random, at inference, too: left out.
LANGUAGEBIND = CLIP | {
    "video": "time",
    "heads": (16, 16),
    "activation": "gelu",
    "resize": "crop bilinear",
    "image": "repeated",
}

# PAPER: 8 frames for a model of 4, whose positions are then interpolated as upstream's code can;
# frames=4 in the rows is the other choice. pre_text and bicubic are upstream's benchmark; its demo
# leaves texts as they are and resizes bilinearly.
INTERNVIDEO2 = {
    "trained_frames": 4,
    "heads": 16,
    "pooling_heads": 16,
    "text_heads": 16,
    "text_layers": 19,  # of 24: the others are the re-ranker, which the paper leaves out
    "text_tokens": 40,
    "tokenizer": "bert-large-uncased",
    "pre_text": True,
    "resize": "squash bicubic",
    "colours": "imagenet",
    "image": "one frame",
    "composed": "sum",
}

# licence is that of the weights; "code" says that only their code names one. CLIP4Clip's hub id is
# inferred from the model's size: the paper gives no link, and its authors released no weights.
ROWS = [
    Baseline(
        name="CLIP4Clip",
        hub="Searchium-ai/clip4clip-webvid150k",
        family="clip",
        licence="not named",
        weights="pytorch_model.bin",
        settings=CLIP,
    ),
    Baseline(
        name="ViCLIP",
        hub="OpenGVLab/ViCLIP-L-14-hf",
        family="clip",
        licence="code: Apache-2.0",
        settings=VICLIP,
    ),
    Baseline(
        name="VideoCLIP-XL",
        hub="alibaba-pai/VideoCLIP-XL",
        family="clip",
        licence="CC-BY-NC-SA-4.0",
        weights="VideoCLIP-XL.bin",
        settings=VIDEOCLIP_XL,
    ),
    Baseline(
        name="LanguageBind",
        hub="LanguageBind/LanguageBind_Video_Huge_V1.5_FT",
        family="clip",
        licence="MIT",
        weights="pytorch_model.bin",
        settings=LANGUAGEBIND,
    ),
    Baseline(
        name="InternVideo2-1B",
        hub="OpenGVLab/InternVideo2-Stage2_1B-224p-f4",
        family="internvideo2",
        licence="Apache-2.0",
        weights="InternVideo2-stage2_1b-224p-f4.pt",
        settings=INTERNVIDEO2,
    ),
    # Its repository with an audio encoder holds a pickle of classes, which torch.load refuses.
    Baseline(
        name="InternVideo2-6B",
        hub="OpenGVLab/InternVideo2-Stage2_6B",
        family="internvideo2",
        licence="MIT",
        settings=INTERNVIDEO2 | {"heads": 25},
    ),
    Baseline("GME-2B", "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct", "qwen2vl", "Apache-2.0"),
    Baseline("GME-7B", "Alibaba-NLP/gme-Qwen2-VL-7B-Instruct", "qwen2vl", "Apache-2.0"),
    Baseline("Unite-2B", "friedrichor/Unite-Base-Qwen2-VL-2B", "qwen2vl", "Apache-2.0"),
    Baseline("Unite-7B", "friedrichor/Unite-Base-Qwen2-VL-7B", "qwen2vl", "Apache-2.0"),
    Baseline("VLM2Vec-V2", "VLM2Vec/VLM2Vec-V2.0", "qwen2vl", "Apache-2.0"),
    Baseline("B3-7B", "raghavlite/B3_Qwen2_7B", "qwen2vl", "code: Apache-2.0"),
    Baseline("BGE-VL", "BAAI/BGE-VL-v1.5-mmeb", "llava", "MIT"),
    Baseline("UniME-7B", "DeepGlint-AI/UniME-LLaVA-OneVision-7B", "llava", "code: MIT"),
]
BASELINES = {row.name: row for row in ROWS}


def __getattr__(name):
    """Load the baseline of this name -> its encoder; eval.py's --encoder FILE.py:NAME asks for it.

    Raises ValueError for a name that is none of the fourteen.
    """
    if name.startswith("__"):  # Python's own questions to a module
        raise AttributeError(name)
    if name not in BASELINES:
        raise ValueError(f"no baseline {name!r}; accepted: {', '.join(BASELINES)}")
    return make_encoder(BASELINES[name], os.environ.get("BASELINE"))


def make_encoder(row, path=None, device=None):
    """Load a baseline -> a function (items, instruction) -> (n, E) float32, NaN for failed items.

    path: folder or hub id of the weights, by default the row's. device: by default a GPU if there
    is one. Media are arrays that the function's `prepare` made, or paths and spans as in data.py.
    Its other attributes are for eval.py (see its Function) and `model`, the loaded model. How many
    texts were longer than the model's limit is printed when the program ends, not written into
    results.json, as vectors that eval.py finds in its cache are not counted.
    Raises ValueError if the weights cannot be had or do not fit.
    """
    path = str(path or row.hub)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not Path(path).is_dir() and not is_hub_id(path):
        raise ValueError(f"{row.name}: {path} is neither a folder nor a hub id, owner/name")
    load, embed, own_row = find_family(row)
    try:
        model = load(own_row, path, device)
    except OSError as error:  # of the hub: an absent or gated id, or no connection
        raise ValueError(
            f"{row.name}: {path} cannot be read: {first_line(error)}; its licence may have to be "
            "accepted at the hub; BASELINE=FOLDER takes the weights from a folder"
        ) from error

    notes = model.protocol
    protocol = {"baseline": row.name, "weights": path, "licence": row.licence, **notes}
    del protocol["texts_cut"]
    settings = json.dumps(protocol | {"weights": ""}, sort_keys=True)  # wherever they lie

    def encoder(items, instruction=None):
        ready, places = decode_items(items, row.frames, model.prepare)
        vectors = torch.full((len(items), model.dim), math.nan)
        if ready:
            vectors[places] = torch.as_tensor(embed(model, ready, instruction)).float().cpu()
        return vectors

    def report():
        if notes["texts_cut"]:
            print(f"{row.name}: texts cut at its limit: {notes['texts_cut']}")

    atexit.register(report)
    encoder.frames = row.frames
    encoder.prepare = model.prepare
    encoder.fingerprint = model.fingerprint + hashlib.sha256(settings.encode()).hexdigest()[:16]
    encoder.protocol = protocol
    encoder.parameters = model.parameters
    encoder.published = row.name
    encoder.model = model
    return encoder


def find_family(row):
    """Return a row's load(row, path, device) -> model and embed(model, items, instruction), and the
    row as load wants it.

    A model has what make_encoder reads: prepare, dim, fingerprint, parameters and protocol.
    """
    if row.family in FAMILIES:
        return *FAMILIES[row.family], row
    from extras import baselines_mllm

    load = getattr(baselines_mllm, f"load_{row.family}")
    embed = getattr(baselines_mllm, f"embed_{row.family}")
    return load, embed, baselines_mllm.MLLMS[row.name]


def decode_items(items, frames, prepare):
    """Decode the media that are paths still -> (items whose media are prepared arrays, their
    places in `items`); those that cannot be decoded are printed and left out.
    """
    ready = []
    places = []
    for i, item in enumerate(items):
        item = dict(item)
        try:
            if item.get("image") is not None and not isinstance(item["image"], np.ndarray):
                item["image"] = prepare(load_image(item["image"])[None])
            if item.get("video") is not None and not isinstance(item["video"], np.ndarray):
                item["video"] = prepare(load_video(item["video"], frames)[0])
        except (MediaError, OSError) as error:
            print(f"no vector: {error}")
            continue
        ready.append(item)
        places.append(i)
    return ready, places


# Weights


def read_weights(path, row):
    """Read all tensors of a baseline's files -> {name in the file: tensor on the CPU}.

    Raises ValueError if there is no such file or it holds anything but tensors.
    """
    index = checkpoint_file(path, "model.safetensors.index.json")
    if index:
        shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    elif checkpoint_file(path, "model.safetensors"):
        shards = ["model.safetensors"]
    else:
        shards = [row.weights]

    tensors = {}
    for shard in shards:
        file = checkpoint_file(path, shard)
        if file is None:
            raise ValueError(
                f"{row.name}: {path} has no {shard}, or the hub is out of reach; BASELINE=FOLDER "
                "takes the weights from a folder"
            )
        try:
            if shard.endswith(".safetensors"):
                tensors |= load_file(file)
            else:
                tensors |= read_pickle(file)
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{row.name}: {file} is no file of tensors: {error}") from error
    return tensors


def read_pickle(file):
    """Read a state dict that torch.save wrote -> {name: tensor}; DeepSpeed puts it a level deeper.

    Raises pickle.UnpicklingError for a file that names anything but tensors and plain containers.
    """
    state = torch.load(file, weights_only=True, map_location="cpu")
    for wrapper in ("module", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise pickle.UnpicklingError(f"a {type(state).__name__} where a state dict was expected")
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def find_tensor(tensors, name, row, path):
    """Return a tensor of a file. Raises ValueError naming it if the file lacks it."""
    if name not in tensors:
        found = ", ".join(list(tensors)[:3])
        raise ValueError(
            f"{row.name}: {path} holds other weights: expected a tensor {name}, found {found}, ..."
        )
    return tensors[name]


def count_layers(tensors, first):
    """Count the layers of a tower; first: the name of any tensor of layer 0, in the file."""
    prefix = first.partition("0.")[0]
    numbers = [0]
    for name in tensors:
        number = name.removeprefix(prefix).partition(".")[0]
        if name.startswith(prefix) and number.isdigit():
            numbers.append(int(number))
    return max(numbers) + 1


def fill(model, tensors, source, unused, row, path):
    """Fill a model that was built without memory with tensors of a file -> their fingerprint.

    source: function of a parameter's name -> (the tensor's name in the file, function of the tensor
    that gives the parameter). unused: pattern of names that a file may hold for nothing.
    Raises ValueError naming tensors that are missing, left over, or of another shape.
    """
    state = {}
    used = set()
    missing = set()
    misshapen = []
    for name, parameter in model.state_dict().items():
        file_name, convert = source(name)
        used.add(file_name)
        if file_name not in tensors:
            missing.add(file_name)
            continue
        state[name] = convert(tensors[file_name])
        expected = tuple(parameter.shape)
        if state[name].shape != expected:
            misshapen.append(f"{file_name} (expected {expected}, got {tuple(state[name].shape)})")

    extra = []
    for name in tensors:
        if name not in used and not re.fullmatch(unused, name):
            extra.append(name)

    problems = []
    kinds = {"missing": missing, "unexpected": extra, "of another shape": misshapen}
    for kind, names in kinds.items():
        if names:
            problems.append(f"{len(names)} {kind}: {', '.join(sorted(names)[:3])}")
    if problems:
        raise ValueError(f"{row.name}: tensors of {path} do not fit; {'; '.join(problems)}")

    model.load_state_dict(state, assign=True)
    return fingerprint_weights(state)


# Models of two towers: texts and frames meet in one space


@dataclasses.dataclass
class Dual:
    """A loaded model of two towers."""

    row: Baseline
    towers: nn.Module
    tokenizer: object
    size: int  # frames are so many pixels high and wide
    encode_text: object  # function of towers, ids (B, T), mask (B, T) -> (B, E)
    encode_video: object  # function of towers, pixels (B, F, 3, H, W) -> (B, E)
    fingerprint: str
    dim: int
    parameters: int
    protocol: dict  # "texts_cut" counts texts that lost their tail

    @property
    def prepare(self):
        """Function of frames uint8 (F, H, W, 3) -> (F, size, size, 3), for a decoding process."""
        return functools.partial(RESIZE[self.row.settings["resize"]], size=self.size)


def finish(row, towers, device, **fields):
    """Move towers to a device, in bfloat16 on a GPU as section 4.1 has it -> Dual."""
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    towers = towers.to(device, dtype).eval().requires_grad_(False)
    parameters = sum(p.numel() for p in towers.parameters())
    protocol = {"frames": row.frames, **row.settings, "texts_cut": 0}
    protocol["dtype"] = str(dtype).removeprefix("torch.")
    return Dual(row, towers, parameters=parameters, protocol=protocol, **fields)


BATCH = 8  # items per forward pass


@torch.no_grad()
def embed_dual(dual, items, instruction):
    """Embed items with two towers -> unit vectors (n, E) float32 on the CPU.

    items: dicts with any of "text", "image" and "video", media as dual.prepare gives them.
    instruction: not used, texts never carry one. Raises ValueError for another number of frames
    than the row's: one frame would count as an image.
    """
    texts = []  # (item's number, text)
    clips = {}  # {number of frames: [(item's number, frames)]}
    for i, item in enumerate(items):
        if item.get("text"):
            texts.append((i, item["text"]))
        for kind in ("image", "video"):
            if item.get(kind) is not None:
                frames = with_time(item[kind])
                if kind == "video" and len(frames) != dual.row.frames:
                    raise ValueError(f"expected {dual.row.frames} frames, got {len(frames)}")
                if kind == "image" and dual.row.settings["image"] == "repeated":
                    frames = np.repeat(frames, dual.row.frames, axis=0)
                clips.setdefault(len(frames), []).append((i, frames))

    parts = [[] for _ in items]  # the projected vectors of each item

    def keep(batch, vectors):
        for (i, _), vector in zip(batch, vectors.float().cpu(), strict=True):
            parts[i].append(vector)

    for batch in batched(texts, BATCH):
        ids, mask = tokenize(dual, [text for _, text in batch])
        keep(batch, dual.encode_text(dual.towers, ids, mask))
    for same_length in clips.values():
        for batch in batched(same_length, BATCH):
            pixels = normalise_colours(dual, np.stack([frames for _, frames in batch]))
            keep(batch, dual.encode_video(dual.towers, pixels))
    composed = dual.row.settings["composed"]
    return torch.stack([compose(vectors, composed) for vectors in parts])


def batched(rows, size):
    """Cut a list into lists of at most `size`."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def compose(vectors, how):
    """Join the projected vectors of an item's text and media, each (E,) -> a unit vector (E,)."""
    if how not in COMPOSED:
        raise ValueError(f"composed {how!r} is unknown; accepted: {', '.join(COMPOSED)}")
    if how == "unit sum":
        vectors = [F.normalize(vector, dim=-1) for vector in vectors]
    return F.normalize(torch.stack(vectors).sum(0), dim=-1)


# Texts


def tokenize(dual, texts):
    """Tokenize and pad texts -> ids (B, T), mask (B, T). Texts beyond the limit lose their tail.

    The start and the end token always stay. Padding does not matter to the vectors, so the longest
    text decides T.
    """
    settings = dual.row.settings
    limit = settings["text_tokens"]
    rows = []
    for text in texts:
        if settings.get("unescape"):
            text = html.unescape(html.unescape(text))
        if settings.get("pre_text"):
            text = pre_text(text)
        ids = dual.tokenizer(text, verbose=False)["input_ids"]
        if len(ids) > limit:
            dual.protocol["texts_cut"] += 1
            ids = ids[: limit - 1] + ids[-1:]
        rows.append(torch.tensor(ids))

    device = next(dual.towers.parameters()).device
    padding = dual.tokenizer.pad_token_id
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
    ones = [torch.ones_like(row) for row in rows]
    mask = nn.utils.rnn.pad_sequence(ones, batch_first=True)
    return ids.to(device), mask.to(device)


def pre_text(text):
    """Clean a text as InternVideo2's benchmark does: lower case, no punctuation, single spaces."""
    text = re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())
    text = re.sub(r"[-/]", " ", text)
    return " ".join(text.split())


def load_tokenizer(path, row):
    """Load the tokenizer of a baseline's folder, else the one that its row names."""
    # Not AutoTokenizer, which asks config.json for a model type that transformers may not know.
    tokenizer_class = CLIPTokenizer if row.family == "clip" else BertTokenizer
    for name in ("tokenizer.json", "vocab.json", "vocab.txt"):
        if checkpoint_file(path, name):
            return tokenizer_class.from_pretrained(path)
    merges = checkpoint_file(path, "bpe_simple_vocab_16e6.txt.gz")
    if merges:
        return read_openai_vocabulary(merges)
    return tokenizer_class.from_pretrained(row.settings["tokenizer"])


def read_openai_vocabulary(file):
    """Make a tokenizer of OpenAI CLIP's own file -> CLIPTokenizer.

    The file has a header, 48,894 merges of which line i makes token 512 + i, and more that CLIP
    does not use. Before them come the 256 letters that stand for bytes, in GPT-2's order, and the
    same as ends of words.
    """
    lines = gzip.decompress(Path(file).read_bytes()).decode().split("\n")
    merges = []
    for line in lines[1 : 49152 - 256 - 2 + 1]:
        if line:
            merges.append(tuple(line.split()))

    # Printable bytes stand for themselves; the others get letters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable]
    letters += [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + [letter + "</w>" for letter in letters]
    tokens += ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


# Frames


COLOURS = {  # mean and standard deviation of red, green and blue
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def normalise_colours(dual, frames):
    """Turn prepared frames (B, F, H, W, 3), 0 to 255, into a tower's pixels (B, F, 3, H, W)."""
    parameter = next(dual.towers.parameters())
    mean, std = COLOURS[dual.row.settings["colours"]]
    pixels = torch.as_tensor(frames).to(parameter.device).float() / 255
    pixels = (pixels - pixels.new_tensor(mean)) / pixels.new_tensor(std)
    return pixels.movedim(-1, 2).to(parameter.dtype)


def short_side(height, width, size):
    """Scale (height, width) so that the short side is `size`; the long one is rounded down."""
    if height < width:
        return size, int(size * width / height)
    return int(size * height / width), size


def centre(frames, size):
    """Cut the central square from frames (F, H, W, 3)."""
    top = round((frames.shape[1] - size) / 2)
    left = round((frames.shape[2] - size) / 2)
    return frames[:, top : top + size, left : left + size]


def interpolate(frames, shape, mode):
    """Resize frames (F, H, W, 3) without antialiasing -> float32 0 to 255."""
    pixels = torch.tensor(frames).movedim(-1, 1).float()
    pixels = F.interpolate(pixels, shape, mode=mode, align_corners=False, antialias=False)
    return pixels.clamp(0, 255).movedim(1, -1).contiguous().numpy()


def with_time(frames):
    """Give an image (H, W, 3) an axis of time; frames (F, H, W, 3) have one."""
    return frames.reshape(-1, *frames.shape[-3:])


def crop_bicubic(frames, size):
    """Short side to `size` by Pillow's bicubic rule, then the central square (CLIP4Clip)."""
    frames = with_time(frames)
    height, width = short_side(*frames.shape[1:3], size)
    resized = []
    for frame in frames:
        image = Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC)
        resized.append(np.asarray(image))
    return np.ascontiguousarray(centre(np.stack(resized), size))


def crop_bilinear(frames, size):
    """Short side to `size`, bilinear, then the central square; never rounded (LanguageBind)."""
    frames = with_time(frames)
    shape = short_side(*frames.shape[1:3], size)
    return np.ascontiguousarray(centre(interpolate(frames, shape, "bilinear"), size))


def squash_bilinear(frames, size):
    """Squash to a square, bilinear, as OpenCV does by default (ViCLIP, VideoCLIP-XL)."""
    frames = interpolate(with_time(frames), (size, size), "bilinear")
    return frames.round().astype(np.uint8)


def squash_bicubic(frames, size):
    """Squash to a square, bicubic, as torchvision 0.14 did to tensors (InternVideo2)."""
    frames = interpolate(with_time(frames), (size, size), "bicubic")
    return frames.round().astype(np.uint8)


RESIZE = {
    "crop bicubic": crop_bicubic,
    "crop bilinear": crop_bilinear,
    "squash bilinear": squash_bilinear,
    "squash bicubic": squash_bicubic,
}


# CLIP with more than one frame: CLIP4Clip, ViCLIP, VideoCLIP-XL, LanguageBind

OPENAI_NAMES = {  # part of a name in transformers' CLIPModel: the same in OpenAI's layout
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.q_proj.": "attn.in_proj_",
    "self_attn.k_proj.": "attn.in_proj_",
    "self_attn.v_proj.": "attn.in_proj_",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.class_embedding": "class_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.temporal_embedding": "temporal_positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
}

# Layout: names of the towers and of their projections.
CLIP_NAMES = {
    "huggingface": {},
    "viclip": {
        "vision_model.": "vision_encoder.",
        "text_model.": "text_encoder.",
        "visual_projection.weight": "vision_encoder.proj",
        "text_projection.weight": "text_encoder.text_projection",
    },
    "videoclip-xl": {
        "vision_model.": "vision_model.vision_encoder.",
        "text_model.": "text_model.",
        "visual_projection.weight": "vision_model.vision_encoder.proj",
        "text_projection.weight": "text_model.text_projection",
    },
}
CLIP_UNUSED = r"(.*\.)?(position_ids|logit_scale|temp)"  # buffers and temperatures
KEPT_POSITIONS = 20  # VideoCLIP-XL: the first rows of its text positions are CLIP's


def clip_source(layout, name):
    """Return a parameter's name in the file, and how the file's tensor becomes the parameter.

    layout: a key of CLIP_NAMES; name: in transformers' CLIPModel.
    """
    names = CLIP_NAMES[layout]
    if name in names:  # a projection: OpenAI multiplies from the other side
        return names[name], torch.t
    file_name = name
    if names:
        tower, dot, rest = name.partition(".")
        for ours, theirs in OPENAI_NAMES.items():
            rest = rest.replace(ours, theirs)
        file_name = names[tower + dot] + rest

    def convert(tensor):
        if tensor.ndim == 5:  # a convolution over one frame at a time
            return tensor.squeeze(2)
        if file_name.endswith(("in_proj_weight", "in_proj_bias")):
            letter = name.split(".")[-2][0]  # of q_proj, k_proj or v_proj
            return tensor.chunk(3)["qkv".index(letter)]
        return tensor

    return file_name, convert


class TimeLayer(CLIPEncoderLayer):
    """LanguageBind's layer: attention over the frames at each place, then CLIP's layer."""

    def __init__(self, config, frames):
        super().__init__(config)
        self.temporal_embedding = nn.Parameter(torch.empty(1, frames, config.hidden_size))
        self.temporal_attn = CLIPAttention(config)
        self.temporal_layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden, attention_mask=None, **kwargs):
        """Take and give states (B F, T, D)."""
        frames = self.temporal_embedding.shape[1]
        tokens = hidden.shape[1]
        x = hidden.unflatten(0, (-1, frames)).transpose(1, 2).flatten(0, 1)  # (B T, F, D)
        x = x + self.temporal_embedding  # which stays in the residual stream
        x = x + self.temporal_attn(self.temporal_layer_norm1(x))[0]
        hidden = x.unflatten(0, (-1, tokens)).transpose(1, 2).flatten(0, 1)  # (B F, T, D)
        return super().forward(hidden, attention_mask, **kwargs)


def load_clip(row, path, device):
    """Load a CLIP -> Dual.

    Raises ValueError if the tensors do not fit, OSError if the hub has none.
    """
    layout = row.settings["layout"]
    tensors = read_weights(path, row)
    if layout == "videoclip-xl":
        merge_text_positions(tensors, row, path)
    config = clip_config(tensors, row, path)
    tokenizer = load_tokenizer(path, row)
    config.text_config.eos_token_id = tokenizer.eos_token_id  # the pooled token
    with init_empty_weights():
        towers = build_clip(config, row)
    source = functools.partial(clip_source, layout)
    fingerprint = fill(towers, tensors, source, CLIP_UNUSED, row, path)
    return finish(
        row,
        towers,
        device,
        tokenizer=tokenizer,
        size=config.vision_config.image_size,
        encode_text=clip_text,
        encode_video=CLIP_VIDEO[row.settings["video"]],
        fingerprint=fingerprint,
        dim=config.projection_dim,
    )


def clip_config(tensors, row, path):
    """Read a CLIP's sizes from its tensors; they do not tell the number of heads.

    Raises ValueError for tensors of another family.
    """
    settings = row.settings

    def shape(name):
        file_name, convert = clip_source(settings["layout"], name)
        return convert(find_tensor(tensors, file_name, row, path)).shape

    def tower(name, heads):
        first = f"{name}.encoder.layers.0."
        return {
            "hidden_size": shape(first + "layer_norm1.weight")[0],
            "intermediate_size": shape(first + "mlp.fc1.bias")[0],
            "num_hidden_layers": count_layers(tensors, clip_source(settings["layout"], first)[0]),
            "num_attention_heads": heads,
            "hidden_act": settings["activation"],
            "layer_norm_eps": 1e-5,
        }

    patch = shape("vision_model.embeddings.patch_embedding.weight")[-1]
    places = shape("vision_model.embeddings.position_embedding.weight")[0] - 1
    vision = {"patch_size": patch, "image_size": patch * math.isqrt(places)}
    text = {
        "vocab_size": shape("text_model.embeddings.token_embedding.weight")[0],
        "max_position_embeddings": settings["text_tokens"],
    }
    vision_heads, text_heads = settings["heads"]
    return CLIPConfig(
        vision_config=vision | tower("vision_model", vision_heads),
        text_config=text | tower("text_model", text_heads),
        projection_dim=shape("visual_projection.weight")[0],
    )


def build_clip(config, row):
    """Build a CLIPModel with what its kind of video adds to it."""
    clip = CLIPModel(config)
    clip.logit_scale = None  # cosines need none
    vision = config.vision_config
    if row.settings["video"] == "joint":
        times = torch.empty(1, row.frames, vision.hidden_size)
        clip.vision_model.embeddings.temporal_embedding = nn.Parameter(times)
    if row.settings["video"] == "time":
        classes = torch.empty(row.frames, vision.hidden_size)
        clip.vision_model.embeddings.class_embedding = nn.Parameter(classes)
        layers = [TimeLayer(vision, row.frames) for _ in range(vision.num_hidden_layers)]
        clip.vision_model.encoder.layers = nn.ModuleList(layers)
    return clip


def merge_text_positions(tensors, row, path):
    """Make VideoCLIP-XL's two tables of text positions one: CLIP's first rows, then its own."""
    name = "text_model.positional_embedding"
    for table in (name, f"{name}_res"):
        find_tensor(tensors, table, row, path)
    merged = tensors.pop(f"{name}_res").clone()
    merged[:KEPT_POSITIONS] = tensors[name][:KEPT_POSITIONS]
    tensors[name] = merged


def clip_text(towers, ids, mask):
    """Project the end token's state -> (B, E). Its causal mask hides the padding."""
    return towers.get_text_features(ids).pooler_output


def mean_of_frames(towers, pixels):
    """CLIP4Clip: the mean of the frames' unit vectors -> (B, E)."""
    frames = towers.get_image_features(pixels.flatten(0, 1)).pooler_output
    return F.normalize(frames, dim=-1).unflatten(0, pixels.shape[:2]).mean(1)


def embed_patches(embeddings, pixels):
    """Embed patches and add the positions of their places -> (B, F, P, D)."""
    patches = embeddings.patch_embedding(pixels.flatten(0, 1)).flatten(2).transpose(1, 2)
    patches = patches + embeddings.position_embedding.weight[1:]
    return patches.unflatten(0, pixels.shape[:2])


def joint_frames(towers, pixels):
    """ViCLIP: one sequence of a class token and all frames' patches -> (B, E)."""
    vision = towers.vision_model
    embeddings = vision.embeddings
    patches = embed_patches(embeddings, pixels)
    batch, frames, _, width = patches.shape
    time = embeddings.temporal_embedding  # (1, F, D)
    if frames == 1:
        time = time.mean(1, keepdim=True)  # an image
    patches = patches + time[:, :, None]

    first = embeddings.class_embedding + embeddings.position_embedding.weight[0]
    tokens = torch.cat([first.expand(batch, 1, width), patches.flatten(1, 2)], 1)
    hidden = vision.encoder(vision.pre_layrnorm(tokens)).last_hidden_state
    return towers.visual_projection(vision.post_layernorm(hidden[:, 0]))


def frames_over_time(towers, pixels):
    """LanguageBind: a sequence per frame, its layers look over time; mean of frames -> (B, E)."""
    vision = towers.vision_model
    embeddings = vision.embeddings
    patches = embed_patches(embeddings, pixels)
    # Each frame has its own class token.
    first = embeddings.class_embedding + embeddings.position_embedding.weight[0]  # (F, D)
    first = first[:, None].expand(len(patches), -1, -1, -1)  # (B, F, 1, D)
    tokens = torch.cat([first, patches], 2).flatten(0, 1)
    hidden = vision.encoder(vision.pre_layrnorm(tokens)).last_hidden_state
    frames = vision.post_layernorm(hidden[:, 0]).unflatten(0, pixels.shape[:2])
    return towers.visual_projection(frames.mean(1))


CLIP_VIDEO = {"mean": mean_of_frames, "joint": joint_frames, "time": frames_over_time}


# InternVideo2, stage 2. Modules and parameters carry the names of the released files.

INTERNVIDEO2_UNUSED = (
    # Decoders of its training, temperatures, the match head that re-ranks, the audio tower
    r"(.*\.)?(clip_decoder\..*|final_clip_decoder\..*|clip_pos_embed|clip_img_pos_embed|temp)"
    r"|(.*\.)?(itm_head|audio\w*)\..*"
    # BERT's head, buffers
    r"|(.*\.)?text_encoder\.cls\..*|.*position_ids"
)


def split_heads(x, heads):
    """(B, T, D) -> (B, heads, T, D / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q, k, v, heads):
    """Attend from q to k and v, each (B, T, D) -> (B, T of q, D)."""
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention; queries and keys are normalised over the whole width, before the heads."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = nn.RMSNorm(width, eps=1e-6)
        self.k_norm = nn.RMSNorm(width, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(attend(self.q_norm(q), self.k_norm(k), v, self.heads))


class Scale(nn.Module):
    """A factor per channel, multiplied in float32 as upstream does."""

    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x):
        return (x.float() * self.gamma.float()).to(x.dtype)


class Mlp(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width, heads, inner):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = Scale(width)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = Mlp(width, inner)
        self.ls2 = Scale(width)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class CrossAttention(nn.Module):
    def __init__(self, width, heads, dim):
        super().__init__()
        self.heads = heads
        for letter in "qkv":
            self.add_module(letter, nn.Linear(width, width, bias=False))
            self.register_parameter(f"{letter}_bias", nn.Parameter(torch.empty(width)))
        self.proj = nn.Linear(width, dim)

    def forward(self, q, k, v):
        q = self.q(q) + self.q_bias
        k = self.k(k) + self.k_bias
        v = self.v(v) + self.v_bias
        return self.proj(attend(q, k, v, self.heads))


class AttentionPool(nn.Module):
    """Attend to all tokens with their mean as the query: (B, T, D) -> (B, dim)."""

    def __init__(self, width, heads, dim):
        super().__init__()
        self.norm1_q = nn.LayerNorm(width)
        self.norm1_k = nn.LayerNorm(width)
        self.norm1_v = nn.LayerNorm(width)
        self.cross_attn = CrossAttention(width, heads, dim)

    def forward(self, x):
        mean = self.norm1_q(x.mean(1, keepdim=True))
        return self.cross_attn(mean, self.norm1_k(x), self.norm1_v(x))[:, 0]


class InternVideo2Vision(nn.Module):
    """InternVideo2's vision tower: pixels (B, F, 3, H, W) -> (B, dim).

    image_positions: whether images have a table of positions of their own (1B; not 6B).
    """

    def __init__(
        self, width, heads, layers, inner, patch, places, frames, pool_heads, dim, image_positions
    ):
        super().__init__()
        self.frames = frames
        kernel = (1, patch, patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, width, kernel, stride=kernel)})
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + frames * places, width))
        self.img_pos_embed = None
        if image_positions:
            self.img_pos_embed = nn.Parameter(torch.empty(1, 1 + places, width))
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.clip_projector = AttentionPool(width, pool_heads, dim)

    def positions(self, frames):
        """Positions of the class token and of so many frames' patches -> (1, 1 + F P, D)."""
        if frames == 1 and self.img_pos_embed is not None:
            return self.img_pos_embed
        first = self.pos_embed[:, :1]
        table = self.pos_embed[:, 1:].unflatten(1, (self.frames, -1))  # (1, F, P, D)
        if frames == 1:
            table = table.mean(1, keepdim=True)
        elif frames != self.frames:
            series = table.flatten(2).transpose(1, 2).float()  # (1, P D, F)
            series = F.interpolate(series, frames, mode="linear", align_corners=False)
            table = series.transpose(1, 2).unflatten(2, table.shape[2:]).to(table.dtype)
        return torch.cat([first, table.flatten(1, 2)], 1)

    def forward(self, pixels):
        patches = self.patch_embed["proj"](pixels.transpose(1, 2)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)
        x = x + self.positions(pixels.shape[1])
        for block in self.blocks:
            x = block(x)
        return self.clip_projector(x)  # there is no norm before it


def load_internvideo2(row, path, device):
    """Load an InternVideo2 -> Dual. All sizes but those of its row are those of the tensors.

    Raises ValueError if the tensors do not fit, OSError if the hub has none.
    """
    settings = row.settings
    tensors = read_weights(path, row)
    # The released files differ in what stands before the names.
    prefix = ""
    for name in tensors:
        if name.endswith("vision_encoder.cls_token"):
            prefix = name.removesuffix("vision_encoder.cls_token")

    def shape(name):
        return find_tensor(tensors, prefix + name, row, path).shape

    width, *_, patch = shape("vision_encoder.patch_embed.proj.weight")
    places = (shape("vision_encoder.pos_embed")[1] - 1) // settings["trained_frames"]
    pooled, _ = shape("vision_encoder.clip_projector.cross_attn.proj.weight")
    vocabulary, text_width = shape("text_encoder.bert.embeddings.word_embeddings.weight")
    dim, _ = shape("vision_proj.weight")
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        num_hidden_layers=settings["text_layers"],
        num_attention_heads=settings["text_heads"],
        intermediate_size=shape("text_encoder.bert.encoder.layer.0.intermediate.dense.bias")[0],
        max_position_embeddings=shape("text_encoder.bert.embeddings.position_embeddings.weight")[0],
    )

    with init_empty_weights():
        vision = InternVideo2Vision(
            width=width,
            heads=settings["heads"],
            layers=count_layers(tensors, f"{prefix}vision_encoder.blocks.0."),
            inner=shape("vision_encoder.blocks.0.mlp.fc1.bias")[0],
            patch=patch,
            places=places,
            frames=settings["trained_frames"],
            pool_heads=settings["pooling_heads"],
            dim=pooled,
            image_positions=f"{prefix}vision_encoder.img_pos_embed" in tensors,
        )
        bert = BertModel(config, add_pooling_layer=False)
        towers = nn.ModuleDict(
            {
                "vision_encoder": vision,
                "vision_proj": nn.Linear(pooled, dim),
                "text_encoder": nn.ModuleDict({"bert": bert}),
                "text_proj": nn.Linear(text_width, dim),
            }
        )

    # Layers of the re-ranker, and nothing else, may be left over.
    for name in list(tensors):
        layer = name.removeprefix(f"{prefix}text_encoder.bert.encoder.layer.").partition(".")[0]
        if layer.isdigit() and int(layer) >= settings["text_layers"]:
            del tensors[name]

    def source(name):
        return prefix + name, lambda tensor: tensor

    fingerprint = fill(towers, tensors, source, INTERNVIDEO2_UNUSED, row, path)
    return finish(
        row,
        towers,
        device,
        tokenizer=load_tokenizer(path, row),
        size=patch * math.isqrt(places),
        encode_text=internvideo2_text,
        encode_video=internvideo2_video,
        fingerprint=fingerprint,
        dim=dim,
    )


def internvideo2_text(towers, ids, mask):
    """Project the class token's state -> (B, E)."""
    states = towers["text_encoder"]["bert"](ids, attention_mask=mask).last_hidden_state
    return towers["text_proj"](states[:, 0])


def internvideo2_video(towers, pixels):
    """Project the pooled tokens -> (B, E)."""
    return towers["vision_proj"](towers["vision_encoder"](pixels))


FAMILIES = {
    "clip": (load_clip, embed_dual),
    "internvideo2": (load_internvideo2, embed_dual),
}
