"""Corruptions: what each does to pixels, that an image's own are the same everywhere, and published sets from files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fixed_inputs import uniform
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import functional as V

from cfamc_cli.commands.measure import corruptions_summary
from cfamc_cli.engine import corruptions as module
from cfamc_cli.engine.corruptions import KINDS, NAME, SEVERITIES, corrupted
from cfamc_cli.engine.data.corrupted import find_published
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.evaluation.measures import corruptions
from cfamc_cli.engine.evaluation.verify import Predictor
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.store.records import Accuracy

SMOOTH = torch.nn.functional.interpolate(0.2 + 0.6 * uniform(6, 3, 4, 4, key="x").float(), [32, 32], mode="bilinear")
X = ((SMOOTH + 0.1 * uniform(6, 3, 32, 32, key="grain").float()) * 255).round().clamp(0, 255) / 255
PLACES = torch.tensor([5, 70, 2, 3, 9, 8])


@pytest.mark.parametrize("kind", KINDS)
def test_a_corruption_grows_with_its_severity_and_is_the_same_in_any_company(kind: str) -> None:
    before, far = torch.get_rng_state(), []
    for severity in SEVERITIES:
        made = corrupted(X, PLACES, kind=kind, severity=severity)
        assert made.shape == X.shape
        assert torch.equal(made, (made * 255).round() / 255)  # as a file would hold it
        assert 0 <= float(made.min()) <= float(made.max()) <= 1
        assert torch.equal(corrupted(X[[4, 1]], PLACES[[4, 1]], kind=kind, severity=severity), made[[4, 1]])
        far.append(float((made - X).square().mean().sqrt()))
    assert far == sorted(far)
    assert 0.003 < far[0] < 0.8 * far[-1] < 0.4
    assert torch.equal(torch.get_rng_state(), before)
    others = corrupted(X, PLACES + 1, kind=kind, severity=3)
    drawn = kind.endswith("noise") or kind in ("elastic", "motion-blur")
    assert torch.equal(others, corrupted(X, PLACES, kind=kind, severity=3)) is not drawn


def in_255ths(x: torch.Tensor) -> torch.Tensor:
    return (x.clamp(0, 1) * 255).round() / 255


@pytest.mark.parametrize("severity", SEVERITIES)
def test_what_a_severity_means(severity: int) -> None:
    """Recomputed one image at a time, with torchvision where it has the same."""
    sigma, photons, share, blur, tiles, contrast, more, colour = (
        values[severity - 1]
        for values in (
            (0.04, 0.06, 0.08, 0.09, 0.1),
            (500, 250, 100, 75, 50),
            (0.01, 0.02, 0.03, 0.05, 0.07),
            (0.4, 0.6, 0.7, 0.8, 1.0),
            (0.2, 0.35, 0.5, 0.7, 1.0),
            (0.75, 0.5, 0.4, 0.3, 0.15),
            (0.05, 0.1, 0.15, 0.2, 0.3),
            (1.5, 2, 2.5, 3.5, 5),
        )
    )
    made = {kind: corrupted(X, PLACES, kind=kind, severity=severity) for kind in KINDS}
    for row, place in enumerate(PLACES.tolist()):
        x = X[row]
        noise = {
            kind: torch.randn(3, 32, 32, generator=addressed_generator(NAME, kind, severity, place)) for kind in KINDS
        }
        u = torch.special.ndtr(noise["impulse-noise"])
        struck = torch.where(u > 1 - share / 2, 1.0, torch.where(u < share / 2, 0.0, x))
        mean = x.mean((1, 2), keepdim=True)
        tiled = x.unflatten(2, (8, 4)).unflatten(1, (8, 4)).mean((2, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)
        expected = {
            "gaussian-noise": x + sigma * noise["gaussian-noise"],
            "shot-noise": x + (x / photons).sqrt() * noise["shot-noise"],
            "impulse-noise": struck,
            "gaussian-blur": V.gaussian_blur(x, [9, 9], [blur, blur]),  # a tail of 4 sigma and more
            "pixelate": x + tiles * (tiled - x),
            "contrast": mean + contrast * (x - mean),
            "brightness": x + more,
            "saturate": V.adjust_saturation(x, colour),
        }
        for kind, images in expected.items():
            torch.testing.assert_close(made[kind][row], in_255ths(images), atol=1.01 / 255, rtol=0)
            assert float((made[kind][row] == in_255ths(images)).float().mean()) > 0.95, kind


def test_pixels_move_by_as_much_as_is_said() -> None:
    ramp = torch.linspace(0.1, 0.9, 32).expand(2, 3, 32, 32).clone()  # rises by 0.8 / 31 a pixel to the right
    shift = torch.tensor([[1.5, 0.0], [0.0, 2.0]])[:, None, None]
    moved = module._moved(ramp, shift)
    torch.testing.assert_close(moved[0, :, :, 4:28], ramp[0, :, :, 4:28] + 1.5 * 0.8 / 31)
    torch.testing.assert_close(moved[1], ramp[1], atol=1e-6, rtol=0)
    step = (torch.arange(32) >= 16).float().expand(1, 3, 32, 32)
    blurred = corrupted(step, torch.tensor([0]), kind="motion-blur", severity=5)[0, 0, 16]
    assert 0 < float(blurred[16]) < 1 or float(corrupted(step.mT, PLACES[:1], kind="motion-blur", severity=5).std()) > 0


# Accuracy of each kind and severity


def test_accuracies_are_those_of_the_corrupted_images_of_each_place() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).eval().requires_grad_(False)
    net.load_state_dict({"1.weight": uniform(4, 3072, key="w").float() - 0.5, "1.bias": torch.zeros(4)})
    y, seen = net(X).argmax(1), list[tuple[str, int, list[int]]]()
    y[0] = (y[0] + 1) % 4

    def corrupt(x: torch.Tensor, places: torch.Tensor, kind: str, severity: int) -> torch.Tensor:
        seen.append((kind, severity, places.tolist()))
        return corrupted(x, places, kind=kind, severity=severity)

    values = corruptions(("contrast", "pixelate"), corrupt, places=PLACES, block_size=4)
    found = values(Predictor(net, net, (net,)), X[4:], y[4:], 1)
    assert seen == [(kind, severity, [9, 8]) for kind in ("contrast", "pixelate") for severity in SEVERITIES]
    columns = dict(values(Predictor(net, net, (net,)), X[:4], y[:4], 0))
    whole = {name: torch.cat((columns[name], found[name])).tolist() for name in columns}
    assert whole["clean"] == [0.0] + [1.0] * 5
    for severity in SEVERITIES:
        right = net(corrupted(X, PLACES, kind="pixelate", severity=severity)).argmax(1) == y
        assert whole[f"pixelate/{severity}"] == right.float().tolist()


def test_the_mean_is_that_of_all_kinds_and_severities() -> None:
    columns = {"clean": [1.0, 1.0, 1.0, 0.0]} | {
        f"{kind}/{severity}": [float(place < count) for place in range(4)]
        for kind, counts in (("blur", (4, 3, 2, 2, 1)), ("noise", (3, 3, 1, 0, 0)))
        for severity, count in zip(SEVERITIES, counts, strict=True)
    }
    summary = corruptions_summary(columns)
    assert [(p.name, p.at, p.accuracy) for p in summary.points[4:7]] == [
        ("blur", 5, Accuracy.of(1, 4)),
        ("noise", 1, Accuracy.of(3, 4)),
        ("noise", 2, Accuracy.of(3, 4)),
    ]
    assert summary.figures == {
        "mean": pytest.approx(19 / 40),
        "relative to clean": pytest.approx(19 / 30),
        "mean of blur": pytest.approx(12 / 20),
        "mean of noise": pytest.approx(7 / 20),
    }
    assert summary.notes == []
    alone = corruptions_summary(columns, apart=("noise", "fog"))
    assert alone.figures["mean"] == pytest.approx(12 / 20)
    assert alone.figures["mean of noise"] == pytest.approx(7 / 20)
    assert alone.notes == ["the mean leaves out noise, which were published for validation"]
    assert corruptions_summary(columns, apart=("noise", "blur")).figures["mean"] == pytest.approx(19 / 40)


# Published sets

LABELS = torch.tensor([0, 0, 1, 2])


def images_of_the_test() -> ImageSet:
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    return ImageSet(
        images=images, labels=LABELS, classes=("ant", "bee", "cat"), fingerprint="f", dataset="folder", split="test",
        licence="",
    )  # fmt: skip


def pixels_of(severity: int, place: int) -> int:
    return 40 * severity + 5 * place


@pytest.fixture(params=["arrays", "folders"])
def published(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Two kinds of corruption of four images, each as bright as its severity and place."""
    whole = np.array([[pixels_of(severity, place) for place in range(4)] for severity in SEVERITIES], dtype=np.uint8)
    if request.param == "arrays":
        np.save(tmp_path / "labels.npy", np.tile(LABELS.numpy(), 5))
        for kind in ("fog", "snow"):
            pixels = np.broadcast_to(whole.reshape(20, 1, 1, 1), (20, 8, 8, 3))
            np.save(tmp_path / f"{kind}.npy", pixels)
    else:
        for kind in ("fog", "snow"):
            for severity in SEVERITIES:
                for place, label in enumerate(LABELS.tolist()):
                    folder = tmp_path / kind / str(severity) / ("ant", "bee", "cat")[label]
                    folder.mkdir(parents=True, exist_ok=True)
                    Image.new("RGB", (8, 8), (pixels_of(severity, place),) * 3).save(folder / f"{place}.png")
    return tmp_path


def test_published_images_are_those_of_their_severity_and_place(published: Path) -> None:
    found = find_published(published, images_of_the_test())
    assert found.kinds == ("fog", "snow")
    for severity in SEVERITIES:
        images = found.images(torch.tensor([3, 0, 2]), kind="snow", severity=severity)
        assert images.shape == (3, 3, 8, 8)
        assert (images[:, 0, 0, 0] * 255).round().tolist() == [pixels_of(severity, place) for place in (3, 0, 2)]


def test_what_is_not_of_the_test_set_is_refused(published: Path) -> None:
    other = ImageSet(**{**vars(images_of_the_test()), "labels": LABELS.flip(0)})
    for folder, images, message in ((published, other, "fog|labels.npy"), (published.parent / "no", other, "holds no")):
        with pytest.raises(CfamcError, match=message) as refused:
            find_published(folder, images)
        assert refused.value.exit_code == ExitCode.BAD_DATA


def test_what_lacks_a_part_is_refused_with_a_way_on(published: Path) -> None:
    if (published / "labels.npy").is_file():
        np.save(published / "snow.npy", np.zeros((20, 8, 8, 3), dtype=np.float32))
        cause = r"snow\.npy is \(20, 8, 8, 3\) of float32, not \(20, 8, 8, 3\) of uint8"
    else:
        (published / "snow/3/bee/2.png").unlink()
        found = find_published(published, images_of_the_test())
        with pytest.raises(CfamcError, match=r"bee/2\.png cannot be read") as refused:
            found.images(torch.tensor([2]), kind="snow", severity=3)
        assert (refused.value.exit_code, bool(refused.value.hint)) == (ExitCode.BAD_DATA, True)
        shutil.rmtree(published / "snow/3")
        cause = "holds no snow/3"
    with pytest.raises(CfamcError, match=cause) as refused:
        find_published(published, images_of_the_test())
    assert (refused.value.exit_code, bool(refused.value.hint)) == (ExitCode.BAD_DATA, True)


def test_an_array_of_objects_is_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "labels.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    with pytest.raises(CfamcError, match="no array that can be read"):
        find_published(tmp_path, images_of_the_test())
    np.save(tmp_path / "labels.npy", np.tile(LABELS.numpy(), 5))
    np.save(tmp_path / "fog.npy", np.zeros((20, 8, 8), dtype=np.uint8))
    with pytest.raises(CfamcError, match=r"fog\.npy is \(20, 8, 8\)"):
        find_published(tmp_path, images_of_the_test())
