"""What is said of an encoder without labels: each number from tensors, by closed forms and an independent spelling."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import recipe_text, the_run
from torch import Tensor

from cfamc_cli import cli
from cfamc_cli.commands import unlabelled as command
from cfamc_cli.commands.common import Options
from cfamc_cli.commands.pretrain import pretrain
from cfamc_cli.engine.encoder import Encoder
from cfamc_cli.engine.evaluation import representation
from cfamc_cli.engine.evaluation.representation import alpha_req, moved, outputs_of, rank_me
from cfamc_cli.engine.heads.classifier import load_encoder
from cfamc_cli.engine.sink import NullTalk
from cfamc_cli.errors import Interrupted
from cfamc_cli.recipe.schema import EmbeddingAttack
from cfamc_cli.store.records import UnlabelledRecord, load_record

CPU = torch.device("cpu")
Attack = Callable[..., tuple[int, str, str]]


def silent(_done: int, _total: int) -> None:
    pass


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_spectrum(singular: Tensor, *, n: int) -> Tensor:
    """A matrix (n, D) with these singular values, whose columns have no mean."""
    raw = noise(n, len(singular))
    left: Tensor = torch.linalg.qr(raw - raw.mean(0))[0]
    right: Tensor = torch.linalg.qr(noise(len(singular), len(singular), seed=1))[0]
    return left * singular @ right.T


# Spectra


def test_rank_me_counts_directions() -> None:
    assert rank_me(torch.linalg.qr(noise(60, 9))[0]) == pytest.approx(9, rel=1e-4)
    assert rank_me(7 * torch.linalg.qr(noise(60, 9))[0].T) == pytest.approx(9, rel=1e-4)  # more dimensions than images
    assert rank_me(torch.outer(noise(60), noise(9, seed=1))) == pytest.approx(1, abs=1e-4)
    assert rank_me(torch.ones(60, 9)) == pytest.approx(1, abs=1e-4)


def test_rank_me_as_numpy_spells_it() -> None:
    z = noise(40, 7) * torch.arange(1, 8)
    sigma = np.linalg.svd(z.numpy(), compute_uv=False)
    p = sigma / np.sum(np.abs(sigma)) + 1e-7
    assert rank_me(z.float()) == pytest.approx(float(np.exp(-np.sum(p * np.log(p)))), rel=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_alpha_is_the_exponent_of_an_exact_power_law(alpha: float) -> None:
    rank = torch.arange(1, 121, dtype=torch.float64)
    z = of_spectrum(rank ** (-alpha / 2), n=300)
    assert alpha_req(z) == pytest.approx(alpha, rel=1e-6)
    assert alpha_req(z + 5) == pytest.approx(alpha, rel=1e-6)  # a mean is no direction
    bent = rank ** (-alpha / 2)
    bent[:10] = bent[0]  # what comes before the tail, and after it, has no say
    bent[100:] = bent[99] / 50
    assert alpha_req(of_spectrum(bent, n=300)) == pytest.approx(alpha, rel=1e-6)


def test_alpha_as_numpy_spells_it() -> None:
    z = noise(200, 60) * (1 + torch.arange(60)) ** -0.7
    values = np.sort(np.linalg.eigvalsh(np.cov(z.numpy().T, bias=True)))[::-1]
    ranks = np.arange(11, 61)
    line = np.polyfit(np.log(ranks), np.log(values[10:60]), 1, w=np.sqrt(1 / ranks))  # polyfit squares its weights
    assert alpha_req(z) == pytest.approx(-float(line[0]), rel=1e-6)


def test_no_alpha_where_the_tail_is_empty() -> None:
    assert alpha_req(of_spectrum(torch.ones(8, dtype=torch.float64), n=30)) is None
    assert alpha_req(torch.outer(noise(60), noise(40, seed=1))) is None


def test_each_layer_is_what_the_encoder_makes(model: Encoder) -> None:
    images = (noise(9, 3, 12, 12).sigmoid() * 256).to(torch.uint8)
    found = outputs_of(model, images, backbone_only=False, device=CPU, each=silent)
    x = images.float() / 255
    expected = {"backbone": model.backbone(x), "pre_feature": model.features(x), "embedding": model(x)}
    assert list(found) == list(expected)
    for layer, output in found.items():
        torch.testing.assert_close(output, expected[layer], rtol=1e-5, atol=1e-6)
    assert list(outputs_of(model, images, backbone_only=True, device=CPU, each=silent)) == ["backbone"]


# Movement

TURN = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])  # of the first two pixels of the red plane


def flat(x: Tensor) -> Tensor:
    """Two features: a linear map of two pixels, away from 0."""
    return x[:, 0, 0, :2] @ TURN + 1


def stage(eps: str, **settings: Any) -> EmbeddingAttack:
    return EmbeddingAttack(name="embedding", eps=eps, **settings)


def test_movement_against_a_search_of_the_whole_box() -> None:
    images = torch.randint(30, 220, (40, 3, 1, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = images.double() / 255
    bank = flat(x.float())
    found = moved(flat, images, bank, stage=stage("8/255", steps=10, restarts=20), seed=0, device=CPU, each=silent)
    z = bank.double().numpy()
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    reach = np.linspace(-8 / 255, 8 / 255, 33)
    kept = []
    for row, pixels in enumerate(x[:, 0, 0, :2].numpy()):
        moves = np.array([(a, b) for a in reach for b in reach])
        there = (pixels + moves) @ TURN.numpy() + 1
        there /= np.linalg.norm(there, axis=1, keepdims=True)
        worst = (there @ unit[row]).argmin()
        assert float(found.cosine[row]) == pytest.approx(float(there[worst] @ unit[row]), abs=1e-5)
        others = np.delete(np.arange(len(z)), row)
        kept.append(others[(unit[others] @ unit[row]).argmax()] == others[(unit[others] @ there[worst]).argmax()])
    assert found.invalid == 0
    agreeing = found.kept.numpy() == np.array(kept)
    assert agreeing.sum() >= len(z) - 1  # two moves of equal length may differ in their side
    assert 0 < found.kept.sum() < len(z)


def test_nothing_moves_without_an_eps_and_more_with_a_larger_one(model: Encoder) -> None:
    images = (noise(12, 3, 12, 12).sigmoid() * 256).to(torch.uint8)
    bank = outputs_of(model, images, backbone_only=True, device=CPU, each=silent)["backbone"]
    cosines = []
    for eps in ("0", "4/255", "32/255"):
        found = moved(
            lambda x: model.features(x, features="backbone"),
            images[:8],
            bank,
            stage=stage(eps, steps=5),
            seed=0,
            device=CPU,
            each=silent,
        )
        assert found.cosine.shape == found.kept.shape == (8,)
        cosines.append(float(found.cosine.mean()))
        if eps == "0":
            assert found.kept.all()
    assert cosines[0] == pytest.approx(1, abs=1e-6)
    assert cosines[0] > cosines[1] > cosines[2]


def test_a_point_outside_the_ball_counts_as_unmoved(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (6, 3, 1, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    def cheat(_stage: object, _predict: object, x: Tensor, *_: object, **__: object) -> Tensor:
        out = x.clone()
        out[::2] = 1 - out[::2]
        return out

    monkeypatch.setattr(representation, "run_stage", cheat)
    bank = flat(images.float() / 255)
    found = moved(flat, images, bank, stage=stage("1/255"), seed=0, device=CPU, each=silent)
    assert found.invalid == 3
    torch.testing.assert_close(found.cosine, torch.ones(6, dtype=torch.float64))
    assert found.kept.all()


@pytest.fixture
def model() -> Encoder:
    from tiny import tiny_recipe

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Encoder(tiny_recipe().model).eval().requires_grad_(False)


# The command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one run, which has no head."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "tiny.toml"
    path.write_text(recipe_text())
    options = Options(device="cpu", runs=folder / "runs", quiet=True)
    pretrain(str(path), overrides=[], seeds=[], resume=None, dry_run=False, force=False, options=options)
    return folder / "runs"


@pytest.fixture
def store(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "runs"))


@pytest.fixture
def loose(tmp_path: Path) -> Path:
    """Thirty images in no class."""
    folder = tmp_path / "loose"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(30):
        Image.fromarray(draw.integers(0, 256, (12, 12, 3)).astype(np.uint8)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def attack(store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Attack:
    monkeypatch.setenv("XDG_CACHE_HOME", str(store.parent / "cache"))

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.run(["attack", "--runs", str(store), "--device", "cpu", "--unlabelled", *arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_a_folder_without_classes_is_enough(store: Path, loose: Path, attack: Attack) -> None:
    code, out, err = attack("--data", str(loose), "--eps", "8/255", "--eps", "2/255", "--steps", "3", "--json")
    assert code == 0, err
    answer = json.loads(out)
    run = the_run(store)
    assert not run.probes.exists()
    assert not run.attacks.exists()
    record = load_record(Path(answer["path"]) / "record.json", UnlabelledRecord)
    assert answer["results"] == [record.model_dump(mode="json")]
    assert [movement.eps for movement in record.movements] == ["2/255", "8/255"]
    assert (record.data.dataset, record.data.split, record.data.n) == ("folder", "train", 30)
    encoder = load_encoder(run.checkpoints, run.recipe().model, device=CPU, talk=NullTalk()).encoder
    pixels = [torch.tensor(np.array(Image.open(path))).permute(2, 0, 1) for path in sorted(loose.iterdir())]
    x = torch.stack(pixels).float() / 255
    layers = {"backbone": encoder.backbone(x), "pre_feature": encoder.features(x), "embedding": encoder(x)}
    for spectrum in record.spectra:
        z = layers[spectrum.layer].double().numpy()
        sigma = np.linalg.svd(z, compute_uv=False)
        p = sigma / sigma.sum() + 1e-7
        assert spectrum.rank_me == pytest.approx(float(np.exp(-(p * np.log(p)).sum())), rel=1e-3)
        assert spectrum.dim == z.shape[1]
    assert record.features == "pre_feature"
    assert record.movements[0].cosine > record.movements[1].cosine
    assert all(movement.kept.n == 30 and movement.invalid == 0 for movement in record.movements)


def test_what_is_finished_is_kept_and_not_done_again(
    store: Path, attack: Attack, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ("--eps", "2/255", "--eps", "8/255", "--steps", "2", "--limit", "12")
    made: list[str] = []
    real = representation.moved

    def counted(*arguments: Any, stage: EmbeddingAttack, **others: Any) -> Any:
        if len(made) == 1 and stage.eps == "8/255":
            made.append("cut")
            raise Interrupted(signal.SIGINT)
        made.append(stage.eps)
        return real(*arguments, stage=stage, **others)

    monkeypatch.setattr(representation, "moved", counted)
    code, _, err = attack(*whole)
    assert (code, "every finished eps is kept" in err) == (130, True)
    code, _, err = attack(*whole, "--json")
    assert (code, made) == (0, ["2/255", "cut", "8/255"]), err
    folder = the_run(store).unlabelled / "embedding-linf-001"
    resumed = load_record(folder / "record.json", UnlabelledRecord)
    shutil.rmtree(folder)
    assert attack(*whole)[0] == 0
    uncut = load_record(folder / "record.json", UnlabelledRecord)
    assert made == ["2/255", "cut", "8/255", "2/255", "8/255"]

    def lasting(record: UnlabelledRecord) -> Any:
        movements = [movement.model_dump(exclude={"wall_seconds"}) for movement in record.movements]
        return record.model_dump(exclude={"created", "wall_seconds", "environment", "movements"}) | {"all": movements}

    assert lasting(resumed) == lasting(uncut)
    _, _, err = attack(*whole)
    assert "finished on" in err
    assert len(made) == 5
    for other in (("--limit", "9"), ("--steps", "3"), ("--norm", "l2")):
        assert attack(*whole, *other)[0] == 0
    assert len(list((store / the_run(store).id / "unlabelled").iterdir())) == 4


def test_without_eps_a_curve_up_to_the_attacks_own(store: Path, attack: Attack) -> None:
    code, out, err = attack("--steps", "1", "--limit", "4", "--norm", "l2", "--json")
    assert code == 0, err
    (found,) = json.loads(out)["results"]
    assert [movement["eps"] for movement in found["movements"]] == ["32/255", "64/255", "128/255"]
    assert found["settings"] == {"name": "embedding", "norm": "l2", "step_size": "0.1", "steps": 1, "restarts": 1}


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (["--head", "linear"], "--head would have no effect"),
        (["--audit", "--strict"], "--strict, --audit would have no effect"),
        (["--attack", "pgd"], "--attack pgd needs labels"),
        (["--limit", "100000"], "--limit: there are"),
        (["--data", "nowhere"], "neither a known data set nor a folder"),
        (["--split", "holdout"], "no training images"),
    ],
)
def test_what_has_no_effect_is_refused(arguments: list[str], cause: str, attack: Attack) -> None:
    code, out, err = attack(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert cause in err
    assert len(err.splitlines()) <= 2


def test_other_images_are_for_this_alone(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["attack", "--runs", str(store), "--data", "cifar10"]) == 2
    assert "--data has no effect without --unlabelled" in capsys.readouterr().err


def test_a_comparison_shows_them_apart(store: Path, attack: Attack, capsys: pytest.CaptureFixture[str]) -> None:
    assert attack("--eps", "8/255", "--steps", "2", "--limit", "12")[0] == 0
    record = load_record(the_run(store).unlabelled / "embedding-linf-001" / "record.json", UnlabelledRecord)
    page = store.parent / "page.html"
    assert cli.run(["compare", str(store), "--html", str(page), "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["unlabelled"] == [record.model_dump(mode="json")]
    assert (found["tables"], found["left_out"]) == ([], [])
    assert "nothing to compare" not in said.err
    assert "Without labels" in page.read_text()
    assert cli.run(["compare", str(store), "--format", "markdown"]) == 0
    out = capsys.readouterr().out
    assert f"{record.movements[0].cosine:.3f}" in out
    assert "not comparable with one" in out
    assert command.MOVED == 1000
