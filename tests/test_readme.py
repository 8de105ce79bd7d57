"""The README's example runs as shown, and the commands that it names exist."""

import re
import shlex
from pathlib import Path

from experiments.train import parse_config

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
ROOT = Path(__file__).parent.parent


def test_the_example_runs_as_shown(capsys):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == "(2, 8)\n2\n"


def test_the_page_on_lime_runs_as_shown(capsys):
    page = (ROOT / "experiments" / "docs" / "lime.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    exec(compile(code, "lime.md", "exec"), {})
    assert capsys.readouterr().out == "36\n"
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (ROOT / "experiments" / "docs" / picture).is_file(), picture
    for command in re.findall(r"python -m experiments\.train (--config [^`#\n]+)", page):
        name, *overrides = shlex.split(command)[1:]
        parse_config(name, overrides)


def test_modules_files_and_pictures_that_it_names_exist():
    for module in set(re.findall(r"python -m (experiments\.\w+)", README)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file(), picture
    for config in set(re.findall(r"--config (\w+)", README)):
        assert (ROOT / "experiments" / "configs" / f"{config}.py").is_file(), config
    table = [line for line in README.splitlines() if line.startswith("| `")]
    for line in table:
        folder = Path()
        for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
            path = ROOT / name if "/" in name.rstrip("/") else ROOT / folder / name
            assert path.exists(), name
            folder = path.parent.relative_to(ROOT) if path.is_file() else folder


def test_training_commands_are_understood():
    commands = re.findall(r"python -m experiments\.train (--config [^`#\n]+)", README)
    assert commands
    # Settings that the text gives without a command are for the same configs.
    extra = [shlex.split(text) for text in re.findall(r"`(--(?:model|data|optim|mesh)\.[^`]+)`", README) if " " in text]
    for command in commands:
        name, *overrides = shlex.split(command)[1:]
        if "--help" not in overrides:
            parse_config(name, overrides)
    for overrides in extra:
        parse_config("lm", overrides)
