"""Texts of V-SynFlow: caption filters, prompts, answer validation, captioners.

Paper: arXiv 2510.27571, sections 3.3 and A.6. A captioner is a function ask(requests) that yields
one Reply per request, in order. A request is {"media": [item, ...], "prompt": str}; the items are
data.py's and are shown before the prompt.

    options = {"frames": 8, "max_tokens": 200, "max_new_tokens": 64}
    ask = transformers_captioner("mini/base", device="cpu", **options)
    prompt = "Describe the video in the concise style."
    print(next(ask([{"media": [{"video": "a.mp4"}], "prompt": prompt}])).text)

Legend: F frames, H height, W width, B batch, T tokens.
"""

import base64
import collections
import dataclasses
import email.utils
import hashlib
import io
import itertools
import json
import math
import os
import random
import re
import threading
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
import numpy as np
import torch
import transformers
from PIL import Image

from model import BACKBONES
from support.decoders import DecoderPool, Failed
from support.media import load_image, load_video

# Pixels along the side of a vision token of the embedder. Other captioners get the same frames.
TOKEN_SIDE = BACKBONES["qwen2_5_vl"].token_side

# Annotation rectification (section 3.3): patterns of uploaders' texts that describe nothing


URL = r"https?://|www\.|\b\w+\.(com|org|net)\b"
FILE_NAME = (
    r"\.(mp4|avi|mov|mkv|webm|wmv|jpe?g|png|gif)\b|"
    r"^\W*(img|dsc|vid|mvi|gopr|pxl|clip|video|untitled|final)[\W\d_]*$"
)
BOILERPLATE = (
    r"subscribe|click (here|the|on|below)|link (below|in)|follow (me|us)|watch (now|more|full)|"
    r"all rights reserved|©|copyright|royalty[- ]free|stock (footage|video)|"
    r"no (description|caption|title)|lorem ipsum|sponsored|download|^(#\w+\s*)+$"
)


def useless_text(text, script="LATIN"):
    """Name the first rule by which a text is no description -> str, or None if it may be one.

    script: first word of the Unicode names of the letters that a caption is written in.
    """
    words = text.lower().split()
    if not words:
        return "empty"
    if re.search(URL, text, re.I):
        return "URL"
    if re.search(FILE_NAME, text, re.I):
        return "file name"
    if re.search(BOILERPLATE, text, re.I):
        return "boilerplate"

    # At least three letters of four are in the script.
    letters = [c for c in text if c.isalpha()]
    in_script = sum(unicodedata.name(c, "").startswith(script) for c in letters)
    if 3 * len(letters) > 4 * in_script:
        return "wrong script"

    if len(words) < 3:
        return "too short"
    if len(words) > 1000:
        return "too long"

    # "a a a a a a a": fewer than half of the pairs of neighbouring words are new.
    pairs = set(itertools.pairwise(words))
    if len(words) > 5 and 2 * len(pairs) < len(words):
        return "repetition"
    return None


# Prompts: our wording of A.6's specification. make_requests() fills the slots in braces.


VIDEO_PROMPT = """Describe the video for a search engine in five captions:
- concise (10-25 words): what happens, in one sentence;
- rich (80-200 words): who and what is where, what it looks like, and what it does in which order;
- abstract (30-100 words): topic and mood, for someone who forgot the details;
- keywords (5-30 words): key terms, separated by commas;
- partial (10-70 words): one object, moment or place only.
In each, 30-60 % is spatial (objects, looks, positions), 30-60 % temporal (actions, changes, order),
up to 20 % theme, background, style and camera, up to 10 % anything else; give most room to {focus}.
At least one caption has fewer than 20 words and one more than 100. State only what can be seen: no
names, causes or sounds. Write {readability} sentences for readers with {education}.{raw}"""

IMAGE_PROMPT = """Describe this frame of a video for a search engine in five captions:
- concise (10-25 words): the moment and where things are, in one sentence;
- rich (50-200 words): every object, its looks and where it stands to the others;
- abstract (30-100 words): what the arrangement of the space is about;
- keywords (5-30 words): key terms, the moment's among them, separated by commas;
- minimal (10-70 words): one object and its place.
In each, 50-70 % is spatial, up to 30 % what this one moment proves (no sequence of events), 10-20 %
style and composition, up to 10 % anything else. At least one caption has fewer than 20 words. State
only what can be seen. Write {readability} sentences for readers with {education}.{raw}"""

IMAGE_AND_TEXT_PROMPT = """First comes a reference image, then the target video. Write the text that
finds the target together with the image, by this strategy: {strategy}. Check that it
1. has at most 50 words, 2. means nothing without the image, 3. does not describe the image again,
4. names a specific attribute of the target, 5. rules out at least half of the videos that fit the
image, 6. is true of the target and not of the reference, 7. reads like something a person would
type."""

CLIP_AND_TEXT_PROMPT = """First comes a reference clip, then the target video. Write the text,
usually 5-15 words, that finds the target together with the clip. It says how the target differs,
by this relation: {strategy}. It means nothing without the clip and does not describe the clip
again."""

PROMPTS = {
    "video": VIDEO_PROMPT,
    "image": IMAGE_PROMPT,
    "TI2V": IMAGE_AND_TEXT_PROMPT,
    "TV2V": CLIP_AND_TEXT_PROMPT,
}

# For captioners too small for the prompts above: one request, and one plain answer, per style
SHORT_PROMPTS = {
    "video": "Describe the video in the {style} style.",
    "image": "Describe the image in the {style} style.",
    "TI2V": "Describe what changes from the reference to the target video.",
    "TV2V": "Describe what changes from the reference to the target video.",
}
SHORT_WORDS = (2, 70)  # least and most words of a plain answer

# A.6: the texts asked for, and the least and most words of each
WORDS = {
    "video": {
        "concise": (10, 25),
        "rich": (80, 200),
        "abstract": (30, 100),
        "keywords": (5, 30),
        "partial": (10, 70),
    },
    "image": {
        "concise": (10, 25),
        "rich": (50, 200),
        "abstract": (30, 100),
        "keywords": (5, 30),
        "minimal": (10, 70),
    },
    "TI2V": {"query": (3, 50)},
    "TV2V": {"query": (3, 25)},
}

# A.6: profiles of a request, drawn with these weights
FOCUS = {
    "what things look like and where they are": 0.3,
    "what happens and in which order": 0.6,
    "theme, style and camera": 0.1,
}
READABILITY = ("simple", "everyday", "elaborate")
EDUCATION = ("primary school", "high school", "a university degree")

# A.6: how the target of a composed query relates to its reference
STRATEGIES = {
    "TI2V": (
        "the same subject in another action",
        "the same subject in another place",
        "the same subject without one thing",
        "the same relation between other things",
    ),
    "TV2V": (
        "what happens next",
        "another point of view",
        "another quality or condition",
        "the same action, done otherwise",
    ),
}


def make_requests(kind, media, prompts, rng, raw=""):
    """Word the requests for a video's or image's captions, or for a composed query.

    kind     "video" or "image", to be captioned; "TI2V" or "TV2V", a composed query.
    media    items to show: one to caption, or reference and target.
    prompts  "full": one request, answered by one JSON object;
             "short": a request and a plain answer per style.
    rng      random.Random that draws the profile of a full request.
    raw      the uploader's caption, if there is one.

    Returns [{"media", "prompt", "want": {name: (least, most words)}, "plain": bool}].
    """
    if prompts == "short":
        requests = []
        for style in WORDS[kind]:
            request = {
                "media": media,
                "prompt": SHORT_PROMPTS[kind].format(style=style),
                "want": {style: SHORT_WORDS},
                "plain": True,
            }
            requests.append(request)
        return requests

    # The profile is drawn in this order, so that equal seeds give equal prompts.
    hint = ""
    if raw:
        words = whole_characters(raw).split()[:200]
        hint = f"\nIts uploader wrote, perhaps wrongly: {' '.join(words)}"
    prompt = PROMPTS[kind].format(
        focus=rng.choices(list(FOCUS), list(FOCUS.values()))[0],
        strategy=rng.choice(STRATEGIES.get(kind, [""])),
        readability=rng.choice(READABILITY),
        education=rng.choice(EDUCATION),
        raw=hint,
    )
    form = json.dumps(dict.fromkeys(WORDS[kind], "..."))
    prompt += f"\nAnswer with one JSON object and nothing else: {form}"
    return [{"media": media, "prompt": prompt, "want": WORDS[kind], "plain": False}]


def print_dry_run(n, pairs_per_video, prompts, frames, max_tokens):
    """Print the prompts, and the calls and tokens that n videos cost if none is dropped.

    pairs_per_video  {task: expected number}.
    max_tokens       vision tokens per frame; two frames of a video share theirs.

    A word counts as 1.35 tokens, and an answer as the middle of its range of words.
    """
    vision_frames = {"video": frames / 2, "image": 1, "TI2V": frames / 2 + 1, "TV2V": frames}
    tokens_per_word = 1.35
    count = {"video": 1, "image": min(1, pairs_per_video["T2I"]), **pairs_per_video}

    # Each cost is [calls, tokens read, tokens written].
    total = np.zeros(3, int)
    for kind in WORDS:
        requests = make_requests(kind, [], prompts, random.Random(0))
        cost = np.zeros(3)
        for request in requests:
            prompt_words = len(request["prompt"].split())
            read = max_tokens * vision_frames[kind] + tokens_per_word * prompt_words
            answer_words = sum((least + most) / 2 for least, most in request["want"].values())
            cost += (1, read, tokens_per_word * answer_words)
        cost = (n * count[kind] * cost).round().astype(int)
        total += cost

        print(f"--- {kind}: calls, tokens read, tokens written: {cost.tolist()}")
        for request in requests:
            print(request["prompt"])
    print(f"--- {n} videos: calls, tokens read, tokens written: {total.tolist()}")


# Answers


class Reply(NamedTuple):
    """A captioner's reply to one request."""

    text: str | None  # None: there is none
    failure: str | None  # the reason why there is none
    tokens_read: int
    tokens_written: int
    end: str = "stop"  # why the text ends: stop, length (cut off), content_filter, refusal


@dataclasses.dataclass
class Answer:
    """The outcome of one request, after all attempts."""

    fate: str  # kept; dropped: no valid answer; failed: no answer at all
    texts: dict | None  # {name: text} if kept
    why: str | None  # the reason if not kept
    tokens: list  # [read, written], over all attempts


# Thinking before an answer: <think> ... </think>, [THINK] ... [/THINK], ◁think▷ ... ◁/think▷
THINKING = r"(?:think|thinking|thought|reasoning)"
THINKING_STARTS = re.compile(rf"[<\[◁]{THINKING}[>\]▷]", re.I)
THINKING_ENDS = re.compile(rf"[<\[◁]/{THINKING}[>\]▷]", re.I)

# Refusals speak of the writer, captions of the video: "I'm sorry, but I can't help with that."
UNWILLING = (
    r"sorry|unable|afraid|apologi[sz]e|cannot|can not|can['’]?t|could not|couldn['’]t|do not|"
    r"don['’]t|will not|won['’]t|must decline|not able|not allowed"
)
REFUSAL = re.compile(
    rf"^\W*((unfortunately|sorry|but)\W+)*(i|we)(['’]m|['’]re| am| are)?( \w+)? ({UNWILLING})\b|"
    r"^\W*(sorry|unfortunately|(my )?apologies)\s*[,.!:;]|"
    r"^\W*as an? (ai|assistant|(large )?language model)\b|"
    r"^\W*please (provide|upload|share|attach|send)\b|"
    r"\bno (video|image|frame|clip)s? (was |were |is |are |has been )?(provided|attached|uploaded)|"
    r"\b(cannot|can['’]t|unable to) (assist|help|comply) with (this|that|your)\b",
    re.I,
)

# Around a plain answer: "Sure! Here is a concise caption:", "**Caption:**", "Let me know if ..."
PREAMBLE = re.compile(
    r"^[\s*_#>\"]*((sure( thing)?|certainly|of course|absolutely|okay|ok)[!,.:]\s*)?"
    r"(here\b[^\n:]{0,60}\b(caption|description|answer|text|query|keyword)s?\b[^\n:]{0,60}:)?",
    re.I,
)
LABEL = r"^[\s*_#>\"]*((\w+ ){{0,3}}(caption|description|answer|query)|{name})s?\W{{0,3}}:"
FAREWELL = re.compile(
    r"(\n|(?<=[.!?]) )\s*(let me know|i hope|would you like|feel free)\b.*", re.I | re.S
)


def parse_answer(answer, want, plain, end="stop"):
    """Read an answer as {name: text} with the names and numbers of words of `want`.

    This alone decides which answers are usable. Thinking before the answer, prose or a fence around
    it, raw control characters and halves of emojis are taken away; an answer that was cut off, a
    refusal or a text that goes round in circles is none.

    answer  as the captioner wrote it.
    want    {name: (least, most words)}.
    plain   the answer is the one text wanted; else it is a JSON object of all.
    end     see Reply.

    Raises ValueError, worded so that it tells the captioner its mistake.
    """
    if end == "length" and goes_round(answer):
        raise ValueError("repetition: it goes round in circles to its limit of tokens")
    if end == "length":
        raise ValueError("truncated: it reached its limit of tokens (--max-new-tokens)")
    if end == "content_filter":
        raise ValueError("filtered: the server's content filter cut it")
    answer = THINKING_ENDS.split(whole_characters(answer))[-1].strip()
    if not answer:
        raise ValueError("empty: there is no text, or thinking alone")
    has_json = "{" in answer and not plain  # an apology may stand before it
    if end == "refusal" or (REFUSAL.search(answer[:300]) and not has_json):
        raise ValueError(f"refusal: {answer[:100]}")

    texts = read_plain(answer, want) if plain else read_json(answer, want)
    for name, (least, most) in want.items():
        text = texts[name]
        if REFUSAL.search(text):
            raise ValueError(f"refusal: {text[:100]}")
        if goes_round(text):
            raise ValueError(f"repetition: {name} goes round in circles")
        n = len(text.split())
        if not least <= n <= most:
            raise ValueError(f"length: {name} has {n} words and must have {least}-{most}")
    if len({text.lower() for text in texts.values()}) < len(texts):
        raise ValueError("repetition: two captions are the same")
    return texts


def whole_characters(text):
    """Drop halves of characters beyond 16 bits (an emoji cut in two), which no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")


def goes_round(text):
    """Say whether a text repeats itself as captioners do that are lost: "and and and and".

    The same one to four words come four times running, one character ten times, or more than a
    fifth of the words are the word before them.
    """
    words = text.lower().split()
    for size in (1, 2, 3, 4):
        equal = 0  # words in a row that are the word `size` places before
        for now, before in zip(words[size:], words, strict=False):
            equal = equal + 1 if now == before else 0
            if equal == 3 * size:
                return True
    doubled = sum(now == before for before, now in itertools.pairwise(words))
    return 5 * doubled > len(words) or bool(re.search(r"(\S)\1{9}", text))


def read_plain(answer, want):
    """Read a plain answer -> {name: text}, without what chatty captioners put around it.

    Raises ValueError if it is JSON of another form, or thinking that never ends.
    """
    if THINKING_STARTS.search(answer):
        raise ValueError("thinking: it has no end, and no answer follows")
    (name,) = want
    answer = re.sub(r"```\w*|<\|[^<>|]+\|>|</?answer>", "", answer).strip()

    # Some captioners answer in JSON unasked, under a name of their own.
    if answer.startswith("{"):
        found, _ = next(find_objects(answer, {}), ({}, ""))
        texts = [found[name]] if name in found else list(found.values())
        if len(texts) != 1 or not isinstance(texts[0], str):
            raise ValueError("schema: it must be one plain text")
        answer = texts[0]

    answer = PREAMBLE.sub("", answer.strip())
    answer = re.sub(LABEL.format(name=name), "", answer, flags=re.I)
    answer = FAREWELL.sub("", answer)
    return {name: one_line(answer).strip("\"'“”*_` ")}


def read_json(answer, want):
    """Read the last JSON object in an answer that has all names of `want` -> {name: text}.

    Raises ValueError if there is none, or a value is no text.
    """
    # In thinking without an end, only the last words can be the answer; others are drafts.
    thinking = THINKING_STARTS.search(answer)
    fitting = None
    for value, rest in find_objects(answer, want):
        if not thinking or not rest.strip("` \n"):
            fitting = value
    if fitting is None:
        if thinking:
            raise ValueError("thinking: it has no end, and no answer follows")
        try:
            json.loads(re.sub(r"^\s*```\w*|```\s*$", "", answer), strict=False)
        except (ValueError, RecursionError) as error:
            # A captioner that is lost in a string may stop before its end.
            if goes_round(answer):
                raise ValueError("repetition: it goes round in circles") from error
            raise ValueError(f"not JSON: {error}") from error
        raise ValueError(f"schema: it must be one object with strings under {', '.join(want)}")

    texts = {}
    for name in want:
        text = fitting[name]
        if isinstance(text, list) and all(isinstance(word, str) for word in text):
            text = ", ".join(text)  # keywords
        if not isinstance(text, str):
            raise ValueError(f"schema: {name} must be a string")
        texts[name] = one_line(text)
    return texts


def find_objects(answer, names):
    """Yield (dict, text after it) for each JSON object in a text that has all of the names.

    Objects inside of others count; control characters in strings are let pass.
    """
    decoder = json.JSONDecoder(strict=False)
    start = answer.find("{")
    while start >= 0:
        after = start + 1
        try:
            value, end = decoder.raw_decode(answer, start)
        except (ValueError, RecursionError):
            pass  # a brace of the prose
        else:
            if set(names) <= value.keys():
                yield value, answer[end:]
                after = end
        start = answer.find("{", after)


def one_line(text):
    """Return a text with a blank for each run of blanks, line ends and control characters."""
    return " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", whole_characters(text)).split())


def ask_until_valid(ask, requests, tries):
    """Ask until each answer is valid, at most `tries` times -> one Answer per request, in order.

    Later attempts tell the captioner why the answer before was refused. A request that got no reply
    at all is not repeated, nor one whose answer reached the limit of tokens: it would again.
    """
    answers = [Answer("dropped", None, None, [0, 0]) for _ in requests]
    pending = list(range(len(requests)))
    for _ in range(tries):
        asked = []
        for i in pending:
            prompt = requests[i]["prompt"]
            if answers[i].why:
                prompt += f"\nYour last answer was refused: {answers[i].why}. Answer again."
            asked.append({**requests[i], "prompt": prompt})

        again = []
        for i, reply in zip(pending, ask(asked), strict=True):
            judge(answers[i], reply, requests[i])
            if answers[i].fate == "dropped" and reply.end != "length":
                again.append(i)
        pending = again
    return answers


def judge(answer, reply, request):
    """Update an Answer in place by the reply to one more attempt."""
    answer.tokens = [answer.tokens[0] + reply.tokens_read, answer.tokens[1] + reply.tokens_written]
    if reply.failure:
        answer.fate = "failed"
        answer.why = one_line(reply.failure)
        return
    try:
        answer.texts = parse_answer(reply.text, request["want"], request["plain"], reply.end)
    except ValueError as error:
        answer.fate = "dropped"
        answer.why = one_line(str(error))
    else:
        answer.fate = "kept"
        answer.why = None


def keep_replies(ask, path, captioner):
    """Return ask(requests), which has each reply in a file before anything else is done with it.

    Whenever the run is killed, no reply that was yielded is asked for again: the n-th of equal
    requests gets the n-th reply that the file has. Failures are not kept.

    path       file of JSON lines, which need not exist.
    captioner  its name and settings: another one's replies are others.
    """
    known = collections.defaultdict(collections.deque)
    if os.path.exists(path):
        with open(path, "rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:  # a process that was killed wrote half of it
                    continue
                known[row["key"]].append(Reply(*row["reply"]))

    def kept_ask(requests):
        if not requests:
            return
        keys = [request_key(request, captioner) for request in requests]
        ready = []  # the kept reply of each request, or None
        missing = []
        for key, request in zip(keys, requests, strict=True):
            if known[key]:
                ready.append(known[key].popleft())
            else:
                ready.append(None)
                missing.append(request)

        fresh = iter(ask(missing) if missing else ())
        with open(path, "a", encoding="ascii") as file:
            for key, reply in zip(keys, ready, strict=True):
                if reply is None:
                    reply = next(fresh)
                    if reply.failure is None:
                        file.write("\n" + json.dumps({"key": key, "reply": reply}))
                        file.flush()
                yield reply

    return kept_ask


def request_key(request, captioner):
    """Return a name for a request to a captioner: a hash of all that decides the reply."""
    asked = json.dumps([captioner, request["media"], request["prompt"]])
    return hashlib.sha256(asked.encode()).hexdigest()[:24]


# Media, decoded in processes that may hang or crash


class Shown(NamedTuple):
    """One decoded item of a request."""

    kind: str  # "video" or "image"
    pixels: np.ndarray  # (F, H, W, 3) uint8; F = 1 for an image
    seconds: float  # duration of a video


def load_media(items, frames, max_tokens):
    """Decode a request's items -> [Shown], frames shrunk to at most max_tokens vision tokens.

    Raises ValueError or FileNotFoundError as load_video and load_image do.
    """
    shown = []
    for item in items:
        if "video" in item:
            pixels, seconds = load_video(item["video"], frames)
            shown.append(Shown("video", shrink(pixels, max_tokens), seconds))
        else:
            pixels = load_image(item["image"])[None]
            shown.append(Shown("image", shrink(pixels, max_tokens), 0.0))
    return shown


def shrink(pixels, max_tokens):
    """Resize frames (F, H, W, 3) uint8 that take more than max_tokens vision tokens each."""
    height, width = pixels.shape[1:3]
    scale = math.sqrt(max_tokens * TOKEN_SIDE**2 / (height * width))
    if scale >= 1:
        return pixels
    size = max(TOKEN_SIDE, int(width * scale)), max(TOKEN_SIDE, int(height * scale))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size)) for frame in pixels])


def decode_ahead(requests, decode, workers, seconds, fork_lock=None):
    """Yield decode(request), or Failed, for each request in order; processes work ahead.

    Only `workers` processes touch media files, and each request has `seconds` of their time: a clip
    that hangs or crashes its decoder costs its own request. fork_lock: see DecoderPool.
    """
    pool = DecoderPool(
        lambda i: decode(requests[i]),
        lambda i: str(requests[i]["media"]),
        workers=workers,
        seconds=seconds,
        fork_lock=fork_lock,
    )
    for _, result in pool.map(range(len(requests))):
        yield result


# Captioner 1: any image-text-to-text model of transformers


def transformers_captioner(
    name,
    *,
    frames,
    max_tokens,
    max_new_tokens,
    device,
    batch_size=32,
    workers=2,
    seconds=60.0,
):
    """Open an image-text-to-text model as a captioner -> ask(requests).

    It answers greedily, in batches.

    frames, max_tokens  frames per video, vision tokens per frame.
    max_new_tokens      tokens per answer; None: as many as the texts wanted need.
    workers, seconds    decoding processes, and their time limit per request; without workers the
                        media are decoded inline and without a limit.
    """
    transformers.logging.set_verbosity_error()
    processor = transformers.AutoProcessor.from_pretrained(name)
    processor.tokenizer.padding_side = "left"
    dtype = torch.bfloat16 if "cuda" in device else torch.float32
    model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    model = model.to(device).eval()

    def decode(request):
        return load_media(request["media"], frames, max_tokens)

    @torch.inference_mode()
    def ask(requests):
        fork_lock = threading.Lock()
        decoded = decode_ahead(requests, decode, workers, seconds, fork_lock)
        for start in range(0, len(requests), batch_size):
            batch = requests[start : start + batch_size]
            media = list(itertools.islice(decoded, len(batch)))
            limit = max_new_tokens or max(map(tokens_for, batch))
            with fork_lock:
                replies = answer_batch(model, processor, batch, media, limit)
            yield from replies

    return ask


def tokens_for(request):
    """Return enough tokens for the texts that a request wants: two a word, and some around them."""
    return sum(2 * most + 16 for _, most in request["want"].values())


def answer_batch(model, processor, requests, media, max_new_tokens):
    """Generate the answers to a batch -> [Reply], one per request.

    media: each request's [Shown], or Failed.
    """
    # Requests without media take no part in the batch.
    replies = {}
    readable = []
    for i, shown in enumerate(media):
        if isinstance(shown, Failed):
            replies[i] = Reply(None, f"media: {shown.reason}", 0, 0)
        else:
            readable.append(i)

    if readable:
        prompts = [requests[i]["prompt"] for i in readable]
        inputs = model_inputs(processor, model.config, prompts, [media[i] for i in readable])
        pad = processor.tokenizer.pad_token_id
        output = model.generate(
            **inputs.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        output = output[:, inputs["input_ids"].shape[1] :]  # (B, T), without the prompt

        texts = processor.batch_decode(output, skip_special_tokens=True)
        tokens_read = inputs["attention_mask"].sum(1).tolist()
        tokens_written = (output != pad).sum(1).tolist()
        cut_off = reached_limit(model, output, max_new_tokens, pad)
        for i, text, read, written, is_cut in zip(
            readable, texts, tokens_read, tokens_written, cut_off, strict=True
        ):
            replies[i] = Reply(text, None, read, written, "length" if is_cut else "stop")
    return [replies[i] for i in range(len(requests))]


def reached_limit(model, output, max_new_tokens, pad):
    """Say of each answer (B, T) whether it was cut off: as long as may be, and without an end."""
    ends = model.generation_config.eos_token_id  # one, several or None
    if not isinstance(ends, list):
        ends = [ends]
    is_long = output.shape[1] == max_new_tokens
    return [is_long and token not in (pad, *ends) for token in output[:, -1].tolist()]


def model_inputs(processor, config, prompts, media):
    """Turn prompts and their [Shown] into model inputs.

    A processor that knows no videos gets their frames as images.
    """
    # A chat turn per request; images and videos are lists over the whole batch, in order.
    has_video_processor = getattr(processor, "video_processor", None) is not None
    turns = []
    images = []
    videos = []
    for prompt, shown in zip(prompts, media, strict=True):
        content = []
        for one in shown:
            if one.kind == "video" and has_video_processor:
                videos.append(one)
                content.append({"type": "video"})
            else:
                images += [Image.fromarray(frame) for frame in one.pixels]
                content += [{"type": "image"}] * len(one.pixels)
        content.append({"type": "text", "text": prompt})
        turns.append([{"role": "user", "content": content}])

    options = {}
    if images:
        options["images"] = images
    if videos:
        options["videos"] = [video.pixels for video in videos]
        # Frames are sampled already; the metadata tells the processor their true times.
        options["videos_kwargs"] = {
            "do_sample_frames": False,
            "video_metadata": [video_metadata(video) for video in videos],
        }
    texts = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=texts, padding=True, return_tensors="pt", **options)
    if config.model_type in BACKBONES:
        inputs["position_ids"] = backbone_positions(config, inputs, videos)
    return inputs


def video_metadata(video):
    """Describe a Shown video's timing in the words of transformers' video processors."""
    n = len(video.pixels)
    return {
        "fps": n / video.seconds,
        "total_num_frames": n,
        "duration": video.seconds,
        "frames_indices": list(range(n)),  # Qwen3-VL writes their times into the prompt
    }


def backbone_positions(config, inputs, videos):
    """Compute the positions (3, B, T) of a Qwen-VL model by our own rule.

    transformers >= 4.52 truncates the seconds per temporal grid.
    """
    spec = BACKBONES[config.model_type]
    geometry = spec.read_geometry(config)
    is_video = inputs["input_ids"] == config.video_token_id
    is_image = inputs["input_ids"] == config.image_token_id
    seconds = torch.tensor([video.seconds for video in videos])
    frames = len(videos[0].pixels) if videos else 1
    return spec.positions(
        is_image + 2 * is_video,
        inputs["attention_mask"],
        inputs.get("image_grid_thw"),
        inputs.get("video_grid_thw"),
        geometry.temporal_patch_size / frames * seconds,  # per temporal grid
        tokens_per_second=geometry.tokens_per_second,
        merge_size=geometry.merge_size,
    )


# Captioner 2: a server that speaks OpenAI's chat completions (vLLM, SGLang)


def server_captioner(
    url,
    model,
    *,
    frames,
    max_tokens,
    max_new_tokens,
    workers=2,
    seconds=60.0,
    concurrency=32,
    retries=5,
    backoff=1.0,
    timeout=300.0,
):
    """Open a server as a captioner -> ask(requests). Each frame is sent as a JPEG data URL.

    frames ... seconds  as in transformers_captioner; max_new_tokens None: at least 1,024, since
                        servers stop by themselves, and some captioners think first.
    concurrency         requests in flight.
    retries             further attempts after status 408, 409, 429 or 5xx, time-outs, broken
                        connections and replies that are no completion.
    backoff             seconds before the second attempt, doubled for each further one; a
                        server's Retry-After may ask for more, up to LONGEST_WAIT.
    timeout             seconds of silence after which an attempt is given up.

    Answers in JSON are asked for in the server's JSON mode, until the server refuses that.
    $OPENAI_API_KEY is sent where it is set. Raises ValueError for a URL that is none.
    """
    server = ChatServer(url, retries, backoff, timeout, concurrency)

    def decode(request):
        shown = load_media(request["media"], frames, max_tokens)
        return message_content(shown, request["prompt"])

    def complete(asked):
        """Have one request answered -> Reply."""
        request, content = asked
        if isinstance(content, Failed):
            return Reply(None, f"media: {content.reason}", 0, 0)
        limit = max_new_tokens
        if limit is None:
            limit = max(1024, tokens_for(request))
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": limit,
            "temperature": 0,
        }
        form = None if request.get("plain", True) else json_mode(request)
        return server.complete(body, form)

    def ask(requests):
        # Processes decode and encode JPEGs; threads wait for the server.
        decoded = decode_ahead(requests, decode, workers, seconds)
        asked = zip(requests, decoded, strict=True)
        return map_in_threads(complete, asked, concurrency, 2 * concurrency)

    return ask


class ChatServer:
    """A server's chat completions, for many threads; the arguments are server_captioner's."""

    def __init__(self, url, retries, backoff, timeout, concurrency):
        self.url = url
        self.retries = retries
        self.backoff = backoff
        self.endpoint = chat_endpoint(url)
        headers = {}
        if os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {os.environ['OPENAI_API_KEY']}"
        limits = httpx.Limits(max_connections=concurrency)
        self.client = httpx.Client(timeout=timeout, headers=headers, limits=limits)
        self.lock = threading.Lock()
        self.has_json_mode = True  # until it refuses that

    def complete(self, body, form):
        """Send a request until the server answers it -> Reply. form: `response_format` or None."""
        # Waits grow, and differ between threads so that these do not come back all at once.
        wait = 0.0
        for attempt in range(self.retries + 1):
            time.sleep(wait)
            wait = self.backoff * 2**attempt * random.uniform(0.8, 1.2)
            try:
                response = self.post(body, form)
            except httpx.HTTPError as error:
                why = f"{type(error).__name__}: {error}"
                continue

            status = response.status_code
            if status == 200:
                try:
                    return read_completion(response.json())
                except NO_COMPLETION:
                    why = f"HTTP 200 without a completion: {response.text[:200]}"
                    continue

            why = f"HTTP {status}: {response.text[:200]}"
            if response.has_redirect_location:
                why += f" (it redirects to {response.headers['location']})"
            if status not in (408, 409, 429) and status < 500:
                break  # the request itself is wrong; another attempt would fail as well
            wait = max(wait, retry_after(response.headers.get("retry-after", "")))
        return Reply(None, why, 0, 0)

    def post(self, body, form):
        """Send a request once, with `form` if the server knows it -> httpx.Response."""
        if not form or not self.has_json_mode:
            return self.client.post(self.endpoint, json=body)
        response = self.client.post(self.endpoint, json=body | {"response_format": form})
        is_refusal = response.status_code in (400, 422, 500, 501)
        if not is_refusal or not re.search(JSON_MODE, response.text, re.I):
            return response

        with self.lock:  # one of the threads says so
            if self.has_json_mode:
                print(
                    f"{self.url} has no JSON mode; its answers are checked all the same", flush=True
                )
            self.has_json_mode = False
        return self.client.post(self.endpoint, json=body)


def chat_endpoint(url):
    """Return the address of a server's chat completions. Raises ValueError for a URL that is none.

    url: of the server, such as http://HOST:8000/v1.
    """
    try:
        return httpx.URL(f"{url.rstrip('/')}/chat/completions")
    except httpx.InvalidURL as error:
        raise ValueError(f"captioner {url}: {error}") from error


LONGEST_WAIT = 30.0  # seconds that a server's Retry-After may ask for

# The words in which servers refuse `response_format`
JSON_MODE = r"response.?format|json.?(schema|mode|object)|guided|grammar|structured"


def json_mode(request):
    """Return the `response_format` by which a server writes nothing but the object asked for."""
    names = list(request["want"])
    schema = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in names},
        "required": names,
        "additionalProperties": False,
    }
    named = {"name": "captions", "strict": True, "schema": schema}
    return {"type": "json_schema", "json_schema": named}


def retry_after(header):
    """Read a Retry-After header, seconds or a date -> seconds to wait, 0 to LONGEST_WAIT."""
    try:
        wait = float(header)
    except ValueError:
        try:
            wait = email.utils.parsedate_to_datetime(header).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    if math.isnan(wait):
        return 0.0
    return min(max(wait, 0.0), LONGEST_WAIT)


# What read_completion raises over a reply that is no completion: no JSON, or other keys and types
NO_COMPLETION = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)


def read_completion(reply):
    """Read the first choice of a chat completion -> Reply. Raises one of NO_COMPLETION.

    A field of its own for the thinking (reasoning_content, reasoning) is left unread.
    """
    choice = reply["choices"][0]
    message = choice["message"]
    text = join_parts(message.get("content"))
    end = str(choice.get("finish_reason")).lower()
    if end in ("error", "abort"):
        raise ValueError(f"the server stopped with {end!r}")
    if end == "max_tokens":  # so say some servers
        end = "length"
    if message.get("refusal"):
        end = "refusal"
        text = str(message["refusal"])

    # Not all servers count.
    usage = reply.get("usage")
    tokens = []
    for key in ("prompt_tokens", "completion_tokens"):
        count = usage.get(key) if isinstance(usage, dict) else 0
        tokens.append(count if isinstance(count, int) else 0)
    return Reply(text, None, *tokens, end)


def join_parts(content):
    """Return a message's content as one text: it may be null, a text, or a list of typed parts."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return str(content)
    text = ""
    for part in content:
        if isinstance(part, str):
            text += part
        elif part.get("type") in ("text", "output_text", "refusal", None):  # not "thinking"
            text += part.get("text") or part.get("refusal") or ""
    return text


def message_content(shown, prompt):
    """Write [Shown] and a prompt as the content of a chat message: texts and JPEG data URLs."""
    content = []
    for one in shown:
        introduction = "An image:"
        if one.kind == "video":
            introduction = f"A video of {one.seconds:.1f} s in {len(one.pixels)} frames:"
        content.append({"type": "text", "text": introduction})
        for frame in one.pixels:
            jpeg = io.BytesIO()
            Image.fromarray(frame).save(jpeg, "JPEG", quality=90)
            data = base64.b64encode(jpeg.getvalue()).decode()
            image_url = {"url": f"data:image/jpeg;base64,{data}"}
            content.append({"type": "image_url", "image_url": image_url})
    content.append({"type": "text", "text": prompt})
    return content


def map_in_threads(function, things, threads, depth):
    """Yield function(thing) for each thing, in order; at most `depth` results wait."""
    waiting = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for thing in things:
            waiting.append(pool.submit(function, thing))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def split_captioner(name):
    """Split a captioner's name -> (kind "hf" or "openai", model, URL, "" for hf); opens nothing.

    name: mini (the embedded base), hf:MODEL or openai:URL#MODEL. Raises ValueError for any other.
    """
    if name == "mini":
        return "hf", str(Path(__file__).parent / "mini" / "base"), ""
    kind, _, place = name.partition(":")
    if kind == "hf" and place:
        return kind, place, ""
    url, _, model = place.partition("#")
    if kind == "openai" and url.startswith(("http://", "https://")) and model:
        chat_endpoint(url)
        return kind, model, url
    raise ValueError(f"captioner {name!r}: wanted mini, hf:MODEL or openai:URL#MODEL")


def open_captioner(name, *, device, concurrency, **options):
    """Open a captioner by name -> ask(requests).

    name     see split_captioner, which raises ValueError for a wrong one.
    options  frames, max_tokens, max_new_tokens, workers, seconds.
    """
    kind, model, url = split_captioner(name)
    if name == "mini":
        print(
            "captioner mini knows only the rendered world of mini/: it cannot describe other videos"
        )
    if kind == "hf":
        return transformers_captioner(model, device=device, **options)
    return server_captioner(url, model, concurrency=concurrency, **options)
