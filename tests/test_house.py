"""The house is as CONTRIBUTING.md draws it: every module has its room, and imports run one way."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import loralib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "loralib"
FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
    for file in PACKAGE.rglob("*.py")
    if file.name != "__init__.py"
}


def is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports_of(file: Path) -> set[str]:
    """The modules of loralib that a file imports, also within functions."""
    found, waiting = set(), [ast.parse(file.read_text(encoding="utf-8"))]
    package = file.parent.relative_to(PACKAGE).parts
    while waiting:
        node = waiting.pop()
        waiting += [child for child in ast.iter_child_nodes(node) if not is_for_type_checkers(child)]
        if isinstance(node, ast.ImportFrom) and node.level:
            start = package[: len(package) - node.level + 1]
            whole = ".".join((*start, *(node.module or "").split("."))).strip(".")
            names = [f"{whole}.{alias.name}".strip(".") for alias in node.names]
            found |= {name if name in FILES else whole for name in names}
    return found & FILES.keys()


IMPORTS = {name: imports_of(file) for name, file in FILES.items()}


def rows_of_the_map() -> list[set[str]]:
    """The modules in each row of CONTRIBUTING.md's table."""
    rows = []
    for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines():
        cell = line.split("|")[1] if line.startswith("| `") else ""
        names = re.findall(r"`([\w/]+)`", cell)
        folder = names.pop(0).replace("/", ".") if names and names[0].endswith("/") else ""
        if names:
            rows.append({folder + name for name in names})
    return rows


def test_every_module_has_one_room():
    named = [name for row in rows_of_the_map() for name in row]
    assert sorted(named) == sorted(FILES)


def test_imports_run_upwards_in_the_map():
    floor = {name: number for number, row in enumerate(rows_of_the_map()) for name in row}
    assert sum(map(len, IMPORTS.values())) > 50  # they are found at all
    wrong = [(name, other) for name, others in IMPORTS.items() for other in others if floor[other] > floor[name]]
    assert not wrong


def test_no_imports_in_a_circle():
    def reached(name, seen):
        for other in IMPORTS[name] - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    assert not [name for name in FILES if name in reached(name, set())]


def test_rooms_are_of_a_size_to_read():
    long = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in FILES.items()}
    assert not {name: n for name, n in long.items() if n > 350 and name != "layers"}
    for name, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                assert node.end_lineno - node.lineno < 250, f"{name}.{node.name}"


def test_the_lazy_names_are_those_that_type_checkers_see():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if is_for_type_checkers(node))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    assert typed == loralib._MODULE_OF
    assert sorted([*typed, "__version__"]) == sorted(loralib.__all__)
    assert all(getattr(loralib, name) is not None for name in loralib.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        loralib.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import loralib", {"torch", "numpy"}),
        ("import loralib.cli; loralib.cli._parser()", {"torch", "numpy", "rich"}),
        ("import loralib.report.writing, loralib.report.plots", {"torch", "transformers"}),
        ("import loralib.report.writing", {"matplotlib", "rich"}),
        ("import loralib.report.results, loralib.report.tables", {"torch", "numpy", "scipy", "rich", "matplotlib"}),
        ("import loralib.adapters.export", {"transformers", "scipy", "sklearn", "rich", "matplotlib", "peft"}),
        ("import loralib.schedule, loralib.all_ranks", {"transformers", "numpy.testing", "safetensors", "scipy"}),
    ],
)
def test_what_an_import_does_not_load(statement, absent):
    code = f"import sys; {statement}; print(*({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
