"""Captioners for synth.py behind one signature: a transformers model in this process, or any OpenAI-compatible server.

A captioner is ask(requests) -> one (answer or None, why there is none, tokens read, tokens written) per request, in order, while
it reads. A request is {"media": [item, ...], "prompt": str}; items are data.py's, shown in that order before the prompt.

    ask = transformers_captioner("mini/base", frames=8, max_tokens=200, device="cpu", batch_size=32, max_new_tokens=64)
    list(ask([{"media": [{"video": "a.mp4"}], "prompt": "Describe the video in the concise style."}]))
"""

import base64
import collections
import io
import math
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import torch
import transformers
from PIL import Image

from data import load_image, load_video
from model import mrope_positions


def ahead(make, things, workers, depth):
    """Map `make` over `things` in threads, in order, with at most `depth` results waiting: decoding overlaps with what follows."""
    waiting = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        for thing in things:
            waiting.append(pool.submit(make, thing))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def show(request, frames, max_tokens):
    """Decode a request's media -> [(kind, PIL images of at most max_tokens * 28 * 28 pixels, seconds)], or why that failed (str)."""
    shown = []
    try:
        for item in request["media"]:
            pixels, seconds = load_video(item["video"], frames) if "video" in item else (load_image(item["image"])[None], 0.0)
            height, width = pixels.shape[1:3]
            scale = min(1, math.sqrt(max_tokens * 28 * 28 / (height * width)))
            images = [Image.fromarray(frame).resize((max(28, int(width * scale)), max(28, int(height * scale)))) if scale < 1
                      else Image.fromarray(frame) for frame in pixels]
            shown.append(("video" if "video" in item else "image", images, seconds))
    except (ValueError, FileNotFoundError) as error:
        return f"media: {error}"
    return shown


def transformers_captioner(name, *, frames, max_tokens, device, batch_size, max_new_tokens, workers=2):
    """Answer with any image-text-to-text model, greedily, in batches; where its processor knows no videos it sees their frames."""
    transformers.logging.set_verbosity_error()
    processor = transformers.AutoProcessor.from_pretrained(name)
    dtype = torch.bfloat16 if "cuda" in device else torch.float32
    model = transformers.AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(device).eval()
    processor.tokenizer.padding_side, films = "left", getattr(processor, "video_processor", None) is not None
    pad = model.generation_config.pad_token_id

    def prepare(batch):
        """-> (why each request's media failed, or None; model inputs of the others)"""
        shown, turns, images, videos, seconds = [show(r, frames, max_tokens) for r in batch], [], [], [], []
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
                turns.append([{"role": "user", "content": [*parts, {"type": "text", "text": request["prompt"]}]}])
        failures = [media if isinstance(media, str) else None for media in shown]
        if not turns:
            return failures, None
        media = {"images": images} if images else {}
        if videos:
            about = [{"fps": frames / s, "total_num_frames": frames, "duration": s} for s in seconds]
            media |= {"videos": videos, "videos_kwargs": {"do_sample_frames": False, "video_metadata": about}}
        texts = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        inputs = processor(text=texts, padding=True, return_tensors="pt", **media)
        if model.config.model_type == "qwen2_5_vl":  # our positions: transformers >= 4.52 truncates the seconds per grid
            video, image = (inputs["input_ids"] == i for i in (model.config.video_token_id, model.config.image_token_id))
            inputs["position_ids"] = mrope_positions(
                image + 2 * video, inputs["attention_mask"], inputs.get("image_grid_thw"), inputs.get("video_grid_thw"),
                2 / frames * torch.tensor(seconds), tokens_per_second=model.config.vision_config.tokens_per_second)
        return failures, inputs

    @torch.inference_mode()
    def ask(requests):
        batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
        for failures, inputs in ahead(prepare, batches, workers, 2):
            made = iter(())
            if inputs is not None:
                out = model.generate(**inputs.to(device), max_new_tokens=max_new_tokens, do_sample=False)
                out = out[:, inputs["input_ids"].shape[1] :]  # (B, T)
                made = zip(processor.batch_decode(out, skip_special_tokens=True), inputs["attention_mask"].sum(1).tolist(),
                           (out != pad).sum(1).tolist(), strict=True)
            for why in failures:
                answer, n_read, n_written = (None, 0, 0) if why else next(made)
                yield answer, why, n_read, n_written

    return ask


def server_captioner(url, model, *, frames, max_tokens, max_new_tokens, concurrency, retries, backoff, timeout):
    """Answer with a server that speaks OpenAI's chat completions (vLLM, SGLang); every frame goes as a JPEG data URL.

    408, 409, 429, 5xx, time-outs, broken connections and replies that are no completion are tried again `retries` times, after
    backoff * 2^n seconds or what Retry-After asks for. $OPENAI_API_KEY is sent where it is set.
    """
    key = os.environ.get("OPENAI_API_KEY")
    client = httpx.Client(timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {},
                          limits=httpx.Limits(max_connections=concurrency))

    def one(request):
        shown, content = show(request, frames, max_tokens), []
        if isinstance(shown, str):
            return None, shown, 0, 0
        for kind, images, seconds in shown:
            content.append({"type": "text", "text": f"A video of {seconds:.1f} s in {frames} frames:" if kind == "video" else "An image:"})
            for image in images:
                image.save(jpeg := io.BytesIO(), "JPEG", quality=90)
                url_of = "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()
                content.append({"type": "image_url", "image_url": {"url": url_of}})
        content.append({"type": "text", "text": request["prompt"]})
        body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": max_new_tokens, "temperature": 0}
        wait = 0.0
        for attempt in range(retries + 1):
            time.sleep(wait)
            wait = backoff * 2**attempt * random.uniform(0.8, 1.2)
            try:
                reply = client.post(f"{url.rstrip('/')}/chat/completions", json=body)
                if reply.status_code == 200:
                    said = reply.json()
                    used = said.get("usage") or {}
                    return (str(said["choices"][0]["message"]["content"] or ""), None, used.get("prompt_tokens", 0),
                            used.get("completion_tokens", 0))
                why = f"HTTP {reply.status_code}: {reply.text[:200]}"
                if reply.status_code not in (408, 409, 429) and reply.status_code < 500:
                    break
                wait = max(wait, float(reply.headers.get("retry-after", 0)))
            except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                why = f"{type(error).__name__}: {error}"
        return None, why, 0, 0

    return lambda requests: ahead(one, requests, concurrency, 2 * concurrency)
