"""eval.py: metrics against trec_eval, chance by sampling, ceilings by brute force, missing media, tables, the command."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
import torch
from conftest import moving_square, write_video

import eval as ev
import uvrb
from embed import GVE, parse_flags, top_k

REPO = Path(__file__).resolve().parent.parent
TREC = {"R@1": "recall_1", "R@5": "recall_5", "R@10": "recall_10", "hit@1": "success_1", "hit@5": "success_5",
        "hit@10": "success_10", "P@1": "P_1", "MRR": "recip_rank", "nDCG@10": "ndcg_cut_10"}


def run(*args, cwd):
    return subprocess.run([sys.executable, str(REPO / "eval.py"), *map(str, args)], capture_output=True, text=True, cwd=cwd)


def call(*args):
    """What the command does, in this process: importing torch and transformers anew costs seconds."""
    return ev.main(parse_flags(ev.Flags, [str(a) for a in args]))


def problem(n=37, m=53, d=16, seed=0, most=5):
    """Random vectors and 1 to `most` positives per query, the odd sizes on purpose."""
    rng = np.random.default_rng(seed)
    queries, corpus = (torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in ((n, d), (m, d)))
    return queries, corpus, [rng.choice(m, rng.integers(1, most + 1), replace=False).tolist() for _ in range(n)], rng


def trec(queries, corpus, positives, pools=None):
    """Means of trec_eval's measures over queries, scores being cosines in float64."""
    queries, corpus = (torch.nn.functional.normalize(x.double(), dim=1) for x in (queries, corpus))
    cosines = (queries @ corpus.T).numpy()
    pools = pools or [range(len(corpus))] * len(queries)
    qrel = {str(i): {str(p): 1 for p in own} for i, own in enumerate(positives)}
    runs = {str(i): {str(j): float(cosines[i, j]) for j in pool} for i, pool in enumerate(pools)}
    measures = {"recall.1,5,10", "success.1,5,10", "P.1", "recip_rank", "ndcg_cut.10"}
    rows = pytrec_eval.RelevanceEvaluator(qrel, measures).evaluate(runs).values()
    return {name: float(np.mean([row[key] for row in rows])) for name, key in TREC.items()}


@pytest.mark.parametrize("n, m, most", [(37, 53, 1), (37, 53, 5), (13, 7, 6), (101, 781, 12)])
def test_metrics_equal_trec_evals(n, m, most):
    queries, corpus, positives, _ = problem(n, m, most=most)
    ours = ev.metrics(ev.ranks(queries, corpus, positives))
    for name, value in trec(queries, corpus, positives).items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name
    assert set(ours) == {*TREC, "MdR"}


def test_metrics_in_pools_equal_trec_evals_over_the_same_candidates():
    queries, corpus, positives, rng = problem()
    pools = [sorted({*own, *rng.choice(53, 8).tolist()}) for own in positives]
    ours, whole = (ev.metrics(ev.ranks(queries, corpus, positives, p)) for p in (pools, None))
    for name, value in trec(queries, corpus, positives, pools).items():
        assert ours[name] == pytest.approx(value, abs=1e-9), name
    assert ours["R@1"] > whole["R@1"]
    assert ev.ranks(queries, corpus, positives, [p[::-1] for p in pools]) == ev.ranks(queries, corpus, positives, pools)


def test_median_rank_is_of_the_first_positive():
    assert ev.metrics([[1], [4, 90], [3, 5]])["MdR"] == 3 and ev.metrics([[2], [5]])["MdR"] == 3.5


def test_ties_rank_in_corpus_order():
    """Vectors of 0 and 1 tie exactly. Here we differ from trec_eval, which puts the later of two equal documents first."""
    rng = np.random.default_rng(1)
    corpus, queries = (torch.from_numpy(np.eye(4, dtype=np.float32)[rng.integers(0, 4, k)]) for k in (23, 11))
    positives = [rng.choice(23, 3, replace=False).tolist() for _ in range(11)]
    expected = []
    for q, own in zip(queries.tolist(), positives, strict=True):
        order = sorted(range(23), key=lambda j: (-sum(a * b for a, b in zip(q, corpus[j].tolist(), strict=True)), j))
        expected.append(sorted(order.index(p) + 1 for p in own))
    assert ev.ranks(queries, corpus, positives) == expected
    assert ev.ranks(queries, corpus, positives, [list(range(23))[::-1]] * 11) == expected  # in pools too, in whatever order
    one = torch.ones(1, 4)
    assert ev.ranks(one, one.repeat(2, 1), [[1]]) == [[2]]
    trec_run = pytrec_eval.RelevanceEvaluator({"q": {"1": 1}}, {"recip_rank"}).evaluate({"q": {"0": 1.0, "1": 1.0}})
    assert trec_run["q"]["recip_rank"] == 1.0


def test_ranks_agree_with_top_k_for_any_block_size_scale_and_dtype():
    queries, corpus, positives, _ = problem(most=3)
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (queries, corpus)]
    indices = top_k(*unit, len(corpus))[1].tolist()
    expected = [sorted(order.index(p) + 1 for p in own) for order, own in zip(indices, positives, strict=True)]
    for block in (1, 60, 54 * 7, 2**26):
        assert ev.ranks(queries, corpus, positives, block=block) == expected
    assert ev.ranks(queries * 1e3, corpus * torch.rand(53, 1), positives) == expected  # cosine: lengths do not count
    half = [x.half() for x in (queries, corpus)]
    assert ev.ranks(*half, positives) == ev.ranks(*(x.double() for x in half), positives)


def test_a_nan_vector_cannot_be_ranked():
    queries, corpus, positives, _ = problem()
    corpus[3, 2] = math.nan
    with pytest.raises(AssertionError, match="NaN"):
        ev.ranks(queries, corpus, positives)


@pytest.mark.parametrize("metric", ["R@1", "R@5", "R@10", "P@1"])
def test_chance_is_the_mean_over_random_rankings(metric):
    """20,000 random rankings of 4 queries with 1 to 6 positives among 8 to 40 candidates; the tolerance is 5 standard errors."""
    rng, counts, sizes = np.random.default_rng(2), [1, 3, 6, 2], [40, 25, 8, 11]
    draws = [ev.metrics([np.sort(rng.permutation(m)[:p] + 1).tolist() for p, m in zip(counts, sizes, strict=True)])[metric]
             for _ in range(20_000)]
    assert abs(ev.chance(metric, counts, sizes) - np.mean(draws)) < 5 * np.std(draws) / len(draws) ** 0.5


@pytest.mark.parametrize("metric", ["R@1", "R@5", "P@1"])
def test_ceiling_is_the_best_of_all_rankings(metric):
    for p in range(1, 7):
        best = max(ev.metrics([list(r)])[metric] for r in itertools.combinations(range(1, 8), p))
        assert ev.ceiling(metric, [p]) == pytest.approx(best)
    assert ev.ceiling(metric, [1, 2, 4]) == pytest.approx(np.mean([ev.ceiling(metric, [p]) for p in (1, 2, 4)]))


def test_ceiling_of_dream_1k_is_the_known_one():
    """DREAM-1K has 6,251 distinct events: 6,214 of one video, 32 of 2, 4 of 3, 1 of 5; strict R@1 cannot pass 0.9969."""
    assert round(ev.ceiling("R@1", [1] * 6214 + [2] * 32 + [3] * 4 + [5]), 4) == 0.9969


def bench(n=6, m=8, name="MSRVTT", pools=None, expected=None):
    rows = [[{"id": f"{kind}{i}", "item": {"text": "x"}, "where": f"{kind}.jsonl:{i + 1}"} for i in range(k)]
            for kind, k in (("q", n), ("c", m))]
    return uvrb.Bench(name, *rows, [[i] for i in range(n)], pools, expected or (n, m), [])


def test_lost_media_cost_their_queries_and_the_place_in_every_average():
    queries, corpus, _, _ = problem(6, 8)
    own, pools = corpus[:6] + 0.05 * queries, [[i, (i + 1) % 8, 7] for i in range(6)]
    queries = own.clone()  # every query finds its own video
    for b in (bench(), bench(name="MS-TI", pools=pools, expected=(6, None))):
        whole = ev.score(b, queries, corpus)
        assert (whole["n"], whole["expected"], whole["score"], whole["complete"]) == (6, 6, 1.0, True)
        holed, spoilt = queries.clone(), corpus.clone()
        holed[4], spoilt[1], spoilt[7] = math.nan, math.nan, math.nan
        part = ev.score(b, holed, spoilt, {4: "no such file"}, {1: "damaged", 7: "damaged"})
        # Query 4 has no vector, query 1's video is gone, video 7 is a distractor: 4 of 6 queries over 6 of 8 videos.
        assert (part["n"], part["expected"], part["corpus"], part["expected_corpus"], part["complete"]) == (4, 6, 6, 8, False)
        assert part["score"] == 1.0
        distractor = ev.score(b, queries, corpus, {}, {7: "damaged"})
        assert (distractor["n"], distractor["corpus"], distractor["complete"]) == (6, 7, False)
    assert part["chance"] == pytest.approx(np.mean([1, 1 / 2, 1 / 2, 1 / 2]))  # pools without videos 1 and 7
    nothing = ev.score(bench(), queries, corpus, {}, dict.fromkeys(range(8), "damaged"))
    assert (nothing["n"], nothing["score"], nothing["complete"]) == (0, None, False)


def test_a_benchmark_smaller_than_it_should_be_is_incomplete():
    queries, corpus, _, _ = problem(6, 8)
    for expected in ((7, 8), (6, 9)):
        assert not ev.score(bench(expected=expected), queries, corpus)["complete"]


def entry(score, complete=True):
    return {"metric": "R@1", "score": score, "chance": 0.005, "ceiling": 1.0, "n": 9, "expected": 9 if complete else 10,
            "corpus": 9, "expected_corpus": 9, "pooled": True, "complete": complete}


PROTOCOL = {"checkpoint": "runs/x", "step": 3, "frames": 8, "max_tokens": 200, "dtype": "float32"}


def test_only_complete_datasets_enter_an_average():
    cells = {name: i / 100 for i, name in enumerate(uvrb.DATASETS)}
    whole = ev.summarise("UVRB", "x", PROTOCOL, {name: entry(s) for name, s in cells.items()})
    assert whole["AVG-D"] == pytest.approx(0.075) and None not in whole["abilities"].values()
    part = ev.summarise("UVRB", "x", PROTOCOL, {name: entry(s, name != "CMRB") for name, s in cells.items()})
    assert part["AVG-D"] is part["AVG-A"] is None
    assert {k for k, v in part["abilities"].items() if v is None} == {"T", "FG", "TXT"}
    assert {k: v for k, v in part["abilities"].items() if v is not None}.items() <= whole["abilities"].items()


def test_tables_show_published_rows_base_beside_trained_chance_ceiling_and_marks(capsys):
    names = list(uvrb.DATASETS)
    base = ev.summarise("mini-UVRB", "base", PROTOCOL, {name: entry(0.031) for name in names})
    scored = {name: entry(0.411, name != "DiDeMo") for name in names if name != "PEV-K"}
    trained = ev.summarise("mini-UVRB", "gve-mini", PROTOCOL, scored)
    ev.print_tables([base, trained])
    text = capsys.readouterr().out
    one, two = text.split("Table 2, mini-UVRB")
    assert one.strip().startswith("Table 1, mini-UVRB") and max(map(len, text.splitlines())) <= 200
    rows = {line.split()[0]: line.split()[1:] for line in one.splitlines() if line.split()}
    order = [line.split()[0] for line in one.splitlines() if line.split()]
    assert order.index("GVE-7B") < order.index("base") < order.index("gve-mini") < order.index("chance") < order.index("ceiling")
    assert rows["GVE-7B"] == [f"{x:.3f}"[1:] for x in ev.published()["table1"]["GVE-7B"].values()]
    assert rows["base"] == [".031"] * 17 and rows["chance"] == [".005"] * 17 and rows["ceiling"] == ["1.000"] * 17
    expected = {name: ".411" for name in names} | {"AVG": "-", "DiDeMo": ".411*", "PEV-K": "-"}
    assert dict(zip(rows["model"], rows["gve-mini"], strict=True)) == expected
    rows = {line.split()[0]: line.split()[1:] for line in two.splitlines() if line.split()}
    assert dict(zip(rows["model"], rows["CLIP4Clip"], strict=True)) == {
        key: f"{x:.3f}"[1:] for key, x in ev.published()["table2"]["CLIP4Clip"].items()}
    assert {a for a, cell in zip(rows["model"], rows["gve-mini"], strict=True) if cell == "-"} == {"AVG", "TXT", "CG", "FG", "PR"}
    assert "* DiDeMo: 9/10 queries" in two and "not scored: PEV-K" in two


def test_published_errata_are_found_by_computing(capsys):
    paper = {key: value for key, value in ev.published().items() if key in ("table1", "table2")}
    wrong = ev.disagreements(paper)
    assert len(wrong) == 5
    assert {cell[1:] for cell in wrong} == {("GME-2B", "AVG"), *(("VLM2Vec-V2", c) for c in ("AVG", "TXT", "CG"))}
    assert wrong["Table 2", "GME-2B", "AVG"] == (0.416, pytest.approx(0.516, abs=5e-4))
    paper["table1"]["UniME-7B"]["VDC-D"] += 0.1  # one digit of one cell
    assert {cell for cell in ev.disagreements(paper) if cell not in wrong} == {
        ("Table 1", "UniME-7B", "AVG"), *(("Table 2", "UniME-7B", c) for c in ("AVG", "TXT", "LC"))}
    ev.print_published()
    text = capsys.readouterr().out
    assert "5 printed cells" in text and "Table 2, GME-2B, AVG: printed 0.416, its cells give 0.5161" in text
    assert text.count("!") == 6  # one in the caption


def test_save_leaves_the_old_file_when_it_cannot_write_the_new_one(tmp_path):
    path = tmp_path / "results.json"
    ev.save(path, {"a": 1})
    with pytest.raises(TypeError):
        ev.save(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


# ---- the real command on real files ----

def world(root, media):
    """A benchmark of three datasets over 7 real clips: text queries with 2 positives, pools, an image and a clip as query."""
    (root / "videos").mkdir(parents=True)
    for i in range(7):
        write_video(root / "videos" / f"{i}.mp4", moving_square(12, seed=20 + i))
    corpus = [{"id": f"c{i}", "video": f"../../videos/{i}.mp4"} for i in range(7)]
    image, clip = str(media / "i.png"), {"path": "../../videos/0.mp4", "start": 0, "end": 1}
    sets = {
        "MSRVTT": ([{"text": f"a square, number {i}"} for i in range(5)],
                   [{"pos": [i, (i + 2) % 7] if i % 2 else [i]} for i in range(5)]),
        "MS-TI": ([{"text": f"the same, {i}", "image": image} for i in range(4)],
                  [{"pos": [i], "neg": [i + 1, i + 3]} for i in range(4)]),
        "LoVR-C2V": ([{"video": {**clip, "path": f"../../videos/{i}.mp4"}} for i in range(7)], [{"pos": [i]} for i in range(7)]),
    }
    sizes = {}
    for k, (name, (queries, instances)) in enumerate(sets.items()):
        rows = root / "uvrb" / name / "jsonl"
        rows.mkdir(parents=True)
        turned = corpus[k:] + corpus[:k]  # another corpus order in each
        files = {"queries": [{"id": f"q{i}", **q} for i, q in enumerate(queries)], "corpus": turned, "instances": [
            {"qid": f"q{i}", **{k: [f"c{j}" for j in v] for k, v in row.items()}} for i, row in enumerate(instances)]}
        for file, lines in files.items():
            (rows / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        sizes[name] = {"queries": len(queries), "corpus": 7}
    (root / "uvrb" / "benchmark.json").write_text(json.dumps({"name": "tiny-UVRB", "datasets": sizes}))
    return root / "uvrb"


@pytest.fixture(scope="module")
def evaluated(tiny, media, tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    folder = world(root, media)
    done = run("--ckpt", tiny, "--uvrb", folder, "--root", media, "--name", "random", "--out", root / "out",
               "--batch-tokens", 300, cwd=root)
    assert done.returncode == 0, done.stderr
    return folder, root / "out", done.stdout


def test_the_command_scores_real_clips_as_embedding_them_one_by_one_does(evaluated, tiny, media):
    """The judge embeds every item alone, with the prompt of Table 5 as system turn, and leaves the metric to trec_eval."""
    folder, out, _ = evaluated
    result, gve = json.loads((out / "results.json").read_text()), GVE.from_pretrained(tiny)
    assert list(result["datasets"]) == ["MSRVTT", "MS-TI", "LoVR-C2V"]
    for name, entry in result["datasets"].items():
        b = uvrb.read(folder, name, [media])
        prompt = ev.published()["datasets"][name]["prompt"]
        queries = torch.cat([gve.embed([row["item"]], prompt) for row in b.queries])
        corpus = torch.cat([gve.embed([row["item"]]) for row in b.corpus])
        expected = trec(queries, corpus, b.positives, b.pools)
        for metric, value in expected.items():
            assert entry[metric] == pytest.approx(value, abs=1e-9), (name, metric)
        assert entry["score"] == expected[{"MS-TI": "P@1"}.get(name, "R@1")] and entry["complete"]
        assert entry["n"] == entry["expected"] == len(b.queries)
    assert result["datasets"]["MS-TI"]["chance"] == pytest.approx(1 / 3)
    assert result["datasets"]["MSRVTT"]["ceiling"] == pytest.approx(0.8)  # two of five queries have two positives


def test_results_json_holds_the_protocol_and_every_contracted_key(evaluated, tiny):
    folder, out, text = evaluated
    result = json.loads((out / "results.json").read_text())
    assert result["benchmark"] == "tiny-UVRB" and result["model"] == "random"
    assert set(result["abilities"]) == set(uvrb.ABILITIES) and {"AVG-D", "AVG-A"} < set(result)
    assert result["AVG-D"] is None and result["abilities"]["VIS"] is None, "13 datasets are not here"
    p = result["protocol"]
    assert (p["frames"], p["max_tokens"], p["max_length"], p["dtype"], p["checkpoint"]) == (8, 200, 8192, "float32", tiny)
    assert p["torch"] == torch.__version__ and p["transformers"] and "corpus order" in p["ties"] and "step" in p
    assert p["sha256"] == p["base_sha256"] == ev.fingerprint(tiny)  # no adapter: the checkpoint is its own base
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["dataset"] for e in events] == list(result["datasets"])
    assert all(e["event"] == "eval" and e["failed"] == [] for e in events)
    assert {path.name for path in out.iterdir()} == {"results.json", "log.jsonl", "cache"}
    assert "Table 1, tiny-UVRB" in text and "Table 2, tiny-UVRB" in text and "GVE-7B" in text


def test_a_fingerprint_is_of_the_weights(tiny, tmp_path):
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    assert ev.fingerprint(copy) == ev.fingerprint(tiny) and ev.fingerprint("Alibaba-NLP/GVE-3B") is None
    with open(copy / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert ev.fingerprint(copy) != ev.fingerprint(tiny)


def test_tables_option_prints_existing_results_side_by_side(evaluated, tmp_path, capsys):
    _, out, _ = evaluated
    other = json.loads((out / "results.json").read_text()) | {"model": "other"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    call("--tables", out / "results.json", tmp_path / "other.json")
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.split()]
    assert lines.index("other") - lines.index("random") == 1
    assert lines.count("chance") == lines.count("ceiling") == 2


def test_missing_and_damaged_media_are_named_and_never_averaged(tiny, media, tmp_path, capsys):
    folder = world(tmp_path, media)
    (tmp_path / "videos" / "2.mp4").unlink()
    damaged = tmp_path / "videos" / "5.mp4"
    damaged.write_bytes(damaged.read_bytes()[:300])
    call("--ckpt", tiny, "--uvrb", folder, "--root", media, "--out", tmp_path / "out", "--datasets", "MSRVTT", "LoVR-C2V")
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    msrvtt, c2v = result["datasets"]["MSRVTT"], result["datasets"]["LoVR-C2V"]
    # MSRVTT: query 2 looks for video 2, query 3 for 3 and 5. LoVR-C2V: queries 2 and 5 are those clips themselves.
    assert (msrvtt["n"], msrvtt["expected"], msrvtt["corpus"], msrvtt["complete"]) == (3, 5, 5, False)
    assert (c2v["n"], c2v["expected"], c2v["complete"]) == (5, 7, False) and result["abilities"]["VIS"] is None
    assert "* MSRVTT: 3/5 queries, 5/7 videos; it enters no average" in capsys.readouterr().out
    failed = {event["dataset"]: event["failed"] for event in map(json.loads, (tmp_path / "out" / "log.jsonl").open())}
    assert [reason.split(": ")[0].rsplit("/", 1)[1] for reason in failed["LoVR-C2V"]] == [
        "queries.jsonl:3", "queries.jsonl:6", "corpus.jsonl:1", "corpus.jsonl:4"]
    assert "2.mp4" in failed["MSRVTT"][0] and "5.mp4" in failed["MSRVTT"][1]


@pytest.mark.parametrize("args, words", [
    (["--framse", "8"], "unrecognized arguments: --framse"), (["--frames", "eight"], "invalid int value"),
    (["--uvrb", "nowhere"], "nowhere: no such benchmark folder"), (["--uvrb", "."], "none of the 16 datasets is here"),
    (["--tables", "gone.json"], "gone.json")])
def test_what_a_user_mistypes_is_an_error_that_names_it(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError, SystemExit)) as error:
        call(*args)
    assert words in str(error.value) + capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bad_dataset_or_checkpoint_leaves_no_results(tiny, media, tmp_path):
    folder, common = world(tmp_path, media), ("--root", media, "--out", tmp_path / "out")
    with open(folder / "MS-TI" / "jsonl" / "instances.jsonl", "a") as file:
        file.write('{"qid": "q0", "pos": ["c99"]}\n')
    done = run("--ckpt", tiny, "--uvrb", folder, *common, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("eval.py: ") and "MS-TI/jsonl/instances.jsonl:5: pos 'c99'" in done.stderr
    with pytest.raises(ValueError, match="unknown dataset 'MSR-VTT'"):
        call("--ckpt", tiny, "--uvrb", folder, "--datasets", "MSR-VTT", *common)
    with pytest.raises(ValueError, match=str(media)):
        call("--ckpt", media, "--uvrb", folder, "--datasets", "MSRVTT", *common)
    assert not (tmp_path / "out").exists()


def test_a_model_that_gives_nan_is_an_error_and_not_a_score(tiny, media, tmp_path, monkeypatch):
    folder = world(tmp_path, media)
    forward = GVE.forward
    monkeypatch.setattr(GVE, "forward", lambda self, batch: forward(self, batch) * math.nan)
    with pytest.raises(ValueError, match="corpus.jsonl:1: .* gives a vector that is not finite"):
        call("--ckpt", tiny, "--uvrb", folder, "--datasets", "MSRVTT", "--out", tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
