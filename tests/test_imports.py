"""Imports point one way along the flow of data; what needs no torch does not import it."""

import ast
import subprocess
import sys
from importlib.metadata import version
from importlib.util import resolve_name
from pathlib import Path
from typing import get_type_hints

import pytest

import invdiff

ROOT = Path(invdiff.__file__).parent

ORDER = (
    *("errors", "options", "config", "text", "files", "seeds", "launched", "distributed", "progress", "assets"),
    *("models", "data", "guidance", "sampling", "auditing", "training", "evaluation", "report", "demo", "app", "cli"),
    "__main__",
)
"""Each part imports only those before it."""
FORBIDDEN = {"evaluation": {"auditing", "guidance", "training"}}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def imported_modules(path):
    """Dotted names that a file imports when it runs (not those for type checkers)."""
    package = ".".join(("invdiff", *path.relative_to(ROOT).parts[:-1]))
    pending, names = [ast.parse(path.read_text(encoding="utf-8"))], []
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending += node.orelse
        elif isinstance(node, ast.ImportFrom):
            source = resolve_name("." * node.level + (node.module or ""), package)
            names += [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        else:
            pending += ast.iter_child_nodes(node)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_back_along_the_flow_of_data(path):
    part = path.relative_to(ROOT).with_suffix("").parts[0]
    assert part in ORDER, f"{part} has no place in the order of parts: give it one in ORDER"
    others = {name.split(".")[1] for name in imported_modules(path) if name.startswith("invdiff.")} - {part}
    assert others <= set(ORDER[: ORDER.index(part)]) - FORBIDDEN.get(part, set())


def loaded_by(statement):
    """Top-level packages in memory after `statement` in a fresh interpreter."""
    code = f"{statement}\nimport sys; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_command_line_imports_nothing_heavy():
    heavy = {"torch", "diffusers", "transformers", "datasets", "gradio", "numpy", "scipy", "matplotlib"}
    assert not loaded_by("from invdiff import cli") & heavy


def test_writing_a_report_loads_neither_torch_nor_pyplot(finished, tmp_path):
    modules = ", ".join(f"invdiff.report.{path.stem}" for path in sorted((ROOT / "report").glob("[!_]*.py")))
    statement = f"""
import invdiff.report, {modules}
from invdiff.report.read import find_parts
from invdiff.report.write import save_report
save_report({str(tmp_path / "report")!r}, **vars(find_parts({str(finished)!r})))
import sys
assert "matplotlib.pyplot" not in sys.modules"""
    assert "torch" not in loaded_by(statement)


def test_every_public_name_is_there_and_no_other():
    for name in invdiff.__all__:
        assert getattr(invdiff, name) is not None
        assert name in dir(invdiff)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = invdiff.nonsense


def test_types_and_version_are_for_users_too():
    assert (ROOT / "py.typed").is_file()
    assert invdiff.__version__ == version("invdiff")
    assert get_type_hints(invdiff.load_guidance)["return"].__name__ == "Guidance"


def test_public_names_agree_with_those_for_type_checkers():
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert {alias.name: node.module for node in block.body for alias in node.names} == invdiff._HOME
