"""The house: imports run downward, clients -> engine -> model, losses -> backend -> the op folders."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from minitinker import kernels, reference

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "minitinker").rglob("*.py"))
REFERENCE, KERNELS = (sorted((ROOT / folder).glob("*.py")) for folder in ("reference", "kernels"))
OP_FOLDERS = {"reference", "kernels"}
DYNAMIC = {"import_module", "__import__"}

# A file may import what stands above it in this list, and its neighbours.
FLOORS = [
    {"errors", "hosted", "conform", "sparse", "tensors", "types", "futures", "twins", "left_out"},  # leaves
    {"backend"},
    {"model", "losses"},
    {"engine"},
    {"training_run", "samplers", "sampling_checks", "loss_handles", "listing"},  # parts of the clients
    {"service_client", "training_client", "sampling_client", "rest_client", "merging", "drop_in"},
    {"__init__"},
    {"run", "tiny", "examples"},  # users of the library
]


def name_of(path: Path) -> str:
    """minitinker/model/config.py -> "minitinker.model.config", a package's __init__.py -> the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int:
    part = [*module.split("."), "__init__"][1]
    floors = [i for i, parts in enumerate(FLOORS) if part in parts]
    assert floors, f"{module} has no floor yet; give it one in FLOORS"
    return floors[0]


def nodes(path: Path, at_import: bool) -> Iterator[ast.AST]:
    """The nodes of a file; `at_import`: without what only a type checker sees or what runs later."""
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        yield node
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checked = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not (at_import and (later or checked)):
            waiting.extend(ast.iter_child_nodes(node))


def imports(path: Path, at_import: bool = False) -> set[str]:
    """The absolute names of the modules that a file imports, each as deep as it can be said."""
    package = name_of(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    known = {name_of(file) for file in [*LIBRARY, *REFERENCE, *KERNELS]}
    found = set()
    for node in nodes(path, at_import):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in known else base for name in names}
    return found


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "minitinker"}


by_name = pytest.mark.parametrize("path", LIBRARY, ids=name_of)


@by_name
def test_imports_run_downward(path):
    here = name_of(path)
    upward = {name for name in own(imports(path)) if floor_of(name) > floor_of(here)}
    assert not upward


def test_files_import_each_other_in_no_circle():
    graph = {name_of(path): own(imports(path, at_import=True)) for path in LIBRARY}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@by_name
def test_only_the_backend_names_the_op_folders(path):
    parts = {part for name in imports(path) for part in name.split(".")}
    assert not parts & OP_FOLDERS
    for node in nodes(path, at_import=False):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in DYNAMIC:
            (name,) = node.args
            if isinstance(name, ast.Constant):
                assert not OP_FOLDERS & set(name.value.split("."))
            else:
                assert name_of(path) == "minitinker.backend"


@pytest.mark.parametrize("path", REFERENCE, ids=name_of)
def test_the_reference_imports_numpy_the_standard_library_and_itself(path):
    allowed = {"numpy", "threadpoolctl", "reference", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", KERNELS, ids=name_of)
def test_the_kernels_import_torch_triton_numpy_the_standard_library_and_themselves(path):
    allowed = {"numpy", "torch", "triton", "kernels", *sys.stdlib_module_names}
    assert {name.split(".")[0] for name in imports(path)} <= allowed


def test_the_op_folders_hold_the_same_files_but_for_what_blas_has_to_be_asked():
    assert [path.name for path in REFERENCE if path.name != "products.py"] == [path.name for path in KERNELS]


def test_the_op_folders_have_the_same_functions_with_the_same_parameters():
    assert reference.__all__ == kernels.__all__
    for name in reference.__all__:
        ours, theirs = getattr(reference, name), getattr(kernels, name)
        if not inspect.isfunction(ours):
            continue
        assert ours.__module__.rpartition(".")[2] == theirs.__module__.rpartition(".")[2], name
        parameters = [
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (ours, theirs)
        ]
        assert parameters[0] == parameters[1], name
        assert theirs.__doc__, name


@by_name
def test_torch_and_what_is_slow_to_load_are_imported_where_they_are_used(path):
    late = {"torch", "triton", "transformers", "peft", "jinja2", "huggingface_hub", "matplotlib"}
    at_import = {name.split(".")[0] for name in imports(path, at_import=True)}
    if name_of(path) == "minitinker.model.chat_template":  # itself imported where it is used
        late -= {"jinja2"}
    assert not at_import & late


def test_importing_the_library_does_not_import_torch():
    script = "import sys, minitinker; print({'torch', 'jinja2', 'huggingface_hub'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


def test_the_readme_names_every_file_and_none_that_is_not_there():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("## The files, in reading order")[1].split("```")[1]
    named = {word.strip(",:") for word in tree.split() if word.strip(",:").endswith(".py")}
    there = {path.name for path in [*LIBRARY, *REFERENCE] if path.name != "__init__.py"}
    assert named - {"test_<file>.py"} - {path.name for path in (ROOT / "tests").glob("*.py")} == there
