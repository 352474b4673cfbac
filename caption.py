"""Texts for synth.py: what is no caption, prompts, checked answers, captioners behind one signature (arXiv 2510.27571, A.6).

A captioner is ask(requests) -> one (answer or None, why there is none, tokens read, tokens written) per request, in order and as
they come. A request is {"media": [item, ...], "prompt": str}; the items are data.py's and are shown before the prompt.

    ask = transformers_captioner("mini/base", frames=8, max_tokens=200, device="cpu", batch_size=32, max_new_tokens=64)
    list(ask([{"media": [{"video": "a.mp4"}], "prompt": "Describe the video in the concise style."}]))
"""

import base64
import collections
import io
import itertools
import json
import math
import os
import random
import re
import time
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import torch
import transformers
from PIL import Image

from model import mrope_positions
from support.media import load_image, load_video

URL = r"https?://|www\.|\b\w+\.(com|org|net)\b"
FILE = r"\.(mp4|avi|mov|mkv|webm|wmv|jpe?g|png|gif)\b|^\W*(img|dsc|vid|mvi|gopr|pxl|clip|video|untitled|final)[\W\d_]*$"
FILLER = (
    r"subscribe|click (here|the|on|below)|link (below|in)|follow (me|us)|watch (now|more|full)|all rights reserved|©|"
    r"copyright|royalty[- ]free|stock (footage|video)|no (description|caption|title)|lorem ipsum|sponsored|download|"
    r"^(#\w+\s*)+$"
)
RULES = {  # annotation rectification: what is no description. rule(text, its words, script); the first that holds counts
    "empty": lambda text, words, script: not words,
    "URL": lambda text, words, script: re.search(URL, text, re.I),
    "file name": lambda text, words, script: re.search(FILE, text, re.I),
    "boilerplate": lambda text, words, script: re.search(FILLER, text, re.I),
    "wrong script": lambda text, words, script: (
        3 * sum(c.isalpha() for c in text)
        > 4 * sum(unicodedata.name(c, "").startswith(script) for c in text if c.isalpha())
    ),
    "too short": lambda text, words, script: len(words) < 3,
    "too long": lambda text, words, script: len(words) > 1000,
    "repetition": lambda text, words, script: (
        len(words) > 5 and 2 * len(set(itertools.pairwise(words))) < len(words)
    ),
}
WORDS = {  # A.6: what is asked for, and the least and most words of each
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
PROMPTS = {  # our wording of A.6's specification; requests_for() fills the slots
    "video": """Describe the video for a search engine in five captions:
- concise (10-25 words): what happens, in one sentence;
- rich (80-200 words): who and what is where, what it looks like, and what it does in which order;
- abstract (30-100 words): topic and mood, for someone who forgot the details;
- keywords (5-30 words): key terms, separated by commas;
- partial (10-70 words): one object, moment or place only.
In each, 30-60 % is spatial (objects, looks, positions), 30-60 % temporal (actions, changes, order), up to 20 % theme,
background, style and camera, up to 10 % anything else; give most room to {focus}. At least one caption
has fewer than 20 words and one more than 100. State only what can be seen: no names, causes or sounds. Write {readability}
sentences for readers with {education}.{raw}""",
    "image": """Describe this frame of a video for a search engine in five captions:
- concise (10-25 words): the moment and where things are, in one sentence;
- rich (50-200 words): every object, its looks and where it stands to the others;
- abstract (30-100 words): what the arrangement of the space is about;
- keywords (5-30 words): key terms, the moment's among them, separated by commas;
- minimal (10-70 words): one object and its place.
In each, 50-70 % is spatial, up to 30 % what this one moment proves (no sequence of events), 10-20 % style and composition, up to
10 % anything else. At least one caption has fewer than 20 words. State only what can be seen. Write {readability} sentences for
readers with {education}.{raw}""",
    "TI2V": """First comes a reference image, then the target video. Write the text that finds the target together with the image,
by this strategy: {strategy}. Check that it
1. has at most 50 words, 2. means nothing without the image, 3. does not describe the image again, 4. names a specific attribute
of the target, 5. rules out at least half of the videos that fit the image, 6. is true of the target and not of the reference,
7. reads like something a person would type.""",
    "TV2V": """First comes a reference clip, then the target video. Write the text, usually 5-15 words, that finds the target
together with the clip. It says how the target differs, by this relation: {strategy}. It means nothing without the clip and does
not describe the clip again.""",
}
SHORT = {
    "video": "Describe the video in the {style} style.",
    "image": "Describe the image in the {style} style.",
    "TI2V": "Describe what changes from the reference to the target video.",
    "TV2V": "Describe what changes from the reference to the target video.",
}
FOCUS = {
    "what things look like and where they are": 0.3,
    "what happens and in which order": 0.6,
    "theme, style and camera": 0.1,
}
STRATEGY = {
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


def useless_text(text, script="LATIN"):
    """Name the first rule by which a text is no description, None if there is none (annotation rectification, section 3.3)."""
    words = text.lower().split()
    return next((name for name, rule in RULES.items() if rule(text, words, script)), None)


def requests_for(kind, media, prompts, rng, raw=""):
    """Word the requests for five captions of a "video" or "image", or for a composed "TI2V" or "TV2V" query.

    prompts: "full", one request answered by one JSON object, or "short", one request and a plain answer per style (for captioners
    too small for the former). raw: the uploader's caption, if any. Returns [{"media", "prompt", "want", "plain"}].
    """
    if prompts == "short":
        return [
            {
                "media": media,
                "prompt": SHORT[kind].format(style=style),
                "want": {style: (2, 70)},
                "plain": True,
            }
            for style in WORDS[kind]
        ]
    slots = {
        "focus": rng.choices(list(FOCUS), list(FOCUS.values()))[0],
        "strategy": rng.choice(STRATEGY.get(kind, [""])),
        "readability": rng.choice(("simple", "everyday", "elaborate")),
        "education": rng.choice(("primary school", "high school", "a university degree")),
        "raw": f"\nIts uploader wrote, perhaps wrongly: {' '.join(raw.split()[:200])}"
        if raw
        else "",
    }
    form = json.dumps(dict.fromkeys(WORDS[kind], "..."))
    return [
        {
            "media": media,
            "prompt": f"{PROMPTS[kind].format(**slots)}\nAnswer with one JSON object and nothing else: {form}",
            "want": WORDS[kind],
            "plain": False,
        }
    ]


def task_numbers(words, default, kind):
    """Read a flag's TASK=NUMBER words over its defaults by task."""
    for word in words:
        task, _, value = word.partition("=")
        if task not in default or not re.fullmatch(
            r"\d+(\.\d+)?" if kind is float else r"\d+", value
        ):
            raise ValueError(f"{word}: wanted TASK=NUMBER, TASK one of {', '.join(default)}")
        default[task] = kind(value)
    return default


def dry_run(n, share, prompts, frames, max_tokens):
    """Print the prompts and what n videos cost if none is dropped; 1.35 tokens a word, the middle of each range of words.

    share: pairs per video of each task; frames per video; max_tokens vision tokens per frame, of which two frames share one.
    """
    vision, half = (
        {"video": frames / 2, "image": 1, "TI2V": frames / 2 + 1, "TV2V": frames},
        1.35 / 2,
    )
    share, total = {"video": 1, "image": min(1, share["T2I"]), **share}, np.zeros(3, int)
    for kind in WORDS:
        requests = requests_for(kind, [], prompts, random.Random(0))
        each = [
            (
                1,
                max_tokens * vision[kind] + 2 * half * len(request["prompt"].split()),
                half * sum(map(sum, request["want"].values())),
            )
            for request in requests
        ]
        total += (cost := (n * share[kind] * np.sum(each, 0)).round().astype(int))
        print(
            f"--- {kind}: calls, tokens read, tokens written: {cost.tolist()}",
            *(x["prompt"] for x in requests),
            sep="\n",
        )
    print(f"--- {n} videos: calls, tokens read, tokens written: {total.tolist()}")


def parse(answer, want, plain):
    """Read an answer as {name: text} with the wanted names and numbers of words; ValueError tells the captioner what is wrong."""
    if plain:
        got = dict.fromkeys(want, answer.strip())
    else:
        try:
            got = json.loads(re.sub(r"^\s*```\w*|```\s*$", "", answer))
        except ValueError as error:
            raise ValueError(f"not JSON: {error}") from error
        if (
            not isinstance(got, dict)
            or set(got) != set(want)
            or not all(isinstance(text, str) for text in got.values())
        ):
            raise ValueError(
                f"schema: it must be one object with strings under {', '.join(want)} and no other key"
            )
    for name, (low, high) in want.items():
        if not low <= (n := len(got[name].split())) <= high:
            raise ValueError(f"length: {name} has {n} words and must have {low}-{high}")
    if len({text.lower() for text in got.values()}) < len(got):
        raise ValueError("repetition: two captions are the same")
    return got


def obtain(ask, requests, tries):
    """Ask until every answer parses or its tries are spent -> one {"fate", "got" or "why", "tokens": [read, written]} each."""
    out, pending = [{"tokens": [0, 0]} for _ in requests], list(range(len(requests)))
    for _ in range(tries):
        shown = [
            f"\nYour last answer was refused: {out[i]['why']}. Answer again."
            if "why" in out[i]
            else ""
            for i in pending
        ]
        asked = [
            {**requests[i], "prompt": requests[i]["prompt"] + error}
            for i, error in zip(pending, shown, strict=True)
        ]
        for i, (answer, failure, *tokens) in zip(pending, ask(asked), strict=True):
            fate = {"fate": "failed", "why": failure}
            if not failure:
                try:
                    fate = {
                        "fate": "kept",
                        "got": parse(answer, requests[i]["want"], requests[i]["plain"]),
                    }
                except ValueError as error:
                    fate = {"fate": "dropped", "why": str(error)}
            out[i] = fate | {
                "tokens": [a + b for a, b in zip(out[i]["tokens"], tokens, strict=True)]
            }
        pending = [i for i in pending if out[i]["fate"] == "dropped"]
    return out


def ahead(make, things, workers, depth):
    """Map `make` over `things` in threads, in order, at most `depth` results waiting: decoding overlaps with what follows."""
    waiting = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for thing in things:
            waiting.append(pool.submit(make, thing))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def show(request, frames, max_tokens):
    """Decode a request's media -> [(kind, PIL images of at most max_tokens * 28 * 28 pixels, seconds)], or why not (str)."""
    shown = []
    try:
        for item in request["media"]:
            pixels, seconds = (
                load_video(item["video"], frames)
                if "video" in item
                else (load_image(item["image"])[None], 0.0)
            )
            height, width = pixels.shape[1:3]
            scale = min(1, math.sqrt(max_tokens * 28 * 28 / (height * width)))
            size = (
                (max(28, int(width * scale)), max(28, int(height * scale)))
                if scale < 1
                else (width, height)
            )
            images = [Image.fromarray(frame).resize(size) for frame in pixels]
            shown.append(("video" if "video" in item else "image", images, seconds))
    except (ValueError, FileNotFoundError) as error:
        return f"media: {error}"
    return shown


def transformers_captioner(
    name, *, frames, max_tokens, device, batch_size, max_new_tokens, workers=2
):
    """Answer with any image-text-to-text model, greedily, in batches; a processor without videos gets their frames as images."""
    transformers.logging.set_verbosity_error()
    processor = transformers.AutoProcessor.from_pretrained(name)
    dtype = torch.bfloat16 if "cuda" in device else torch.float32
    model = (
        transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        .to(device)
        .eval()
    )
    processor.tokenizer.padding_side, films = (
        "left",
        getattr(processor, "video_processor", None) is not None,
    )
    pad = processor.tokenizer.pad_token_id

    def prepare(batch):
        """-> (why each request's media failed, or None; model inputs of the others)"""
        shown, turns, images, videos, seconds = (
            [show(r, frames, max_tokens) for r in batch],
            [],
            [],
            [],
            [],
        )
        for request, media in zip(batch, shown, strict=True):
            parts = []
            for kind, pictures, length in media if isinstance(media, list) else ():
                if kind == "video" and films:
                    videos.append(np.stack(pictures))
                    seconds.append(length)
                    parts.append({"type": "video"})
                else:
                    images += pictures
                    parts += [{"type": "image"}] * len(pictures)
            if isinstance(media, list):
                turns.append(
                    [
                        {
                            "role": "user",
                            "content": [*parts, {"type": "text", "text": request["prompt"]}],
                        }
                    ]
                )
        failures = [media if isinstance(media, str) else None for media in shown]
        if not turns:
            return failures, None
        media = {"images": images} if images else {}
        if videos:
            about = [
                {"fps": frames / s, "total_num_frames": frames, "duration": s} for s in seconds
            ]
            media |= {
                "videos": videos,
                "videos_kwargs": {"do_sample_frames": False, "video_metadata": about},
            }
        texts = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=texts, padding=True, return_tensors="pt", **media)
        if (
            model.config.model_type == "qwen2_5_vl"
        ):  # our positions: transformers >= 4.52 truncates the seconds per grid
            video, image = (
                inputs["input_ids"] == i
                for i in (model.config.video_token_id, model.config.image_token_id)
            )
            inputs["position_ids"] = mrope_positions(
                image + 2 * video,
                inputs["attention_mask"],
                inputs.get("image_grid_thw"),
                inputs.get("video_grid_thw"),
                2 / frames * torch.tensor(seconds),
                tokens_per_second=model.config.vision_config.tokens_per_second,
            )
        return failures, inputs

    @torch.inference_mode()
    def ask(requests):
        batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
        for failures, inputs in ahead(prepare, batches, workers, 2):
            made = iter(())
            if inputs is not None:
                out = model.generate(
                    **inputs.to(device),
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    pad_token_id=pad,
                )
                out = out[:, inputs["input_ids"].shape[1] :]  # (B, T)
                made = zip(
                    processor.batch_decode(out, skip_special_tokens=True),
                    inputs["attention_mask"].sum(1).tolist(),
                    (out != pad).sum(1).tolist(),
                    strict=True,
                )
            for why in failures:
                answer, n_read, n_written = (None, 0, 0) if why else next(made)
                yield answer, why, n_read, n_written

    return ask


def server_captioner(
    url, model, *, frames, max_tokens, max_new_tokens, concurrency, retries, backoff, timeout
):
    """Answer with a server that speaks OpenAI's chat completions (vLLM, SGLang); every frame goes as a JPEG data URL.

    408, 409, 429, 5xx, time-outs, broken connections and replies that are no completion are tried again `retries` times, after
    backoff * 2^n seconds or what Retry-After asks for. $OPENAI_API_KEY is sent where it is set.
    """
    key = os.environ.get("OPENAI_API_KEY")
    client = httpx.Client(
        timeout=timeout,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        limits=httpx.Limits(max_connections=concurrency),
    )

    def one(request):
        shown, content = show(request, frames, max_tokens), []
        if isinstance(shown, str):
            return None, shown, 0, 0
        for kind, images, seconds in shown:
            caption = (
                f"A video of {seconds:.1f} s in {frames} frames:"
                if kind == "video"
                else "An image:"
            )
            content.append({"type": "text", "text": caption})
            for image in images:
                image.save(jpeg := io.BytesIO(), "JPEG", quality=90)
                data = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
                content.append({"type": "image_url", "image_url": {"url": data}})
        content.append({"type": "text", "text": request["prompt"]})
        turn, wait = {"role": "user", "content": content}, 0.0
        body = {"model": model, "messages": [turn], "max_tokens": max_new_tokens, "temperature": 0}
        for attempt in range(retries + 1):
            time.sleep(wait)
            wait = backoff * 2**attempt * random.uniform(0.8, 1.2)
            try:
                reply = client.post(f"{url.rstrip('/')}/chat/completions", json=body)
                if reply.status_code == 200:
                    said = reply.json()
                    used = said.get("usage") or {}
                    return (
                        str(said["choices"][0]["message"]["content"] or ""),
                        None,
                        used.get("prompt_tokens", 0),
                        used.get("completion_tokens", 0),
                    )
                why = f"HTTP {reply.status_code}: {reply.text[:200]}"
                if reply.status_code not in (408, 409, 429) and reply.status_code < 500:
                    break
                wait = max(wait, float(reply.headers.get("retry-after", 0)))
            except (
                httpx.HTTPError,
                ValueError,
                KeyError,
                IndexError,
                TypeError,
                AttributeError,
            ) as error:
                why = f"{type(error).__name__}: {error}"
        return None, why, 0, 0

    return lambda requests: ahead(one, requests, concurrency, 2 * concurrency)


def captioner(
    name, *, device, batch_size, workers, concurrency, retries, backoff, timeout, **sizes
):
    """Open a captioner by name: mini (the embedded base), hf:MODEL or openai:URL#MODEL."""
    kind, _, rest = ("hf:mini/base" if name == "mini" else name).partition(":")
    url, _, model = rest.partition("#")
    if kind == "hf" and rest:
        return transformers_captioner(
            rest, device=device, batch_size=batch_size, workers=workers, **sizes
        )
    if kind == "openai" and url.startswith(("http://", "https://")) and model:
        return server_captioner(
            url,
            model,
            concurrency=concurrency,
            retries=retries,
            backoff=backoff,
            timeout=timeout,
            **sizes,
        )
    raise ValueError(f"captioner {name!r}: wanted mini, hf:MODEL or openai:URL#MODEL")
