"""Other people's networks: what is read computes what its source does, and what harms or misleads is one line."""

from __future__ import annotations

import argparse
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fixed_inputs import uniform
from foreign_networks import Theirs, drawn, read_in_this_process, torchvision_network
from safetensors.torch import save
from torch import Tensor, nn

from cfamc_cli.engine import checkpoint, export
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.encoder import Input, build_encoder
from cfamc_cli.engine.heads import foreign_file
from cfamc_cli.engine.heads.classifier import Classifier, LinearHead
from cfamc_cli.engine.heads.foreign_file import read_foreign_file
from cfamc_cli.engine.heads.imported import Foreign, LastLayer, Reading, better_with, read_foreign
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.errors import CfamcError
from cfamc_cli.recipe.schema import Model, Normalize

X = uniform(3, 3, 32, 32, key="imported")  # float64, in which networks of equal arithmetic are equal to 1e-5
IMAGENET = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.fixture(autouse=True)
def _here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "in_its_process" not in request.node.name:
        read_in_this_process(monkeypatch)


def read(folder: Path, content: object, **reading: Any) -> Foreign:
    path = folder / "theirs.ckpt"
    torch.save(content, path)
    return read_foreign(path, Reading(**reading))


@torch.no_grad()
def features(foreign: Foreign, x: Tensor = X) -> Tensor:
    return foreign.encoder.double().eval().features(x, features="backbone")


def refused(folder: Path, content: object, *, code: int, **reading: Any) -> str:
    with pytest.raises(CfamcError) as error:
        read(folder, content, **reading)
    assert error.value.exit_code == code
    assert error.value.hint
    assert "\n" not in error.value.message
    return error.value.message


# Equality with the source


@pytest.mark.parametrize(
    ("name", "stem"), [("resnet18", "imagenet"), ("resnet18", "cifar"), ("resnet34", "cifar"), ("resnet50", "imagenet")]
)
@torch.no_grad()
def test_torchvisions_networks_are_the_same_here(tmp_path: Path, name: str, stem: str) -> None:
    theirs = torchvision_network(name, stem)
    found = read(tmp_path, theirs.state_dict())
    assert (found.model.backbone, found.model.stem, found.model.width) == (name, stem, 64)
    logits, last = theirs(X), found.last
    theirs.fc = nn.Identity()
    torch.testing.assert_close(features(found), theirs(X), rtol=1e-5, atol=1e-5)
    assert last is not None
    assert (last.name, last.features) == ("fc", "backbone")
    torch.testing.assert_close(last.head.double()(features(found)), logits, rtol=1e-5, atol=1e-5)


WRAPPED: dict[str, Callable[[Mapping[str, Tensor]], object]] = {
    "bare": dict,
    "module.": lambda state: {"net": {f"module.{key}": value for key, value in state.items()}, "acc": 91.5, "epoch": 3},
    "model.": lambda state: {"state_dict": {f"model.{key}": value for key, value in state.items()}},
    "online_encoder.net.": lambda state: {f"online_encoder.net.{key}": value for key, value in state.items()},
    "namespace": lambda state: {
        "opt": argparse.Namespace(lr=0.1),
        "model": {f"encoder.{k}": v for k, v in state.items()},
    },
}


@pytest.mark.parametrize("wrapped", WRAPPED)
@torch.no_grad()
def test_kuangliu_s_names_are_read_in_any_wrapper(tmp_path: Path, wrapped: str) -> None:
    theirs = drawn(Theirs())
    assert isinstance(theirs, Theirs)
    assert "layer2.0.shortcut.1.running_mean" in theirs.state_dict()
    found = read(tmp_path, WRAPPED[wrapped](theirs.state_dict()))
    torch.testing.assert_close(features(found), theirs.features(X), rtol=1e-5, atol=1e-5)
    assert found.last is not None
    assert found.last.name.endswith("linear")
    torch.testing.assert_close(
        found.last.head.double()(features(found)), theirs.linear(theirs.features(X)), rtol=1e-5, atol=1e-5
    )
    assert found.notes == ('there is no pre_feature layer: heads read the backbone (features "backbone")',)


@pytest.mark.parametrize(("asked", "branch"), [("normal", 0), ("0", 0), ("pgd", 1), ("1", 1)])
@torch.no_grad()
def test_a_branch_of_dual_batch_norm_is_chosen_and_said(tmp_path: Path, asked: str, branch: int) -> None:
    theirs = drawn(Theirs(branches=2))
    assert isinstance(theirs, Theirs)
    state = theirs.state_dict()
    assert "layer2.0.downsample.bn.bn_list.1.running_mean" in state
    found = read(tmp_path, {"state_dict": state, "optim": {"state": {0: {"momentum_buffer": X}}}}, batch_norm=asked)
    torch.testing.assert_close(features(found), theirs.features(X, branch=branch), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(features(found), theirs.features(X, branch=1 - branch), rtol=0.1, atol=0.1)
    name = ("normal", "pgd")[branch]
    assert found.notes[0] == f"of the batch norms 0 (normal), 1 (pgd) in each place, {branch} ({name}) is read"
    assert found.model.normalize == IMAGENET  # the file has it
    assert found.notes[1].startswith(
        "pixels are normalised by mean (0.485, 0.456, 0.406) and std (0.229, 0.224, 0.225)"
    )
    assert "as the file has it" in found.notes[1]
    assert "optim.state (1)" not in found.notes[2]
    assert "optim.state" in found.notes[2]
    assert "state_dict.layer1.* (" in found.notes[2]  # the other branch


def test_no_branch_is_guessed(tmp_path: Path) -> None:
    state = drawn(Theirs(branches=3)).state_dict()
    listed = "0 (normal), 1 (pgd), 2 (pgd_ce)"
    assert refused(tmp_path, state, code=2).endswith(f"nothing says which of its batch norms to read: {listed}")
    assert refused(tmp_path, state, code=2, batch_norm="adv").endswith(f"--batch-norm 'adv' is none of {listed}")
    assert "one batch norm in each place" in refused(tmp_path, drawn(Theirs()).state_dict(), code=2, batch_norm="1")


@torch.no_grad()
def test_a_single_branch_is_no_choice(tmp_path: Path) -> None:
    theirs = drawn(Theirs(branches=1))
    assert isinstance(theirs, Theirs)
    state = theirs.state_dict()
    torch.testing.assert_close(features(read(tmp_path, state)), theirs.features(X), rtol=1e-5, atol=1e-5)
    unnumbered = {name.replace("bn_list.0.", "bn_list."): value for name, value in state.items()}
    torch.testing.assert_close(features(read(tmp_path, unnumbered)), theirs.features(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kept", [(0, 1, 2, 3, 4, 5, 6, 7), (0, 1, 2, 4, 5, 6, 7), (0, 1, 4, 5, 6, 7)])
@torch.no_grad()
def test_numbered_layers_are_those_of_a_sequential(tmp_path: Path, kept: tuple[int, ...]) -> None:
    """As of lightly: ReLU and pooling may have been modules among them, or not; without a module there is no ReLU."""
    children = list(torchvision_network("resnet18", "cifar").children())
    numbered = nn.Sequential(*(children[place] for place in kept))
    state = {"backbone": numbered.state_dict(), "classifier.weight": torch.zeros(2, 2)}
    found = read(tmp_path, state)
    torch.testing.assert_close(features(found), numbered(X).mean((2, 3)), rtol=1e-5, atol=1e-5)
    assert found.last is None
    assert "left out, for they are no part of the encoder: classifier.weight" in found.notes
    bare = len(kept) == 6
    assert found.model.stem == ("cifar-linear" if bare else "cifar")
    assert any("no ReLU among its numbered layers" in note for note in found.notes) == bare
    assert read(tmp_path, state, stem="cifar").model.stem == "cifar"


@torch.no_grad()
def test_the_padding_of_solo_learn_s_stem_is_asked_for(tmp_path: Path) -> None:
    theirs = torchvision_network("resnet18", "cifar")
    theirs.fc = nn.Identity()
    state = {f"backbone.{key}": value for key, value in theirs.state_dict().items()}
    state |= {"classifier.weight": torch.ones(2, 512), "classifier.bias": torch.ones(2)}
    assert "whether its first one pads as solo-learn's" in refused(tmp_path, {"state_dict": state}, code=2)
    torch.testing.assert_close(
        features(read(tmp_path, {"state_dict": state}, stem="cifar")), theirs(X), rtol=1e-5, atol=1e-5
    )
    assert isinstance(theirs.conv1, nn.Conv2d)
    theirs.conv1.padding = (2, 2)
    found = read(tmp_path, {"state_dict": state}, stem="cifar-padded")
    torch.testing.assert_close(features(found), theirs(X), rtol=1e-5, atol=1e-5)
    assert found.last is not None


def test_a_stem_that_is_none_is_refused(tmp_path: Path) -> None:
    small, large = (torchvision_network("resnet18", stem).state_dict() for stem in ("cifar", "imagenet"))
    assert "'imagenet' is none of cifar, cifar-padded" in refused(tmp_path, small, code=2, stem="imagenet")
    assert "its first convolution" not in refused(tmp_path, small, code=2, stem="none")
    assert refused(tmp_path, large, code=2, stem="cifar").endswith("is 7x7")


@torch.no_grad()
def test_of_solo_learn_s_networks_the_one_that_learns_is_read(tmp_path: Path) -> None:
    theirs, other = drawn(Theirs()), Theirs()
    assert isinstance(theirs, Theirs)
    backbone = {key: value for key, value in theirs.state_dict().items() if not key.startswith("linear")}
    classifier = {f"classifier.{part}": theirs.state_dict()[f"linear.{part}"] for part in ("weight", "bias")}
    state = (
        {f"momentum_backbone.{key}": value for key, value in other.state_dict().items()}
        | {f"backbone.{key}": value for key, value in backbone.items()}
        | classifier
    )
    found = read(tmp_path, {"state_dict": state, "global_step": 9}, stem="cifar")
    torch.testing.assert_close(features(found), theirs.features(X), rtol=1e-5, atol=1e-5)
    assert found.last is not None
    assert found.last.name == "state_dict.classifier"
    assert torch.equal(found.last.head.bias, theirs.linear.bias.float())
    assert found.notes[0] == "of several networks state_dict.backbone. is read, not state_dict.momentum_backbone."
    momentum = read(tmp_path, {"state_dict": state}, network="momentum", stem="cifar")
    torch.testing.assert_close(features(momentum), other.double().eval().features(X), rtol=1e-5, atol=1e-5)


def test_no_network_is_guessed(tmp_path: Path) -> None:
    state = Theirs().state_dict()
    two = {f"{name}.{key}": value for name in ("first", "second") for key, value in state.items()}
    assert refused(tmp_path, two, code=2).endswith("several networks: it has 'first.', 'second.'")
    assert "no network whose names hold 'third'" in refused(tmp_path, two, code=2, network="third")
    assert read(tmp_path, two, network="second").notes[0].startswith("of several networks second. is read")


@torch.no_grad()
def test_our_own_export_keeps_head_and_normalisation(tmp_path: Path) -> None:
    model = Model(width=4, hidden_dim=6, embedding_dim=4, normalize=IMAGENET, input_size=24)
    encoder = build_encoder(model, generator=addressed_generator("export"))
    head = LinearHead(6, 3, standardized=True)
    assert head.std is not None
    head.weight.normal_(generator=addressed_generator("weight"))
    head.std.fill_(0.3)
    drawn(encoder)
    classifier = Classifier(encoder, head, features="pre_feature").double().eval()
    subject = export.classifier_of(classifier, model, device=torch.device("cpu"))
    path = tmp_path / "classifier.safetensors"
    checkpoint.write_tensors(path, subject.module.state_dict())
    found = read_foreign(path)
    assert found.last is not None
    assert (found.last.name, found.last.features) == ("head", "pre_feature")
    assert (found.model.normalize, found.model.input_size) == (IMAGENET, 24)
    own = Classifier(found.encoder, found.last.head, features="pre_feature").double().eval()
    torch.testing.assert_close(own(X), classifier(X), rtol=1e-5, atol=1e-5)


# Pixels


@torch.no_grad()
def test_normalisation_and_size_are_part_of_the_network(tmp_path: Path) -> None:
    theirs = drawn(Theirs())
    assert isinstance(theirs, Theirs)
    found = read(tmp_path, theirs.state_dict(), normalize=IMAGENET, input_size=48)
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (IMAGENET.mean, IMAGENET.std))
    large = F.interpolate(X, (48, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(features(found), theirs.features((large - mean) / std), rtol=1e-5, atol=1e-5)
    moved = read(tmp_path, theirs.state_dict(), normalize=Normalize(mean=(0.1, 0.1, 0.1), std=IMAGENET.std))
    assert checkpoint.digest_of(moved.encoder) != checkpoint.digest_of(read(tmp_path, theirs.state_dict()).encoder)
    torch.testing.assert_close(features(moved), theirs.features((X - 0.1) / std), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [8, 20, 33, 64])
def test_images_are_resized_as_torch_does(size: int) -> None:
    x = X.clone().requires_grad_()
    wanted = F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(Input(None, size)(x), wanted, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(Input(None, size)(x).square().sum(), x)
    (expected,) = torch.autograd.grad(wanted.square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_half_the_digits_move_no_pixel() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        seen = Input(IMAGENET, 48)(X.float())
    assert torch.equal(seen, Input(IMAGENET, 48)(X.float()))


def test_what_the_file_says_of_pixels_may_be_overruled_and_that_is_said(tmp_path: Path) -> None:
    other = Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    found = read(tmp_path, Theirs(branches=1).state_dict(), normalize=other)
    assert found.model.normalize == other
    assert "in place of the file's own normalize.mean" in found.notes[0]


@pytest.mark.parametrize("names", [("normalizer.new_mean", "normalizer.new_std"), ("mu", "sigma"), ("mean", "std")])
def test_normalisation_is_found_beside_the_network(tmp_path: Path, names: tuple[str, str]) -> None:
    state = {f"model.{key}": value for key, value in Theirs().state_dict().items()}
    buffers = {
        names[0]: torch.tensor(IMAGENET.mean).view(1, 3, 1, 1),
        names[1]: torch.tensor(IMAGENET.std).view(3, 1, 1),
    }
    assert read(tmp_path, state | buffers).model.normalize == IMAGENET


def image_set(images: Tensor, labels: Tensor) -> ImageSet:
    return ImageSet(images, labels, ("a", "b", "c"), "aa", "folder", "test", "")


def test_a_network_that_wants_other_pixels_is_suspected(tmp_path: Path) -> None:
    """Labels are what it answers to normalised pixels, so those are right and others are not."""
    images = (uniform(200, 3, 8, 8, key="suspected") * 255).to(torch.uint8)
    found = read(tmp_path, drawn(Theirs()).state_dict())
    head = LinearHead(32, 3)
    with torch.no_grad():
        head.weight.normal_(generator=addressed_generator("w"))

    def answers(x: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = head(found.encoder.eval().features(x, features="backbone"))
        return logits.argmax(1)

    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (IMAGENET.mean, IMAGENET.std))
    plain, normalized = answers(images / 255), answers((images / 255 - mean) / std)
    assert len(set(normalized.tolist())) > 1
    suspected = Foreign(found.model, found.encoder, LastLayer("fc", head, "backbone"), True, ())
    judged = image_set(images, normalized)
    assert better_with(suspected, IMAGENET, judged, judged) == (int((plain == normalized).sum()), 200, 200)
    honest = image_set(images, plain)
    assert better_with(suspected, IMAGENET, honest, honest) is None
    encoder = Foreign(found.model, found.encoder, None, True, ())
    assert better_with(encoder, IMAGENET, honest, honest) is None  # each image is its own neighbour, whatever it sees


# What does not fit


def test_what_is_no_such_network(tmp_path: Path) -> None:
    state = dict(Theirs().state_dict())
    assert "no ResNet: it holds block1.0, block1.1" in refused(
        tmp_path, {"block1.0.weight": torch.zeros(1), "block1.1.weight": torch.zeros(1)}, code=4
    )
    assert "holds a list" in refused(tmp_path, [1, 2], code=4)
    grey = state | {"conv1.weight": torch.zeros(4, 1, 3, 3)}
    assert "(4, 1, 3, 3)" in refused(tmp_path, grey, code=4)
    turned = state | {"layer2.0.shortcut.0.weight": state["layer2.0.shortcut.0.weight"].transpose(0, 1)}
    assert "layer2.0.downsample.0.weight is torch.float32 (4, 8, 1, 1)" in refused(tmp_path, turned, code=4)
    whole = state | {"conv1.weight": state["conv1.weight"].to(torch.int8)}
    assert "conv1.weight is torch.int8" in refused(tmp_path, whole, code=4)
    below = state | {"bn1.running_var": -state["bn1.running_var"]}
    assert "bn1.running_var is below 0" in refused(tmp_path, below, code=4)
    odd = state | {"mean": torch.tensor([123.7, 116.3, 103.5]), "std": torch.tensor([58.4, 57.1, 57.4])}
    assert "normalize.mean.0 123.7 is none that is known" in refused(tmp_path, odd, code=4)
    giant = {"conv1.weight": torch.zeros(600, 3, 3, 3)}
    assert "width 600" in refused(tmp_path, state | giant, code=4)
    bare = {key: value for key, value in state.items() if not key.endswith("conv1.weight")}
    hollow = {key: torch.zeros(1, 1, 1, 1) for key in state if key.endswith("conv1.weight")}
    hollow |= {"conv1.weight": torch.zeros(512, 3, 3, 3)}
    message = refused(tmp_path, bare | hollow, code=4)
    assert re.search(r"its first layers are of a network of [67]\d\d,\d+,\d+ numbers; it has \d{2},\d+$", message)
    lost = state | {"layer1.0.bn1.weight": state["layer1.0.bn1.weight"] * float("nan")}
    assert "layer1.0.bn1.weight is not finite" in refused(tmp_path, lost, code=4)


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this must not run",))


class Large:
    def __reduce__(self) -> tuple[Any, ...]:
        return (bytearray, (3 * 2**30,))


def containing_itself() -> dict[str, Any]:
    table: dict[str, Any] = {"conv1.weight": torch.zeros(1)}
    table["model"] = table
    return table


ODD: dict[str, tuple[Callable[[], object], str]] = {
    "meta": (lambda: {"a": torch.zeros(3, device="meta")}, "a is on the meta device"),
    "sparse": (lambda: {"a": torch.eye(3).to_sparse()}, "a is sparse"),
    "quantised": (lambda: {"a": torch.quantize_per_tensor(X.float(), 0.1, 0, torch.qint8)}, "a is quantised"),
    "complex": (lambda: {"m": {"a": torch.zeros(3, dtype=torch.complex64)}}, "m.a is complex"),
    "stretched": (lambda: {"a": torch.zeros(1).expand(10**6, 10**6)}, "a is (1000000, 1000000): tensors far larger"),
    "code": (lambda: {"a": Hostile()}, "holds more than weights (print), and would run code"),
    "itself": (containing_itself, "no ResNet: it holds conv1.weight"),
    "module": (lambda: nn.Linear(2, 2), "holds more than weights (torch.nn.modules.linear.Linear)"),
    "tensor": (lambda: X, "holds a Tensor, not tensors by name"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_what_is_no_plain_tensor_is_named(
    tmp_path: Path, kind: str, zipped: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    make, wanted = ODD[kind]
    path = tmp_path / "odd.safetensors"  # its name tells nothing
    torch.save(make(), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CfamcError, match=re.escape(wanted)) as error:
        read_foreign(path)
    assert (error.value.exit_code, bool(error.value.hint)) == (4, True)
    assert "must not run" not in capfd.readouterr().out


def test_a_file_is_what_its_content_says(tmp_path: Path) -> None:
    state = {key: value.contiguous() for key, value in Theirs().state_dict().items()}
    long = save(state, metadata={"padding": ""})
    header = int.from_bytes(long[:8], "little")
    wanted = header - header % 256 + 0x180  # its lowest byte is 0x80, as of a pickle
    data = save(state, metadata={"padding": "x" * (wanted - header)})
    assert data[:1] == b"\x80"
    path = tmp_path / "weights.pt"
    path.write_bytes(data)
    assert read_foreign(path).model.width == 4
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(CfamcError, match="not a safetensors file"):
        read_foreign_file(path)
    path.write_bytes(b"\x80\x02garbage")
    with pytest.raises(CfamcError, match=r"not a readable file of weights \(Unsupported operand 103\)"):
        read_foreign_file(path)


def test_tables_within_tables_are_followed_so_far_and_no_further(tmp_path: Path) -> None:
    """A name grows with each table, so that a small file could hold gigabytes of names."""
    table: dict[str, Any] = {}
    for _ in range(foreign_file._DEPTH + 9):
        table = {"weight": torch.ones(1), "inner": table}
    torch.save(table, tmp_path / "deep.pt")
    assert len(read_foreign_file(tmp_path / "deep.pt")) == foreign_file._DEPTH + 1
    levels = 100_000
    with zipfile.ZipFile(tmp_path / "deeper.pt", "w") as archive:
        opened = b"}X\x01\x00\x00\x00a" * levels  # an empty table, and the key of the next one in it
        archive.writestr("deeper/data.pkl", b"\x80\x02" + opened + b"}" + b"s" * levels + b".")
        archive.writestr("deeper/version", "3\n")
    assert read_foreign_file(tmp_path / "deeper.pt") == {}


def test_what_is_no_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(CfamcError, match=r"not a regular file|is a directory") as error:
            read_foreign_file(path)
        assert error.value.exit_code == 4
    with pytest.raises(CfamcError, match="no such file"):
        read_foreign_file(tmp_path / "none")


def test_a_zip_that_unpacks_to_gigabytes_is_refused_before(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("bomb/data/0", "w") as file:
        for _ in range(40):
            file.write(bytes(2**24))
    with pytest.raises(CfamcError, match=r"0\.\d MiB that unpack to 0\.6 GiB"):
        read_foreign_file(path)


def test_a_file_is_opened_in_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('a stranger in the working folder')")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "theirs.pt"
    state = Theirs().state_dict()
    torch.save({"state_dict": state}, path)
    found = read_foreign_file(path)
    assert found.keys() == {f"state_dict.{name}" for name in state}
    assert all(torch.equal(found[f"state_dict.{name}"], value) for name, value in state.items())
    torch.save({"a": Large()}, path)
    with pytest.raises(CfamcError, match="too much memory"):
        read_foreign_file(path)
    monkeypatch.setattr(foreign_file, "_WAIT", 0)
    with pytest.raises(CfamcError, match="takes too long to be read") as error:
        read_foreign_file(path)
    assert error.value.exit_code == 4
