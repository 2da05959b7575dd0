"""The shape of the package in numbers; exit status 1 if one of them is over its limit.

python tests/house.py [another checkout's package folder]
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "moellava"
# Name to the highest value that is allowed.
LIMITS = {
    "share of lines over 100 characters, %": 0.3,
    "Any per 100 lines": 1.0,
    "functions over 60 lines": 0,
    "modules in import circles": 0,
}


def measure(package: Path = PACKAGE) -> dict[str, float]:
    """The four numbers of `LIMITS`; lines are non-blank lines of Python files."""
    texts = [path.read_text(encoding="utf-8") for path in python_files(package)]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    num_any = sum(len(re.findall(r"\bAny\b", line)) for line in lines)
    values = (
        100 * sum(len(line) > 100 for line in lines) / len(lines),
        100 * num_any / len(lines),
        sum(length > 60 for text in texts for length in function_lengths(text)),
        len(modules_in_circles(package)),
    )
    return dict(zip(LIMITS, values, strict=True))


def python_files(package: Path) -> list[Path]:
    """All modules of a package, in order."""
    return sorted(package.rglob("*.py"))


def function_lengths(text: str) -> Iterator[int]:
    """Lines of each function's body, without its docstring."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            has_docstring = ast.get_docstring(node) is not None
            body = node.body[1:] if has_docstring else node.body
            yield body[-1].end_lineno - body[0].lineno + 1 if body else 0


def modules_in_circles(package: Path) -> set[str]:
    """Modules that reach themselves by imports, lazy ones and those for types included."""
    imports = {name: set(imported) for name, imported in import_graph(package).items()}
    reached = {name: set(targets) for name, targets in imports.items()}
    changed = True
    while changed:
        changed = False
        for targets in reached.values():
            further = set().union(*(imports[target] for target in targets)) - targets
            changed = changed or bool(further)
            targets |= further
    return {name for name, targets in reached.items() if name in targets}


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module to the modules of the package that it names in an import statement.

    A package's `__init__` counts as the modules that it re-exports from, so it is left out.
    """
    names = {module_name(path, package): path for path in python_files(package)}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        if path.name == "__init__.py":
            continue
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = {item for item in found if item in names}
    return {name: {item for item in found if item in graph} for name, found in graph.items()}


def module_name(path: Path, package: Path) -> str:
    """`a/b/__init__.py` and `a/b.py` → `a.b`, from the package's own folder on."""
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def main() -> None:
    """Print the numbers and the size of each folder."""
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    values = measure(package)
    print("| number | found | limit |\n|---|---|---|")
    for name, value in values.items():
        print(f"| {name} | {value:.2f} | {LIMITS[name]} |".replace(".00 |", " |"))
    print("\n| folder | modules | lines |\n|---|---|---|")
    for folder in sorted({path.parent for path in python_files(package)}):
        texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]
        num_lines = sum(len(text.splitlines()) for text in texts)
        print(f"| {folder.relative_to(package.parent)} | {len(texts)} | {num_lines:,} |")
    if over := [name for name, value in values.items() if value > LIMITS[name]]:
        sys.exit(f"over the limit: {', '.join(over)}")


if __name__ == "__main__":
    main()
