"""What pages point to is there: files, headings, and the tests that they name."""

import math
import re
from collections.abc import Iterator
from inspect import signature
from pathlib import Path

from longtake import load
from longtake.generation.script import read_scripts, script_from
from longtake.recipes import hybrid_forcing
from longtake.toy import captions

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks" / "results").rglob("*.md")]


def anchor(heading: str) -> str:
    """As sites that show Markdown make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def links(page: Path) -> Iterator[tuple[str, Path, str]]:
    """The links of a page to this repository: as they stand, the file, and the heading if one is named."""
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not link.startswith(("http:", "https:", "mailto:")):
            path, _, heading = link.partition("#")
            yield link, page.parent / path if path else page, heading


def test_links_lead_somewhere() -> None:
    lost = []
    for page in PAGES:
        for link, file, heading in links(page):
            there = file.exists()
            if there and heading:
                headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                there = heading in map(anchor, headings)
            if not there:
                lost.append(f"{page.relative_to(ROOT)}: {link}")
    assert not lost, "\n".join(lost)


def test_the_file_of_times_that_docs_show_is_one_that_the_embedded_model_films(tmp_path: Path) -> None:
    shown = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "prompts.md").read_text(encoding="utf-8"), re.DOTALL)
    assert shown
    (tmp_path / "prompts.yaml").write_text(shown[1], encoding="utf-8")
    (script,) = read_scripts(tmp_path / "prompts.yaml")
    engine = load("toy", recipe="self_forcing_sink", device="cpu")
    cues = script.by_block(engine, round(script.lasts(engine.frame_rate) * engine.frame_rate))
    engine.prepare([cue.shown for cue in cues.values()])
    assert len(cues) == len(script.cues) > 1


def test_every_option_of_hybrid_forcing_is_in_its_table_with_its_default() -> None:
    rows = (ROOT / "docs" / "hybrid_forcing.md").read_text(encoding="utf-8").splitlines()
    for name, option in signature(hybrid_forcing).parameters.items():
        default = option.default
        shown = f"`{default}`" if isinstance(default, str) else "" if default == math.inf else f"{default:g}"
        assert any(row.startswith(f"| `{name}` | {shown} |".replace("|  |", "| |")) for row in rows), name


def test_tests_that_pages_name_are_there() -> None:
    """By their names without `test_`, as in the tables of what is tested; they are of five words or more."""
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    named = [
        (page.name, name)
        for page in (ROOT / "docs").glob("*.md")
        for name in re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+){4,})`", page.read_text(encoding="utf-8"))
    ]
    assert len(named) > 20
    assert not [f"{page}: {name}" for page, name in named if f"def test_{name}(" not in tests]


def test_prompts_of_commands_are_made_of_words_that_the_embedded_model_knows() -> None:
    """But for those that a chat model writes out first, and those for published weights."""
    lines = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines()]
    asked = [line for line in lines if re.match('longtake (generate|take fork) .*"', line)]
    texts = [line.split('"')[1] for line in asked if not re.search("--rewrite|--model self-forcing|--base", line)]
    assert len(texts) > 10
    for text in texts:
        for cue in script_from(text).cues:
            captions.encode(cue.prompt)
