"""The house stands: rooms import only rooms above them, in no circle, and frameworks stay in their rooms.

Every file under src/burnish is parsed, not imported. Each check is shown to catch what it is for, on small
made-up trees.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "burnish"

# docs/DESIGN.md, the house: a room imports only rooms with a smaller number, and its own.
RANKS = {
    room: rank
    for rank, room in enumerate((
        "errors", "recipe", "machine", "models", "planning", "data", "backends", "runs", "inference",
        "evaluation", "training", "export", "report", "serving", "cli",
    ))
}  # fmt: skip

# Where a library may be imported: the prefixes of the modules, as dotted paths below `burnish`.
ROOMS_OF = {
    "torch": ("backends.torch",),
    "peft": ("backends.torch",),
    "bitsandbytes": ("backends.torch",),
    "accelerate": ("backends.torch",),
    "transformers": ("backends.torch", "models"),  # models: the tokenizer only
    "tokenizers": ("models",),
    "jinja2": ("models",),
    "mlx": ("backends.mlx",),
    "mlx_lm": ("backends.mlx",),
    "psutil": ("machine",),
    "pydantic": ("recipe",),
    "yaml": ("recipe",),
    "huggingface_hub": ("models",),
    "gguf": ("models", "export"),
    "llama_cpp": ("export",),
    "safetensors": ("models", "backends", "runs", "export"),
    "numpy": ("models", "data", "backends", "runs", "inference", "evaluation", "training", "export"),
    "pyarrow": ("data",),
    "modelscope": ("data",),
    "datasets": ("data",),
    "tensorboard": ("training.trackers",),
    "wandb": ("training.trackers",),
    "swanlab": ("training.trackers",),
    "mlflow": ("training.trackers",),
    "trackio": ("training.trackers",),
    "starlette": ("serving",),
    "uvicorn": ("serving",),
    "typer": ("cli",),
    "rich": ("cli",),
}
# A tracker's writer may be torch's own (tensorboard without tensorflow).
ALLOWED = {("training.trackers", "torch.utils.tensorboard")}


@dataclass(frozen=True)
class Import:
    importer: str  # dotted, below burnish: 'data.rows', 'data' for data/__init__.py
    imported: str  # dotted, in full: 'burnish.errors', 'numpy.linalg'
    line: int
    eager: bool  # runs when the importer is imported

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules(root: Path) -> dict[str, Path]:
    """Dotted name below the package → file."""
    found: dict[str, Path] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> list[Import]:
    known = modules(root)
    return [found for name, path in known.items() for found in _imports_of(name, path, known)]


def _imports_of(name: str, path: Path, known: dict[str, Path]) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node, eager in _walk(tree, True):
        if isinstance(node, ast.Import):
            yield from (Import(name, alias.name, node.lineno, eager) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute in this house"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                is_module = whole.removeprefix("burnish.") in known
                yield Import(name, whole if is_module else str(node.module), node.lineno, eager)


def _walk(node: ast.AST, eager: bool) -> Iterator[tuple[ast.stmt, bool]]:
    """Every import statement; not eager inside a function, nor under `if TYPE_CHECKING`, which never runs."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, eager
        lazy = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        lazy = lazy or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
        yield from _walk(child, eager and not lazy)


def upward(found: list[Import]) -> list[str]:
    """Imports of a room that stands lower in the list, and of rooms that are not in it."""
    wrong = []
    for i in found:
        if i.importer == "" or not i.imported.startswith("burnish."):
            continue
        own, other = i.importer.partition(".")[0], i.imported.split(".")[1]
        if own not in RANKS or other not in {*RANKS, "__version__"}:
            wrong.append(f"{i}: not a room of the design")
        elif other != own and RANKS[other] > RANKS[own]:
            wrong.append(f"{i}: upward")
    return wrong


def cycles(found: list[Import]) -> list[str]:
    """Circles among the modules, deferred imports included: they only hide one."""
    edges: dict[str, set[str]] = {}
    for i in found:
        if i.imported.startswith("burnish.") and i.importer != "":
            edges.setdefault(i.importer, set()).add(i.imported.removeprefix("burnish."))
    circles: list[str] = []
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            circles.append(" → ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for other in sorted(edges.get(name, ())):
                visit(other, [*trail, name])
            done.add(name)

    for name in sorted(edges):
        visit(name, [])
    return circles


def misplaced(found: list[Import]) -> list[str]:
    """Libraries outside their rooms, and libraries that the design does not know."""
    wrong = []
    for i in found:
        library = i.imported.partition(".")[0]
        if library == "burnish" or library in sys.stdlib_module_names or (i.importer, i.imported) in ALLOWED:
            continue
        rooms = ROOMS_OF.get(library)
        if rooms is None:
            wrong.append(f"{i}: {library} has no room")
        elif not any(i.importer == room or i.importer.startswith(f"{room}.") for room in rooms):
            wrong.append(f"{i}: {library} belongs in {' or '.join(rooms)}")
    return wrong


REAL = imports(SRC)


def test_no_upward_import():
    assert upward(REAL) == []


def test_no_cycle():
    assert cycles(REAL) == []


def test_frameworks_stay_in_their_rooms():
    assert misplaced(REAL) == []


def test_transformers_is_only_the_tokenizer_outside_the_backend():
    outside = {
        i.importer
        for i in REAL
        if i.imported.partition(".")[0] == "transformers" and not i.importer.startswith("backends.torch")
    }
    assert outside <= {"models.tokenizer"}


def test_the_package_itself_imports_nothing():
    assert [str(i) for i in REAL if i.importer == ""] == []


# ---- controls: what each check is for, it catches


def tree(root: Path, files: dict[str, str]) -> list[Import]:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return imports(root)


GOOD = {
    "__init__.py": "__version__ = '0'",
    "errors.py": "",
    "data/__init__.py": "",
    "data/rows.py": "import json\nimport numpy as np\nfrom burnish.errors import UserError\n"
    "from burnish import __version__",
    "data/formats.py": "from burnish.data import rows",
    "backends/__init__.py": "def open():\n    from burnish.backends.torch.load import open_torch",
    "backends/torch/__init__.py": "",
    "backends/torch/load.py": "import torch.nn\nfrom peft import LoraConfig",
    "cli/__init__.py": "from rich.console import Console\nfrom burnish.data.formats import read",
}


def test_a_good_tree_is_good(tmp_path: Path):
    found = tree(tmp_path, GOOD)
    assert len(found) == 10
    assert upward(found) == cycles(found) == misplaced(found) == []
    assert not next(i for i in found if i.importer == "backends").eager


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data/rows.py", "import burnish.cli"),
        ("data/rows.py", "from burnish import cli"),
        ("data/rows.py", "from burnish.cli.app import app"),
        ("data/rows.py", "def f():\n    if True:\n        from burnish.training import train"),
        ("errors.py", "from burnish.recipe import Recipe"),
        ("data/rows.py", "from burnish.helpers import x"),
        ("helpers.py", "from burnish.errors import UserError"),
    ],
)
def test_an_upward_import_is_caught(tmp_path: Path, name: str, text: str):
    assert len(upward(tree(tmp_path, {**GOOD, name: text}))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "from burnish.data import formats",
        "import burnish.data.formats",
        "def f():\n    from burnish.data.formats import read",
    ],
)
def test_a_cycle_is_caught(tmp_path: Path, text: str):
    assert cycles(tree(tmp_path, {**GOOD, "data/rows.py": text})) == [
        "data.formats → data.rows → data.formats"
    ]


def test_a_longer_cycle_is_caught(tmp_path: Path):
    more = {"data/rows.py": "from burnish.data.a import x", "data/a.py": "from burnish.data.formats import y"}
    assert cycles(tree(tmp_path, {**GOOD, **more})) == ["data.formats → data.rows → data.a → data.formats"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data/rows.py", "import torch"),
        ("data/rows.py", "def f():\n    from torch.nn import functional"),
        ("backends/base.py", "import mlx.core as mx"),
        ("backends/torch/load.py", "import mlx_lm"),
        ("data/rows.py", "from rich import print"),
        ("errors.py", "import numpy"),
        ("data/rows.py", "import tensorflow"),
        ("training/loop.py", "import wandb"),
    ],
)
def test_a_misplaced_framework_is_caught(tmp_path: Path, name: str, text: str):
    assert len(misplaced(tree(tmp_path, {**GOOD, name: text}))) == 1


def test_a_relative_import_is_caught(tmp_path: Path):
    with pytest.raises(AssertionError, match="imports are absolute"):
        tree(tmp_path, {**GOOD, "data/rows.py": "from . import formats"})


# ---- starting up

FRAMEWORKS = (
    "torch",
    "mlx",
    "transformers",
    "peft",
    "tokenizers",
    "bitsandbytes",
    "numpy",
    "pyarrow",
    "datasets",
)
REPORT = f"""
import sys
loaded = [m for m in {FRAMEWORKS!r} if m in sys.modules]
print("LOADED", loaded, file=sys.stderr)
"""


def loads(code: str) -> str:
    """What Python says it loaded after `code`, in a process of its own."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stderr.strip().splitlines()[-1]


def verbs() -> list[str]:
    """The command line's verbs, read from its source: functions under `@app.command`."""
    tree = ast.parse((SRC / "cli" / "app.py").read_text(encoding="utf-8"))
    return [
        node.name.replace("_", "-").strip("-")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and any("app.command" in ast.unparse(d) for d in node.decorator_list)
    ]


def test_import_burnish_loads_no_framework():
    assert loads("import burnish" + REPORT) == "LOADED []"


@pytest.mark.parametrize("verb", ["", *verbs()])
def test_help_loads_no_framework(verb: str):
    argv = ["burnish", *([verb] if verb else []), "--help"]
    code = (
        f"import sys\nsys.argv = {argv!r}\nfrom burnish.cli import main\n"
        "try:\n    main()\nexcept SystemExit as e:\n"
        f"    assert not e.code, e.code\n{REPORT}"
    )
    assert loads(code) == "LOADED []"


def test_the_report_would_see_a_framework():
    assert loads("import numpy" + REPORT) == "LOADED ['numpy']"


def test_help_is_quick():
    """`burnish --help` takes under 0.3 s of CPU time: the best of five, since the machine may be busy."""
    code = (
        "import sys, time\nsys.argv = ['burnish', '--help']\nfrom burnish.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\nprint('CPU', time.process_time(), file=sys.stderr)"
    )
    assert min(float(loads(code).split()[1]) for _ in range(5)) < 0.3
