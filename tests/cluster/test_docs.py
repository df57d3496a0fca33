"""The pages about clusters can be followed: every file is there, every verb and every option exists."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from autotune.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = ["docs/cluster.md", "cluster/README.md", "k8s/README.md"]
OPTIONS = {
    name: {option for parameter in command.params for option in parameter.opts}
    for name, command in vars(typer.main.get_command(app))["commands"].items()
}


def commands(page: str) -> list[list[str]]:
    """Every command line of Autotune on a page, in words."""
    text = (ROOT / page).read_text()
    lines = [line.strip()[2:] for line in text.splitlines() if line.strip().startswith("$ ")]
    lines += re.findall(r"`(autotune [^`]+)`", text)
    found = []
    for line in lines:
        words: list[Any] = shlex.split(line, comments=True)
        if "autotune" in words and words[0] in ("autotune", "srun"):
            found.append(words[words.index("autotune") + 1 :])
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_file_is_there(page: str) -> None:
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for name in re.findall(
        r"(?<![\w/.$-])((?:k8s|cluster|search_spaces|benchmarks|docs)/[\w./-]+\w|autotune/\w+\.py)", text
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES)
def test_every_verb_and_option_exists(page: str) -> None:
    for words in commands(page):
        verb, *rest = [word for word in words if word != "&"]
        assert verb in OPTIONS, words
        for word in rest:
            assert not word.startswith("-") or word in OPTIONS[verb], words


def test_the_page_has_commands() -> None:
    assert {words[0] for words in commands("docs/cluster.md")} >= {
        "submit",
        "status",
        "logs",
        "stop",
        "fetch",
        "doctor",
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_anchor_is_a_heading(page: str) -> None:
    for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", (ROOT / page).read_text()):
        target = (ROOT / page).parent / link if link else ROOT / page
        headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, anchor
