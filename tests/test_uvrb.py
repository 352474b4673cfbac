"""uvrb.py: the table of datasets, the abilities against the paper's tables, folders in every
layout, every kind of bad row, benchmarks with datasets of their own."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import uvrb
from support.flags import parse_flags

REPO = Path(__file__).resolve().parent.parent
PAPER = json.loads((REPO / "published.json").read_text())
# Printed cells that do not follow from the paper's own Table 1: GME-2B's average, and those that
# hang on one CG cell of VLM2Vec-V2.
MISPRINTS = {
    ("GME-2B", "AVG-A"),
    ("VLM2Vec-V2", "AVG-D"),
    ("VLM2Vec-V2", "AVG-A"),
    ("VLM2Vec-V2", "TXT"),
    ("VLM2Vec-V2", "CG"),
}


def write(
    root,
    name="MSRVTT",
    *,
    queries=None,
    corpus=None,
    instances=None,
    layout="{}/jsonl",
    videos=("a.mp4", "b.mp4"),
):
    """Write a dataset of two queries and two videos; rows are given as dicts or as raw lines.

    -> folder of its jsonl files
    """
    rows = root / layout.format(name)
    rows.mkdir(parents=True, exist_ok=True)
    folder = rows.parent if rows.name == "jsonl" else rows
    (folder / "videos").mkdir(exist_ok=True)
    for video in videos:
        (folder / "videos" / video).write_bytes(b"not decoded here")
    queries = queries or [{"id": "q0", "text": "a red ball"}, {"id": "q1", "text": "a blue ball"}]
    corpus = corpus or [
        {"id": "c0", "video": "videos/a.mp4"},
        {"id": "c1", "video": "videos/b.mp4"},
    ]
    instances = instances or [{"qid": "q0", "pos": ["c0"]}, {"qid": "q1", "pos": ["c1"]}]
    for file, content in (("queries", queries), ("corpus", corpus), ("instances", instances)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in content]
        (rows / f"{file}.jsonl").write_text("".join(line + "\n" for line in lines))
    return rows


def declare(root, datasets, name="mine"):
    """Write benchmark.json; datasets {name: entry, or (queries, corpus)}."""
    entries = {}
    for key, entry in datasets.items():
        if isinstance(entry, tuple):
            entry = {"queries": entry[0], "corpus": entry[1]}
        entries[key] = entry
    (root / "benchmark.json").write_text(json.dumps({"name": name, "datasets": entries}))


def run(*args):
    command = [sys.executable, str(REPO / "uvrb.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_datasets_are_the_papers_table_4_and_5_letter_for_letter():
    assert list(uvrb.DATASETS) == list(PAPER["datasets"]) and len(uvrb.DATASETS) == 16
    for name, row in PAPER["datasets"].items():
        ours = uvrb.DATASETS[name]
        for key in ("task", "metric", "queries", "corpus", "prompt"):
            assert getattr(ours, key) == row[key], (name, key)
        assert ours.domain == (row["domain"] or "").removeprefix("FG-")
        assert ours.in_average


@pytest.mark.parametrize("model", PAPER["table1"])
def test_table_2_follows_from_table_1(model):
    cells = PAPER["table1"][model]
    table2 = PAPER["table2"][model]
    ours = uvrb.abilities(cells)
    printed = {ability: table2[ability] for ability in uvrb.ABILITIES}
    printed |= {"AVG-D": cells["AVG"], "AVG-A": table2["AVG"]}
    off = {(model, column) for column in printed if abs(ours[column] - printed[column]) > 0.0011}
    assert set(printed) == set(ours) and off == {cell for cell in MISPRINTS if cell[0] == model}


@pytest.mark.parametrize(
    "left_out, lost",
    [
        ("MSRVTT", {"CG", "TXT"}),
        ("CRB-S", {"S", "FG", "TXT"}),
        ("CMRB", {"T", "FG", "TXT"}),
        ("PEV-K", {"PR", "FG", "TXT"}),
        ("LoVR-V", {"LC", "TXT"}),
        ("MS-TV", {"CMP"}),
        ("LoVR-C2V", {"VIS"}),
    ],
)
def test_a_missing_dataset_takes_its_abilities_along_instead_of_shrinking_a_mean(left_out, lost):
    full = uvrb.abilities(PAPER["table1"]["GVE-7B"])
    for hole in ({}, {left_out: None}):
        scores = {k: v for k, v in PAPER["table1"]["GVE-7B"].items() if k != left_out} | hole
        ours = uvrb.abilities(scores)
        assert {k for k, v in ours.items() if v is None} == lost | {"AVG-D", "AVG-A"}
        assert all(ours[k] == full[k] for k in full if ours[k] is not None)


def test_a_seventeenth_dataset_enters_no_average(monkeypatch):
    """A row more in the table, with a score or without: the averages are over the paper's 16."""
    scores = PAPER["table1"]["GVE-7B"]
    before = uvrb.abilities(scores)
    extra = uvrb.Dataset("Extra", "TXT", "CG", "R@1", 10, 10, "Find it.")
    monkeypatch.setitem(uvrb.DATASETS, "Extra", extra)
    assert uvrb.abilities(scores) == uvrb.abilities({**scores, "Extra": 0.0}) == before
    assert None not in before.values()


@pytest.mark.parametrize(
    "layout", ["{}/jsonl", "{0}/UVRB/{0}/jsonl", "UVRB/{}/jsonl", "{}", "{0}/UVRB/{0}"]
)
def test_every_accepted_layout_is_found(tmp_path, layout):
    write(tmp_path, layout=layout)
    bench = uvrb.read(tmp_path, "MSRVTT")
    assert [row["id"] for row in bench.queries] == ["q0", "q1"]
    assert bench.positives == [[0], [1]] and bench.pools is None
    videos = [Path(row["item"]["video"]) for row in bench.corpus]
    assert [path.name for path in videos] == ["a.mp4", "b.mp4"] and not bench.missing
    assert all(path.is_file() for path in videos)


def test_lines_of_a_query_merge_and_neg_makes_pools(tmp_path):
    corpus = []
    for i in range(6):
        corpus.append({"id": f"c{i}", "video": "videos/a.mp4", "note": "unknown keys are ignored"})
    instances = [
        {"qid": "q0", "pos": ["c4"], "neg": ["c5"]},
        {"qid": "q1", "pos": ["c3", "c0"], "neg": ["c2"]},
        {"qid": "q0", "pos": ["c1"]},
        {"qid": "q0", "pos": ["c4"], "neg": ["c0"], "score": 1},
    ]
    write(tmp_path, "MS-TI", corpus=corpus, instances=instances)
    bench = uvrb.read(tmp_path, "MS-TI")
    assert bench.positives == [[1, 4], [0, 3]] and bench.pools == [[0, 1, 4, 5], [0, 2, 3]]
    assert bench.expected == (400, None)  # the published corpus of 10 is the pool


def test_media_are_found_as_given_then_in_videos_images_and_frame_folders(tmp_path):
    clip = {"path": "b.mp4", "start": 1, "end": 2}
    queries = [{"id": "q0", "image": "i.png"}, {"id": "q1", "video": clip}]
    corpus = [
        {"id": "c0", "video": "a.mp4"},
        {"id": "c1", "video": "far/gone.mp4"},
        {"id": "c2", "video": "x.mp4"},
    ]
    rows = write(tmp_path, queries=queries, corpus=corpus)
    folder = rows.parent
    extra = tmp_path / "extra"
    for made in (folder / "images", folder / "videos_frames" / "gone", extra):
        made.mkdir(parents=True)
    for file in (folder / "images" / "i.png", folder / "a.mp4", extra / "x.mp4"):
        file.write_bytes(b"")
    bench = uvrb.read(tmp_path, "MSRVTT", [extra])
    videos = [row["item"]["video"] for row in bench.corpus]
    # As given comes before videos/a.mp4, which exists as well.
    assert videos[0] == str(folder / "a.mp4")
    assert videos[1] == str(folder / "videos_frames" / "gone")
    assert videos[2] == str(extra / "x.mp4")
    assert bench.queries[0]["item"] == {"image": str(folder / "images" / "i.png")}
    assert bench.queries[1]["item"] == {"video": {**clip, "path": str(folder / "videos" / "b.mp4")}}


def positives(*pairs):
    """Instances rows of (query, positives[, negatives])."""
    return {"instances": [dict(zip(("qid", "pos", "neg"), pair, strict=False)) for pair in pairs]}


Q0, Q1 = {"id": "q0", "text": "a"}, {"id": "q1", "text": "b"}
C0, C1 = {"id": "c0", "video": "a.mp4"}, {"id": "c1", "video": "b.mp4"}
BAD = {  # case: (files, the line that must be named, words of its reason)
    "broken JSON": ({"queries": [Q0, '{"id": "q1", "text": ']}, "queries.jsonl:2", "JSON"),
    "not UTF-8": ({"queries": [Q0]}, "queries.jsonl:2", "JSON"),
    "not an object": ({"queries": [Q0, "[1]"]}, "queries.jsonl:2", "list"),
    "no id": ({"corpus": [{"video": "videos/a.mp4"}]}, "corpus.jsonl:1", '"id"'),
    "number as id": ({"corpus": [{"id": 3, "video": "videos/a.mp4"}]}, "corpus.jsonl:1", '"id"'),
    "duplicate video": (
        {"corpus": [C0, C1, {**C1, "id": "c0"}]},
        "corpus.jsonl:3",
        "duplicate id 'c0', first on line 1",
    ),
    "duplicate query": (
        {"queries": [Q0, Q1, Q1]},
        "queries.jsonl:3",
        "duplicate id 'q1', first on line 2",
    ),
    "unknown modality": (
        {"queries": [Q0, {"id": "q1", "audio": "a.wav"}]},
        "queries.jsonl:2",
        "audio; one of text, image",
    ),
    "empty item": (
        {"queries": [{"id": "q0", "text": ""}, Q1]},
        "queries.jsonl:1",
        "nothing to embed",
    ),
    "text of wrong type": (
        {"queries": [{"id": "q0", "text": ["a"]}, Q1]},
        "queries.jsonl:1",
        "text must be",
    ),
    "video of wrong form": (
        {"corpus": [{"id": "c0", "video": {"file": "a"}}, C1]},
        "corpus.jsonl:1",
        "path",
    ),
    "unknown positive": (
        positives(("q0", ["c0"]), ("q1", ["c9", "c1"])),
        "instances.jsonl:2",
        "pos 'c9'",
    ),
    "unknown negative": (
        positives(("q0", ["c0"], ["c7"]), ("q1", ["c1"], ["c0"])),
        "instances.jsonl:1",
        "neg 'c7'",
    ),
    "unknown query": (
        positives(("q0", ["c0"]), ("q1", ["c1"]), ("q2", ["c1"])),
        "instances.jsonl:3",
        "'q2'",
    ),
    "no positive": (positives(("q0", ["c0"])), "queries.jsonl:2", "'q1' has no positive"),
    "empty positives": (
        positives(("q0", []), ("q1", ["c1"])),
        "queries.jsonl:1",
        "'q0' has no positive",
    ),
    "pos and neg": (
        positives(("q0", ["c0"], ["c1"]), ("q1", ["c1"], ["c1", "c0"])),
        "queries.jsonl:2",
        "'c1' as pos and as neg",
    ),
    "pool of positives": (
        positives(("q0", ["c0"], ["c1"]), ("q1", ["c1"])),
        "queries.jsonl:2",
        "has no neg",
    ),
    "up and out": (
        {"corpus": [{"id": "c0", "video": "../../../secret.mp4"}, C1]},
        "corpus.jsonl:1",
        "leaves",
    ),
    "symlink out": (
        {"corpus": [{"id": "c0", "video": "link.mp4"}, C1]},
        "corpus.jsonl:1",
        "leaves",
    ),
    "absolute out": ({"corpus": [C0, C1]}, "corpus.jsonl:1", "leaves"),
}


@pytest.mark.parametrize("case", BAD)
def test_each_bad_row_is_named_by_file_and_line_by_read_and_by_check(tmp_path, case):
    files, where, reason = BAD[case]
    secret, root = tmp_path / "secret.mp4", tmp_path / "data" / "uvrb"
    secret.write_bytes(b"x")
    if case == "absolute out":
        files = {"corpus": [{"id": "c0", "video": str(secret)}, C1]}
    root.mkdir(parents=True)
    declare(root, {"MSRVTT": (2, 2)})
    good = write(root)
    assert uvrb.check(root) == [], "the folder must be good before it is spoilt"
    if case == "symlink out":
        (good.parent / "link.mp4").symlink_to(secret)
    if case == "not UTF-8":
        write(root, **files)
        with open(good / "queries.jsonl", "ab") as file:
            file.write(b'{"id": "q1", "text": "\xff"}\n')
    else:
        write(root, **files)
    with pytest.raises(ValueError) as error:
        uvrb.read(root, "MSRVTT")
    for text in (str(error.value), "\n".join(uvrb.check(root))):
        lines = [line for line in text.splitlines() if where + ":" in line]
        assert lines and any(reason in line for line in lines), text
    if "out" in case:  # the same row is good once its root is allowed
        assert uvrb.read(root, "MSRVTT", [tmp_path]).corpus[0]["item"]["video"] == str(secret)


def test_media_beside_the_benchmark_folder_are_allowed(tmp_path):
    video = tmp_path / "videos" / "v.mp4"
    video.parent.mkdir()
    video.write_bytes(b"")
    corpus = [{"id": "c0", "video": "../../videos/v.mp4"}, {"id": "c1", "video": "b.mp4"}]
    write(tmp_path / "uvrb", corpus=corpus)
    bench = uvrb.read(tmp_path / "uvrb", "MSRVTT")
    assert bench.corpus[0]["item"]["video"] == str(video)


def test_missing_media_do_not_stop_reading_but_check_lists_them(tmp_path):
    declare(tmp_path, {"MSRVTT": (2, 2)})
    corpus = [{"id": "c0", "video": "videos/a.mp4"}, {"id": "c1", "video": "videos/gone.mp4"}]
    rows = write(tmp_path, corpus=corpus)
    bench = uvrb.read(tmp_path, "MSRVTT")
    (missing,) = bench.missing
    assert missing.startswith(f"{rows / 'corpus.jsonl'}:2: missing media")
    assert Path(bench.corpus[1]["item"]["video"]).name == "gone.mp4" and len(bench.corpus) == 2
    assert uvrb.check(tmp_path) == bench.missing


def test_a_clip_that_crashes_its_decoder_is_listed_and_the_check_goes_on(
    tmp_path, media, monkeypatch
):
    rows = write(tmp_path)
    declare(tmp_path, {"MSRVTT": (2, 2)})
    for video in ("a.mp4", "b.mp4"):
        (rows.parent / "videos" / video).write_bytes((media / "a.mp4").read_bytes())

    open_clip = uvrb.open_clip

    def crash(video):
        if "a.mp4" in video:
            os.kill(os.getpid(), signal.SIGKILL)
        return open_clip(video)

    monkeypatch.setattr(uvrb, "open_clip", crash)
    bench, bad = uvrb.scan(tmp_path, "MSRVTT", decode=True)
    (missing,) = bench.missing
    assert missing.startswith(f"{rows}/corpus.jsonl:1: undecodable media: ")
    assert missing.endswith("a.mp4: its decoder crashed") and not bad


def test_a_video_that_decodes_in_part_is_remarked_and_no_problem(
    tmp_path, media, monkeypatch, capsys
):
    """Four items with the damaged file; without --decode nobody knows."""
    videos = ["b.mp4", "a.mp4", "a.mp4", "a.mp4", "a.mp4"]
    corpus = [{"id": f"c{i}", "video": video} for i, video in enumerate(videos)]
    rows = write(tmp_path, corpus=corpus)
    declare(tmp_path, {"MSRVTT": (2, 5)})
    for video in set(videos):
        (rows.parent / "videos" / video).write_bytes((media / "a.mp4").read_bytes())
    open_clip = uvrb.open_clip

    def noted(video):
        note = f"{video}: damaged: 3 of 16 frames decode" if "a.mp4" in video else ""
        return dataclasses.replace(open_clip(video), note=note)

    monkeypatch.setattr(uvrb, "open_clip", noted)
    assert uvrb.check(tmp_path) == [] and "remark" not in capsys.readouterr().out
    flags = parse_flags(uvrb.Flags, ["check", str(tmp_path), "--decode", "--show", "3"])
    with pytest.raises(SystemExit, match="0"):
        uvrb.main(flags)
    first, *remarks, rest, last = capsys.readouterr().out.splitlines()
    assert first.endswith("0 media missing, 4 damaged in part")
    path = rows.parent / "videos" / "a.mp4"
    for line, remark in zip((2, 3, 4), remarks, strict=True):
        where = f"{rows}/corpus.jsonl:{line}"
        assert remark == f"  remark: {where}: {path}: damaged: 3 of 16 frames decode"
    assert "... and 1 more" in rest and last == f"0 problems in {tmp_path}"


def test_check_command_lists_everything_and_exits_1(tmp_path, media):
    """Three kinds of trouble in two datasets: all are listed, not only the first; --decode adds the
    file that cannot be decoded."""
    declare(tmp_path, {"MSRVTT": (2, 2), "MS-TI": (2, 10)})
    good = (media / "a.mp4").read_bytes()
    one = write(tmp_path)
    instances = [
        {"qid": "q0", "pos": ["c0"], "neg": ["c1"]},
        {"qid": "q1", "pos": ["c1"], "neg": ["c0"]},
    ]
    two = write(tmp_path, "MS-TI", instances=instances)
    for rows in (one, two):
        for video in ("a.mp4", "b.mp4"):
            (rows.parent / "videos" / video).write_bytes(good)
    clean = run("check", tmp_path, "--decode")
    assert clean.returncode == 0, clean.stdout + clean.stderr
    assert "0 problems" in clean.stdout and "pools of 2-2" in clean.stdout

    (one.parent / "videos" / "b.mp4").write_bytes(good[: len(good) // 3])
    (two.parent / "videos" / "a.mp4").unlink()
    with open(one / "instances.jsonl", "a") as file:
        file.write('{"qid": "nobody", "pos": ["c0"]}\nnonsense\n')
    shallow = run("check", tmp_path)
    deep = run("check", tmp_path, "--decode")
    expected = [
        f"{one}/instances.jsonl:3: ",
        f"{one}/instances.jsonl:4: ",
        f"{two}/corpus.jsonl:1: missing media",
    ]
    assert shallow.returncode == 1 and "3 problems" in shallow.stdout, shallow.stdout
    assert all(text in shallow.stdout for text in expected), shallow.stdout
    assert deep.returncode == 1 and "4 problems" in deep.stdout, deep.stdout
    assert f"{one}/corpus.jsonl:2: undecodable media" in deep.stdout


def test_check_of_a_folder_without_datasets_or_no_folder_fails(tmp_path):
    empty = run("check", tmp_path)
    assert empty.returncode == 1
    assert "none of the 16 datasets is here (MSRVTT, DiDeMo" in empty.stdout
    absent = run("check", tmp_path / "absent")
    assert absent.returncode == 1 and "Traceback" not in absent.stderr
    assert "no such benchmark folder" in absent.stderr
    for args in (["check"], ["check", str(tmp_path), "--decod3"], ["chekc"]):
        with pytest.raises(SystemExit, match="2"):
            uvrb.main(parse_flags(uvrb.Flags, args))


def test_sizes_are_table_4s_unless_benchmark_json_says_otherwise(tmp_path):
    write(tmp_path)
    assert uvrb.benchmark(tmp_path).name == "UVRB"
    assert uvrb.read(tmp_path, "MSRVTT").expected == (1000, 1000)
    (problem,) = uvrb.check(tmp_path)
    assert "2 queries, 2 corpus items; UVRB has 1000 and 1000" in problem
    for queries, corpus, problems in ((2, 2, 0), (3, 2, 1), (2, 3, 1)):
        declare(tmp_path, {"MSRVTT": (queries, corpus)}, "mini-UVRB")
        assert uvrb.benchmark(tmp_path).name == "mini-UVRB"
        assert len(uvrb.check(tmp_path)) == problems


OWN = {"queries": 2, "corpus": 2, "task": "CMP", "metric": "P@1", "prompt": "Find mine."}


def test_benchmark_json_defines_datasets_of_its_own(tmp_path, capsys):
    """A name that uvrb.py does not know is read and checked like the 16, with its own metric."""
    instances = [
        {"qid": "q0", "pos": ["c0"], "neg": ["c1"]},
        {"qid": "q1", "pos": ["c1"], "neg": ["c0"]},
    ]
    rows = write(tmp_path, "MyVideos", instances=instances)
    with pytest.raises(ValueError, match="MyVideos is none of UVRB's datasets; define it in"):
        uvrb.read(tmp_path, "MyVideos")
    declare(tmp_path, {"MyVideos": OWN})
    bench = uvrb.read(tmp_path, "MyVideos")
    assert bench.dataset == uvrb.Dataset("MyVideos", "CMP", "", "P@1", 2, 2, "Find mine.")
    assert not bench.dataset.in_average
    assert bench.expected == (2, None) and bench.pools == [[0, 1], [0, 1]]

    assert uvrb.check(tmp_path) == []
    assert "MyVideos    2 queries, 2 corpus items, pools of 2-2" in capsys.readouterr().out
    declare(tmp_path, {"MyVideos": OWN | {"task": "VIS", "domain": "S", "queries": 3}})
    bench = uvrb.read(tmp_path, "MyVideos")
    assert (bench.dataset.domain, bench.expected) == ("S", (3, 2))
    (problem,) = uvrb.check(tmp_path)
    assert problem.startswith(f"{rows}: 2 queries, 2 corpus items; mine has 3 and 2")


@pytest.mark.parametrize(
    "name, change, reason",
    [
        ("MyVideos", {"task": "TEXT"}, "MyVideos: task 'TEXT'; accepted: TXT, CMP, VIS"),
        ("MyVideos", {"metric": "R@3"}, "MyVideos: metric 'R@3'; accepted: R@1, R@5, R@10, P@1"),
        ("MyVideos", {"domain": "FG"}, "MyVideos: domain 'FG'; accepted: CG, S, T, PR, LC"),
        ("MyVideos", {"metric": ["R@1"]}, "accepted: R@1"),
        ("MyVideos", {"prompt": None}, "prompt must be a string, got None"),
        ("MyVideos", {"queries": "many"}, "MyVideos: queries 'many'; accepted: a number"),
        ("MyVideos", {"corpus": -1}, "MyVideos: corpus -1; accepted: a number"),
        ("../other", {}, "'../other' is not the name of a folder"),
        ("..", {}, "'..' is not the name of a folder"),
        ("MSRVTT", {}, "MSRVTT is UVRB's: its metric, prompt, task cannot be changed"),
    ],
)
def test_a_wrong_definition_is_named_with_the_accepted_values(tmp_path, name, change, reason):
    declare(tmp_path, {name: OWN | change})
    with pytest.raises(ValueError, match="benchmark.json: ") as error:
        uvrb.benchmark(tmp_path)
    assert reason in str(error.value)
    # One short line: no list of all 21 names.
    told = str(error.value).replace(str(tmp_path), "")
    assert "\n" not in told and len(told) < 120, told


@pytest.mark.parametrize("key", ["task", "metric", "prompt", "queries", "corpus"])
def test_a_definition_without_a_key_names_the_key(tmp_path, key):
    declare(tmp_path, {"MyVideos": {k: v for k, v in OWN.items() if k != key}})
    with pytest.raises(ValueError, match=f"benchmark.json: MyVideos .* needs {key}, too$"):
        uvrb.benchmark(tmp_path)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("{", "not JSON: "),
        ('{"name": "x"}', "datasets"),
        ('{"name": "x", "datasets": {"MSR-VTT": {"queries": 1, "corpus": 1}}}', "MSR-VTT"),
        ('{"name": "x", "datasets": {"MSRVTT": {"queries": 1}}}', "corpus"),
        ("[]", "expected a JSON object, got list"),
        ('{"name": 3, "datasets": {}}', '"name" must be a string, got 3'),
        ('{"name": "x", "datasets": ["MSRVTT"]}', '"datasets" must be {DS: {"queries": int'),
        ('{"name": "x", "datasets": {"MSRVTT": 5}}', "MSRVTT must be an object"),
        ('{"name": "x", "datasets": {}}', "no sizes for MSRVTT"),
    ],
)
def test_a_bad_benchmark_json_is_named(tmp_path, text, reason):
    write(tmp_path)
    (tmp_path / "benchmark.json").write_text(text)
    with pytest.raises(ValueError, match="benchmark.json") as error:
        uvrb.read(tmp_path, "MSRVTT")
    assert reason in str(error.value)


def test_an_unknown_or_absent_dataset_is_an_error_with_the_accepted_names(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="unknown dataset 'MSR-VTT'.*MSRVTT, DiDeMo"):
        uvrb.read(tmp_path, "MSR-VTT")
    with pytest.raises(FileNotFoundError, match="DiDeMo/jsonl/queries.jsonl"):
        uvrb.read(tmp_path, "DiDeMo")


# What a newcomer's own folder meets


def test_an_own_dataset_without_benchmark_json_is_told_the_line_to_write(tmp_path, capsys):
    """That line, written as told, makes the folder good."""
    write(tmp_path, "Kitchen")
    (told,) = uvrb.check(tmp_path)
    assert uvrb.find(tmp_path) == ([], [told])
    assert told in capsys.readouterr().out and "\n" not in told and "DiDeMo" not in told
    path, _, content = told.partition("define it in ")[2].partition(": ")
    Path(path).write_text(content)
    assert uvrb.check(tmp_path) == []
    assert capsys.readouterr().out == "Kitchen     2 queries, 2 corpus items, 0 media missing\n"

    # A second dataset: its entry alone is told, and the first one is found as before.
    write(tmp_path, "Garden")
    names, (told,) = uvrb.find(tmp_path)
    assert names == ["Kitchen"] and uvrb.check(tmp_path) == [told]
    entry = json.loads("{" + told.partition(f"{path}: ")[2] + "}")
    content = json.loads(content)
    content["datasets"] |= entry
    Path(path).write_text(json.dumps(content))
    assert uvrb.check(tmp_path) == [] and uvrb.find(tmp_path)[0] == ["Kitchen", "Garden"]


def test_a_folder_that_is_not_where_it_should_be_is_named(tmp_path):
    rows = write(tmp_path, "Kitchen")
    folder = rows.parent
    (told,) = uvrb.check(folder)
    assert told == f"{folder} is a dataset: give the folder that holds it, {tmp_path}"
    declare(tmp_path, {"Kitchen": OWN, "Garden": OWN, "Attic": OWN})
    _, (told,) = uvrb.find(tmp_path)
    assert told.endswith("declares Garden, Attic, but there is no Garden/jsonl/queries.jsonl")


def test_a_videos_folder_that_leads_elsewhere_is_explained_once(tmp_path, capsys):
    """One line for all rows, and its --root makes them good."""
    far = tmp_path / "disk" / "clips"
    far.mkdir(parents=True)
    count = 7
    corpus = []
    for i in range(count):
        (far / f"{i}.mp4").write_bytes(b"")
        corpus.append({"id": f"c{i}", "video": f"{i}.mp4"})
    root = tmp_path / "home" / "uvrb"
    rows = write(root, corpus=corpus, videos=())
    (rows.parent / "videos").rmdir()
    (rows.parent / "videos").symlink_to(far)
    declare(root, {"MSRVTT": (2, count)})

    (told,) = uvrb.check(root)
    where = f"{rows / 'corpus.jsonl'}:1: '0.mp4' leaves the allowed roots"
    assert told.startswith(where) and "so do 6 more media of MSRVTT" in told
    assert str(root) in told and told.endswith(f"add --root {far}")
    assert "0 media missing, 7 outside the allowed roots" in capsys.readouterr().out
    with pytest.raises(ValueError) as error:
        uvrb.read(root, "MSRVTT")
    assert str(error.value) == told
    assert uvrb.check(root, [far]) == []


def test_check_lists_the_first_few_and_counts_the_rest(tmp_path, capsys):
    corpus = [{"id": f"c{i}", "video": f"gone{i}.mp4"} for i in range(30)]
    write(tmp_path, corpus=corpus)
    declare(tmp_path, {"MSRVTT": (2, 30)})
    assert len(uvrb.check(tmp_path, show=3)) == 30
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("2 queries, 30 corpus items, 30 media missing") and len(lines) == 5
    assert "'gone2.mp4'" in lines[3] and lines[4].strip().startswith("... and 27 more")


def test_a_media_path_that_is_no_path_is_a_missing_medium(tmp_path):
    """A caption in the video's place is longer than any file's name may be."""
    corpus = [{"id": "c0", "video": "a man walks " * 400}, {"id": "c1", "video": "b.mp4"}]
    write(tmp_path, corpus=corpus)
    (missing,) = uvrb.read(tmp_path, "MSRVTT").missing
    assert "corpus.jsonl:1: missing media: no 'a man walks" in missing


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path):
    rows = write(tmp_path, "Kitchen")
    declare(tmp_path, {"Kitchen": OWN | {"task": "TXT", "metric": "R@1"}})
    for path in (rows / "queries.jsonl", tmp_path / "benchmark.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert [row["id"] for row in uvrb.read(tmp_path, "Kitchen").queries] == ["q0", "q1"]
