"""The pieces that other research would copy, cut out with what they name in the root's files.

Each runs in an empty module with at most two imports, none of them ours.
"""

import ast
import symtable
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST_IMPORTS = 2


def globals_of(code):
    """Return every name that a piece of code looks up outside itself."""

    def walk(table):
        names = set()
        for symbol in table.get_symbols():
            if table.get_type() == "module" or symbol.is_global():
                names.add(symbol.get_name())
        for child in table.get_children():
            names |= walk(child)
        return names

    return walk(symtable.symtable(code, "piece", "exec"))


def definitions(tree):
    """Return {name: top-level statement that defines it} of a module, imports included."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        found[name.id] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = node
    return found


def cut(file, *names):
    """Return (imports, code) of a module that holds these names and all that they need.

    A function that the file imports from another file of the root is cut from there.
    """
    source = (ROOT / file).read_text()
    known = definitions(ast.parse(source))
    wanted = list(names)
    taken = {}
    elsewhere = {}  # {file: names to cut from it}
    while wanted:
        name = wanted.pop()
        if name in taken or name not in known:
            continue
        node = known[name]
        if isinstance(node, ast.ImportFrom) and (ROOT / f"{node.module}.py").is_file():
            elsewhere.setdefault(f"{node.module}.py", set()).add(name)
            continue
        taken[name] = node
        wanted += globals_of(ast.unparse(node))

    statements = {id(node): node for node in taken.values()}.values()
    statements = sorted(statements, key=lambda node: node.lineno)
    imports = []
    body = []
    for other, needed in elsewhere.items():
        more_imports, more_code = cut(other, *needed)
        imports += more_imports
        body.append(more_code)
    for node in statements:
        text = ast.get_source_segment(source, node)
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports.append(ast.unparse(node))
        else:
            decorators = [f"@{ast.unparse(d)}" for d in getattr(node, "decorator_list", [])]
            body.append("\n".join([*decorators, text]))
    imports = list(dict.fromkeys(imports))
    return imports, "\n\n\n".join(["\n".join(imports), *body])


# file, names, and a check that runs in the module they were cut into
PIECES = {
    "last-token pooling": (
        "model.py",
        ["last_token_pool"],
        """
hidden = torch.arange(12.0).view(2, 3, 2)
mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
assert last_token_pool(hidden, mask).tolist() == [[2, 3], [10, 11]]
""",
    ),
    "M-RoPE": (
        "model.py",
        ["mrope_positions"],
        """
types = torch.tensor([[0, 2, 2, 2, 2, 0]])  # text, two temporal grids of 1 x 2 tokens, text
grid = torch.tensor([[2, 2, 4]])
time, y, x = mrope_positions(types, torch.ones_like(types), None, grid, torch.tensor([1.5]))
assert time.tolist() == [[0, 1, 1, 4, 4, 5]] and x.tolist() == [[0, 1, 2, 1, 2, 5]]
""",
    ),
    "the schedule": (
        "train.py",
        ["draw_epoch", "source_quotas", "sigma"],
        """
quotas = source_quotas([4, 4], [2, 2])
numbers, share = draw_epoch(
    "pyramid", [0.3, 0.7], sigma(0, 3), [4, 4], [1, 2], quotas=quotas, seed=42, steps=range(1)
)
assert abs(share[1] - 1 / (1 + np.exp(-4))) < 1e-12 and len(numbers) == 1
numbers, _ = draw_epoch("pyramid", [0.3, 0.7], 0.1, [4, 4], [1, 2], quotas=quotas, seed=42)
assert sorted(numbers) == [0, 0, 1, 1]
""",
    ),
    "the sampler": (
        "train.py",
        ["Sampler"],
        """
class Rows:
    samples, batch_size = 4, 2
    def __len__(self):
        return 4

sampler = Sampler([Rows(), Rows()])
assert sorted([*sampler.draw(0), *sampler.draw(0)]) == [0, 1, 2, 3]
""",
    ),
    "the plain loss": (
        "train.py",
        ["contrastive_loss"],
        """
q = torch.eye(2)
ids = torch.arange(2)
none = torch.zeros(0, dtype=torch.int64)
loss = contrastive_loss(q, q, q[:0], ids, none, tau=1.0)
assert abs(float(loss) - float(torch.tensor(1 + 2.718281828459045**-1).log())) < 1e-6
""",
    ),
    "GradCache": (
        "train.py",
        ["GradCache"],
        """
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
batches = [torch.randn(4, 3), torch.randn(1, 3)]
torch.manual_seed(1)
(torch.cat([net(b) for b in batches]) ** 3).sum().backward()
expected = net[0].weight.grad.clone()
net.zero_grad()
torch.manual_seed(1)
cache = GradCache(net, torch.zeros(0, 2))
(cache.forward(batches) ** 3).sum().backward()
cache.backward()
assert torch.allclose(net[0].weight.grad, expected) and expected.abs().max() > 0
""",
    ),
    "probing": (
        "train.py",
        ["probe"],
        """
import torch
mean, error = probe(torch.eye(2), torch.tensor([[1.0, 0.0], [0.8, 0.6]]))
assert abs(mean - 0.8) < 1e-6 and abs(error - 0.2) < 1e-6
""",
    ),
    "mining": (
        "train.py",
        ["mine"],
        """
q = torch.eye(3)
p = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.9, 0.2], [0.8, 0.1, 0.7]])
found = mine(q, p, torch.tensor([5, 7, 9]), k=2, margin=0.1)
assert found.tolist() == [[1, -1], [0, 2], [1, 0]]  # row 2 scores .2 above row 0's own positive
""",
    ),
    "top-k": (
        "embed.py",
        ["top_k"],
        """
scores, rows = top_k(torch.eye(2), torch.tensor([[1.0, 0], [0, 2], [1, 0]]), 2)
assert rows.tolist() == [[0, 2], [1, 0]] and scores.tolist() == [[1, 1], [2, 0]]
""",
    ),
    "ranks and metrics": (
        "eval.py",
        ["ranks", "metrics"],
        """
queries = torch.eye(2)
corpus = torch.tensor([[0.9, 0.1], [1.0, 0.0], [0.0, 1.0]])
found = ranks(queries, corpus, [[0], [2]])
assert found == [[2], [1]]
assert metrics(found)["R@1"] == 0.5 and metrics(found)["MRR"] == 0.75
""",
    ),
    "chance and ceiling": (
        "eval.py",
        ["chance", "ceiling"],
        """
assert chance("R@1", [1, 2], [10, 20]) == (1 / 10 + 1 / 20) / 2
assert ceiling("R@1", [1, 2]) == 0.75
""",
    ),
    "the abilities": (
        "uvrb.py",
        ["abilities"],
        """
scores = dict.fromkeys(DATASETS, 0.5)
assert abilities(scores)["AVG-D"] == 0.5
assert abilities({**scores, "CMRB": None})["T"] is None
""",
    ),
    "micro-batches": (
        "data.py",
        ["micro_batches"],
        """
assert micro_batches([5, 1, 5, 1], 2) == [[1, 3], [0, 2]]
assert micro_batches([5, 1, 5], 9, 5) == [[1], [0], [2]]
""",
    ),
}


@pytest.mark.parametrize("piece", PIECES)
def test_a_piece_runs_alone(piece):
    file, names, check = PIECES[piece]
    imports, code = cut(file, *names)
    ours = {path.stem for path in ROOT.glob("*.py")} | {"support", "kernels", "extras", "mini"}
    modules = {line.split()[1].split(".")[0] for line in imports}
    assert not modules & ours, f"{piece} needs {modules & ours}"
    assert len(imports) <= MOST_IMPORTS, imports
    exec(compile(code + check, file, "exec"), {"__name__": "copied"})


def test_the_kernel_works_as_one_copied_file(tmp_path, monkeypatch):
    (tmp_path / "copied_infonce.py").write_text((ROOT / "kernels" / "infonce.py").read_text())
    monkeypatch.syspath_prepend(tmp_path)
    import copied_infonce
    import torch

    assert copied_infonce.__file__.startswith(str(tmp_path))
    q = torch.nn.functional.normalize(torch.randn(5, 8), dim=1)
    ours = copied_infonce.info_nce(q, q, 10.0)
    plain = torch.nn.functional.cross_entropy(10 * q @ q.T, torch.arange(5))
    assert abs(float(ours - plain)) < 1e-5
    del sys.modules["copied_infonce"]
