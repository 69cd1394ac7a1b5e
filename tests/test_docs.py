"""What the pages say exists: links and anchors, commands and their options, figures as the benchmarks left them."""

import ast
import json
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from statistics import mean
from typing import Any, cast

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command

from cascade.cli.main import app
from tests.helpers.paths import ROOT

PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "tests" / "data" / "README.md"]
FIGURES = (  # heading in docs/performance.md, and the JSON files whose figures its rows show, in this order
    ("## ResNet-50", ("serving-resnet50", "serving-resnet50-executors", "serving-resnet50-identical")),
    ("## EfficientNet", ("serving-tf_efficientnet_lite0",)),
)
DATASETS = ("cifar10", "fashion-mnist", "digits", "groceries")  # of benchmarks.accuracy
CLI = cast(TyperGroup, get_command(app))


def commands(start: str) -> set[tuple[str, ...]]:
    """The words that follow a pattern in the code on the pages, up to a comment or what begins the next command."""
    found = set()
    for text in (page.read_text().replace("\\\n", " ") for page in PAGES):
        lines = re.findall(r"^(?:    |\$ )(.+)", text, re.MULTILINE)  # indented, or what was typed in a fenced block
        for code in (*lines, *re.findall(r"`([^`\n]+)`", text)):
            pieces = [piece.strip() for piece in re.split(r"[|;&]", code.partition("#")[0])]
            found |= {tuple(shlex.split(rest)) for piece in pieces for rest in re.findall(f"{start}(.+)", piece)}
    return found


def flags(arguments: tuple[str, ...]) -> set[str]:
    return {each.partition("=")[0] for each in arguments if re.match(r"--?[a-z]", each)} - {"--help"}


def text_of(module: str) -> Path:
    """The file of a module of ours that ``python -m`` runs."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def options(module: str) -> set[str]:
    """The options of a benchmark; for training, every one that a module or one that it imports spells out."""
    if module.startswith("benchmarks.") and module != "benchmarks.datasets":
        app = typer.Typer()
        app.command()(import_module(f"{module}.__main__" if text_of(module).name == "__main__.py" else module).main)
        return {option for parameter in get_command(app).params for option in parameter.opts}
    names = [module]
    for node in ast.walk(ast.parse(text_of(module).read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(("benchmarks", "training")):
            names += [str(node.module), *(f"{node.module}.{each.name}" for each in node.names)]
    texts = "".join(text_of(name).read_text() for name in names if text_of(name).exists())
    recipe = (ROOT / "training" / "recipe.py").read_text() if "@with_recipe" in texts else ""
    fields = re.findall(r"^    (\w+): ", recipe, re.MULTILINE) + re.findall(r"(\w+): (?:Annotated|RunFolder)\b", texts)
    fields += re.findall(r"^    (\w+): .+,$", texts, re.MULTILINE)  # parameters of a command, one a line
    return {*re.findall(r'"(--[a-z-]+)"', texts), *(f"--{name.replace('_', '-')}" for name in fields)}


def slugs(page: Path) -> Iterator[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    for heading in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, anchor = link.partition("#")
        if not name.startswith(("http:", "https:")):
            target = (page.parent / name).resolve() if name else page
            assert target.is_relative_to(ROOT) and target.exists(), link
            assert not anchor or anchor in slugs(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    """Between backticks, from the root; ``*`` matches something."""
    for name in re.findall(
        r"`((?:cascade|handlers|training|tests|benchmarks|deploy|docs|examples)/[\w./*-]+)`", page.read_text()
    ):
        assert list(ROOT.glob(name.rstrip("/"))), name


def test_decisions_are_numbered_without_gaps_and_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = sorted(folder.glob("0*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    listed = re.findall(r"^(\d+)\. \[(.+)\]\((.+)\)$", (folder / "index.md").read_text(), re.MULTILINE)
    titles = [page.read_text().partition("\n")[0].removeprefix("# ") for page in pages]
    assert listed == [(*title.split(". ", 1), page.name) for title, page in zip(titles, pages, strict=True)]


def test_commands_of_cascade_take_the_options_shown() -> None:
    shown = commands(r"^(?:[A-Z_]+=\S+ )?cascade (?!transport)")
    assert {"train", "predict", "serve", "index", "inspect", "pack"} <= {each[0] for each in shown}
    for name, *rest in shown:
        command = CLI.commands[name]
        if isinstance(command, TyperGroup) and rest:
            command = command.commands[rest[0]]
        known = options("training.pipeline") if name == "train" else {o for p in command.params for o in p.opts}
        assert flags(tuple(rest)) <= known, (name, *rest)


def test_modules_that_are_run_exist_and_take_the_options_shown() -> None:
    shown = {each for each in commands("(?:python -m|-m --) ") if re.fullmatch(r"[a-z_.]+[a-z]", each[0])}
    assert len(shown) > 30
    for module, *rest in shown - commands("python -m (?=pytest)"):
        assert text_of(module).exists(), module
        assert flags(tuple(rest)) <= options(module), (module, *rest)


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shown = {each[0] for each in commands("^make ")}
    assert {"demo", "test", "soak"} <= shown and shown <= targets


def shown_as(figure: dict[str, Any]) -> str:
    value, (least, most) = figure["value"], figure["spread"]
    return f"{value:.2f}" if least == most else f"{value:.2f} ({least:.2f}-{most:.2f})"


def trained(dataset: str, row: str) -> dict[str, float]:
    """What ``benchmarks.accuracy`` measured with EfficientNet-Lite0, as means over the seeds."""
    files = (ROOT / "benchmarks" / "results" / "accuracy").glob(f"{dataset}-{row}-tf_efficientnet_lite0-?.json")
    cells = [json.loads(path.read_text()) for path in files]
    return {name: mean(cell[name] for cell in cells) for name in ("accuracy", "bytes", "probe") if name in cells[0]}


def test_figures_of_the_readme_are_those_of_the_json() -> None:
    text = (ROOT / "README.md").read_text()
    figures = json.loads((ROOT / "benchmarks" / "results" / "serving-resnet50.json").read_text())["figures"]
    for name in ("mixed_uniform", "over_load_state_dict", "over_hooks", "over_torchserve_n_models"):
        memory = figures[{"mixed_uniform": "mixed_uniform_memory_of_copies"}.get(name, f"{name}_memory")]["value"]
        assert f" | {shown_as(figures[name])} | {memory:.{1 if memory > 1 else 2}f} |" in text, name
    for dataset in DATASETS:
        head, mask, copy = (trained(dataset, row)["accuracy"] for row in ("frozen", "both", "full"))
        assert f" | {head:.1f} | **{mask:.1f}** | {copy:.1f} |" in text, dataset
    for row in ("frozen", "distilled", "teacher"):
        assert f" {trained('cifar10', f'unlabeled-{row}')['accuracy']:.1f} " in text, row


def test_tables_of_the_accuracy_page_are_those_of_the_json() -> None:
    lines = (ROOT / "docs" / "accuracy.md").read_text().splitlines()
    tables = {row: line.split(" | ") for line in lines if (row := line.removeprefix("| `").partition("`")[0]) != line}
    for path in sorted((ROOT / "benchmarks" / "results" / "accuracy").glob("*-tf_efficientnet_lite0-0.json")):
        dataset, row = (json.loads(path.read_text())[name] for name in ("dataset", "row"))
        found = trained(dataset, row)
        second = f"{found['probe']:.1f}" if "probe" in found else f"{found['bytes'] / 1000:,.0f} KB"
        shown = f"{found['accuracy']:.1f} ({second})"
        assert tables[row][1 + DATASETS.index(dataset)].removesuffix(" |") == shown, (dataset, row)


def test_accuracy_of_the_demo_is_that_of_its_cards() -> None:
    text = (ROOT / "README.md").read_text()
    for customer, row in (
        ("objects", "mask, scales and shifts"),
        ("clothes", "1-bit delta"),
        ("groceries", "mask, scales and shifts"),
    ):
        card = json.loads((ROOT / "model_store" / customer / "1" / "cascade.json").read_text())
        assert f"{customer} {100 * card['accuracy']['rows'][row]['test']:.1f}" in text, customer


def test_figures_of_second_passes_are_those_of_the_json() -> None:
    figures = json.loads((ROOT / "benchmarks" / "results" / "deferral-4000.json").read_text())["figures"]
    assert f"at {figures['deferral_cost']['value']:.2f} of its" in (ROOT / "README.md").read_text()


def test_figures_of_tenants_are_those_of_the_json() -> None:
    figures = json.loads((ROOT / "benchmarks" / "results" / "tenants.json").read_text())["figures"]
    assert f"p99 of another is {figures['victim_p99']['value']:.1f} times" in (ROOT / "README.md").read_text()


def test_figures_of_dispatch_are_those_of_the_json() -> None:
    figures = json.loads((ROOT / "benchmarks" / "results" / "domains.json").read_text())["figures"]
    share = f"{100 * figures['route_accuracy_between_data_sets']['value']:.1f} %"
    for page in ("README.md", "docs/cascade-quality.md"):
        assert share in (ROOT / page).read_text(), page


def test_figures_of_the_papers_cascade_are_those_of_its_card() -> None:
    text = (ROOT / "docs" / "cascade-quality.md").read_text()
    card = json.loads((ROOT / "model_store" / "paper" / "1" / "cascade.json").read_text())
    for method, scores in card["accuracy"]["whitened"].items():
        cells = [f"{100 * mean:.1f} ± {100 * deviation:.1f}" for mean, deviation in scores.values()]
        assert f" | {' | '.join(cells)} |" in text, method


@pytest.mark.parametrize("heading, names", FIGURES, ids=[heading for heading, _ in FIGURES])
def test_figures_of_the_performance_page_are_those_of_the_json(heading: str, names: tuple[str, ...]) -> None:
    section = (ROOT / "docs" / "performance.md").read_text().partition(f"\n{heading}")[2].partition("\n## ")[0]
    shown = re.findall(r"^\| `(\w+)` \|[^|]*\| ([^|]+) \|[^|]*\|([^|]*)\|$", section, re.MULTILINE)
    left = []
    for name in names:
        figures = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["figures"]
        left += [(figure, values) for figure, values in figures.items() if figure != "load_average_before"]
    assert sorted(figure for figure, _, _ in shown) == sorted(figure for figure, _ in left)
    for figure, text, met in shown:
        at = next(i for i, (name, _) in enumerate(left) if name == figure)  # one that is there twice comes in order
        _, values = left.pop(at)
        assert text == shown_as(values), figure
        assert met.strip() == {None: "", True: "yes", False: "**no**"}[values["met"]], figure


@pytest.mark.parametrize(
    "table", sorted((ROOT / "benchmarks" / "results" / "paper").glob("*.md")), ids=lambda p: p.stem
)
def test_tables_of_the_paper_page_are_those_of_the_runs(table: Path) -> None:
    def rows(page: Path) -> set[str]:
        cells = re.findall(r"^\|(?!-)(.*)\|$", page.read_text(), re.MULTILINE)
        return {" ".join(row.replace("|", " ").split()) for row in cells}

    found = rows(table)
    assert len(found) > 3 and found <= rows(ROOT / "docs" / "paper.md")
