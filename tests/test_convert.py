"""extras/convert.py: a small file of each upstream format; data.Source reads the result."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data import Source
from extras import convert

REPO = Path(__file__).resolve().parent.parent


def write(path, content):
    """Write rows in the format that the suffix names; a string as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def command(*words):
    """Run extras/convert.py as a user does."""
    return subprocess.run(
        [sys.executable, "extras/convert.py", *map(str, words)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
    )


def run(tmp_path, name, source, *flags, media=()):
    """Convert, put files where media are named, and read what training would.

    Returns [query, positive, *negatives] per row.
    """
    for file in media:
        write(tmp_path / file, "not decoded here")
    convert.main([name, str(source), str(tmp_path / "out.jsonl"), *flags])
    read = Source(name, "T2V", str(tmp_path / "out.jsonl"), negatives=9)
    rows = [read.load(i) for i in range(len(read))]
    base = str(tmp_path.resolve()) + "/"
    return json.loads(json.dumps(rows).replace(base, ""))


def test_mmeb_train(tmp_path, capsys):
    rows = [
        {
            "qry": "<|image_1|>\nmake it blue",
            "qry_image_path": "images/CIRR/1.jpg",
            "pos_text": "<|image_1|>\n",
            "pos_image_path": "images/CIRR/2.jpg",
            "neg_text": "",
            "neg_image_path": "images/CIRR/3.jpg",
        },
        {
            "qry": "What is this? <|image_1|>",
            "qry_image_path": "images/1.jpg",
            "pos_text": "a cat",
            "pos_image_path": "",
            "neg_text": "",
            "neg_image_path": "",
        },
        {
            "qry": "no positive",
            "qry_image_path": "",
            "pos_text": "",
            "pos_image_path": None,
            "neg_text": "",
            "neg_image_path": "",
        },
    ]
    media = [f"mm/images/{name}" for name in ("CIRR/1.jpg", "CIRR/2.jpg", "CIRR/3.jpg", "1.jpg")]
    for suffix in ("parquet", "jsonl"):
        got = run(
            tmp_path, "mmeb", write(tmp_path / f"up.{suffix}", rows), "--media", "mm", media=media
        )
        assert got == [
            [
                {"text": "make it blue", "image": "mm/images/CIRR/1.jpg"},
                {"image": "mm/images/CIRR/2.jpg"},
                {"image": "mm/images/CIRR/3.jpg"},
            ],
            [{"text": "What is this?", "image": "mm/images/1.jpg"}, {"text": "a cat"}],
        ]
        assert "2 rows, 1 dropped" in capsys.readouterr().out


def test_unite(tmp_path):
    rows = [
        {
            "query": {"text": "a dog", "image": None},
            "candidate": {"video": ["v/1.mp4"]},
            "negative": {"video": "v/2.mp4"},
            "target_modal": "video",
        },
        {
            "query": {"text": "and now?", "video": "v/1.mp4"},
            "candidate": {"text": "x", "image": "i.jpg"},
            "target_modal": "text,image",
        },
        {
            "query": {"text": "q"},
            "candidate": {"text": "p"},
            "negative": [{"text": "n1"}, {"text": "n2"}],
            "target_modal": "text",
        },
    ]
    got = run(
        tmp_path, "unite", write(tmp_path / "up.json", rows), media=["v/1.mp4", "v/2.mp4", "i.jpg"]
    )
    assert got == [
        [{"text": "a dog"}, {"video": "v/1.mp4"}, {"video": "v/2.mp4"}],
        [{"text": "and now?", "video": "v/1.mp4"}, {"text": "x", "image": "i.jpg"}],
        [{"text": "q"}, {"text": "p"}, {"text": "n1"}, {"text": "n2"}],
    ]


def test_webvid_drops_captions_of_several_videos_over_all_partitions(tmp_path, capsys):
    head = "videoid,contentUrl,duration,page_dir,name\n"
    first = (
        "21179416,https://x/21179416-preview.mp4,PT00H00M11S,006001_006050,"
        '"Aerial, at ""dawn"""\n'
        "5629184,https://x/y,PT00H00M29S,071501_071550,Sunset\n"
    )
    second = (
        "7,https://x/z,PT00H00M05S,000001_000050,Sunset\n"
        "8,https://x/s,PT00H00M01S,000001_000050,Snow falls\n"
    )
    write(tmp_path / "up" / "0000.csv", head + first)
    write(tmp_path / "up" / "0001.csv", head + second)
    media = ["clips/006001_006050/21179416.mp4", "clips/000001_000050/8.mp4"]
    got = run(tmp_path, "webvid", tmp_path / "up", "--media", "clips", media=media)
    assert got == [
        [{"text": 'Aerial, at "dawn"'}, {"video": media[0]}],
        [{"text": "Snow falls"}, {"video": media[1]}],
    ]
    assert "2 rows, 2 dropped" in capsys.readouterr().out


def test_vast_draws_one_vision_caption_under_the_seed(tmp_path):
    rows = [
        {
            "id": f"v{i}.0",
            "url": "u",
            "begin_s": 0.0,
            "end_s": 9.5,
            "begin_t": "00:00:00",
            "end_t": "00:00:09",
            "vision_cap": [f"{i} first", f"{i} second", f"{i} third"],
            "audio_cap": ["no"],
            "subtitle": "no",
            "vast_cap": "no",
        }
        for i in range(20)
    ]
    media = [f"v{i}.0.mp4" for i in range(20)]
    read = {}
    for suffix in ("parquet", "json"):
        source = write(tmp_path / f"up.{suffix}", rows)
        for seed in "001":
            got = run(tmp_path, "vast", source, "--seed", seed, media=media)
            assert [p["video"] for _, p in got] == media
            for (query, _), row in zip(got, rows, strict=True):
                assert query["text"] in row["vision_cap"]
            assert read.setdefault(seed, got) == got
    assert read["0"] != read["1"]
    assert len({query["text"].split()[1] for query, _ in read["0"]}) == 3


def test_llava_hound(tmp_path):
    turns = [
        {"from": "human", "value": "<video>\nDescribe."},
        {"from": "gpt", "value": "A man runs."},
        {"from": "gpt", "value": "no"},
    ]
    rows = [
        {"id": "k0", "video": "k0", "conversations": turns},
        {"id": "k1", "video": "k1", "conversations": turns[:1]},
    ]
    source = write(tmp_path / "up.jsonl", rows)
    words = ("llava-hound", source, "--media", "train_300k")
    got = run(tmp_path, *words, media=["train_300k/k0/f.jpg"])
    assert got == [[{"text": "A man runs."}, {"video": "train_300k/k0"}]]

    ((_, positive),) = run(tmp_path, *words, "--fps", "2")
    assert positive == {"video": {"path": "train_300k/k0", "fps": 2.0}}


def test_megapairs(tmp_path):
    row = {
        "q_img": "a.jpg",
        "q_text": ["make it red", "make it red"],
        "t_img": "b.jpg",
        "hns": ["a.jpg", "c.jpg"],
    }
    source = write(tmp_path / "up.jsonl", [row])
    got = run(tmp_path, "megapairs", source, media=["a.jpg", "b.jpg", "c.jpg"])
    assert got == [
        [
            {"image": "a.jpg", "text": "make it red"},
            {"image": "b.jpg"},
            {"image": "a.jpg"},
            {"image": "c.jpg"},
        ]
    ]

    run(tmp_path, "megapairs", source, "--negatives", "1")
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["negatives"]) == 1
    run(tmp_path, "megapairs", source, "--negatives", "0")
    assert "negatives" not in json.loads((tmp_path / "out.jsonl").read_text())


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def test_pe_video(tmp_path):
    row = {"human_caption": "A paper flower.", "model_caption": "no", "keywords": ["no"]}
    members = {"158873272.mp4": b"x", "158873272.json": json.dumps(row).encode()}
    write_tar(tmp_path / "up" / "0.tar", members)
    got = run(tmp_path, "pe-video", tmp_path / "up", "--media", "v", media=["v/158873272.mp4"])
    assert got == [[{"text": "A paper flower."}, {"video": "v/158873272.mp4"}]]


def test_ms_marco_in_its_three_forms_gives_the_same_rows(tmp_path):
    expected = [[{"text": "who?"}, {"text": "T one"}, {"text": "two"}, {"text": "three"}]]
    row = {
        "query_id": "1",
        "query": "who?",
        "positive_passages": [{"docid": "1", "title": "T", "text": "one"}],
        "negative_passages": [
            {"docid": "2", "title": "", "text": "two"},
            {"docid": "3", "text": "three"},
        ],
    }
    assert run(tmp_path, "tevatron", write(tmp_path / "up.jsonl", [row])) == expected
    write(tmp_path / "t.tsv", 'who?\tT one\ttwo\nwho?\tT one\tthree\nan "odd\tp\tn\n')
    assert run(tmp_path, "triples", tmp_path / "t.tsv") == expected + [
        [{"text": 'an "odd'}, {"text": "p"}, {"text": "n"}]
    ]

    folder = tmp_path / "beir"
    corpus = [
        {"_id": "1", "title": "T", "text": "one"},
        {"_id": "2", "title": "", "text": "two"},
        {"_id": "3", "title": "", "text": "three"},
        {"_id": "4", "title": "", "text": "unjudged"},
    ]
    queries = [{"_id": "1", "text": "who?"}, {"_id": "9", "text": "of another split"}]
    write(folder / "corpus.jsonl", corpus)
    write(folder / "queries.jsonl", queries)
    write(folder / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore\n1\t1\t1\n1\t2\t0\n1\t3\t0\n")
    assert run(tmp_path, "beir", folder) == expected
    write(folder / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore\n1\t7\t1\n")
    with pytest.raises(ValueError, match="corpus.jsonl: 1 documents .* '7'"):
        run(tmp_path, "beir", folder)


@pytest.mark.parametrize(
    "name, file_name, content, message",
    [
        (
            "vast",
            "x.json",
            [{"id": "1", "captions": []}],
            "x.json:1: none of the keys vision_cap; keys found: id, captions",
        ),
        ("mmeb", "x.jsonl", '{"qry": 1\n', "x.jsonl: after 0 rows"),
        ("unite", "x.json", [[1]], "expected an object, got list"),
        ("triples", "x.tsv", "a\tb\tc\na\tb\n", "x.tsv:2: 2 cells"),
        ("vast", "x.txt", "", "x.txt: .txt; accepted: .csv"),
    ],
)
def test_a_wrong_file_is_named_with_its_row_and_keys_and_makes_no_training_file(
    tmp_path, name, file_name, content, message
):
    path = tmp_path / file_name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    done = command(name, path, tmp_path / "out.jsonl")
    assert done.returncode == 1
    assert message in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == [file_name], "no training file, no part"


def test_help_lists_every_format():
    shown = command("--help").stdout
    for name in convert.CONVERTERS:
        assert f"  {name} " in shown
    assert "q_img, q_text (list)" in shown
