"""The package as a whole: what importing it costs, who imports whom, what the wheel and the tree hold."""

import ast
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fam_jax

ROOT = Path(__file__).resolve().parent.parent
TOPS = ("lime_jax", "fam_jax", "experiments")  # each may import only itself and those before it
COMMANDS = ("pip install -e . && python -m experiments.quickstart", 'pip install -e ".[test]" && pytest')


def run_python(code: str) -> str:
    """Runs code in a new interpreter in the checkout and returns what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def sources(*tops: str) -> Iterator[Path]:
    for top in tops:
        yield from sorted((ROOT / top).rglob("*.py"))


def imported_modules(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yields the line and the dotted name of every absolute import, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""


def test_import_is_light():
    """Time and modules beyond `import jax`; the best of a few, as the machine may be busy."""
    code = (
        "import jax, sys, time, json\n"
        "before = set(sys.modules)\n"
        "start = time.perf_counter()\n"
        "import fam_jax\n"
        "seconds = time.perf_counter() - start\n"
        "from jax._src import xla_bridge\n"
        "print(json.dumps({'seconds': seconds, 'modules': sorted(set(sys.modules) - before),"
        " 'backends': len(xla_bridge._backends)}))\n"
    )
    runs = [json.loads(run_python(code)) for _ in range(3)]
    modules = {name.split(".")[0] for name in runs[0]["modules"]}
    assert "fam_jax" in modules
    assert not modules & {"tensorflow", "tensorflow_datasets", "optax", "matplotlib", "experiments"}
    assert [run["backends"] for run in runs] == [0, 0, 0], "import fam_jax starts a backend"
    assert min(run["seconds"] for run in runs) < 1.5, "import fam_jax is slow"


def test_backend_count_notices_a_started_backend():
    """The registry that the import test reads is the one that a started backend appears in."""
    code = "import jax\nfrom jax._src import xla_bridge\njax.devices()\nprint(len(xla_bridge._backends))"
    assert int(run_python(code)) >= 1


def test_import_direction():
    wrong = []
    for position, top in enumerate(TOPS):
        later = set(TOPS[position + 1 :]) | {"tests"}
        for path in sources(top):
            for line, name in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
                if name.split(".")[0] in later:
                    wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "imports go experiments -> fam_jax -> lime_jax only:\n" + "\n".join(wrong)


def test_model_packages_import_no_training_libraries():
    allowed = {"jax", "flax", "numpy", "fam_jax", "lime_jax"} | set(sys.stdlib_module_names)
    of_files = {"safetensors", "gguf"}  # when a pretrained model is read or written
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources("lime_jax", "fam_jax")
        for line, name in imported_modules(ast.parse(path.read_text(encoding="utf-8")))
        if name.split(".")[0] not in allowed | (of_files if path.parent.name == "pretrained" else set())
    ]
    assert not wrong, "\n".join(wrong)


def test_files_are_short():
    lengths = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines()) for path in sources(*TOPS, "tests")
    }
    assert len(lengths) > 10
    long = {str(path): lines for path, lines in lengths.items() if lines > 400}
    assert not long, f"over 400 lines, split by subject: {long}"


def test_no_path_of_one_machine():
    """A home or work folder in a tracked text file runs on one machine only."""
    pattern = re.compile(r"(?<![\w.])/(?:root|home|work|Users|mnt)/\w+|[A-Z]:\\\\?Users")
    suffixes = {".py", ".md", ".toml", ".json", ".cfg", ".ipynb", ".txt", ".sh", ""}
    found = []
    for top in (*TOPS, "tests", ".ci"):
        for path in sorted((ROOT / top).rglob("*")):
            if not path.is_file() or path.suffix not in suffixes or path == Path(__file__):
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                if pattern.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number} {line.strip()[:100]}")
    for name in ("README.md", "setup.py", "pyproject.toml"):
        if pattern.search((ROOT / name).read_text(encoding="utf-8")):
            found.append(name)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_has_the_commands(command: str):
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")


def test_modules_named_by_the_readme_exist():
    """Every `python -m experiments.NAME` of the README can be found."""
    names = set(re.findall(r"python -m (experiments\.\w+)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert "experiments.quickstart" in names
    missing = [name for name in sorted(names) if importlib.util.find_spec(name) is None]
    assert not missing


def test_version_comes_from_one_place():
    version = fam_jax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert version not in (ROOT / "setup.py").read_text(encoding="utf-8")
    try:
        installed = importlib.metadata.version("fam-jax")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("fam-jax runs from the checkout but is not installed: pip install -e .")
    assert installed == version, "installed by an older setup.py: run pip install -e . again"
