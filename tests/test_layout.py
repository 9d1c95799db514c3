"""The rules of the house (CONTRIBUTING.md, "The rules"), read off the source with `ast`.

Every rule is a function from a file's text to a list of problems, so that
a bad snippet can show that it still bites.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A file imports only from lower floors; `ops`, `models` and `demo` are folders whose files share their floor.
FLOORS = {
    "errors": 0, "files": 1,
    "ops": 2, "sources": 2, "image_config": 2, "console": 2, "chat_template": 2, "sentencepiece": 2, "text_stream": 2,
    "open_image": 3, "open_film": 3, "images": 3, "text": 3, "layers": 3, "positions": 3, "cache": 3, "inputs": 3,
    "sampling": 3,
    "videos": 4, "decoder": 4, "vit": 4, "fuse": 4, "conversation": 4,
    "processor": 5,
    "models": 6,
    "hub": 7, "weights": 7, "generate": 7,
    "vlm": 8,
    "__init__": 9,
    "train": 10, "chat": 10, "batch": 10, "preview": 10,
    "demo": 11,
    "run": 12,
}  # fmt: skip

# In the order of their papers: a model may use functions of an earlier one.
MODELS = (
    "llava", "video_llava", "llava_next", "llava_original", "video_llava_original", "llava_onevision",
    "llava_onevision_original", "qwen2_vl_patches", "qwen2_vl", "mllama",
)  # fmt: skip

MODULES = {*FLOORS, *MODELS}

# Tests of the house rather than of one file, and what each is a test of.
HOUSE_TESTS = {
    "test_bench": "bench/", "test_families": "models/", "test_layout": "README.md", "test_published": "published/",
}  # fmt: skip

LINES, MODEL_LINES = 450, 600
SOURCES = sorted((ROOT / "minivlm").rglob("*.py"))
CODE = {".py", ".cpp", ".cu", ".cuh", ".h"}


# --- reading imports --------------------------------------------------------------------------------------------------


def parts_of(path):
    """`minivlm/models/llava.py` → ("models", "llava"); `minivlm/ops/__init__.py` → ("ops",)."""
    parts = Path(path).with_suffix("").parts[1:]
    return parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts


def imports_of(text, path):
    """[(parts of the imported minivlm module, imported names or None)], wherever they stand: in functions and under
    TYPE_CHECKING, too. `("llava",)`-style names that are no module are attributes of the package, `("__init__",)`."""
    here = parts_of(path)
    package = here if Path(path).name == "__init__.py" else here[:-1]
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(tuple(a.name.split(".")[1:]), None) for a in node.names if a.name.split(".")[0] == "minivlm"]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                target = package[: len(package) - node.level + 1] + tuple((node.module or "").split("."))
            elif (node.module or "").split(".")[0] == "minivlm":
                target = tuple(node.module.split(".")[1:])
            else:
                continue
            target = tuple(part for part in target if part)
            names = [a.name for a in node.names]
            if target in ((), ("models",), ("ops",), ("demo",)):  # from a package: each name may be a module of it
                modules = [n for n in names if (ROOT / "minivlm" / Path(*target, n + ".py")).is_file() or n in MODULES]
                found += [((*target, n), None) for n in modules]
                names = [n for n in names if n not in modules]
            if names:
                found.append((target, names))
    return [(target or ("__init__",), names) for target, names in found]


# --- the rules --------------------------------------------------------------------------------------------------------


def upward_imports(text, path):
    here = parts_of(path)
    problems = []
    for target, _ in imports_of(text, path):
        for room in (here[0], target[0]):
            if room not in FLOORS:
                problems.append(f"{path}: minivlm/{room} stands on no floor; give it one in FLOORS")
                return problems
        if target[0] != here[0] and FLOORS[target[0]] >= FLOORS[here[0]]:
            problems.append(
                f"{path} (floor {FLOORS[here[0]]}) imports {'.'.join(target)} (floor {FLOORS[target[0]]}): move what "
                "both need to a lower floor"
            )
    return problems


def model_imports(text, path):
    """A model takes functions, constants and dataclasses of numbers from earlier papers. A class with behaviour, to be
    subclassed, is what makes a family of models unreadable."""
    here = parts_of(path)
    if here[0] != "models":
        return []
    problems = []
    for target, names in imports_of(text, path):
        if target[0] != "models" or target == here:
            continue
        if len(here) == 1:
            problems.append(f"{path}: holds one literal dict and imports no model")
        elif len(target) == 1:
            problems.append(f"{path}: a model does not need the table of models")
        elif MODELS.index(target[1]) >= MODELS.index(here[1]):
            problems.append(f"{path}: {target[1]} is not an earlier paper than {here[1]}")
        else:
            names = attributes_of(target[1], text) if names is None else names
            behaving = behaving_classes((ROOT / "minivlm/models" / f"{target[1]}.py").read_text(encoding="utf-8"))
            problems += [f"{path}: takes the class {n} from {target[1]}" for n in names if n in behaving]
    return problems


def attributes_of(module, text):
    """x of every `module.x` in the text."""
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)]
    return {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == module}


def behaving_classes(text):
    classes = [node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]
    return {node.name for node in classes if not any("dataclass" in ast.unparse(d) for d in node.decorator_list)}


def import_cycles(files):
    """`files` {parts: text} → the modules that (directly or not) import themselves."""
    edges = {here: set() for here in files}
    for here, text in files.items():
        is_package = here in {other[:-1] for other in files if len(other) > 1}
        path = Path("minivlm", *here, "__init__.py") if is_package else Path("minivlm", *here).with_suffix(".py")
        edges[here] = {target for target, _ in imports_of(text, path) if target in files and target != here}
    reach = {here: set(targets) for here, targets in edges.items()}
    for via in files:
        for targets in reach.values():
            if via in targets:
                targets |= reach[via]
    return sorted(".".join(here) for here in files if here in reach[here])


def foreign_imports(text, path):
    """transformers is the oracle of the tests. In the package it would be an answer copied from the neighbour."""
    problems = []
    for node in ast.walk(ast.parse(text)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        problems += [
            f"{path}:{node.lineno}: imports {name}" for name in names
            if name.split(".")[0] in ("transformers", "torchvision")
        ]  # fmt: skip
    return problems


def kwargs_soup(text, path):
    """`**name` in a signature may only be handed on whole, to one call, and says by its name what it carries. An
    override that hands torch's own **kwargs to super() may call them that."""
    problems = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or not node.args.kwarg:
            continue
        name = node.args.kwarg.arg
        inside = list(ast.walk(node))
        uses = sum(isinstance(n, ast.Name) and n.id == name for n in inside)
        receivers = [
            n.func for n in inside if isinstance(n, ast.Call)
            for k in n.keywords if k.arg is None and isinstance(k.value, ast.Name) and k.value.id == name
        ]  # fmt: skip
        to_super = len(receivers) == 1 and ast.unparse(receivers[0]).startswith("super().")
        if uses != 1 or len(receivers) != 1 or (name in ("kwargs", "kw") and not to_super):
            problems.append(f"{path}:{node.lineno}: **{name} is not handed on whole to one call; name the arguments")
    return problems


def swallowed_errors(text, path):
    problems = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ExceptHandler):
            continue
        broad = isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException")
        if node.type is None or (broad and all(isinstance(n, (ast.Pass, ast.Continue)) for n in node.body)):
            problems.append(f"{path}:{node.lineno}: swallows every error; name the one that is expected")
    return problems


def silent_defaults(text, path):
    return [
        f"{path}:{node.lineno}: getattr with a default hides a misspelt name"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"
        and len(node.args) + len(node.keywords) > 2
    ]  # fmt: skip


def too_long(text, path):
    limit = MODEL_LINES if Path(path).match("minivlm/models/*.py") else LINES
    lines = text.count("\n") + 1
    return [f"{path}: {lines} lines, the limit is {limit}"] if lines > limit else []


def homeless_test(path, sources):
    """tests/test_X.py and tests/test_X_more.py belong to a source file X; ops/rope.py is called ops_rope."""
    stem = Path(path).stem
    homes = {"_".join(p for p in parts_of(s) if p not in ("models", "__init__")) for s in sources} - {""}
    if stem in HOUSE_TESTS or any(stem == f"test_{home}" or stem.startswith(f"test_{home}_") for home in homes):
        return []
    return [f"{path}: no source file is called that"]


FILE_RULES = [
    upward_imports, model_imports, foreign_imports, kwargs_soup, swallowed_errors, silent_defaults, too_long,
]  # fmt: skip


@pytest.mark.parametrize("rule", FILE_RULES, ids=lambda rule: rule.__name__)
def test_sources_keep_the_rule(rule):
    assert [p for s in SOURCES for p in rule(s.read_text(encoding="utf-8"), s.relative_to(ROOT))] == []


def test_imports_have_no_cycles():
    assert import_cycles({parts_of(s.relative_to(ROOT)): s.read_text(encoding="utf-8") for s in SOURCES}) == []


def test_tests_and_kernels_keep_the_line_limit():
    others = [p for folder in ("tests", "csrc", "bench") for p in (ROOT / folder).rglob("*") if p.suffix in CODE]
    assert [problem for p in others for problem in too_long(p.read_text(encoding="utf-8"), p.relative_to(ROOT))] == []


def test_every_test_file_belongs_to_a_source_file():
    sources = [s.relative_to(ROOT) for s in SOURCES]
    tests = sorted((ROOT / "tests").glob("test_*.py"))
    assert [problem for t in tests for problem in homeless_test(t.relative_to(ROOT), sources)] == []


BAD = [
    (upward_imports, "minivlm/decoder.py", "from minivlm.vlm import load"),
    (upward_imports, "minivlm/decoder.py", "def f():\n    from .vlm import load"),
    (upward_imports, "minivlm/vit.py", "from minivlm import decoder"),
    (upward_imports, "minivlm/text.py", "if TYPE_CHECKING:\n    import minivlm.models.llava"),
    (upward_imports, "minivlm/vlm.py", "from minivlm import load"),
    (upward_imports, "minivlm/attic.py", "from minivlm.errors import MinivlmError"),
    (model_imports, "minivlm/models/llava.py", "from minivlm.models.llava_next import num_image_tokens"),
    (model_imports, "minivlm/models/llava_next.py", "from minivlm.models.llava import Model"),
    (model_imports, "minivlm/models/llava_next.py", "from .llava import Model"),
    (model_imports, "minivlm/models/llava_next.py", "from minivlm.models import llava\nclass M(llava.Model): ..."),
    (model_imports, "minivlm/models/__init__.py", "from minivlm.models import llava"),
    (foreign_imports, "minivlm/vlm.py", "import transformers.models"),
    (foreign_imports, "minivlm/vlm.py", "def f():\n    from transformers import AutoModel"),
    (kwargs_soup, "minivlm/vlm.py", "def f(**kwargs):\n    g(**kwargs)"),
    (kwargs_soup, "minivlm/vlm.py", "def f(**sampling):\n    return sampling['seed']"),
    (kwargs_soup, "minivlm/vlm.py", "def f(**sampling):\n    g(**sampling)\n    h(**sampling)"),
    (kwargs_soup, "minivlm/vlm.py", "def f(**unused): ..."),
    (swallowed_errors, "minivlm/vlm.py", "try:\n    f()\nexcept:\n    raise"),
    (swallowed_errors, "minivlm/vlm.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (silent_defaults, "minivlm/vlm.py", "getattr(config, 'width', 4096)"),
    (too_long, "minivlm/vlm.py", "\n" * LINES),
    (too_long, "minivlm/models/llava.py", "\n" * MODEL_LINES),
]  # fmt: skip

GOOD = [
    (upward_imports, "minivlm/vlm.py", "from minivlm import ops\nfrom .models import llava"),
    (upward_imports, "minivlm/ops/rope.py", "from minivlm.ops import loader\nfrom . import rms_norm"),
    (model_imports, "minivlm/models/llava.py", "from minivlm.decoder import Decoder"),
    (model_imports, "minivlm/models/llava_next.py", "from .llava import LlavaConfig, make_projector"),
    (model_imports, "minivlm/models/llava_next.py", "from minivlm.models import llava\nKEYS = {**llava.KEYS}"),
    (foreign_imports, "minivlm/vlm.py", "import torch\nfrom . import text"),
    (kwargs_soup, "minivlm/vlm.py", "def chat(self, text, **sampling):\n    return self.generate(text, **sampling)"),
    (kwargs_soup, "minivlm/vlm.py", "def to(self, *args, **kwargs):\n    return super().to(*args, **kwargs)"),
    (swallowed_errors, "minivlm/vlm.py", "try:\n    f()\nexcept ImportError:\n    pass"),
    (swallowed_errors, "minivlm/vlm.py", "try:\n    f()\nexcept Exception as error:\n    raise OSError from error"),
    (silent_defaults, "minivlm/vlm.py", "getattr(torch, name)"),
    (too_long, "minivlm/vlm.py", "\n" * (LINES - 1)),
    (too_long, "minivlm/models/llava.py", "\n" * LINES),
]  # fmt: skip


@pytest.mark.parametrize("rule, path, text", BAD)
def test_rule_bites(rule, path, text):
    assert rule(text, Path(path)) != []


@pytest.mark.parametrize("rule, path, text", GOOD)
def test_rule_lets_good_code_pass(rule, path, text):
    assert rule(text, Path(path)) == []


def test_cycle_rule_bites():
    chain = {("text",): "from minivlm.cache import x", ("cache",): "def f():\n    from .fuse import y", ("fuse",): ""}
    assert import_cycles(chain) == []
    assert import_cycles(chain | {("fuse",): "import minivlm.text"}) == ["cache", "fuse", "text"]
    inside = {("ops",): "from minivlm.ops import rope", ("ops", "rope"): "from minivlm.ops import use"}
    assert import_cycles(inside) == ["ops", "ops.rope"]


def test_homeless_test_rule_bites():
    sources = ["minivlm/ops/rope.py", "minivlm/models/llava.py", "minivlm/text.py"]
    homes = ["test_ops_rope", "test_llava", "test_llava_many_pictures", "test_text", "test_layout"]
    assert [p for name in homes for p in homeless_test(f"tests/{name}.py", sources)] == []
    assert all(homeless_test(f"tests/{name}.py", sources) for name in ("test_rope", "test_misc", "test_textual"))


# --- the README's tree ------------------------------------------------------------------------------------------------


def readme_tree(readme):
    """{path: description} of the first ```text block under "## What is where"; folders end in "/"."""
    block = re.search(r"^## What is where\n.*?^```text\n(.*?)^```", readme, re.S | re.M)
    assert block, 'README.md has no ```text block under "## What is where"'
    found, folders = {}, []
    for line in block[1].splitlines():
        if not line.strip():
            continue
        indent, name, description = re.fullmatch(r"( *)(\S+) *(.*)", line).groups()
        folders = folders[: len(indent) // 2]
        found["".join(folders) + name] = description
        if name.endswith("/"):
            folders.append(name)
    return found


def tree_problems(tree, disk):
    """`disk`: the paths of all source files. A folder listed with nothing under it stands for all it holds."""
    closed = tuple(p for p in tree if p.endswith("/") and not any(q != p and q.startswith(p) for q in tree))
    missing = [f"{p} is not in the README's tree" for p in disk if p not in tree and not p.startswith(closed)]
    gone = [
        f"{p} is in the README's tree and not on disk" for p in tree if not any(d == p or d.startswith(p) for d in disk)
    ]
    bare = [f"{p} has no description in the README's tree" for p in tree if not tree[p] and p in closed + tuple(disk)]
    return missing + gone + bare


def files_on_disk():
    top = [p for p in ROOT.iterdir() if p.is_file() and p.suffix in {".py", ".md", ".toml", ".txt"} | {""}]
    rooms = [
        p
        for room in ("minivlm", "csrc", "tests", "bench", "tutorials")
        for p in (ROOT / room).rglob("*")
        if p.suffix in CODE | {".ipynb"} or p.name == "Makefile"
    ]
    names = {p.relative_to(ROOT).as_posix() for p in top + rooms} - {".gitignore", ".coverage"}
    return sorted(n for n in names if "/build/" not in n and "/.ipynb_checkpoints/" not in n) + [".ci/run"]


def test_readme_tree_equals_the_disk():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tree_problems(readme_tree(readme), files_on_disk()) == []


def test_tree_rule_bites():
    readme = "# x\n\n## What is where\n\n```text\na.py   does a\nb/\n  c.py   does c\ntests/ all tests\n```\n"
    tree = readme_tree(readme)
    assert tree == {"a.py": "does a", "b/": "", "b/c.py": "does c", "tests/": "all tests"}
    assert tree_problems(tree, ["a.py", "b/c.py", "tests/t.py"]) == []
    assert len(tree_problems(tree, ["a.py", "b/c.py", "b/d.py", "tests/t.py"])) == 1
    assert len(tree_problems(tree, ["a.py", "tests/t.py"])) == 2  # b/ and b/c.py are gone
    assert len(tree_problems(tree | {"a.py": ""}, ["a.py", "b/c.py", "tests/t.py"])) == 1


# --- what an import costs ---------------------------------------------------------------------------------------------

HEAVY = {
    "torch", "numpy", "PIL", "av", "tokenizers", "safetensors", "huggingface_hub", "jinja2", "tqdm", "transformers",
}  # fmt: skip


def modules_after(statement):
    """Top-level names in sys.modules after `statement` in a fresh interpreter, `minivlm` with its files' names."""
    script = f"import sys\n{statement}\nprint(*(n for n in sys.modules if n.startswith('minivlm') or '.' not in n))"
    return set(subprocess.run([sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True, check=True)
               .stdout.split())  # fmt: skip


@pytest.mark.parametrize("module", ["minivlm", "minivlm.run"])
def test_startup_imports_nothing_heavy(module):
    assert modules_after(f"import {module}") & HEAVY == set()


def test_ops_need_torch_alone():
    loaded = modules_after("import minivlm.ops")
    assert "torch" in loaded
    assert (loaded - modules_after("import torch")) & HEAVY == set()  # torch itself takes numpy and tqdm where they are
    ours = {name.split(".")[1] for name in loaded if name.startswith("minivlm.")}
    assert ours <= {"ops", "errors"}


def test_import_check_bites():
    assert "PIL" in modules_after("import PIL") & HEAVY
