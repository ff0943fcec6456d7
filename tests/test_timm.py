"""Backbones that timm makes: timm's own numbers, exact plans, what is refused, and every command on one of them."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from fixed_inputs import fill, uniform
from safetensors.torch import save_file
from tiny import image_folder, tiny_recipe
from torch import Tensor, nn

from cfamc_cli import cli, errors
from cfamc_cli.engine import checkpoint, costs, timm_backbone
from cfamc_cli.engine.data.sets import ImageSet
from cfamc_cli.engine.distributed import World
from cfamc_cli.engine.encoder import Encoder, build_encoder, frozen_statistics
from cfamc_cli.engine.heads.imported import Reading
from cfamc_cli.engine.heads.imported_timm import read_timm
from cfamc_cli.engine.optim import LarsOptimizer
from cfamc_cli.engine.pretrain import Trainer
from cfamc_cli.engine.randomness import addressed_generator
from cfamc_cli.engine.sink import NullLedger, NullTalk
from cfamc_cli.errors import CfamcError, ExitCode
from cfamc_cli.recipe import file as recipe_file
from cfamc_cli.recipe import plan
from cfamc_cli.recipe.file import to_toml
from cfamc_cli.recipe.schema import Lars, Model, Normalize, Recipe

HEADS: dict[str, Any] = {"hidden_dim": 16, "embedding_dim": 8}
VIT: dict[str, Any] = {
    "backbone": "timm:vit_tiny_patch16_224",
    "options": {"img_size": 12, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2},
}
RESNET: dict[str, Any] = {"backbone": "timm:resnet18", "options": {"channels": [8, 8, 16, 16]}}
SWIN: dict[str, Any] = {
    "backbone": "timm:swin_tiny_patch4_window7_224",
    "options": {
        "img_size": 16,
        "patch_size": 2,
        "window_size": 4,
        "depths": [1, 2],
        "num_heads": [1, 2],
        "embed_dim": 8,
    },
}


def model_of(table: dict[str, Any]) -> Model:
    return Model(**table, **HEADS)


def encoder_of(table: dict[str, Any], seed: int = 0) -> Encoder:
    return build_encoder(model_of(table), generator=addressed_generator("init", seed))


def recipe_of(table: dict[str, Any], adversary: str = "free", **tables: Any) -> Recipe:
    whole = tiny_recipe("emp-ssl", adversary, crops=[{"count": 4, "size": 12}], **tables).resolved()
    return Recipe.model_validate(whole | {"model": table | HEADS})


# The net


@pytest.mark.parametrize(
    ("table", "size"),
    [({"backbone": "timm:resnet18"}, 48), (VIT, 12), (SWIN, 16), ({"backbone": "timm:convnext_atto"}, 32)],
)
def test_features_are_timms_and_the_weights_load_into_it(table: dict[str, Any], size: int) -> None:
    net = encoder_of(table)
    fill(net.state_dict())
    theirs = timm.create_model(net.model.timm or "", num_classes=0, **net.model.options)
    theirs.load_state_dict(net.backbone.state_dict())  # strict: the keys and shapes are the same
    x = uniform(2, 3, size, size, key="x").float()
    with torch.no_grad():
        mine, reference = net.eval().features(x, features="backbone"), theirs.eval()(x)
    assert mine.shape == (2, net.feature_dim)
    assert float(mine.std()) > 1e-3
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("table", [VIT, RESNET])
def test_weights_depend_on_the_address_alone_and_the_callers_rng_stays(table: dict[str, Any]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    first = encoder_of(table)
    assert torch.equal(torch.rand(5), expected)
    assert checkpoint.digest_of(encoder_of(table)) == checkpoint.digest_of(first)
    assert checkpoint.digest_of(encoder_of(table, seed=1)) != checkpoint.digest_of(first)


def test_another_process_draws_the_same_weights() -> None:
    code = (
        "import torch; torch.rand(9)\nfrom cfamc_cli.engine import checkpoint\n"
        "from cfamc_cli.recipe.schema import Model\nfrom cfamc_cli.engine.encoder import build_encoder\n"
        "from cfamc_cli.engine.randomness import addressed_generator\n"
        f"model = Model(**{VIT | HEADS!r});"
        "print(checkpoint.digest_of(build_encoder(model, generator=addressed_generator('init', 0))))"
    )
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    assert other == checkpoint.digest_of(encoder_of(VIT))


def test_nothing_is_dropped_so_that_passes_repeat() -> None:
    own = timm.create_model(model_of(SWIN).timm or "", num_classes=0, **SWIN["options"])
    assert any(getattr(part, "drop_prob", 0) for part in own.modules()), "timm drops whole blocks of it"
    net, x = encoder_of(SWIN).train(), uniform(4, 3, 16, 16, key="x").float()
    with frozen_statistics(net):
        torch.manual_seed(0)
        first = net(x)
        torch.manual_seed(1)
        assert torch.equal(net(x), first)


def test_a_net_that_draws_while_it_trains_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Noisy(nn.Module):
        num_features = 3

        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3)) + torch.rand_like(x[:, :, 0, 0])

    monkeypatch.setattr(timm, "create_model", lambda *_, **__: Noisy())
    refused = r"model.backbone: timm:resnet10t draws random numbers in training \(aten.rand"
    with pytest.raises(CfamcError, match=refused):
        costs.plan_of(recipe_of({"backbone": "timm:resnet10t"}), 64)


@pytest.mark.parametrize("table", [VIT, RESNET])
def test_blocks_that_are_made_again_are_the_same_in_every_bit(table: dict[str, Any]) -> None:
    def passes(*, again: bool) -> tuple[list[Tensor], int]:
        net, kept = encoder_of(table), 0
        if again:
            net.recompute()
            net = copy.deepcopy(net)  # a copy makes its own blocks again, not those it was copied from
        net.train()
        x = uniform(2, 4, 3, 12, 12, key="x").float().requires_grad_()

        def note(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        def loss() -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                return (net.embed([x, x[:1]]).square() * torch.arange(8)).sum()

        with frozen_statistics(net):
            attacked = loss()
        found = list(torch.autograd.grad(attacked, [x]))
        loss().backward()
        gradients = [parameter.grad for parameter in (x, *net.parameters()) if parameter.grad is not None]
        assert len(gradients) > 20
        return [*found, *gradients, *net.buffers()], kept

    (full, kept), (made, fewer) = passes(again=False), passes(again=True)
    assert all(torch.equal(one, other) for one, other in zip(full, made, strict=True))
    assert fewer < 0.7 * kept, "what is made in a block is not kept"


def test_lars_leaves_norms_and_biases_to_plain_sgd() -> None:
    net = encoder_of(VIT)
    parameters = dict(net.named_parameters())
    for name, parameter in parameters.items():
        parameter.grad = uniform(*parameter.shape, key=name).float()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    LarsOptimizer(list(parameters.values()), Lars(momentum=0.0, nesterov=False, weight_decay=0.1)).step(lr=0.5)
    plain = {
        name
        for name, parameter in parameters.items()
        if torch.allclose(parameter, before[name] - 0.5 * parameter.grad, atol=1e-7)  # type: ignore[operator]
    }
    assert plain == {name for name, parameter in parameters.items() if parameter.dim() == 1}
    assert {"backbone.blocks.0.norm1.weight", "backbone.blocks.0.attn.qkv.bias", "backbone.norm.bias"} <= plain
    assert not {"backbone.pos_embed", "backbone.patch_embed.proj.weight", "backbone.blocks.0.mlp.fc1.weight"} & plain


# The plan


@pytest.mark.parametrize("table", [VIT, RESNET, SWIN])
def test_a_plan_counts_the_parameters_that_there_are(table: dict[str, Any]) -> None:
    size = 16 if table is SWIN else 12
    recipe = Recipe.model_validate(recipe_of(table).resolved() | {"crops": [{"count": 4, "size": size}]})
    net, shown = encoder_of(table), costs.plan_of(recipe, 64)
    assert shown.parameters == checkpoint.count_parameters(net)
    assert shown.backbone_parameters == checkpoint.count_parameters(net.backbone)


@pytest.mark.parametrize("size", [32, 64])
def test_what_is_measured_is_what_is_counted_of_the_same_net(size: int) -> None:
    recipe = recipe_of({"backbone": "timm:resnet18"})
    recipe = Recipe.model_validate(recipe.resolved() | {"crops": [{"count": 4, "size": size}]})
    counted, measured = plan._resnet(Model(stem="imagenet"), size), timm_backbone.measure(recipe)[size]
    assert measured[:3] == counted[:3]  # features, parameters, products
    kept = [sum(part.kept + 2 * part.places for part in shape.parts) for shape in (counted, measured)]
    assert kept[1] == pytest.approx(kept[0], rel=0.15)
    assert [part.output for part in measured.parts] == [part.output for part in counted.parts]
    assert [part.again for part in measured.parts] == [False] + 8 * [True]


def test_products_of_a_vit_are_those_of_its_formula() -> None:
    tokens, dim, depth, patch = 10, 12, 2, 4
    block = 12 * dim**2 * tokens + 2 * tokens**2 * dim
    assert timm_backbone.measure(recipe_of(VIT))[12].products == depth * block + 9 * 3 * patch**2 * dim


def test_recomputing_is_planned_to_keep_less() -> None:
    shown = costs.plan_of(recipe_of(VIT), 64)
    assert shown.memory_recompute < shown.memory_full
    assert costs.plan_of(recipe_of(VIT, train={"memory": "recompute"}), 64).memory == shown.memory_recompute


# What is refused

SIZES = "set model.options, such as img_size, to what crops and images have; many nets take one size only"
REFUSED = {  # there are no images: all is refused before they are missed
    'model={backbone="timm:vit_tinny_patch16_224"}': (
        f"model.backbone: timm {timm.__version__} knows no vit_tinny_patch16_224",
        "did you mean vit_tiny_patch16_224",
    ),
    'model={backbone="timm:qqqq"}': (
        f"model.backbone: timm {timm.__version__} knows no qqqq",
        "timm.list_models() lists all names",
    ),
    'model={backbone="timm:resnet18", options={patch_size=4}}': (
        "model.options: timm cannot make resnet18 with these: "
        "ResNet.__init__() got an unexpected keyword argument 'patch_size'",
        "the arguments of timm.create_model for that name are what can be set",
    ),
    'model={backbone="timm:vit_tiny_patch16_224"}': (
        "crops.0.size: timm:vit_tiny_patch16_224 does not take images of 12x12 pixels: "
        "Input height (12) doesn't match model (224).",
        SIZES,
    ),
    'data={dataset="cifar10"}': (
        "data.size: timm:vit_tiny_patch16_224 does not take images of 32x32 pixels: "
        "Input height (32) doesn't match model (12).",
        SIZES,
    ),
    'model={backbone="timm:vit_tiny_patch16_224", options={img_size=12, patch_size=4, global_pool=""}}': (
        "crops.0.size: timm:vit_tiny_patch16_224 does not take images of 12x12 pixels: "
        "what comes out is (10, 192), not 192 features",
        SIZES,
    ),
    "phase=[{epochs=0.5, crops=[{count=2, size=16}]}]": (
        "phase.0.crops.0.size: timm:vit_tiny_patch16_224 does not take images of 16x16 pixels: "
        "Input height (16) doesn't match model (12).",
        SIZES,
    ),
}


PLAIN = '"{key}" must be a number, text, true, false or a list of those'
FAULTY = [
    ({"backbone": "timm:"}, "backbone", '"timm:" stands before a name of small letters, digits and _, without a tag'),
    ({"backbone": "timm:resnet18.a1_in1k"}, "backbone", '"timm:" stands before a name'),
    ({"backbone": "timm:hf-hub:timm/resnet18"}, "backbone", '"timm:" stands before a name'),
    ({"backbone": "resnet19"}, "backbone", 'must be "resnet18", "resnet34", "resnet50" or "timm:NAME", not the text'),
    (VIT | {"width": 8}, "width", "has no effect: timm:vit_tiny_patch16_224 has its own (see model.options)"),
    (VIT | {"stem": "cifar"}, "stem", "has no effect: timm:vit_tiny_patch16_224 has its own (see model.options)"),
    ({"options": {"img_size": 32}}, "options", "has no effect: only a backbone timm:NAME has any"),
    (
        VIT | {"options": {"pretrained": True}},
        "options",
        '"pretrained" is not yours to set: a backbone begins untrained',
    ),
    (VIT | {"options": {"checkpoint_path": "x"}}, "options", '"checkpoint_path" is not yours to set'),
    (VIT | {"options": {"num_classes": 5}}, "options", '"num_classes" is not yours to set'),
    (VIT | {"options": {"drop_path_rate": 0.1}}, "options", '"drop_path_rate" cannot be set: nothing is dropped'),
    (VIT | {"options": {"depth": {"a": 1}}}, "options", PLAIN.format(key="depth")),
    (VIT | {"options": {"depth": []}}, "options", PLAIN.format(key="depth")),
    (VIT | {"options": {"depth": 10**6}}, "options", '"depth" is out of range: numbers lie within 65,536 of 0'),
    (VIT | {"options": {"mlp_ratio": [1.0, float("nan")]}}, "options", '"mlp_ratio" is out of range'),
]


@pytest.mark.parametrize(("table", "key", "message"), FAULTY)
def test_what_no_backbone_can_be_is_said_of_its_key(table: dict[str, Any], key: str, message: str) -> None:
    raw = tiny_recipe().resolved() | {"model": table}
    with pytest.raises(CfamcError) as refused:
        recipe_file.validate(raw, label="r.toml")
    assert refused.value.exit_code is ExitCode.INVALID
    assert refused.value.message.startswith(f"r.toml: 1 problem\nmodel.{key}: {message}")


def test_options_are_written_and_digested_and_our_resnets_have_none() -> None:
    recipe = recipe_of(VIT)
    assert recipe_file.validate(recipe_file.parse(to_toml(recipe), label=""), label="") == recipe
    assert recipe_of(VIT | {"options": VIT["options"] | {"depth": 1}}).digest() != recipe.digest()
    assert "options" not in to_toml(tiny_recipe())
    assert not {"width", "stem"} & recipe.resolved()["model"].keys()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CFAMC_RUNS", raising=False)
    (tmp_path / "vit.toml").write_text(to_toml(recipe_of(VIT)))
    return tmp_path


@pytest.mark.parametrize("setting", REFUSED)
def test_what_timm_does_not_take_is_refused_before_anything_runs(
    setting: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message, hint = REFUSED[setting]
    assert cli.run(["pretrain", "vit.toml", "--set", setting]) == ExitCode.INVALID
    error, way, *rest = capsys.readouterr().err.splitlines()
    assert (error, rest) == (f"error: {message}", [])
    assert way.startswith(f"hint: {hint}")
    assert not (folder / "runs").exists()


def test_blocks_can_be_made_again_only_where_a_net_has_any(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ['model={backbone="timm:vgg11"}', "crops=[{count=2, size=32}]", "train.memory=recompute"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    assert cli.run(["pretrain", "vit.toml", "--dry-run", *arguments]) == ExitCode.INVALID
    assert capsys.readouterr().err.endswith(  # below a warning that the folder of images is not there
        'error: train.memory: "recompute" has no effect: timm:vgg11 has no list of blocks to compute again\n'
        'hint: set train.memory = "full"\n'
    )


def test_the_library_is_asked_for_before_torch_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda _: None)
    for arguments in (["pretrain", "vit.toml"], ["pretrain", "vit.toml", "--dry-run"], ["bench", "vit.toml"]):
        assert cli.run(arguments) == ExitCode.INVALID
        assert capsys.readouterr().err.endswith(
            "error: model.backbone = \"timm:vit_tiny_patch16_224\" needs timm\nhint: pip install 'cfamc[timm]'\n"
        )
    code = (
        "import sys; from cfamc_cli import cli, errors; errors.find_spec = lambda _: None;"
        "cli.run(['pretrain', 'vit.toml']); assert not {'torch', 'timm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# Every command


class Work:
    """A folder of images, and a run of a tiny recipe for each backbone."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capture = folder, capture

    def __call__(self, *arguments: str, code: int = 0) -> Any:
        self.capture.readouterr()
        assert cli.run([*arguments, "--json", "--quiet"]) == code, self.capture.readouterr()
        return json.loads(self.capture.readouterr().out)


@pytest.fixture
def work(folder: Path, capsys: pytest.CaptureFixture[str]) -> Work:
    image_folder(folder / "images", train=8, test=6)
    return Work(folder, capsys)


SHORT = {
    "linear": [],
    "robust-linear": ["--set", "probe.epochs=1", "--set", "probe.steps=2"],
    "crops": ["--crops", "2", "--set", "probe.epochs=2"],
    "knn": [],
    "finetune": ["--set", "probe.epochs=1", "--set", "probe.steps=2"],
}


@pytest.mark.parametrize(("name", "table"), [("vit", VIT), ("resnet", RESNET)])
def test_heads_attacks_and_exports_work(
    name: str, table: dict[str, Any], work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    adversary = "pgd" if name == "resnet" else "free"
    recipe = recipe_of(table, adversary, train={"evaluate_every": 1})
    Path("one.toml").write_text(to_toml(recipe))
    run = work("pretrain", "one.toml")
    assert run["totals"]["parameters"] == checkpoint.count_parameters(encoder_of(table))
    digests = {head: work("probe", "--head", head, *further)["encoder_digest"] for head, further in SHORT.items()}
    assert len(set(digests.values())) == 1
    for head in ("linear", "finetune", "crops"):
        (record,) = work("attack", "--head", f"{head}-001", "--eps", "8/255", "--steps", "2")["results"]
        assert record["robust"]["correct"] <= record["clean"]["correct"]
    for part, chosen in (("backbone", []), ("classifier", ["--head", "linear-001"])):
        made = work("export", "--part", part, *chosen, "--out", f"safetensors-{part}")
        assert made["check"]["reader"].startswith("timm ")
    for part, output in (("backbone", "features"), ("classifier", "logits")):
        monkeypatch.chdir(work.folder / f"safetensors-{part}")
        card = Path("README.md").read_text()
        found = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)
        assert found is not None
        assert "cfamc_cli" not in found[1]
        names: dict[str, Any] = {"images": uniform(3, 3, 12, 12, key="x").float()}
        with torch.no_grad():
            exec(compile(found[1], "README.md", "exec"), names)
        assert type(names["net"]).__module__.startswith("timm.")
        assert names[output].shape == (3, 3 if output == "logits" else names["net"].num_features)
        assert f"timm's {table['backbone'].removeprefix('timm:')}" in card
        if part == "backbone":
            whole = timm.create_model("local-dir:.", pretrained=True).eval()
            with torch.no_grad():
                assert torch.equal(whole(names["images"]), names[output])
            tuned = timm.create_model("local-dir:.", pretrained=True, num_classes=7)
            assert tuned(names["images"]).shape == (3, 7)
    monkeypatch.chdir(work.folder)
    again = ("--import", "safetensors-classifier/model.safetensors", "--architecture", told(table))
    record = work("probe", *again, "--data", "images")
    (own,) = (work.folder / "runs").glob("*/probes/linear-001/record.json")
    before = json.loads(own.read_text())
    assert (record["head"], record["features"]) == ("imported", before["features"])
    assert record["confusion"] == before["confusion"]


@pytest.mark.slow
@pytest.mark.parametrize("table", [VIT, RESNET])
@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_graphs_of_them_compute_the_same(table: dict[str, Any], form: str, work: Work) -> None:
    Path("one.toml").write_text(to_toml(recipe_of(table, "none", train={"epochs": 0.25})))
    work("pretrain", "one.toml")
    for part in ("backbone", "classifier"):  # held against the live model before they are handed over
        made = work("export", "--part", part, "--format", form, "--out", part)
        assert made["check"]["reader"].startswith({"pt2": "torch ", "onnx": "onnxruntime "}[form])


def test_images_of_another_size_are_refused_where_they_are_read(work: Work) -> None:
    wide = recipe_of(VIT | {"options": VIT["options"] | {"img_size": 16}}).resolved()
    Path("wide.toml").write_text(to_toml(Recipe.model_validate(wide | {"crops": [{"count": 2, "size": 16}]})))
    refused = work("pretrain", "wide.toml", code=ExitCode.INVALID)["error"]
    assert refused["message"].startswith("timm:vit_tiny_patch16_224 does not take images of 12x12 pixels")
    assert not Path("runs").exists()
    work("pretrain", "vit.toml")
    refused = work("probe", "--data", "fashion-mini", code=ExitCode.INVALID)["error"]
    assert refused["message"].startswith("timm:vit_tiny_patch16_224 does not take images of 28x28 pixels")


# Weights that others trained


def told(table: dict[str, Any]) -> str:
    options = (f"{key}={json.dumps(value)}" for key, value in table["options"].items())
    return ",".join([table["backbone"], *options])


@pytest.mark.parametrize("table", [VIT, RESNET])
@pytest.mark.parametrize("prefix", ["", "module.model."])
def test_features_of_what_is_imported_are_timms(table: dict[str, Any], prefix: str, tmp_path: Path) -> None:
    model = model_of(table)
    with torch.random.fork_rng(devices=[]):
        theirs = timm.create_model(model.timm or "", num_classes=7, **model.options)
    fill(theirs.state_dict())
    state = {prefix + key: value for key, value in theirs.state_dict().items()}
    torch.save({"state_dict": state | {"queue": torch.zeros(3)}}, tmp_path / "weights.pt")
    half = Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    foreign = read_timm(tmp_path / "weights.pt", model, Reading(normalize=half))
    x = uniform(3, 3, 12, 12, key="x").float()
    assert foreign.last is not None
    with torch.no_grad():
        logits = foreign.last.head(foreign.encoder.eval().features(x, features="backbone"))
        torch.testing.assert_close(logits, theirs.eval()((x - 0.5) / 0.5), rtol=1e-5, atol=1e-5)
    assert foreign.notes[0].startswith("left out, for they are no part of the backbone: ")
    assert foreign.notes[0].endswith("queue")


def test_a_classifier_of_timm_becomes_a_run_with_its_last_layer_as_a_head(work: Work) -> None:
    net = timm.create_model("resnet18", num_classes=3, **RESNET["options"])
    fill(net.state_dict())
    save_file(net.state_dict(), work.folder / "net.safetensors")
    record = work("probe", "--import", "net.safetensors", "--architecture", told(RESNET), "--data", "images")
    assert (record["head"], record["features"]) == ("imported", "backbone")
    assert work("attack", "--eps", "8/255", "--steps", "2")["results"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--architecture", "resnet18"], "--architecture 'resnet18': timm:NAME is what it can be"),
        (
            ["--architecture", "timm:resnet18,in_chans=3"],
            "--architecture 'timm:resnet18,in_chans=3': \"in_chans\"",
        ),
        (["--architecture", "timm:resnt18"], f"model.backbone: timm {timm.__version__} knows no resnt18"),
        (["--architecture", told(RESNET), "--network", "a"], "--network would have no effect beside --architecture"),
        (["--architecture", told(VIT)], "net.safetensors: no timm:vit_tiny_patch16_224: it holds"),
        (["--architecture", "timm:resnet18"], "net.safetensors: another architecture: lacks"),
    ],
)
def test_what_the_file_is_not_is_said(flags: list[str], message: str, work: Work) -> None:
    net = timm.create_model("resnet18", num_classes=3, stem_width=16, stem_type="deep", **RESNET["options"])
    save_file(net.state_dict(), work.folder / "net.safetensors")
    code = ExitCode.BAD_DATA if message.startswith("net.") else ExitCode.INVALID
    refused = work("probe", "--import", "net.safetensors", "--data", "images", *flags, code=code)["error"]
    assert refused["message"].startswith(message)
    assert refused["hint"]
    assert not Path("runs").exists()


@pytest.mark.parametrize("table", [VIT, RESNET])
def test_a_run_that_was_cut_goes_on_bit_for_bit(table: dict[str, Any], tiny_images: ImageSet, tmp_path: Path) -> None:
    def trainer() -> Trainer:
        quiet = NullTalk(), NullLedger()
        recipe = recipe_of(table, train={"epochs": 0.375, "memory": "recompute"})
        return Trainer(recipe, tiny_images, device=torch.device("cpu"), world=World(), talk=quiet[0], ledger=quiet[1])

    straight = trainer()
    straight.train(tmp_path / "straight", stop=lambda: 0)
    trainer().train(tmp_path / "cut", stop=lambda: 15)
    path, saved, _ = checkpoint.newest_valid(tmp_path / "cut")
    second = trainer()
    second.load(saved, path=path)
    assert 0 < second.step < second.updates
    second.train(tmp_path / "cut", stop=lambda: 0)
    assert checkpoint.digest_of(second.encoder) == checkpoint.digest_of(straight.encoder)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_is_compiled_computes_the_same() -> None:
    """Embeddings, and the gradient that an adversary takes its signs from."""
    net, x = encoder_of(VIT), torch.rand(6, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    fill(net.state_dict())
    found = []
    for _ in range(2):
        given = x.clone().requires_grad_()
        z = net(given)
        z[:, 0].sum().backward()
        assert given.grad is not None
        found.append((z.detach(), given.grad))
        net.compile(dynamic=False)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
