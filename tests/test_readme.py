"""What README.md and the pages in docs/ say: every command, recipe, snippet and link in them holds."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import pytest
import typer
import yaml
from pydantic import TypeAdapter
from torch.distributed.run import parse_args as parse_torchrun

from capgap.cli import commands
from capgap.demo import demo_spec
from capgap.recipe import PretrainRecipe, Recipe, load
from capgap.study import Family, StudySpec

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
RECIPES = dict.fromkeys(("pack", "shapes", "prune", "cache", "distil", "run"), Recipe) | {"pretrain": PretrainRecipe}
RUN_FOR_REAL = ("plan", "law", "report")
STUDY = [["study", name] for name in ("status", "resume", "report", "export", "race", "next")]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


COMMANDS = {
    (page.relative_to(ROOT).as_posix(), line.strip()): words_of(line)
    for page in PAGES
    for block in blocks(page, "console")
    for line in block.splitlines()
    if words_of(line)
}


@pytest.fixture(scope="module")
def cli() -> typer.core.TyperGroup:
    app = typer.Typer()
    commands.register(app)
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    return group


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder as a reader has it: recipes, those that a page spells out, records of studies and of a demo."""
    place = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "recipes", place / "recipes")
    for folder in ("capgap-demo", "runs/nano"):
        (place / folder).mkdir(parents=True)
        shutil.copy(ROOT / "studies/demo/records.jsonl", place / folder)
    for folder in ("studies/nano", "studies/nano-neox"):
        (place / folder).mkdir(parents=True)
        shutil.copy(ROOT / folder / "records.jsonl", place / folder)
    for page in PAGES:
        for block in blocks(page, "yaml"):
            if name := re.match(r"# (\S+\.yaml)\n", block):
                (place / name[1]).write_text(block)
    return place


@pytest.fixture(autouse=True)
def _test_data_is_named(monkeypatch):
    monkeypatch.setenv("CAPGAP_TEST_DATA", os.environ.get("CAPGAP_TEST_DATA", "data"))


def parse(cli: typer.core.TyperGroup, words: list[str]) -> tuple[list[str], dict]:
    """The names of command and subcommand, and the values of its parameters; nothing is run."""
    command, names = cli, []
    while isinstance(command, typer.core.TyperGroup):
        assert words, f"capgap {' '.join(names)}: no command"
        assert words[0] in command.commands, f"capgap {' '.join([*names, words[0]])}: no such command"
        command, names, words = command.commands[words[0]], [*names, words[0]], words[1:]
    return names, command.make_context(" ".join(names), list(words)).params


@lru_cache
def run_capgap(place: Path, words: tuple[str, ...]) -> str:
    call = [sys.executable, "-m", "capgap", *words]
    done = subprocess.run(call, cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return done.stdout


@lru_cache
def benchmark_help(script: str) -> str:
    call = [sys.executable, ROOT / script, "--help"]
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check_capgap(cli: typer.core.TyperGroup, place: Path, words: list[str]) -> None:
    if words == ["--help"]:
        return
    names, values = parse(cli, words)
    if names[0] in RECIPES:
        load(place / values["recipe"], RECIPES[names[0]], values["overrides"] or [])
    elif names in (["study", "run"], ["study", "create"]):
        study = values["study"]
        assert values["output"] or study.parts[0] in ("runs", "/"), f"{study}: no folder is given"
        if study.suffix and not study.is_absolute():
            load(place / study, StudySpec)
    elif names[0] in RUN_FOR_REAL:
        # Both studies' records are copies of one file here.
        shown = run_capgap(place, tuple(word.replace("runs/nano/records", "capgap-demo/records") for word in words))
        assert "your own law" in shown or "--records" not in words
    else:
        assert names in (["demo"], ["eval"], *STUDY), f"capgap {' '.join(words)}: add a check"


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line}" for page, line in COMMANDS])
def test_command(cli, place, page, line):
    words = COMMANDS[page, line]
    if words[0] == "capgap":
        check_capgap(cli, place, words[1:])
    elif words[0] == "torchrun":
        given = parse_torchrun(words[1:])
        assert given.module, f"{line}: runs a file, not a module"
        assert given.training_script == "capgap"
        check_capgap(cli, place, given.training_script_args)
    elif words[0] == "make":
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"capgap\[([\w,]+)\]", line)
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert extras
        assert set(extras[0].split(",")) <= set(known)
    elif words[0] == "python" and words[1].startswith("benchmarks/"):
        options = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
        assert options <= set(re.findall(r"--[\w-]+", benchmark_help(words[1]))), line
    elif words[0] == "export":
        name = words[1].partition("=")[0]
        assert name in (ROOT / "src/capgap/cli/study.py").read_text()
    elif words[0] == "source":
        venv = re.search(r"^VENV := (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert venv
        assert words[1:] == [f"{venv[1]}/bin/activate"]
    else:
        pytest.fail(f"{page}: no check for {line!r}; write one, or leave the command out")


def test_examples_in_the_help(cli, place):
    """The example in the help of each command can be parsed, and the recipes that it names load."""
    seen = []

    def look(command: typer.core.TyperCommand | typer.core.TyperGroup, path: list[str]) -> None:
        if isinstance(command, typer.core.TyperGroup):
            for name, inner in command.commands.items():
                look(inner, [*path, name])
            return
        example = re.search(r"Example: capgap (.+)", " ".join((command.help or "").split()))
        assert example, f"capgap {' '.join(path)}: its help has no example"
        words = shlex.split(example[1])
        assert words[: len(path)] == path
        names, _ = parse(cli, words)
        if names[0] not in RUN_FOR_REAL:
            check_capgap(cli, place, words)
        seen.append(names)

    look(cli, [])
    assert len(seen) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_named_in_the_text_exist(cli, page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"`(capgap [^`]+)`", text):
        command = cli
        for word in words_of(span)[1:]:
            if isinstance(command, typer.core.TyperGroup):
                assert word in command.commands, f"{page.name}: {span}: no such command"
                command = command.commands[word]
            elif word.startswith("--"):
                known = {option for parameter in command.params for option in parameter.opts}
                assert word.partition("=")[0] in known, f"{page.name}: {span}: no such option"


YAML = [(page.name, block) for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize(("page", "block"), YAML, ids=[f"{page}-{i}" for i, (page, _) in enumerate(YAML)])
def test_recipe(cli, place, tmp_path, page, block):
    """A whole recipe loads; of a part of one, or of a study, every key is valid; a job's command is one of ours."""
    tree = yaml.safe_load(block)
    if tree.get("kind") == "Job":
        (container,) = tree["spec"]["template"]["spec"]["containers"]
        assert container["command"][0] == "capgap"
        check_capgap(cli, place, container["command"][1:])
        return
    if "output" in tree:
        (tmp_path / "recipe.yaml").write_text(block)
        load(tmp_path / "recipe.yaml", Recipe)
        return
    for key, value in tree.items():
        field = (StudySpec if page == "studies.md" else Recipe).model_fields[key]
        whole = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        TypeAdapter(whole).validate_python(value)


def test_the_recipe_in_the_readme_is_the_one_it_runs(tmp_path):
    (shown,) = blocks(ROOT / "README.md", "yaml")
    (tmp_path / "shown.yaml").write_text(shown)
    assert load(tmp_path / "shown.yaml", Recipe) == load(ROOT / "recipes/minima-3b.yaml", Recipe)


def test_the_first_recipe_uses_a_model_that_the_demo_trains(place):
    teacher = Path(str(load(place / "first.yaml", Recipe).teacher))
    assert teacher.parts[:2] == ("capgap-demo", "runs")
    assert teacher.parts[2] in Family(demo_spec(full=False)).models


def test_snippets_run(place):
    for page in PAGES:
        for code in blocks(page, "python"):
            done = subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, f"{page.name}: {done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```\w*\n.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(
        r"^```{literalinclude} (\S+)$", text, flags=re.MULTILINE
    )
    for target in targets:
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target} leads nowhere"
