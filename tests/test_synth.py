"""V-SynFlow on real videos: filters on known faults, captioners, kills and reruns.

The captioners include a real HTTP server that misbehaves.
"""

import contextlib
import ctypes
import functools
import http.server
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import moving_square, write_tiny, write_video

import caption
import data
import synth
from extras.check_data import check
from mini import bench, world
from model import GVE, mrope_positions
from studies import report
from support import progress
from support.files import load_jsonl
from support.flags import parse_flags
from support.jobs import print_summary, run_sharded
from support.progress import track

ROOT = Path(__file__).resolve().parent.parent
FIVE = {
    "concise": "A white square slides slowly over the plain ground to the right edge.",
    "rich": " ".join(
        [
            "A small bright square lies on the left of a plain coloured ground and glides to the "
            "right."
        ]
        * 6
    ),
    "abstract": " ".join(
        ["It is about one simple thing that crosses an empty place without any hurry."] * 3
    ),
    "keywords": "square, motion, right, plain ground, slow",
    "partial": "A small bright square touches the right edge of the ground.",
    "minimal": "A small bright square is on the left side of the ground.",
}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A few of the mini world's raw videos, each fault among them."""
    folder = tmp_path_factory.mktemp("raw")
    bench.raw(folder, n=1, faults=2)
    return folder


def run(*words, ok=True):
    """synth.py's main with these flags -> what it printed, and the error's text."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            synth.main(parse_flags(synth.Flags, [str(word) for word in words]))
            failed = ""
        except (ValueError, OSError, SystemExit) as error:
            failed = str(error)
    assert bool(failed) != ok, failed or printed.getvalue()
    return printed.getvalue() + failed


def as_rank(rank, world, flags):
    os.environ.update(RANK=rank, WORLD_SIZE=world)
    synth.main(flags)


def apart(*words, rank="0", world="1"):
    """The same in a process of its own, forked from a server that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["synth", "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"])
    child = context.Process(
        target=as_rank, args=(rank, world, parse_flags(synth.Flags, [str(word) for word in words]))
    )
    child.start()
    return child


def rows_of(out):
    """Every row of every stage, without what a rerun may spend differently."""
    return {
        path.relative_to(out).as_posix(): [
            {k: v for k, v in row.items() if k != "tokens"} for row in load_jsonl(path)
        ]
        for path in sorted(out.rglob("*.jsonl"))
        if path.name != "log.jsonl"
    }


def accounted(out, stage):
    rows = [row for path in sorted((out / stage).glob("*.jsonl")) for row in load_jsonl(path)]
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["fate"] for row in rows} <= {"kept", "dropped", "failed"}
    assert all(row.get("why") for row in rows if row["fate"] != "kept")
    return {
        fate: sum(row["fate"] == fate for row in rows) for fate in ("kept", "dropped", "failed")
    }


# A real server that answers as vLLM does, and misbehaves on demand


class Server(http.server.ThreadingHTTPServer):
    """Answer as vLLM does, after faults.

    faults: one for each of the next requests ("429", "500", "slow", ...); answer(prompt, n images).
    """

    daemon_threads = True

    def __init__(self, faults=(), answer=None, dies_after=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults = list(faults)
        self.answer = answer
        self.dies_after = dies_after
        self.served = []
        self.formats = []  # `response_format` of each request
        self.json_mode = True
        self.refuses_with = 400
        self.completion = None  # the reply to every request
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def name(self):
        return f"openai:{self.url}#vl"

    def handle_error(self, request, client_address):
        pass  # broken pipes are the point of some tests


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each reply waits 40 ms

    def log_message(self, *args):
        pass

    def send(self, code, body, **headers):
        self.send_response(code)
        for key, value in {
            "Content-Length": len(body),
            "Content-Type": "application/json",
            **headers,
        }.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/chat/completions" and body["model"] == "vl"
        content, server = body["messages"][0]["content"], self.server
        images = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        # JPEG's first bytes
        assert all(url.startswith("data:image/jpeg;base64,/9j/") for url in images)
        with server.lock:
            server.served.append(content[-1]["text"])
            server.formats.append(body.get("response_format"))
            fault = server.faults.pop(0) if server.faults else ""
            dead = server.dies_after is not None and len(server.served) > server.dies_after
        if server.completion is not None:
            return self.send(200, json.dumps(server.completion).encode())
        if server.formats[-1] and not server.json_mode:
            words = b'{"error": {"message": "response_format is unavailable"}}'
            return self.send(server.refuses_with, words)
        if fault == "429":
            return self.send(429, b'{"error": "busy"}', Retry_After=0)
        if fault == "500":
            return self.send(500, b"oops")
        if fault == "400":
            return self.send(400, b'{"error": "prompt is too long"}')
        if fault == "not json":
            return self.send(200, b"<html>gateway</html>")
        if fault == "no choices":
            return self.send(200, b'{"choices": []}')
        if fault == "closed" or dead:
            self.close_connection = True
            self.connection.shutdown(2)
            return None
        if fault == "half":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.close_connection = True
            return None
        if fault == "slow":
            time.sleep(1.5)
        text = (
            server.answer(content[-1]["text"], len(images))
            if server.answer
            else fit(content[-1]["text"])
        )
        text = {"fence": f"```json\n{text}\n```", "chatty": f"Sure! {text}", "cut": text[:40]}.get(
            fault, text
        )
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 100, "completion_tokens": 50}
        return self.send(200, json.dumps({"choices": [choice], "usage": usage}).encode())


def fit(prompt):
    """The JSON that a prompt of caption.py asks for, read off the form that it ends with."""
    form = json.loads(re.findall(r"nothing else: (\{.*\})", prompt)[0])
    return json.dumps(
        {key: FIVE.get(key, "the same square, but it goes the other way round") for key in form}
    )


SIZES = {"frames": 8, "max_tokens": 200, "max_new_tokens": 64}


def ask_server(server, **more):
    quick = {"concurrency": 1, "retries": 2, "backoff": 0.01, "timeout": 1.0} | more
    return caption.server_captioner(server.url, "vl", **SIZES, **quick)


def requests(media, n=1, kind="video"):
    item = {"video": str(media / "a.mp4")} if kind == "video" else {"image": str(media / "i.png")}
    made = []
    for i in range(n):
        made += caption.make_requests(kind, [item], "full", random.Random(i))
    return made


@pytest.mark.parametrize(
    "faults, fate, calls",
    [
        ([], "kept", 1),
        (["429"], "kept", 2),
        (["500", "500"], "kept", 3),
        (["500"] * 3, "failed", 3),
        (["slow"], "kept", 2),
        (["closed"], "kept", 2),
        (["half"], "kept", 2),
        (["not json"], "kept", 2),
        (["no choices"], "kept", 2),
        (["400"], "failed", 1),
        (["fence"], "kept", 1),
        (["chatty"], "kept", 1),
        (["cut"], "kept", 2),
        (["cut"] * 3, "dropped", 3),
    ],
)
def test_every_way_a_server_misbehaves_is_tried_again_and_accounted_for(media, faults, fate, calls):
    server = Server(faults)
    (result,) = caption.ask_until_valid(ask_server(server), requests(media), tries=3)
    assert (result.fate, len(server.served)) == (fate, calls), result
    answers = 0 if fate == "failed" else 1 + sum(fault == "cut" for fault in faults[:2])
    assert result.tokens == [100 * answers, 50 * answers]
    if faults and faults[0] == "cut":
        assert "refused: not JSON" in server.served[1] and "refused" not in server.served[0]


def test_frames_go_out_as_many_jpegs_as_the_captioner_sees_and_a_lost_file_fails_alone(media):
    seen = []
    server = Server(answer=lambda prompt, n: seen.append(n) or fit(prompt))
    asked = [
        *requests(media),
        *requests(media, kind="image"),
        *caption.make_requests(
            "TV2V",
            [{"video": str(media / "a.mp4")}, {"video": str(media / "b.mp4")}],
            "full",
            random.Random(0),
        ),
    ]
    asked.insert(1, {**asked[0], "media": [{"video": str(media / "lost.mp4")}]})
    results = caption.ask_until_valid(ask_server(server), asked, tries=1)
    assert [result.fate for result in results] == ["kept", "failed", "kept", "kept"]
    assert "lost.mp4" in results[1].why
    assert seen == [8, 1, 16]


@pytest.mark.parametrize(
    "answer, wrong",
    [
        ({**FIVE, "concise": "Too short."}, "length: concise has 2 words and must have 10-25"),
        ({"query": "a b c"}, "schema"),
        ({**FIVE, "rich": 7}, "schema"),
        ([1], "schema"),
        ("I cannot help with that.", "refusal: I cannot"),
        ({**FIVE, "partial": FIVE["concise"]}, "repetition"),
    ],
)
def test_bad_answers_are_refused_with_the_reason(answer, wrong):
    want = caption.WORDS["video"]
    if isinstance(answer, dict):
        answer = {k: v for k, v in answer.items() if k != "minimal"}
    text = answer if isinstance(answer, str) else json.dumps(answer)
    with pytest.raises(ValueError, match=wrong):
        caption.parse_answer(text, want, plain=False)
    good = {style: FIVE[style] for style in want}
    assert caption.parse_answer(json.dumps(good), want, plain=False) == good


# Answers as servers give them: content or choice, and the text that is to be kept or the reason

TEXT = "the same square, but it goes the other way round"
JSON = json.dumps({"query": TEXT})
DRAFT = json.dumps({"query": "this is a draft and not the answer"})
SORRY = "I'm sorry, but I can't help with that."

JSON_FORMS = {
    "bare": (JSON, TEXT),
    "fence": (f"```json\n{JSON}\n```", TEXT),
    "prose around a fence": (f"Sure! Here it is:\n```json\n{JSON}\n```\nHope it helps {{:", TEXT),
    "text after it": (f"{JSON}\n\nLet me know if you need more.", TEXT),
    "apology before it": (f"I'm sorry for the delay. {JSON}", TEXT),
    "thinking": (f"<think>A square. Perhaps {DRAFT}?</think>\n{JSON}", TEXT),
    "thinking whose start is in the template": (f"A square. {DRAFT}\n</think>\n\n{JSON}", TEXT),
    "thinking of another make": (f"[THINK]{DRAFT}[/THINK]{JSON}", TEXT),
    "thinking without an end": (f"<think>It is a square.\n{JSON}", TEXT),
    "thinking in a field": ({"content": JSON, "reasoning_content": f"Perhaps {DRAFT}"}, TEXT),
    "two objects": (f"{DRAFT}\nBetter:\n{JSON}", TEXT),
    "object in an object": (f'{{"answer": {JSON}}}', TEXT),
    "one key more": (json.dumps({"query": TEXT, "notes": ["none"]}), TEXT),
    "list of words": (
        json.dumps({"query": ["a square", "the other way"]}),
        "a square, the other way",
    ),
    "parts": ({"content": [{"type": "text", "text": JSON[:9]}, {"text": JSON[9:]}]}, TEXT),
    "parts that think": (
        {"content": [{"type": "thinking", "thinking": [DRAFT]}, {"type": "text", "text": JSON}]},
        TEXT,
    ),
    "raw control characters": ('{"query": "the\tother\nway \x07 round"}', "the other way round"),
    "half an emoji": ('{"query": "the other way \\ud83d round"}', "the other way round"),
    "whole emoji": ('{"query": "the \\ud83d\\ude00 goes round"}', "the \U0001f600 goes round"),
    "no finish reason": ({"content": JSON, "finish_reason": None}, TEXT),
    "cut off": ({"content": JSON[:30], "finish_reason": "length"}, "truncated"),
    "cut off in circles": ({"content": "and " * 99, "finish_reason": "length"}, "repetition"),
    "filtered": ({"content": JSON[:30], "finish_reason": "content_filter"}, "filtered"),
    "refusal": (SORRY, "refusal: I'm sorry"),
    "refusal in a field": ({"content": None, "refusal": SORRY}, "refusal: I'm sorry"),
    "refusal in a part": ({"content": [{"type": "refusal", "refusal": SORRY}]}, "refusal"),
    "refusal in the object": (json.dumps({"query": "I cannot see the video you sent."}), "refusal"),
    "null": ({"content": None}, "empty"),
    "absent": ({"role": "assistant"}, "empty"),
    "thinking alone": (f"<think>Perhaps {DRAFT}</think>", "empty"),
    "drafts in thinking without an end": (f"<think>Perhaps {DRAFT}? No,", "thinking"),
    "half an object": (JSON[:30], "not JSON"),
    "half an object in circles": ('{"query": "a square ' + "and goes " * 99, "repetition: it goes"),
    "a number": ('{"query": 7}', "schema"),
    "another key": ('{"caption": "the other way round"}', "schema"),
    "circles": ('{"query": "goes and goes and goes and goes and goes"}', "repetition"),
}
PLAIN_FORMS = {
    "bare": (TEXT, TEXT),
    "quotes": (f"\u201c{TEXT}\u201d\n", TEXT),
    "preamble": (f"Sure! Here is a concise caption of the video:\n\n{TEXT}", TEXT),
    "label": (f"**Caption:** {TEXT}", TEXT),
    "farewell": (f"{TEXT}.\n\nLet me know if you want another one!", f"{TEXT}."),
    "fence": (f"```\n{TEXT}\n```", TEXT),
    "thinking": (f"<think>{SORRY}</think>{TEXT}", TEXT),
    "thinking whose start is in the template": (f"A square.\n</think>\n{TEXT}", TEXT),
    "box": (f"<|begin_of_box|>{TEXT}<|end_of_box|>", TEXT),
    "JSON unasked": (json.dumps({"caption": TEXT}), TEXT),
    "parts": ({"content": [{"type": "text", "text": TEXT}]}, TEXT),
    "control characters": (TEXT.replace(" ", "\x1b\n"), TEXT),
    "thinking without an end": (f"<think>{TEXT}", "thinking"),
    "cut off": ({"content": TEXT, "finish_reason": "length"}, "truncated"),
    "refusal": (SORRY.replace("'", "\u2019"), "refusal"),
    "refusal of another make": ("Unfortunately, I am not able to view videos.", "refusal"),
    "no video seen": ("It seems that no video was provided.", "refusal"),
    "as an AI": ("As an AI language model, I have no eyes.", "refusal"),
    "JSON of many texts": (json.dumps({"a": TEXT, "b": TEXT}), "schema"),
    "and and": ("and and and and", "repetition"),
    "instead instead": ("instead instead", "repetition"),
    "exclamations": ("a square !!!!!!!!!!!!!!!!!!!!", "repetition"),
    "one word": ("square", "length"),
    "null": ({"content": None}, "empty"),
}


def test_one_rule_says_which_answers_of_a_server_are_usable():
    """The right ones are kept after one call, the wrong ones are dropped with the reason."""
    forms = [(form, False, name) for name, form in JSON_FORMS.items()]
    forms += [(form, True, name) for name, form in PLAIN_FORMS.items()]
    assert len(forms) > 50
    server = Server()
    ask = ask_server(server, workers=0)
    usages = [None, {}, [], "unknown", {"prompt_tokens": None, "completion_tokens": "many"}]
    for (answer, expected), plain, name in forms:
        choice = dict(answer) if isinstance(answer, dict) else {"content": answer}
        finish = choice.pop("finish_reason", "stop")
        server.completion = {
            "choices": [{"message": choice, "finish_reason": finish}],
            "usage": usages[len(server.served) % len(usages)],
        }
        request = {"media": [], "prompt": "x", "want": {"query": (2, 50)}, "plain": plain}
        (result,) = caption.ask_until_valid(ask, [request], tries=1)
        if result.fate == "kept":
            assert result.texts == {"query": expected}, name
        else:
            assert result.fate == "dropped" and result.why.startswith(expected), (name, result)
    assert len(server.served) == len(forms)


@pytest.mark.parametrize(
    "completion",
    [
        {},
        {"choices": None},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": [{"text": 3}]}}]},
        {"choices": [{"message": {"content": "half a"}, "finish_reason": "error"}]},
        {"error": {"message": "overloaded"}},
    ],
)
def test_a_reply_that_is_no_completion_is_asked_for_again_and_shows_the_server_s_words(completion):
    server = Server()
    server.completion = completion
    request = {"media": [], "prompt": "x", "want": {"query": (2, 50)}, "plain": True}
    (result,) = caption.ask_until_valid(ask_server(server), [request], tries=3)
    assert (result.fate, len(server.served)) == ("failed", 3)
    assert result.why == f"HTTP 200 without a completion: {json.dumps(completion)}"


@pytest.mark.parametrize("status", [400, 422, 500, 501])
def test_json_mode_is_used_until_the_server_refuses_it_and_then_never_again(capsys, status):
    server = Server()
    server.json_mode = False
    server.refuses_with = status
    ask = ask_server(server)
    asked = caption.make_requests("TI2V", [], "full", random.Random(0)) * 3
    results = caption.ask_until_valid(ask, asked, tries=1)
    assert [result.fate for result in results] == ["kept"] * 3
    assert len(server.served) == 4 and server.formats[1:] == [None] * 3
    assert server.formats[0]["json_schema"]["schema"]["required"] == ["query"]
    assert capsys.readouterr().out.count("no JSON mode") == 1

    # Where it is known, every answer in JSON is asked for so, and plain ones are not.
    server = Server()
    plain = {**asked[0], "plain": True}
    list(ask_server(server)([asked[0], plain]))
    assert [bool(format) for format in server.formats] == [True, False]


@pytest.mark.parametrize(
    "header, least, most",
    [
        ("2", 2, 2),
        ("in 5 seconds", 4, 5),
        ("yesterday", 0, 0),
        ("next year", 30, 30),
        ("1e9", 30, 30),
        ("inf", 30, 30),
        ("-5", 0, 0),
        ("nan", 0, 0),
        ("soon", 0, 0),
        ("", 0, 0),
    ],
)
def test_retry_after_is_heeded_within_bounds(header, least, most):
    days = {"in 5 seconds": 5 / 86400, "yesterday": -1, "next year": 365}
    if header in days:
        moment = time.time() + days[header] * 86400
        header = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(moment))
    assert least <= caption.retry_after(header) <= most


def test_no_reply_is_asked_for_twice_whenever_the_run_ends(tmp_path):
    """The n-th of equal requests gets the n-th reply, also after half a line."""
    asked = []

    def ask(requests):
        for request in requests:
            asked.append(request["prompt"])
            if request["prompt"] == "lost":
                yield caption.Reply(None, "HTTP 500", 0, 0)
            elif len(asked) > 4:
                raise OSError("the machine goes down")
            else:
                yield caption.Reply(f"{len(asked)} \ud83d", None, 1, 2, "stop")

    requests = [{"media": [], "prompt": prompt} for prompt in ("a", "b", "lost", "a", "b")]
    path = tmp_path / "part.answers"
    replies = caption.keep_replies(ask, path, "m")(requests)
    for k in range(2):
        next(replies)
        assert path.read_text().count('"reply"') == k + 1  # before anything else is done with it
    with pytest.raises(OSError, match="goes down"):
        list(replies)
    with open(path, "a") as file:
        file.write('\n{"key": "half of a li')
    asked.clear()
    replies = list(caption.keep_replies(ask, path, "m")(requests))
    assert asked == ["lost", "b"]
    assert [reply.text for reply in replies] == [
        "1 \ud83d",
        "2 \ud83d",
        None,
        "4 \ud83d",
        "2 \ud83d",
    ]
    assert replies[0] == ("1 \ud83d", None, 1, 2, "stop")
    asked.clear()
    list(caption.keep_replies(ask, path, "another")(requests[:2]))
    assert asked == ["a", "b"]


def test_texts_that_go_round_are_told_from_captions():
    for text in (
        "one " * 30,
        "The round " + "and goes " * 8,
        "a square goes to the" + " left to the" * 4,
        "A ring goes goes and goes goes right.",
        "A ring spins ....................",
    ):
        assert caption.goes_round(text), text
    for text in (
        "Round and round and round the ring goes on a meadow, over and over and over again.",
        "It walks up and down and up and down, left, right, left, right, left, right.",
        "A far far away town had had its day when a ring rolled down that road.",
        "red car, blue car, red bus, blue bus, red road, blue road, red sky, blue sky",
        "no no no, says a sign... and the dog runs on",
    ):
        assert not caption.goes_round(text), text
        assert not caption.REFUSAL.search(text), text


def test_full_prompts_state_the_paper_s_numbers_and_the_profile_is_30_60_10():
    text = caption.make_requests("video", [], "full", random.Random(0), raw="my dog")[0]["prompt"]
    for asked in (
        "concise (10-25 words)",
        "rich (80-200 ",
        "abstract (30-100 ",
        "keywords (5-30 ",
        "partial (10-70 ",
        "30-60 %",
    ):
        assert asked in text
    assert "my dog" in text and "{" not in text.split("Answer with")[0]
    focus = [
        caption.make_requests("video", [], "full", random.Random(i))[0]["prompt"]
        for i in range(600)
    ]
    share = [np.mean([part in prompt for prompt in focus]) for part in caption.FOCUS]
    # Within 3 standard deviations of 600 draws
    assert np.allclose(share, [0.3, 0.6, 0.1], atol=0.06), share


def test_texts_that_describe_nothing_are_named_and_captions_pass():
    for text in bench.EMPTY_TEXTS:
        assert caption.useless_text(text), text
    assert caption.useless_text("word " * 20_000) == "too long"
    assert caption.useless_text("красная звезда движется", "CYRILLIC") is None
    rng = random.Random(0)
    for _ in range(200):
        scene = world.sample_scene(rng, test=False)
        for form in (*world.VIDEO_STYLES.values(), *world.FRAME_STYLES.values()):
            assert caption.useless_text(text := form(scene, rng)[0]) is None, text
            got = caption.parse_answer(text, {"rich": (2, 300)}, plain=True)
            assert got == {"rich": text}


# Whole runs


@pytest.fixture
def impatient(monkeypatch):
    """Give a server up soon."""
    quick = functools.partial(caption.server_captioner, retries=1, backoff=0.01)
    monkeypatch.setattr(caption, "server_captioner", quick)


def test_a_server_that_dies_midway_leaves_everything_accounted_for_and_a_rerun_finishes(
    raw, tmp_path, impatient
):
    server, again, whole = Server(dies_after=9), Server(), Server()
    common = ["--videos", raw / "captions.jsonl", "--prompts", "full", "--part", 8]
    common += ["--shares", "T2I=1", "TI2V=1", "TV2V=1", "--concurrency", 3]
    run(*common, "--captioner", server.name, "--out", tmp_path / "out", ok=False)
    assert accounted(tmp_path / "out", "2-captions")["failed"] > 0
    # The same pool: no need to look at it again
    shutil.copytree(tmp_path / "out" / "1-pool", tmp_path / "whole" / "1-pool")
    for name in ("pool.jsonl", "pool.npy", "flags.jsonl", "log.jsonl"):
        shutil.copy(tmp_path / "out" / name, tmp_path / "whole" / name)
    run(*common, "--captioner", again.name, "--out", tmp_path / "out")
    run(*common, "--captioner", whole.name, "--out", tmp_path / "whole")
    assert (
        accounted(tmp_path / "out", "2-captions")["failed"]
        == accounted(tmp_path / "out", "3-pairs")["failed"]
        == 0
    )
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole") and len(again.served) < len(
        whole.served
    )


def test_failures_end_in_status_1_also_where_the_run_stops_after_the_captions(
    raw, tmp_path, impatient
):
    server = Server(dies_after=0)
    where = ["--videos", raw / "captions.jsonl", "--out", tmp_path, "--stages", 2]
    printed = run(*where, "--captioner", server.name, ok=False)
    failed = accounted(tmp_path, "2-captions")["failed"]
    assert failed > 0
    assert f"{failed} failed; the same command tries them again" in printed


def test_a_captioner_that_always_refuses_ends_with_everything_dropped(raw, tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "TRIES", 2)
    server = Server(answer=lambda prompt, n: "I'm sorry, but I can't help with that.")
    where = ["--videos", raw / "captions.jsonl", "--out", tmp_path]
    printed = run(*where, "--captioner", server.name, ok=False)
    count = accounted(tmp_path, "2-captions")
    assert count["kept"] == count["failed"] == 0 < count["dropped"]
    assert f"dropped {count['dropped']} (refusal)" in printed
    assert "not one pair was made" in printed
    assert len(server.served) == 2 * count["dropped"]


@pytest.fixture(scope="module")
def whole(raw, tmp_path_factory):
    """An uninterrupted run with captioner mini -> (flags, its folder)."""
    flags = ["--videos", raw / "captions.jsonl", "--part", 4, "--max-new-tokens", 64]
    flags += ["--shares", *(f"{task}=1" for task in synth.TABLE7)]
    run(*flags, "--out", out := tmp_path_factory.mktemp("whole"))
    return flags, out


def test_mini_makes_a_mixture_that_loads_whole(whole, raw):
    mixture = whole[1] / "uvrd" / "mixture.json"
    assert list(check(mixture, [raw])) == []
    sources = {source.task: source for source in data.load_mixture(mixture)}
    assert sources.keys() >= {"T2T", "T2I", "T2V", "I2V", "TI2V"}
    # Equal shares, however many were dropped
    assert {source.samples for source in sources.values()} == {len(sources["T2V"])}
    assert sum(map(len, sources.values())) == accounted(whole[1], "3-pairs")["kept"]


def test_a_caption_is_as_consistent_as_the_best_of_its_video_and_shots(whole):
    gve, by_shot = GVE.from_pretrained("mini/prober"), 0
    for row in (row for row in load_jsonl(whole[1] / "pool.jsonl") if "consistency" in row):
        ends = [0, *row["cuts"], row["seconds"]]
        clips = [
            {"video": {"path": row["video"], "start": ends[i], "end": ends[i + 1]}}
            for i in range(len(ends) - 1)
        ]
        scores = (
            gve.embed([{"video": row["video"]}, *clips]) @ gve.embed([{"text": row["text"]}])[0]
        )
        assert row["consistency"] == pytest.approx(scores.max().item(), abs=1e-3), row["id"]
        assert row.get("why", "").startswith("consistency") == (row["consistency"] < 0.09), row[
            "id"
        ]
        by_shot += scores.argmax().item() > 0 and len(clips) > 1
    assert by_shot


def test_hard_negatives_are_what_a_plain_search_finds(whole):
    gve, out = GVE.from_pretrained("mini/prober"), whole[1]
    every = {
        stage: [row for path in sorted((out / stage).glob("*.jsonl")) for row in load_jsonl(path)]
        for stage in ("2-captions", "3-pairs")
    }
    said = {
        row["of"]: gve.embed([{"text": text} for text in row["captions"].values()])
        for row in every["2-captions"]
        if row["kind"] == "video" and row["fate"] == "kept"
    }
    pool = {
        row["id"]: row["video"] for row in load_jsonl(out / "pool.jsonl") if row["fate"] == "kept"
    }
    videos, names = gve.embed([{"video": path} for path in pool.values()]), list(pool)
    pairs = [row for row in every["3-pairs"] if row["task"] == "T2V" and row["fate"] == "kept"]
    assert len(pairs) > 5
    for row in pairs:
        query, own = gve.embed([row["query"]])[0], names.index(row["of"])
        like = {
            names[j]: float((said[names[j]] @ query).max())
            for j in range(len(names))
            if names[j] in said
            and videos[j] @ videos[own] < 0.98
            and videos[j] @ query <= videos[own] @ query
        }
        best = max(score for score in like.values() if score <= 0.97)
        [negative] = [name for name in names if pool[name] == row["negatives"][0]["video"]]
        assert negative != row["of"] and like[negative] == pytest.approx(best, abs=1e-3), row["id"]


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_killed_at_random_moments_ends_with_the_rows_of_a_whole_one(whole, tmp_path, kills):
    (flags, folder), rng, killed = whole, random.Random(kills), 0
    for _ in range(kills):
        began = len(list(tmp_path.glob("*/*.jsonl")))
        child, more = (
            apart(*flags, "--out", tmp_path),
            rng.choice((0, 1, 2) if kills < 20 else (0, 0, 1)),
        )
        while child.is_alive() and len(list(tmp_path.glob("*/*.jsonl"))) < began + more:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.5)
        killed += child.is_alive()
        os.kill(child.pid, signal.SIGKILL)
        child.join()
    assert killed >= kills / 2
    run(*flags, "--out", tmp_path)
    assert rows_of(tmp_path) == rows_of(folder)


def test_two_processes_and_shards_share_the_work_and_make_the_same_rows(raw, tmp_path):
    common = ["--videos", raw / "captions.jsonl", "--part", 3, "--stages", 1]
    run(*common, "--out", tmp_path / "one")
    children = [apart(*common, "--out", tmp_path / "two", rank=rank, world="2") for rank in "01"]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")
    events = load_jsonl(tmp_path / "two" / "log.jsonl")
    assert (
        len({e["part"] for e in events})
        == len(events)
        == len(list((tmp_path / "two" / "1-pool").glob("*.jsonl")))
    )
    assert "belong to other shards" in run(
        *common, "--shard", "0/2", "--out", tmp_path / "three", ok=False
    )
    run(*common, "--shard", "1/2", "--out", tmp_path / "three")
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "three")


def test_a_shard_is_never_done_twice_at_once(tmp_path):
    """Two threads at one part: the second waits and then finds it done."""
    done = []

    def do(p, jobs):
        done.append(p)
        time.sleep(0.3)
        return [{"id": job["id"], "fate": "kept"} for job in jobs]

    with ThreadPoolExecutor(2) as pool:
        runs = [
            pool.submit(run_sharded, tmp_path, "s", [[{"id": "a"}], [{"id": "b"}]], do)
            for _ in range(2)
        ]
    rows = [[{"id": "a", "fate": "kept"}], [{"id": "b", "fate": "kept"}]]
    assert [run.result() for run in runs] == [rows, rows] and sorted(done) == [0, 1]


# Clips that hang or crash their decoder, and vectors that cannot be had


@pytest.fixture
def clips(tmp_path):
    """A folder of four sound clips whose names say how the tests below spoil two of them."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for seed, name in {0: "a", 1: "crash", 2: "hang", 5: "z"}.items():  # seeds that show motion
        write_video(folder / f"{name}.mp4", moving_square(16, seed=seed))
    return folder


def spoil(monkeypatch, module, name):
    """Let a module's reader of videos die over crash.mp4 and never return from hang.mp4."""
    read = getattr(module, name)

    def spoiled(video, *options):
        if "crash.mp4" in str(video):
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang.mp4" in str(video):
            ctypes.PyDLL(None).sleep(1000)  # in C, holding the interpreter's lock
        return read(video, *options)

    monkeypatch.setattr(module, name, spoiled)


def assert_two_are_lost(rows, prefix, fate="dropped"):
    """crash and hang have the fate, each once, with a reason; a and z are kept."""
    assert len(rows) == 4
    rows = {row["id"].split(".mp4")[0]: row for row in rows}
    assert {name: row["fate"] for name, row in rows.items()} == {
        "a": "kept",
        "crash": fate,
        "hang": fate,
        "z": "kept",
    }
    for name, end in (("crash", "its decoder crashed"), ("hang", "not decoded within 8 s")):
        why = rows[name]["why"]
        assert why.startswith(prefix) and f"{name}.mp4" in why and why.endswith(end), why


@pytest.mark.timeout(300)
def test_a_clip_that_hangs_or_crashes_its_decoder_is_dropped_when_measured(
    clips, tmp_path, monkeypatch
):
    spoil(monkeypatch, synth, "read_frames")
    monkeypatch.setattr(synth, "PATIENCE", 1)
    words = ["--videos", clips, "--out", tmp_path / "out", "--stages", 1, "--seconds", 8]
    words += ["--duplicate", 2]
    printed = run(*words)
    assert "kept 2 of 4, dropped 2 (unreadable)" in printed
    assert_two_are_lost(load_jsonl(tmp_path / "out" / "pool.jsonl"), "unreadable: ")

    # The same command again does not go near them.
    began = time.time()
    assert "kept 2 of 4, dropped 2 (unreadable)" in run(*words)
    assert time.time() - began < 8


@pytest.mark.timeout(300)
@pytest.mark.parametrize("text", ["", "A white square slides to the right."])
def test_a_video_that_cannot_be_embedded_is_dropped_with_the_reason(
    clips, tmp_path, monkeypatch, text
):
    """With and without a caption: no NaN in the pool, no consistency that nobody measured."""
    spoil(monkeypatch, data, "open_clip")
    lines = [{"id": path.name, "video": str(path), "text": text} for path in clips.iterdir()]
    captions = clips / "captions.jsonl"
    captions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["--videos", captions, "--out", tmp_path / "out", "--stages", 1, "--seconds", 8]
    run(*words, "--duplicate", 2, "--consistency", -1)

    rows = load_jsonl(tmp_path / "out" / "pool.jsonl")
    assert_two_are_lost(rows, "not embedded: ")
    for row in rows:
        assert ("consistency" in row) == (row["fate"] == "kept" and bool(text)), row
    for path in (tmp_path / "out").rglob("*.npy"):
        assert np.isfinite(np.load(path)).all(), path
    assert len(np.load(tmp_path / "out" / "pool.npy")) == 2


@pytest.mark.timeout(300)
def test_a_shot_that_cannot_be_embedded_drops_its_video(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3))
    scenes = [np.kron(scene, np.ones((12, 12, 1))).astype(np.uint8) for scene in noise]
    frames = [np.roll(scenes[i // 16], 2 * i, axis=1) for i in range(32)]
    write_video(tmp_path / "film.mp4", np.stack(frames), fps=8)
    load = data.open_clip

    def broken(video, frames):
        if isinstance(video, dict):
            raise data.MediaError("no such window")
        return load(video, frames)

    monkeypatch.setattr(data, "open_clip", broken)
    row = {"id": "film", "video": "film.mp4", "text": "Tiles of all colours pan to the right."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = ["--videos", tmp_path / "rows.jsonl", "--out", tmp_path / "out", "--stages", 1]
    run(*words)
    (row,) = load_jsonl(tmp_path / "out" / "pool.jsonl")
    assert row["cuts"] and row["fate"] == "dropped"
    assert row["why"] == "not embedded: no such window" and "consistency" not in row


def test_vectors_of_nan_count_as_failures(monkeypatch):
    def encode(gve, items, **options):
        vectors = torch.ones(3, 2)
        vectors[0] = vectors[2] = torch.nan
        return vectors, {0: "its decoder crashed"}

    monkeypatch.setattr(synth, "encode", encode)
    prober = synth.Prober(synth.Flags())
    prober.gve = None
    vectors, failed = prober.embed([{"text": c} for c in "abc"])
    assert failed == {0: "its decoder crashed", 2: "the embedder returned NaN"}
    assert vectors.tolist() == [[0, 0], [1, 1], [0, 0]]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["server", "model"])
def test_a_clip_that_hangs_or_crashes_its_decoder_costs_the_captioner_one_request(
    clips, tmp_path, monkeypatch, name
):
    spoil(monkeypatch, caption, "load_video")
    asked = []
    for clip in sorted(clips.iterdir()):
        asked += caption.make_requests("video", [{"video": str(clip)}], "full", random.Random(0))
    if name == "server":
        ask = caption.server_captioner(Server().url, "vl", **SIZES, seconds=8)
    else:
        tiny = write_tiny(tmp_path / "tiny")
        ask = caption.transformers_captioner(tiny, device="cpu", **SIZES, seconds=8)
    replies = list(ask(asked))

    rows = []
    for clip, reply in zip(sorted(clips.iterdir()), replies, strict=True):
        fate = "failed" if reply.failure else "kept"
        rows.append({"id": clip.name, "fate": fate, "why": reply.failure})
    assert_two_are_lost(rows, "media: ", "failed")


def test_a_lost_clip_in_stage_3_costs_its_pairs_alone(clips, tmp_path, monkeypatch):
    """Frames that the queries show fail, the videos themselves do not."""
    load = data.load_image

    def broken(image):
        if "crash.mp4" in str(image):
            raise data.MediaError(f"{image['video']}: no such frame")
        return load(image)

    monkeypatch.setattr(data, "load_image", broken)
    words = ["--videos", clips, "--out", tmp_path / "out", "--duplicate", 2]
    words += ["--shares", "T2T=0", "T2I=0", "T2V=0", "I2V=1", "V2V=0", "TI2V=0", "TV2V=0"]
    run(*words, "--captioner", Server().name)
    (part,) = (tmp_path / "out" / "3-pairs").glob("*.jsonl")
    fates = {row["of"]: row.get("why", row["fate"]) for row in load_jsonl(part)}
    lost = fates.pop("crash.mp4")
    assert lost.startswith("not embedded: ") and lost.endswith("no such frame")
    assert set(fates.values()) == {"kept"} and len(fates) == 3


def test_measuring_in_processes_gives_the_rows_of_measuring_inline(raw):
    flags = synth.Flags(videos=str(raw / "captions.jsonl"))
    rows = synth.list_videos(flags)
    assert len(rows) > 10
    inline = synth.inspect_videos(rows, synth.Flags(videos=flags.videos, workers=0))
    assert synth.inspect_videos(rows, flags) == inline


def test_another_flag_on_the_same_out_is_refused_by_name(raw, tmp_path):
    words = ["--videos", raw / "captions.jsonl", "--out", tmp_path, "--prompts", "short"]
    flags = parse_flags(synth.Flags, [str(word) for word in words])
    rows = synth.list_videos(flags)
    synth.check_flags(rows, flags)
    synth.check_flags(rows, flags)
    assert "begun with --frames 8, not 4: take another" in run(*words, "--frames", 4, ok=False)

    # Flags that this version does not know, or that the run's version did not.
    (begun,) = load_jsonl(tmp_path / "flags.jsonl")
    (tmp_path / "flags.jsonl").write_text(json.dumps(begun | {"hallucination": 0.2}) + "\n")
    with pytest.raises(ValueError, match="--hallucination 0.2, not None"):
        synth.check_flags(rows, flags)
    del begun["duplicate"]
    (tmp_path / "flags.jsonl").write_text(json.dumps(begun) + "\n")
    with pytest.raises(ValueError, match="--duplicate None, not 0.6"):
        synth.check_flags(rows, flags)


# Quality control


def test_cuts_clips_motion_and_key_frames_of_known_films(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3))
    scenes = [np.kron(scene, np.ones((12, 12, 1))).astype(np.uint8) for scene in noise]  # 96 x 96
    # 3 shots of 4 s at 10 fps, panning
    film = np.stack([np.roll(scenes[i // 40], i, axis=1) for i in range(120)])
    write_video(tmp_path / "film.mp4", film, fps=10)
    write_video(tmp_path / "slides.mp4", np.stack([scenes[i // 40] for i in range(120)]), fps=10)
    monkeypatch.setattr(synth, "PROBE_FPS", 10.0)
    flags = synth.Flags(videos=str(tmp_path))
    rows = [
        {"id": name, "video": str(tmp_path / name), "text": ""}
        for name in ("film.mp4", "slides.mp4")
    ]
    film, slides = synth.inspect_videos(rows, flags)
    assert (film["fate"], film["cuts"], film["seconds"], film["size"]) == (
        "kept",
        [4.0, 8.0],
        12.0,
        [96, 96],
    ), film
    # Cuts are not motion.
    assert slides["why"].startswith("static") and slides["cuts"] == [4.0, 8.0]
    for start, end in film["clips"]:
        assert 2 <= end - start <= 10 and start // 4 == (end - 1e-6) // 4, film["clips"]
    assert len({time // 4 for time in film["key_frames"]}) == 3


def test_a_red_ball_that_crosses_a_ground_of_its_own_brightness_moves(tmp_path):
    """The means of their channels are equal; the same ball at rest is static."""
    grey = np.array([90, 100, 110], np.uint8)
    red = np.array([220, 40, 40], np.uint8)
    assert grey.mean() == red.mean()
    film = np.broadcast_to(grey, (32, 96, 96, 3)).copy()
    for i in range(32):
        film[i, 40:56, 2 * i : 2 * i + 16] = red
    write_video(tmp_path / "crosses.mp4", film)
    write_video(tmp_path / "rests.mp4", film[:1].repeat(32, axis=0))
    flags = synth.Flags(videos=str(tmp_path))
    crosses, rests = synth.inspect_videos(synth.list_videos(flags), flags)
    # It sweeps over 16 x 78 of 96 x 96 pixels.
    assert crosses["fate"] == "kept" and crosses["motion"] == pytest.approx(0.135, abs=0.03)
    assert rests["why"] == "static: 0.0 < 0.01"


def test_odd_folders_ids_and_files(tmp_path, media):
    """Unicode, slashes and spaces in ids; two files of one name; no captions; no videos."""
    for name in ("one/ä b.mp4", "two/ä b.mp4"):
        (tmp_path / "in" / name).parent.mkdir(parents=True)
        write_video(tmp_path / "in" / name, moving_square(16, seed=len(name) + (name < "t")))
    (tmp_path / "in" / "notes.txt").write_text("not a video")
    # Left out: images, a Mac's companion of a video, a folder of thumbnails
    (tmp_path / "in" / "one" / "._ä b.mp4").write_bytes(b"\0\5\x16\7")
    (tmp_path / "in" / ".thumbnails").mkdir()
    (tmp_path / "in" / ".thumbnails" / "a.mp4").write_bytes(b"")
    for name in ("i.png", "one/I.JPG"):
        shutil.copy(media / "i.png", tmp_path / "in" / name)
    server = Server()
    printed = run(
        "--videos",
        tmp_path / "in",
        "--captioner",
        server.name,
        "--out",
        tmp_path / "out",
        "--negatives",
        "T2V=0",
        "--duplicate",
        2,
    )
    rows = {row["id"]: row for row in load_jsonl(tmp_path / "out" / "pool.jsonl")}
    assert {i: row["fate"] for i, row in rows.items()} == {
        "notes.txt": "dropped",
        "one/ä b.mp4": "kept",
        "two/ä b.mp4": "kept",
    }
    assert f"{tmp_path / 'in'}: 2 image files left out, since only videos are used\n" in printed
    assert list(check(tmp_path / "out" / "uvrd" / "mixture.json", [tmp_path])) == []


def test_names_and_captions_that_no_file_can_hold_cost_their_row_or_half_an_emoji(tmp_path):
    """An archive from a Latin-1 machine; half an emoji as JSON escapes it."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, name in enumerate([b"a.mp4", b"caf\xe9.mp4"]):
        path = os.path.join(os.fsencode(folder), name)
        write_video(folder / "new.mp4", moving_square(16, seed=i))
        os.rename(folder / "new.mp4", path)
    words = ["--prober", "mini/prober", "--stages", 1]
    printed = run(*words, "--videos", folder, "--out", tmp_path / "1")
    rows = {row["id"]: row for row in load_jsonl(tmp_path / "1" / "pool.jsonl")}
    assert rows["a.mp4"]["fate"] == "kept"
    assert rows["caf\\udce9.mp4"]["why"].startswith("file name: ")
    assert "dropped caf\\udce9.mp4: file name: " in printed

    line = {"video": "a.mp4", "text": "A white square \ud83d goes \ud83d\ude00 right."}
    (folder / "rows.jsonl").write_text(json.dumps(line))
    flags = synth.Flags(videos=str(folder / "rows.jsonl"))
    (row,) = synth.list_videos(flags)
    assert row["text"] == "A white square  goes \U0001f600 right."
    assert json.dumps(row, ensure_ascii=False).encode()


def test_pairs_that_are_drawn_again_count_once_and_sources_of_one_pair_are_named(tmp_path, capsys):
    def pair(task, name, query):
        return {"id": name, "task": task, "query": query, "positive": {"video": str(tmp_path)}}

    frame = {"image": {"video": str(tmp_path / "a.mp4"), "time": 1.0}}
    rows = [pair("I2V", f"a {k}", frame) for k in range(18)]
    rows += [pair("T2V", f"b {k}", {"text": f"text {k}"}) for k in range(2)]
    flags = synth.Flags(out=str(tmp_path))
    assert synth.write_uvrd(rows, flags) == 3
    assert len(load_jsonl(tmp_path / "uvrd" / "i2v.jsonl")) == 1
    printed = capsys.readouterr().out
    assert "I2V: 1 pairs" in printed and "(17 draws gave a pair again)" in printed
    assert "T2V: 2 pairs, 2 samples in the mixture\n" in printed
    assert "warning: only one pair in I2V:" in printed


def test_the_summary_names_the_first_rows_of_each_reason(tmp_path, capsys):
    rows = [{"id": f"v{k}", "fate": "dropped", "why": f"duplicate: of w{k}"} for k in range(5)]
    rows += [{"id": "s", "fate": "dropped", "why": "static: 0 < 1"}, {"id": "k", "fate": "kept"}]
    (tmp_path / "log.jsonl").write_text("")
    print_summary(tmp_path, "1-pool", rows)
    head, *names = capsys.readouterr().out.splitlines()
    assert head.startswith("1-pool: kept 1 of 7, dropped 5 (duplicate), dropped 1 (static); 0 s")
    assert names == [
        "    dropped v0: duplicate: of w0",
        "    dropped v1: duplicate: of w1",
        "    dropped v2: duplicate: of w2",
        "    dropped ... and 2 more (duplicate)",
        "    dropped s: static: 0 < 1",
    ]


def test_a_log_line_that_a_full_disk_cut_spoils_no_later_run(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_text('{"stage": "1-pool", "sec')

    def do(p, jobs):
        return [{**job, "fate": "kept", "tokens": [3, 4]} for job in jobs]

    (rows,) = run_sharded(tmp_path, "1-pool", [[{"id": "a"}]], do)
    print_summary(tmp_path, "1-pool", rows)
    assert "1-pool: kept 1 of 1; 0 s of one process, 3 tokens read, 4 " in capsys.readouterr().out


def test_a_long_loop_speaks_up_while_one_thing_takes_its_time(monkeypatch, capfd):
    monkeypatch.setattr(progress, "SILENCE", 0.1)

    def slow():
        yield 1
        yield 2
        time.sleep(0.35)
        yield 3

    assert list(track(slow(), 3, "clips")) == [1, 2, 3]
    first, *_ = lines = capfd.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert re.fullmatch(r"    clips: 0 s so far, 2 of 3, [\d.]+ a second, about \d s left", first)


def test_where_nothing_can_be_used_the_run_fails_and_has_said_why(tmp_path, media):
    (tmp_path / "in").mkdir()
    # Outside the folder, and no --root
    rows = [{"id": c, "video": str(media / f"{c}.mp4")} for c in "ab"]
    (tmp_path / "in" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    printed = run(
        "--videos",
        tmp_path / "in" / "rows.jsonl",
        "--captioner",
        Server().name,
        "--out",
        tmp_path / "out",
        ok=False,
    )
    assert "kept 0 of 2, dropped 2 (unreadable)" in printed and "not one pair was made" in printed
    (tmp_path / "empty").mkdir()
    assert "empty: no videos in it" in run("--videos", tmp_path / "empty", ok=False)


@pytest.mark.parametrize(
    "line, wrong",
    [
        ('{"video": 3}', "captions.jsonl:2: video and text"),
        ("{", "captions.jsonl:2: not JSON"),
        ('{"video": "a.mp4"}', "captions.jsonl:2: .*'a.mp4' new"),
    ],
)
def test_wrong_rows_name_file_and_line(tmp_path, line, wrong):
    (tmp_path / "captions.jsonl").write_text('{"video": "a.mp4"}\n' + line + "\n")
    with pytest.raises(ValueError, match=wrong):
        synth.list_videos(synth.Flags(videos=str(tmp_path / "captions.jsonl")))


def test_wrong_flags_and_places_are_one_line(raw, tmp_path):
    (tmp_path / "file").write_text("")
    where = ["--videos", raw / "captions.jsonl"]
    assert "Not a directory" in run(*where, "--out", tmp_path / "file" / "out", ok=False)
    assert "wanted TASK=NUMBER" in run(*where, "--shares", "T2W=1", ok=False)
    with pytest.raises(ValueError, match="captioner http://a:b: Invalid port"):
        caption.open_captioner("openai:http://a:b#m", device="cpu", concurrency=1, **SIZES)
    with pytest.raises(ValueError, match="wanted mini, hf:MODEL or openai:URL#MODEL"):
        caption.open_captioner("opneai:x", device="cpu", concurrency=1, **SIZES)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("openai:http://there:1/v1", "wanted mini, hf:MODEL or openai:URL#MODEL"),
        ("openai:there:1/v1#m", "wanted mini, hf:MODEL or openai:URL#MODEL"),
        ("openai:http://there:port/v1#m", "captioner http://there:port/v1: Invalid port"),
        ("hf:", "wanted mini, hf:MODEL or openai:URL#MODEL"),
    ],
)
def test_a_captioner_s_wrong_name_is_refused_before_stage_1(raw, tmp_path, name, wrong):
    words = ["--videos", raw / "captions.jsonl", "--out", tmp_path / "out", "--stages", 1]
    assert wrong in run(*words, "--captioner", name, ok=False)
    assert not (tmp_path / "out").exists()


def test_the_notes_on_the_pool_say_which_captions_go_unused(capsys):
    reasons = ["empty", "URL", "of several videos", "empty", "of several videos"]
    synth.print_pool_notes([{"text_dropped": reason} for reason in reasons], "out")
    assert capsys.readouterr().out.splitlines() == [
        "    raw captions not used, which drops no video: 2 (empty), 1 (URL)",
        "    raw captions not used, since other videos have the same: 2",
    ]
    synth.print_pool_notes([{"text": "A ring goes right."}], "out")
    assert not capsys.readouterr().out


def test_a_pool_of_one_names_the_way_around_negatives_and_the_rate_says_whose_pairs(tmp_path):
    (tmp_path / "in").mkdir()
    write_video(tmp_path / "in" / "a.mp4", moving_square(16))
    words = ["--videos", tmp_path / "in", "--captioner", Server().name, "--out", tmp_path / "out"]
    printed = run(*words, "--shares", "I2V=0", "V2V=0", "T2I=1", "T2T=1", "TI2V=0", "TV2V=0")
    (hint,) = re.findall(r"dropped a.mp4 T2V \d: too few negatives: 0 of 1; (.*)", printed)
    assert hint.endswith("take more videos, or --negatives T2V=0 and another --out")
    assert re.search(r"one process would take \d+ hours for the paper's 1.55M pairs", printed)


def test_a_full_disk_ends_in_one_line_and_leaves_no_half_file(raw, tmp_path):
    """A limit on file size stands in for the disk: writes beyond 6 kB fail as on a full one."""
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)); sys.argv = sys.argv[1:]; "
        "runpy.run_path('synth.py', run_name='__main__')"
    )
    words = ["--videos", str(raw / "captions.jsonl"), "--out", str(tmp_path), "--stages", "1"]
    done = subprocess.run(
        [sys.executable, "-B", "-c", limited, "synth.py", *words],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 1 and "synth.py: " in done.stderr.splitlines()[-1], done.stderr
    assert not list(tmp_path.glob("1-pool/*.jsonl"))
    run(*words)
    assert accounted(tmp_path, "1-pool")["failed"] == 0


def test_dry_run_prints_prompts_and_counts_and_writes_nothing(raw, tmp_path):
    printed = run(
        "--videos",
        raw / "captions.jsonl",
        "--out",
        tmp_path / "out",
        "--dry-run",
        "--prompts",
        "full",
        "--shares",
        "T2I=0.5",
        "TI2V=0.1",
        "TV2V=0",
    )
    n = len(load_jsonl(raw / "captions.jsonl"))
    calls = n + round(n * 0.5) + round(n * 0.1)
    assert (
        f"{n} videos: calls, tokens read, tokens written: [{calls}," in printed
        and "Describe this frame" in printed
    )
    assert not (tmp_path / "out").exists()


# hf:


def llava(folder):
    """A random LLaVA, which knows images only."""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "mini" / "base")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tiny = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    vision = CLIPVisionConfig(**tiny, image_size=28, patch_size=14)
    text = LlamaConfig(
        **tiny,
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    template = (
        "{% for m in messages %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}"
        "{% endif %}{% endfor %}{% endfor %}"
    )
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    processor.save_pretrained(folder)
    return folder


def test_answers_stop_at_the_length_that_their_words_need(media, tmp_path):
    """A random model never stops by itself: two tokens for each of 3 words, and 16 around them."""
    ask = caption.transformers_captioner(
        write_tiny(tmp_path), device="cpu", **SIZES | {"max_new_tokens": None}, workers=0
    )
    item = {"image": str(media / "i.png")}
    request = {"media": [item], "prompt": "x", "want": {"query": (2, 3)}, "plain": True}
    asked = []

    def counted(requests):
        asked.extend(requests)
        return ask(requests)

    (result,) = caption.ask_until_valid(counted, [request], tries=3)
    assert result.fate == "dropped" and result.tokens[1] == 22
    assert len(asked) == 1  # what reached its limit would reach it again


@pytest.mark.parametrize("make", [write_tiny, llava])
def test_nonsense_of_a_random_model_is_refused_and_counted(make, media, tmp_path):
    sizes = SIZES | {"max_new_tokens": 8}
    ask = caption.transformers_captioner(make(tmp_path), device="cpu", batch_size=3, **sizes)
    lost = {**requests(media)[0], "media": [{"video": str(media / "lost.mp4")}]}
    asked = [*requests(media, 3), *requests(media, 2, "image"), lost]
    results = caption.ask_until_valid(ask, asked, tries=2)
    assert [result.fate for result in results] == ["dropped"] * 5 + ["failed"]
    for result in results[:5]:
        assert result.why.split(":")[0] in ("truncated", "repetition")  # its limit is eight tokens
        assert result.tokens[0] > 100 and 0 < result.tokens[1] <= 8


def test_the_mini_captioner_says_what_the_base_says(raw):
    """generate in batches, with a cache, equals one clip at a time, read anew for every token."""
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

    clips = [{"video": str(path)} for path in sorted((raw / "videos").glob("raw-t-*.mp4"))[:4]]
    base = ROOT / "mini" / "base"
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
    collate = data.Collator(Qwen2_5_VLProcessor.from_pretrained(base))
    prompt = "Describe the video in the rich style."
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = collate.tokenizer
    stop, video_pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|video_pad|>"])

    wanted = []
    for clip in clips:
        sample = collate.prepare(clip)
        pads = "<|video_pad|>" * sample["ids"].count(video_pad)
        ids = tokenizer.encode(f"{head}<|vision_start|>{pads}<|vision_end|>{prompt}{tail}")
        start = len(ids)
        while ids[-1] != stop and len(ids) < start + 64:
            batch = collate.batch([{**sample, "ids": ids}])
            positions = mrope_positions(
                batch["mm_token_type_ids"],
                batch["attention_mask"],
                None,
                batch["video_grid_thw"],
                batch["second_per_grid_ts"],
            )
            with torch.no_grad():
                out = model.model(**batch, position_ids=positions, use_cache=False)
                ids.append(int(model.lm_head(out.last_hidden_state[:, -1]).argmax()))
        wanted.append(tokenizer.decode(ids[start:], skip_special_tokens=True))

    options = {"device": "cpu", "batch_size": 3, **SIZES}
    ask = caption.transformers_captioner(str(base), **options)
    got = [reply.text for reply in ask([{"media": [clip], "prompt": prompt} for clip in clips])]
    assert got == wanted and len(set(got)) > 1


def test_the_report_reads_back_every_fact_that_a_caption_states():
    """Its reader finds as many facts as the world's own claims hold, and none that is not true."""
    rng = random.Random(0)
    for _ in range(100):
        scene = world.sample_scene(rng, test=False)
        for form in (*world.VIDEO_STYLES.values(), *world.FRAME_STYLES.values()):
            text, claim = form(scene, rng)
            read = report.facts_in(text)
            assert report.misses({"scenes": [scene]}, read) == 0, text
            assert report.stated(read) == report.stated({"objects": [], **claim}), text
            other = {**scene, "theme": "none", "camera": ["none"], "objects": []}
            assert report.misses({"scenes": [other]}, read) == report.stated(read)
