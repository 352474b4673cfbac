"""Turn upstream training annotations into training files of data.py, for the sources of Table 6 and their like.

    python extras/convert.py webvid data/train/partitions DIR/webvid.jsonl --media clips     # DIR/clips/<page_dir>/<videoid>.mp4
    python extras/convert.py --help                                                          # every name and its format
    python data.py check DIR/webvid.jsonl                                                    # decodes every file that it names

SOURCE is a file (.json, .jsonl, .csv, .tsv, .parquet, .tar of json members) or a folder of such files. Media stay where they are:
OUT names them as upstream does, after --media, relative to OUT's folder. What upstream leaves open (which of several captions) is
drawn under --seed. Rows without a query or a positive are dropped and counted.
"""

import argparse
import csv
import json
import os
import random
import sys
import tarfile
from pathlib import Path

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".tar", ".tsv")


def read_rows(source):
    """Yield ("file:row", dict) of an annotation file, or of every such file below a folder in name order; csv needs a header.

    Raises FileNotFoundError for an absent source, ValueError naming the file and the row for one that is not what it seems.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise ValueError(f"{path}: no {', '.join(SUFFIXES)} file below this folder")
        for file in files:
            yield from read_rows(file)
        return
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: {path.suffix or 'no suffix'}; accepted: {', '.join(SUFFIXES)}")
    number = 0
    try:
        for number, row in enumerate(_rows(path), 1):
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, got {type(row).__name__}")
            yield f"{path}:{number}", row
    except (ValueError, csv.Error, tarfile.TarError) as error:
        raise ValueError(f"{path}: after {number} rows: {error}") from error


def _rows(path):
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet  # late: nothing else needs it

        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    elif path.suffix == ".tar":  # webdataset: <key>.json beside <key>.mp4
        with tarfile.open(path) as file:
            for member in file:
                if member.name.endswith(".json"):
                    yield json.load(file.extractfile(member)) | {"__key__": Path(member.name).stem}
    elif path.suffix == ".json":
        whole = json.loads(path.read_text(encoding="utf-8"))
        yield from whole if isinstance(whole, list) else [whole]
    else:
        with open(path, encoding="utf-8", newline="" if path.suffix == ".csv" else None) as file:
            if path.suffix == ".jsonl":
                yield from (json.loads(line) for line in file if line.strip())
            else:
                yield from csv.DictReader(
                    file, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True
                )


def key_in(where, row, *names):
    """Return the first of `names` that is a key of the row; ValueError with the keys found if there is none."""
    for name in names:
        if name in row:
            return name
    raise ValueError(
        f"{where}: none of the keys {', '.join(names)}; keys found: {', '.join(map(str, row))}"
    )


def pick(where, row, *names):
    return row[key_in(where, row, *names)]


def pair(query, positive, negatives=()):
    """Make a training row; None, which drops it, if the query or the positive is empty. Empty parts of an item go."""
    query, positive, *negatives = (
        {k: v for k, v in item.items() if v} for item in (query, positive, *negatives)
    )
    return (
        {"query": query, "positive": positive, "negatives": [n for n in negatives if n]}
        if query and positive
        else None
    )


def mmeb(source, flags):
    """MMEB-train: qry, qry_image_path, pos_text, pos_image_path, neg_text, neg_image_path; <|image_1|> in a text is dropped."""
    for where, row in read_rows(source):
        items = []
        for text, image in (
            ("qry", "qry_image_path"),
            ("pos_text", "pos_image_path"),
            ("neg_text", "neg_image_path"),
        ):
            words = (pick(where, row, text) or "").replace("<|image_1|>", "").strip()
            items.append({"text": words, "image": place(flags, pick(where, row, image))})
        yield pair(items[0], items[1], items[2:])


def unite(source, flags):
    """UNITE: {"query": {"text", "image", "video"}, "candidate": {...}, "negative": {...} or a list of them}."""

    def item(given):
        return {
            "text": given.get("text"),
            **{kind: place(flags, given.get(kind)) for kind in ("image", "video")},
        }

    for where, row in read_rows(source):
        negatives = row.get("negative") or []
        negatives = negatives if isinstance(negatives, list) else [negatives]
        yield pair(
            item(pick(where, row, "query")),
            item(pick(where, row, "candidate")),
            map(item, negatives),
        )


def webvid(source, flags):
    """WebVid csv: videoid, page_dir, name -> <page_dir>/<videoid>.mp4. A caption of more than one video is dropped (A.4)."""
    seen, twice = set(), set()  # hashes: about 1 GB for 10 million captions
    for where, row in read_rows(source):
        name = hash(pick(where, row, "name"))
        (twice if name in seen else seen).add(name)
    for where, row in read_rows(source):
        path = f"{pick(where, row, 'page_dir')}/{pick(where, row, 'videoid')}.mp4"
        yield (
            None
            if hash(row["name"]) in twice
            else pair({"text": row["name"]}, {"video": place(flags, path)})
        )


def vast(source, flags):
    """VAST-27M: id, vision_cap (list) -> <id>.mp4, the clip as cut upstream; one caption at random, as the paper (A.4)."""
    for where, row in read_rows(source):
        captions = pick(where, row, "vision_cap")
        text = flags.random.choice(captions) if captions else ""
        yield pair(
            {"text": text}, {"video": place(flags, f"{pick(where, row, 'id', 'clip_id')}.mp4")}
        )


def llava_hound(source, flags):
    """LLaVA-Hound: video (a folder of frames), conversations [{"from": "human" or "gpt", "value"}]: first answer -> frames."""
    for where, row in read_rows(source):
        answers = [
            turn["value"] for turn in pick(where, row, "conversations") if turn["from"] == "gpt"
        ]
        video = place(flags, pick(where, row, "video"))
        yield pair(
            {"text": answers[0] if answers else ""},
            {"video": {"path": video, "fps": flags.fps} if flags.fps else video},
        )


def megapairs(source, flags):
    """MegaPairs: q_img, q_text (list), t_img, hns (list of images; the first is the query's own) -> one text at random."""
    for where, row in read_rows(source):
        texts = pick(where, row, "q_text")
        texts = [texts] if isinstance(texts, str) else texts
        query = {
            "image": place(flags, pick(where, row, "q_img")),
            "text": flags.random.choice(texts) if texts else "",
        }
        negatives = [{"image": place(flags, image)} for image in row.get("hns") or []]
        yield pair(query, {"image": place(flags, pick(where, row, "t_img"))}, negatives)


def pe_video(source, flags):
    """PE-Video: train/*.tar with <key>.json -> <key>.mp4; human_caption, as the paper (A.4)."""
    for where, row in read_rows(source):
        yield pair(
            {"text": pick(where, row, "human_caption")},
            {"video": place(flags, pick(where, row, "__key__") + ".mp4")},
        )


def tevatron(source, flags):
    """Tevatron's MS MARCO: query, positive_passages and negative_passages [{"title", "text"}]; the first positive counts."""
    for where, row in read_rows(source):
        positives = [passage(p) for p in pick(where, row, "positive_passages")]
        yield pair(
            {"text": pick(where, row, "query")},
            positives[0] if positives else {},
            [passage(p) for p in row.get("negative_passages") or []],
        )


def triples(source, flags):
    """MS MARCO's triples.train.*.tsv: query, positive and negative text, tab-separated, no header. Equal pairs are merged."""
    last = None
    with open(source, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\n").split("\t")
            if len(cells) != 3:
                raise ValueError(
                    f"{source}:{number}: {len(cells)} cells; query, positive and negative are wanted"
                )
            query, positive, negative = ({"text": cell} for cell in cells)
            if last and (last["query"], last["positive"]) == (query, positive):
                last["negatives"].append(negative)
                continue
            if last:
                yield last
            last = pair(query, positive, [negative])
    if last:
        yield last


def beir(source, flags):
    """BEIR folder: corpus.jsonl, queries.jsonl, qrels/<split>.tsv (query-id, corpus-id, score); score 0 makes a negative."""
    folder, judged, documents = Path(source), {}, {}
    for where, row in read_rows(folder / "qrels" / f"{flags.split}.tsv"):
        lists = judged.setdefault(pick(where, row, "query-id"), {"positive": [], "negative": []})
        lists["positive" if int(pick(where, row, "score")) > 0 else "negative"].append(
            pick(where, row, "corpus-id")
        )
    wanted = {doc for lists in judged.values() for ids in lists.values() for doc in ids}
    for where, row in read_rows(folder / "corpus.jsonl"):
        if (name := str(pick(where, row, "_id"))) in wanted:
            documents[name] = passage(row)
    if lost := wanted - documents.keys():
        raise ValueError(
            f"{folder / 'corpus.jsonl'}: {len(lost)} documents of the qrels are missing, such as {min(lost)!r}"
        )
    for where, row in read_rows(folder / "queries.jsonl"):
        lists = judged.get(str(pick(where, row, "_id")), {"positive": []})
        for doc in lists["positive"]:
            yield pair(
                {"text": pick(where, row, "text")},
                documents[doc],
                [documents[n] for n in lists["negative"]],
            )


def passage(row):
    return {
        "text": " ".join(
            filter(None, ((row.get("title") or "").strip(), (row.get("text") or "").strip()))
        )
    }


def place(flags, path):
    """Media path as OUT names it; None stays None. A list of one, as some files have it, is that one."""
    path = path[0] if isinstance(path, list) and len(path) == 1 else path
    return os.path.join(flags.media, path) if path else None


CONVERTERS = {
    "mmeb": mmeb,
    "unite": unite,
    "webvid": webvid,
    "vast": vast,
    "llava-hound": llava_hound,
    "megapairs": megapairs,
    "pe-video": pe_video,
    "tevatron": tevatron,
    "triples": triples,
    "beir": beir,
}


def main(argv=None):
    formats = "\n".join(f"  {name:12} {function.__doc__}" for name, function in CONVERTERS.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{formats}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=CONVERTERS)
    parser.add_argument("source", help="upstream's annotation file or folder")
    parser.add_argument("out", help="training file to write (*.jsonl)")
    parser.add_argument("--media", default="", help="folder of the media, relative to OUT's folder")
    parser.add_argument(
        "--negatives", type=int, help="keep at most so many hard negatives per row (default: all)"
    )
    parser.add_argument(
        "--fps",
        type=float,
        help="llava-hound: frame rate of the extracted frames (default: data.py's 8)",
    )
    parser.add_argument("--split", default="train", help="beir: name of the qrels file")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    flags = parser.parse_args(argv)
    flags.random, out, counts = random.Random(flags.seed), Path(flags.out), {True: 0, False: 0}
    part = out.with_name(out.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        for row in CONVERTERS[flags.name](flags.source, flags):
            counts[row is not None] += 1
            if row is not None:
                row["negatives"] = row["negatives"][: flags.negatives]
                file.write(
                    json.dumps({k: v for k, v in row.items() if v}, ensure_ascii=False) + "\n"
                )
    os.replace(part, out)
    print(f"{out}: {counts[True]} rows, {counts[False]} dropped")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as problem:
        sys.exit(f"error: {problem}")
