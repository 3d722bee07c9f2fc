"""README and docs tell the truth: their commands exist, their links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from trt_int8.cli import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands() -> list[str]:
    """Return every `trt-int8 ...` line of the code blocks, continuation lines joined."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", page.read_text(), flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("trt-int8 ")]
    return found


@pytest.mark.parametrize("line", commands())
def test_command_exists_with_its_options(line: str):
    """A command line in the documentation names a command and options that exist."""
    words = [word for word in shlex.split(line, comments=True)[1:] if word]
    command = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help", "-h"}

    assert not getattr(command, "commands", {}) or words[:1] in ([], ["--help"], ["--version"]), line
    assert {word.split("=")[0] for word in words if word.startswith("-")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path):
    """A relative link points to a file of the repository."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]

    assert not missing


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_make_target_exists(target: str):
    """The make targets that README names are in the Makefile."""
    assert f"make {target}" in (ROOT / "README.md").read_text()
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
