"""Rules of CONTRIBUTING.md that a machine can check, and facts of the README that follow from the code."""

import ast
import re
import statistics
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvarn.core.capacity import CacheShape
from kvarn.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kvarn", "tools", "tests", "benchmarks")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PACKAGE = [path for path in FILES if path.is_relative_to(ROOT / "kvarn")]
ENGINES = {"sglang", "vllm", "transformers"}
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}
NO_CODE |= {tokenize.ENDMARKER}
MAX_FILE_LINES, MAX_MEDIAN_LINES = 400, 200
MAX_FUNCTION_LINES, MAX_KERNEL_LINES = 60, 150
MAX_ADAPTER_CODE_LINES = 2500


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def lines_of(path: Path) -> int:
    return len(path.read_text().splitlines())


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    return any(name in decorator for decorator in decorators for name in ("triton.jit", "gluon.jit"))


def imports(tree: ast.Module) -> Iterator[str]:
    """Top-level packages that are imported anywhere in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def test_median_file_is_short():
    assert statistics.median(lines_of(path) for path in PACKAGE) < MAX_MEDIAN_LINES
    assert statistics.median(lines_of(path) for path in FILES) < MAX_MEDIAN_LINES


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_not_too_long(path):
    assert lines_of(path) <= MAX_FILE_LINES
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            limit = MAX_KERNEL_LINES if is_kernel(node) else MAX_FUNCTION_LINES
            assert node.end_lineno - node.lineno < limit, f"{node.name} has more than {limit} lines"


def code_lines_of(path: Path) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    with path.open("rb") as source:
        tokens = [token for token in tokenize.tokenize(source.readline) if token.type not in NO_CODE]
    lines = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(tree_of(path)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_adapters_stay_thin():
    adapters = [path for path in PACKAGE if {"sglang_backend", "vllm_backend"}.intersection(path.parts)]
    assert 0 < sum(map(code_lines_of, adapters)) < MAX_ADAPTER_CODE_LINES


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_environment_is_read_in_one_file(path):
    reads = re.search(r"\bos\.(environ|getenv|putenv)\b|from os import", path.read_text())
    assert reads is None or path == ROOT / "kvarn" / "env.py"


@pytest.mark.parametrize("path", [path for path in PACKAGE if "core" in path.parts], ids=name_of)
def test_core_imports_no_engine(path):
    assert not ENGINES.intersection(imports(tree_of(path)))


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_no_data_is_run_as_code(path):
    tree = tree_of(path)
    assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve"}.intersection(imports(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"eval", "exec", "torch.load", "yaml.load"}


def test_dev_extra_is_what_development_installs():
    extra = (ROOT / "pyproject.toml").read_text().partition("\ndev = [\n")[2].partition("\n]")[0]
    lines = (ROOT / "requirements" / "dev.txt").read_text().splitlines()
    assert sorted(re.findall(r'^ +"(.+)",', extra, re.MULTILINE)) == sorted(
        line for line in lines if line and not line.startswith("#")
    )


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda preset: preset.name)
def test_readme_table_has_the_preset_with_its_bytes(preset):
    shape = CacheShape(preset, 1, 1, 128, 2, preset.tail_tokens, preset.sink_tokens)
    token_bytes = shape.layout.record_bytes / preset.tile_tokens
    row = (
        f"| `{preset.name}` | {preset.key_bits} | {preset.value_bits} | {preset.tile_tokens} "
        f"| {token_bytes:g} | {shape.raw_bytes_per_token / token_bytes:.2f} | {shape.break_even_tokens} |"
    )
    assert row in (ROOT / "README.md").read_text().splitlines()


def test_readme_names_every_variable():
    read = set(re.findall(r"\bKVARN_[A-Z_]+\b", (ROOT / "kvarn" / "env.py").read_text()))
    told = set(re.findall(r"^\| `(KVARN_[A-Z_]+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    assert told == read - {"KVARN_SGLANG_HOOKS"}  # set by KVarN itself, for the processes that it starts
