"""UVRB's eight baselines that are multimodal language models (arXiv 2510.27571, Table 10).

    family            models                                           functions
    Qwen2-VL          GME-2B, -7B, Unite-2B, -7B, VLM2Vec-V2, B3-7B    load_, embed_qwen2vl
    LLaVA-NeXT        BGE-VL                                           load_, embed_llava
    LLaVA-OneVision   UniME-7B                                         load_, embed_llava

All of them pool the last token of the last layer after the final norm and divide by its length. A
model is its row of MLLMS, its own prompt (PROMPTS) and its family's way from pixels to vision
tokens.

    model = load_qwen2vl(MLLMS["GME-2B"], FOLDER_OR_HUB_ID, "cuda")
    vectors = embed_qwen2vl(model, items, "Find the video.")  # (n, D)

An item holds a text, or pixels, or both: its "video" is a uint8 array (F, H, W, 3), its "image"
(H, W, 3). `model.prepare` shrinks either to the size that the model sees; a process that decodes
may do it earlier, since what is shrunk once stays as it is.

None of this was tried with the released weights: no hub was in reach. Tests compare the forwards
with golden values of upstream's modules and with transformers' own models, tiny and random.

Legend: B batch, T tokens, D embedding dim, F frames, V vision tokens.
"""

import bisect
import dataclasses
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from transformers import (
    AutoTokenizer,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
)
from transformers.image_utils import PILImageResampling, SizeDict

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run from any folder
from data import DEFAULT_INSTRUCTION, MIN_TOKENS, micro_batches  # noqa: E402
from model import (  # noqa: E402
    GVE,
    checkpoint_file,
    find_base,
    find_spec,
    fingerprint_weights,
    first_line,
    last_token_pool,
    load_adapter,
    load_backbone,
    load_processor,
    to_device,
)
from support.files import parse_json  # noqa: E402

BATCH_ITEMS = 32  # items of a forward pass
BATCH_TOKENS = 16384  # tokens of a forward pass, padding included


@dataclasses.dataclass(frozen=True)
class MllmRow:
    """What distinguishes one of the models; what is set stands in results.json's protocol."""

    hub_id: str
    licence: str
    prompt: str  # a name in PROMPTS
    # PAPER: says that models without native video get several images; not which ones those are.
    video: str = "native"  # one video; "images": a row of as many images
    frames: int = 8  # per video (section 4.1)
    max_length: int = 8192  # tokens of an item (section 4.1)
    # PAPER: silent. "1d": places in the row, as in the models' own code; "mrope": Qwen2-VL only.
    positions: str = "1d"
    # Qwen2-VL: most vision tokens per frame or image. LLaVA's tiles have a fixed number: 0.
    # PAPER: asks for fewer than 200 per frame, and says nothing of images.
    frame_tokens: int = 200
    # LLaVA squashes a frame to the square of one tile, and an image to this side before it is cut
    # into tiles; 0: to a tile's.
    image_side: int = 0
    frame_pool: int = 0  # LLaVA-NeXT: features are averaged in squares of this side


# PAPER: gives the queries' instructions (Table 5) and not how a baseline receives them, nor any
# prompt for the corpus. Each model gets them in the place where its own training had one; Unite's
# Base models and UniME had none.
MLLMS = {
    # GME's published code handles no video.
    "GME-2B": MllmRow(
        hub_id="Alibaba-NLP/gme-Qwen2-VL-2B-Instruct",
        licence="Apache-2.0",
        prompt="gme",
        video="images",
    ),
    "GME-7B": MllmRow(
        hub_id="Alibaba-NLP/gme-Qwen2-VL-7B-Instruct",
        licence="Apache-2.0",
        prompt="gme",
        video="images",
    ),
    "Unite-2B": MllmRow(
        hub_id="friedrichor/Unite-Base-Qwen2-VL-2B", licence="Apache-2.0", prompt="unite"
    ),
    "Unite-7B": MllmRow(
        hub_id="friedrichor/Unite-Base-Qwen2-VL-7B", licence="Apache-2.0", prompt="unite"
    ),
    "VLM2Vec-V2": MllmRow(hub_id="VLM2Vec/VLM2Vec-V2.0", licence="Apache-2.0", prompt="vlm2vec"),
    # B3 was trained on images alone, but its code takes videos.
    "B3-7B": MllmRow(hub_id="raghavlite/B3_Qwen2_7B", licence="code: Apache-2.0", prompt="b3"),
    # A frame is one tile, 576 tokens; averaged in 2x2 squares it is 144, as the paper's rule asks.
    # Such features are not what the model was trained on: frame_pool=0 may score better, with
    # 4,608 tokens per video.
    "BGE-VL": MllmRow(
        hub_id="BAAI/BGE-VL-v1.5-mmeb",
        licence="MIT",
        prompt="bge_vl",
        video="images",
        frame_tokens=0,
        image_side=512,
        frame_pool=2,
    ),
    # The model pools a frame to 14x14 tokens by itself. It was trained on images of a single tile.
    "UniME-7B": MllmRow(
        hub_id="DeepGlint-AI/UniME-LLaVA-OneVision-7B",
        licence="code: MIT",
        prompt="unime",
        frame_tokens=0,
    ),
}


# Prompts, in the words that each model was trained on


@dataclasses.dataclass
class Turn:
    """What a prompt is made of."""

    kind: str  # "image", "video" or, without either, ""
    placeholders: list  # a placeholder token for each image or video
    text: str
    instruction: str  # the dataset's prompt for queries; empty for the corpus


def gme_prompt(turn):
    """GME: the instruction is the system turn, media stand before the text."""
    media = "".join(f"<|vision_start|>{pad}<|vision_end|>" for pad in turn.placeholders)
    return (
        f"<|im_start|>system\n{turn.instruction or DEFAULT_INSTRUCTION}<|im_end|>\n"
        f"<|im_start|>user\n{media}{turn.text}<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )


def unite_prompt(turn):
    """Unite: a request to sum the content up in one word; no instruction."""
    media = "".join(f"<|vision_start|>{pad}<|vision_end|>" for pad in turn.placeholders)
    parts = []
    if turn.text:
        parts.append("sentence")
    if turn.kind:
        parts.append(turn.kind)
    what = " and ".join(parts)
    return (
        f"<|im_start|>system\n{DEFAULT_INSTRUCTION}<|im_end|>\n"
        f"<|im_start|>user\n{media}{turn.text}\nSummary above {what} in one word:<|im_end|>\n"
        "<|im_start|>assistant\n<|endoftext|>"
    )


def vlm2vec_prompt(turn):
    """VLM2Vec-V2: no chat template; bare placeholders, instruction and text, joined by spaces."""
    instruction = turn.instruction
    if not instruction and turn.kind:
        instruction = f"Understand the content of the provided {turn.kind}."  # as its targets
    parts = [*turn.placeholders, instruction, turn.text]
    return " ".join(part for part in parts if part)


def b3_prompt(turn):
    """B3: likewise, but a line break follows the media, as in the texts of MMEB."""
    instruction = turn.instruction
    if not instruction and turn.kind:
        instruction = f"Represent the given {turn.kind}."
    words = " ".join(part for part in (instruction, turn.text) if part)
    return "".join(f"{pad}\n" for pad in turn.placeholders) + words


def bge_vl_prompt(turn):
    """BGE-VL: Mistral's turn; text stands before media, and only queries have an instruction.

    The tokenizer's start token is put before it in `tokenise`.
    """
    text = f" {turn.text} \n" if turn.text else ""
    media = "".join(f" {pad}" for pad in turn.placeholders)
    if turn.instruction:
        return f"[INST] \n <instruct> {turn.instruction} <query> {text}{media} [/INST]"
    return f"[INST] {text}{media} [/INST]"


def unime_prompt(turn):
    """UniME: LLaVA-OneVision's turn and a request to sum up in one word; no instruction."""
    media = "".join(turn.placeholders)
    parts = []
    if turn.kind:
        parts.append(turn.kind)
    text = turn.text
    if text:
        parts.append("sentence")
        text += "\n"
    what = " and ".join(parts)
    return (
        f"<|im_start|>user {media}\n{text}Summary above {what} in one word:\n<|im_end|>"
        "<|im_start|>assistant\n"
    )


PROMPTS = {
    "gme": gme_prompt,
    "unite": unite_prompt,
    "vlm2vec": vlm2vec_prompt,
    "b3": b3_prompt,
    "bge_vl": bge_vl_prompt,
    "unime": unime_prompt,
}


def show_prompts(row):
    """Render a row's prompts for results.json: a query of video and text, a corpus video."""
    render = PROMPTS[row.prompt]
    return {
        "query_prompt": render(Turn("video", ["{video}"], "{text}", "{instruction}")),
        "corpus_prompt": render(Turn("video", ["{video}"], "", "")),
    }


# What the families share


@dataclasses.dataclass
class Mllm:
    """A loaded model, as embed_qwen2vl and embed_llava take it."""

    row: MllmRow
    network: torch.nn.Module
    tokenizer: object
    image_processor: object
    video_processor: object  # Qwen2-VL's; None: videos need no processor
    placeholders: dict  # {"image": token, "video": token}
    start: list  # ids before every prompt
    frame_side: int  # LLaVA: pixels along the side of a tile (336 and 384); Qwen2-VL: 0
    dim: int
    fingerprint: str  # a hash of the weights, of the row and of this file
    parameters: int
    protocol: dict  # the row and its prompts; "texts_cut" counts the texts that lost their tail

    def prepare(self, pixels):
        """Shrink frames (F, H, W, 3) uint8, or one image (1, H, W, 3), to the model's size."""
        if self.frame_side and len(pixels) == 1:
            return squash(pixels, self.row.image_side or self.frame_side)
        if self.frame_side:
            return squash(pixels, self.frame_side)
        return resize_to_tokens(pixels, self.image_processor, self.row.frame_tokens)


def make_model(row, network, tokenizer, image_processor, **parts):
    """Put a loaded model together, on the CPU still; parts: Mllm's other fields."""
    placeholders = parts["placeholders"]
    for token in placeholders.values():
        if token not in tokenizer.get_vocab():
            raise ValueError(f"{row.hub_id}: the tokenizer has no token {token}")
    protocol = {name: value for name, value in dataclasses.asdict(row).items() if value}
    protocol |= show_prompts(row) | {"texts_cut": 0}
    # The prompts and the preprocessing are part of what makes a vector: this file as a whole.
    digest = hashlib.sha256(Path(__file__).read_bytes())
    digest.update(fingerprint_weights(network.state_dict()).encode())
    digest.update(json.dumps(dataclasses.asdict(row), sort_keys=True).encode())
    return Mllm(
        row=row,
        network=network,
        tokenizer=tokenizer,
        image_processor=image_processor,
        fingerprint=digest.hexdigest()[:16],
        parameters=sum(p.numel() for p in network.parameters()),
        protocol=protocol,
        **parts,
    )


# A tensor or two of each family, for the message about a folder of another one.
TENSORS = {
    "qwen2_vl": "visual.blocks.0.attn.qkv.weight and model.layers.0.self_attn.q_proj.weight",
    "llava_next": "image_newline, multi_modal_projector.linear_1.weight and a CLIP vision_tower",
    "llava_onevision": "image_newline, multi_modal_projector.linear_1.weight and a SigLIP "
    "vision_tower",
}


def check_family(path, model_type):
    """Check that a folder or hub id holds a checkpoint of a family, by its config.json.

    Raises ValueError naming the tensors that are expected.
    """
    try:
        file = checkpoint_file(path, "config.json")
    except OSError as error:
        raise ValueError(f"{path}: cannot be loaded: {first_line(error)}") from error
    if file is None:
        raise ValueError(
            f"{path}: no config.json: not a checkpoint folder, and the hub gives none for this "
            "name (no network, HF_HUB_OFFLINE, no access, or no such model)"
        )
    found = parse_json(Path(file).read_bytes(), file).get("model_type")
    if found != model_type:
        raise ValueError(
            f"{file}: model_type is {found!r}; expected {model_type!r}, a checkpoint with tensors "
            f"such as {TENSORS[model_type]}"
        )


def choose_dtype(device):
    """Return bfloat16 on a GPU (section 4.1), float32 elsewhere."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def squash(frames, side):
    """Resize frames (F, H, W, 3) uint8 to squares, bicubic, whatever their aspect ratio."""
    if frames.shape[1:3] == (side, side):
        return frames
    resized = [Image.fromarray(f).resize((side, side), Image.Resampling.BICUBIC) for f in frames]
    return np.stack([np.asarray(frame) for frame in resized])


def resize_to_tokens(frames, processor, most):
    """Resize frames (F, H, W, 3) uint8 by Qwen2-VL's rule to at most `most` tokens each.

    The aspect ratio is kept but for rounding to whole tokens. Raises ValueError for a ratio > 200.
    """
    token_side = processor.patch_size * processor.merge_size
    size = SizeDict(shortest_edge=MIN_TOKENS * token_side**2, longest_edge=most * token_side**2)
    pixels = torch.from_numpy(np.array(frames)).movedim(-1, 1)  # (F, 3, H, W)
    resized = processor.resize(
        pixels, size=size, resample=PILImageResampling.BICUBIC, factor=token_side
    )
    return resized.movedim(1, -1).numpy()


def take_medium(model, item):
    """Return an item's medium -> ("image" or "video", prepared frames (F, H, W, 3)), or ("", None).

    Raises ValueError for both at once and for another number of frames than the row's: a video is
    never embedded as a single frame.
    """
    has_image = item.get("image") is not None
    has_video = item.get("video") is not None
    if has_image and has_video:
        raise ValueError("an item may hold an image or a video, not both")
    if has_image:
        pixels = np.asarray(item["image"])
        if pixels.ndim == 3:
            pixels = pixels[None]
        return "image", model.prepare(pixels)
    if has_video:
        frames = np.asarray(item["video"])
        if len(frames) != model.row.frames:
            raise ValueError(f"{len(frames)} frames in place of {model.row.frames}")
        return "video", model.prepare(frames)
    return "", None


def tokenise(model, item, instruction, kind, counts):
    """Tokenise an item's prompt -> list of ids; a text that is too long loses its tail.

    kind: of its medium; counts: vision tokens of each image or video in the prompt. Raises
    ValueError where the prompt and the vision tokens alone are too long.
    """
    medium = "image" if model.row.video == "images" else kind
    placeholder = model.placeholders.get(medium)
    turn = Turn(
        kind=kind,
        placeholders=[placeholder] * len(counts),
        text=plain_text(item.get("text") or "", model.tokenizer),
        instruction=plain_text(instruction or "", model.tokenizer),
    )

    def encode(length):
        shorter = dataclasses.replace(turn, text=turn.text[:length])
        prompt = PROMPTS[model.row.prompt](shorter)
        return model.start + model.tokenizer.encode(prompt, add_special_tokens=False, verbose=False)

    def count_tokens(length):
        return len(encode(length)) - len(counts) + sum(counts)

    # Longer texts have more tokens, so the longest beginning that fits is found by bisection.
    kept = len(turn.text)
    limit = model.row.max_length
    if count_tokens(kept) > limit:
        kept = bisect.bisect_right(range(len(turn.text)), limit, key=count_tokens) - 1
        if kept < 0:
            raise ValueError(
                f"the prompt and {sum(counts)} vision tokens ({len(counts)} blocks, "
                f"{model.row.frames} frames per video) exceed {limit} tokens before any text"
            )
        model.protocol["texts_cut"] += 1

    ids = []
    blocks = iter(counts)
    pad = model.tokenizer.convert_tokens_to_ids(placeholder) if placeholder else None
    for token in encode(kept):
        ids += [token] * (next(blocks) if token == pad else 1)
    return ids


def plain_text(text, tokenizer):
    """Return a user's text in which no special token can be written."""
    # Half of a character (an emoji cut in two) would be refused: U+FFFD takes its place.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    for token in tokenizer.get_added_vocab():
        if token.startswith("<"):
            text = text.replace(token, "< " + token[1:])
    return text


@torch.no_grad()
def embed_items(model, items, make_sample, forward):
    """Embed items -> (n, D) float32 on the CPU, rows of NaN for items that cannot be used.

    make_sample(item): a dict with "ids" and what forward needs besides; it may raise ValueError.
    forward(samples): -> unit vectors (b, D).
    """
    samples = {}
    for i, item in enumerate(items):
        try:
            samples[i] = make_sample(item)
        except ValueError as error:
            print(f"item {i} of a batch cannot be embedded: {error}", file=sys.stderr)

    vectors = torch.full((len(items), model.dim), torch.nan)
    places = list(samples)
    lengths = [len(samples[i]["ids"]) for i in places]
    for group in micro_batches(lengths, BATCH_ITEMS, BATCH_TOKENS):
        rows = [places[k] for k in group]
        vectors[rows] = forward([samples[i] for i in rows]).float().cpu()
    return vectors


# Qwen2-VL: GME, Unite, VLM2Vec-V2, B3


def load_qwen2vl(row, path, device):
    """Load a Qwen2-VL embedder from a checkpoint or adapter folder or a hub id -> Mllm.

    An adapter's base is the folder or hub id that its adapter_config.json names. Every tensor must
    find its place: of these adapters, PEFT's own loader drops all tensors and transformers' drops
    DoRA's magnitudes, with a warning at most. All six models count places in the row on all three
    axes (positions "1d"): their code never computes M-RoPE, or its rule finds no vision block.

    Raises ValueError for a folder of another family and for a tensor that is missing or left over.
    """
    path = str(path)
    is_adapter = checkpoint_file(path, "adapter_config.json") is not None
    if is_adapter and checkpoint_file(path, "adapter_model.safetensors") is None:
        raise ValueError(
            f"{path}: no adapter_model.safetensors; an adapter_model.bin becomes one by "
            "torch.load(file, weights_only=True) and safetensors.torch.save_file"
        )
    base = find_base(path) if is_adapter else path
    check_family(base, "qwen2_vl")
    spec = find_spec(base)

    backbone = load_backbone(base, spec, choose_dtype(device))
    if is_adapter:
        # Merged: DoRA would compute the norms of all its weights again in each forward pass.
        backbone = load_adapter(backbone, path, False).merge_and_unload()
    backbone.requires_grad_(False)
    processor = load_processor(base, spec)  # the adapters bring no tokens of their own
    gve = GVE(backbone, processor, spec, base=base, positions=row.positions).eval()

    model = make_model(
        row,
        gve,
        processor.tokenizer,
        processor.image_processor,
        video_processor=processor.video_processor,
        placeholders={"image": "<|image_pad|>", "video": "<|video_pad|>"},
        start=[],
        frame_side=0,
        dim=gve.dim,
    )
    gve.to(device)
    return model


def embed_qwen2vl(model, items, instruction=None):
    """Embed items -> (n, D); instruction: the dataset's prompt for queries, None for the corpus."""
    gve = model.network
    # A causal model's last token does not see padding on its right.
    collate = gve.collator(padding_side="right")

    def make_sample(item):
        kind, frames = take_medium(model, item)
        sample = cut_patches(model, kind, frames) if kind else {}
        counts = []
        for key in ("image_grid_thw", "video_grid_thw"):
            for grid in sample.get(key, ()):
                counts.append(int(grid.prod()) // model.image_processor.merge_size**2)
        return sample | {"ids": tokenise(model, item, instruction, kind, counts)}

    def forward(samples):
        return gve(to_device(collate.batch(samples, raw=True), gve.device))

    return embed_items(model, items, make_sample, forward)


def cut_patches(model, kind, frames):
    """Cut prepared frames (F, H, W, 3) uint8 into patches -> {pixels (P, S) uint8, grids (n, 3)}.

    A video is one medium or, for a model that takes images alone, as many as it has frames.
    """
    options = {
        "do_resize": False,  # Mllm.prepare did
        "do_rescale": False,
        "do_normalize": False,
        "input_data_format": "channels_first",
        "return_tensors": "pt",
    }
    pixels = torch.from_numpy(np.array(frames)).movedim(-1, 1)  # (F, 3, H, W)
    if kind == "video" and model.row.video == "native":
        options |= {"do_sample_frames": False, "cap_pixels_per_frame": False}
        return dict(model.video_processor([pixels], **options))
    return dict(model.image_processor(list(pixels), **options))


# LLaVA-NeXT and LLaVA-OneVision: BGE-VL, UniME


# By the model_type of a checkpoint's config.json.
LLAVAS = {
    "llava_next": (LlavaNextForConditionalGeneration, LlavaNextImageProcessor),
    "llava_onevision": (LlavaOnevisionForConditionalGeneration, LlavaOnevisionImageProcessor),
}


def load_llava(row, path, device):
    """Load BGE-VL or UniME from a folder or a hub id -> Mllm; no remote code runs.

    The processor's files are read for the tokenizer, tiles, mean and standard deviation alone: the
    number of vision tokens is counted on the features themselves.

    Raises ValueError for a folder of another family and for a tensor that is missing or left over.
    """
    path = str(path)
    model_type = "llava_next" if row.prompt == "bge_vl" else "llava_onevision"
    check_family(path, model_type)
    network_class, processor_class = LLAVAS[model_type]
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        image_processor = processor_class.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: no usable processor: {first_line(error)}") from error
    network = load_strictly(network_class, path, choose_dtype(device))

    start = []
    placeholders = {"image": "<image>"}
    if model_type == "llava_next":
        start = [tokenizer.bos_token_id]  # some tokenizers add it by themselves, others do not
    else:
        placeholders["video"] = "<video>"
    model = make_model(
        row,
        network.eval(),
        tokenizer,
        image_processor,
        video_processor=None,
        placeholders=placeholders,
        start=start,
        frame_side=network.config.vision_config.image_size,
        dim=network.config.text_config.hidden_size,
    )
    network.to(device)
    return model


def load_strictly(network_class, path, dtype):
    """Load a checkpoint of transformers' own class and check that every tensor found its place.

    The language model's head is not used here, and may be absent. Raises ValueError.
    """
    try:
        network, report = network_class.from_pretrained(
            path,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they come with the report below
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be loaded: {first_line(error)}") from error
    wrong = {}
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = set(map(str, report[problem])) - {"lm_head.weight"}
        if names:
            wrong[problem] = sorted(names)[:3]
    if wrong:
        raise ValueError(f"{path}: weights do not fit {network_class.__name__}: {wrong}")
    return network


def embed_llava(model, items, instruction=None):
    """Embed items -> (n, D); instruction: the dataset's prompt for queries, None for the corpus."""

    def make_sample(item):
        kind, frames = take_medium(model, item)
        features = encode_medium(model, kind, frames) if kind else []
        counts = [len(block) for block in features]
        ids = tokenise(model, item, instruction, kind, counts)
        return {"ids": ids, "features": features}

    def forward(samples):
        return forward_llava(model, samples)

    return embed_items(model, items, make_sample, forward)


def encode_medium(model, kind, frames):
    """Run the vision tower -> list of (V, D), one for each placeholder of the prompt.

    frames: (F, H, W, 3) uint8, prepared. An image gives a base tile and those of its grid.
    """
    core = model.network.model
    if kind == "image":
        inputs = model.image_processor(images=[frames[0]], return_tensors="pt")
        pixels = inputs["pixel_values"].to(core.device, core.dtype)  # (1, tiles, 3, H, W)
        return core.get_image_features(pixels, inputs["image_sizes"]).pooler_output

    pixels = normalise_frames(frames, model.image_processor).to(core.device, core.dtype)
    if model.row.video == "native":
        features = core.get_video_features(pixels[None]).pooler_output[0]  # (V - 1, D)
        return [torch.cat([features, core.image_newline[None]])]
    return list(encode_tiles(core, pixels, model.row.frame_pool))


def normalise_frames(frames, processor):
    """Normalise frames (F, H, W, 3) uint8 as the image processor does -> (F, 3, H, W) float32.

    Not as transformers' video processor for LLaVA-OneVision: where a folder has no file for it, its
    mean and standard deviation are CLIP's and not SigLIP's.
    """
    pixels = torch.from_numpy(np.array(frames)).movedim(-1, 1) / 255
    mean = torch.tensor(processor.image_mean)[:, None, None]
    std = torch.tensor(processor.image_std)[:, None, None]
    return (pixels - mean) / std


def encode_tiles(core, pixels, pool):
    """Encode LLaVA-NeXT's tiles (n, 3, H, W) without a grid -> (n, V, D).

    pool: features are averaged in squares of this side ahead of the projector, as transformers'
    LLaVA-NeXT-Video does; 0: not at all.
    """
    states = core.vision_tower(pixels, output_hidden_states=True).hidden_states
    features = states[core.config.vision_feature_layer][:, 1:]  # (n, P, C), no class token
    if pool > 1:
        side = math.isqrt(features.shape[1])
        grid = features.transpose(1, 2).unflatten(2, (side, side))  # (n, C, side, side)
        features = F.avg_pool2d(grid, pool).flatten(2).transpose(1, 2)
    return core.multi_modal_projector(features)


def forward_llava(model, samples):
    """Embed samples {"ids", "features"} -> (b, D) unit vectors, float32.

    Rows are padded on the right, where a causal model's last token does not see it. Upstream pads
    on the left, since it takes the last column for the last token.
    """
    core = model.network.model
    width = max(len(sample["ids"]) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    features = []
    for row, sample in enumerate(samples):
        length = len(sample["ids"])
        ids[row, :length] = torch.tensor(sample["ids"])
        mask[row, :length] = 1
        features += sample["features"]
    ids = ids.to(core.device)
    mask = mask.to(core.device)

    embeds = core.get_input_embeddings()(ids)  # (b, T, D)
    if features:
        pads = model.tokenizer.convert_tokens_to_ids(list(model.placeholders.values()))
        place = torch.isin(ids, torch.tensor(pads, device=ids.device)) & mask.bool()  # (b, T)
        features = torch.cat(features).to(embeds)
        assert int(place.sum()) == len(features), f"{int(place.sum())} for {len(features)}"
        embeds = embeds.masked_scatter(place[..., None], features)
    hidden = core.language_model(
        inputs_embeds=embeds, attention_mask=mask, use_cache=False
    ).last_hidden_state
    return F.normalize(last_token_pool(hidden, mask).float(), dim=-1)
