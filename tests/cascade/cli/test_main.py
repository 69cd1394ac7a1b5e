"""The front door: help, each command on real images, and errors in one line."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

import cascade
from cascade.bundle.format import write
from cascade.cli.main import app
from cascade.model import backbone
from tests.helpers.bundles import handmade

COMMANDS = ("train", "predict", "index", "serve", "inspect", "verify", "pack", "unpack", "evaluate", "bench")


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory, cifar: list[Image.Image]) -> Path:
    """A bundle that loads in a moment."""
    return write(handmade(cifar[:40]), tmp_path_factory.mktemp("store") / "hand" / "1")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def fails(*arguments: str | Path) -> str:
    """The one line on stderr of a command that fails."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert not result.stdout
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def flipped(bundle: Path, copy: Path, file: str = "fusion.safetensors") -> Path:
    shutil.copytree(bundle, copy)
    raw = bytearray((copy / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / file).write_bytes(raw)
    return copy


def test_help_lists_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for command in COMMANDS:
        assert re.search(rf"^\W*{command} ", result.stdout, re.MULTILINE), command


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output or "usage" in result.output


def test_version() -> None:
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"cascade {cascade.__version__}\n")


def test_only_serve_reads_options_from_the_environment(tmp_path: Path) -> None:
    """A container may have a variable CASCADE_VERSION of its own."""
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)], env={"CASCADE_VERSION": "1"})
    assert result.exit_code == 1 and "no bundle" in result.output


def test_idle_threads_do_not_spin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY")
    run("inspect", tmp_path)
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_without_a_command_there_is_help() -> None:
    assert "Usage" in run().output


def test_an_unknown_log_level_is_refused_before_anything_starts() -> None:
    result = run("serve", "--frontend", "asgi", "--log-level", "loud")
    assert result.exit_code == 2 and "'debug', 'info', 'warning', 'error'" in " ".join(result.stderr.split())


def test_inspect(bundle_path: Path) -> None:
    result = run("inspect", bundle_path)
    assert result.exit_code == 0, result.output
    assert "small/1 · conditional" in result.stdout and "expert-2" in result.stdout


def test_inspect_nothing(tmp_path: Path) -> None:
    assert "cascade.json is missing; a bundle is a folder <name>/<version>" in fails("inspect", tmp_path)


def test_pack_and_unpack(hand: Path, tmp_path: Path) -> None:
    file, again = tmp_path / "hand.cascade", tmp_path / "hand" / "2"
    assert "makes a bundle of it" in run("pack", hand, file).stdout
    assert run("unpack", file, again).stdout == f"wrote {again}\n"
    assert str(again) in fails("unpack", file, again), "a version is never overwritten"


def test_verify_the_good(bundle_path: Path) -> None:
    result = run("verify", bundle_path)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{bundle_path} is whole and fits tf_efficientnet_lite0 (4cf934214273)\n"


@pytest.mark.parametrize("file", ["cascade.json", "SHA256SUMS", "masks.safetensors"])
def test_verify_one_flipped_byte(hand: Path, tmp_path: Path, file: str) -> None:
    assert str(tmp_path / "flipped") in fails("verify", flipped(hand, tmp_path / "flipped", file))


def test_verify_against_other_weights(hand: Path, tmp_path: Path) -> None:
    for seed, name in ((9, "other.pth"), (0, "same.pth")):
        torch.save(backbone.load("test_resnet", f"random:{seed}").model.state_dict(), tmp_path / name)
    assert "no weights at" in fails("verify", hand, "--weights", tmp_path / "missing.pth")
    assert "pass the right ones with --weights" in fails("verify", hand, "--weights", tmp_path / "other.pth")
    assert run("verify", hand, "--weights", tmp_path / "same.pth").exit_code == 0


def test_predict_a_folder_with_a_broken_image(bundle_path: Path, cifar_folder: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(cifar_folder / "test" / "cat", images)
    whole = len(list(images.iterdir()))
    (images / "broken.png").write_bytes(b"no image at all")
    out = tmp_path / "out [1]" / "predictions.parquet"
    out.parent.mkdir()
    result = run("predict", images, "--out", out, "--bundle", bundle_path, "--mode", "unconditional")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{whole + 1} rows in {out}, {whole + 1} of them now, ")
    assert lines[0].endswith(" images a second") and lines[1].startswith("time: forward ")
    assert lines[-1] == "  1 with error not_an_image" and " % in cluster " in lines[2]
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == whole + 1
    assert [Path(r["path"]).name for r in rows if r["error"]] == ["broken.png"]


@pytest.mark.parametrize("command", ["predict", "inspect", "verify", "evaluate", "bench"])
def test_a_corrupt_bundle_is_one_line(command: str, hand: Path, cifar_folder: Path, tmp_path: Path) -> None:
    bad = flipped(hand, tmp_path / "hand" / "1")
    arguments: dict[str, list[str | Path]] = {
        "predict": [cifar_folder, "--out", tmp_path / "out.parquet", "--bundle", bad],
        "evaluate": [bad, cifar_folder],
    }
    assert "fusion.safetensors: its checksum differs from SHA256SUMS" in fails(command, *arguments.get(command, [bad]))
    assert not (tmp_path / "out.parquet").exists()


def test_workers_without_ray_are_an_error(tmp_path: Path) -> None:
    done = run("predict", "photos", "--out", tmp_path / "out", "--workers", "2")
    assert (done.exit_code, done.stderr) == (1, "error: --workers is an option of --ray: omit it, or add --ray\n")


def test_predict_checks_its_output_before_it_loads_anything(tmp_path: Path) -> None:
    line = fails("predict", tmp_path, "--out", tmp_path / "a" / "b", "--bundle", "none")
    assert "b cannot be written: name a folder" in line


def test_predict_in_a_mode_that_is_none(hand: Path, cifar_folder: Path, tmp_path: Path) -> None:
    images, out = cifar_folder / "test" / "dog", tmp_path / "predictions.parquet"
    result = run("predict", images, "--out", out, "--bundle", hand, "--mode", "sideways")
    assert result.exit_code == 1 and not out.exists()
    assert "error: hand/1 has no mode sideways; it has: conditional dispatcher unconditional\n" in result.output


def test_evaluate(bundle_path: Path, cifar_folder: Path) -> None:
    result = run("evaluate", bundle_path, cifar_folder / "test", "--limit", "20")
    assert result.exit_code == 0, result.output
    assert re.search(r"accuracy in % on \d+ images", " ".join(result.stdout.split()))
    assert re.search(r"unconditional\W+\d+\.\d\W+\d+\.\d", result.stdout)


def test_bench(hand: Path) -> None:
    result = run("bench", hand, "--batch", "2", "--rounds", "1")
    assert result.exit_code == 0, result.output
    for row in ("plain backbone", "swap, not materialized", "dispatcher", "conditional", "unconditional"):
        assert re.search(rf"{row}\W+[\d.]+", result.stdout), row


def test_train_on_nothing(tmp_path: Path) -> None:
    result = run("train", tmp_path / "none", "--out", tmp_path / "m" / "1", "--run", tmp_path / "run")
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert "error: " in result.output and str(tmp_path / "none") in result.output


def test_wrong_use_is_explained() -> None:
    for arguments in (("predict",), ("verify",), ("fly",), ("bench", "x", "--batch", "0")):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Usage" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_as_a_process(tmp_path: Path) -> None:
    """What a shell sees: exit status 1, one line, no traceback."""
    command = [sys.executable, "-m", "cascade.cli.main", "verify", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: no bundle at {tmp_path}: cascade.json is missing; a bundle is a folder <name>/<version>\n"
    )
