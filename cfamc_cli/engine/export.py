"""Weights that load elsewhere: written, read back from the file, and held against the live model.

A part is the backbone (torchvision's or timm's names), backbone and `pre_feature`, or those with a linear head.
Formats are safetensors, torch.export's archive (.pt2) and ONNX, the last two for any batch size and one image size.
Symbols: N images, F features, C classes, S pixels of a side. Images are float32 in [0, 1], and so is all arithmetic.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, assert_never

import torch
from torch import Tensor, nn

from cfamc_cli.engine import checkpoint
from cfamc_cli.engine.device import full_precision
from cfamc_cli.engine.encoder import Encoder
from cfamc_cli.engine.heads.classifier import Classifier, LinearHead, feature_dim
from cfamc_cli.errors import CfamcError, invalid, require_libraries
from cfamc_cli.recipe.schema import DEPTHS, PADDING, Model
from cfamc_cli.store.records import CheckRecord, DataUsed, Format, OutputSpec

Forward = Callable[[Tensor], Tensor]

RTOL, ATOL = 1e-3, 1e-5
BATCHES = (1, 2, 7)
IMAGES = sum(BATCHES)  # that a check looks at
INPUT = "images"
_ONNX_LIMIT = 3 * 2**29  # bytes of weights; a protocol buffer ends at 2 GiB, so larger weights lie in a second file


class Stack(nn.Module):
    """Input, backbone, `pre_feature` and head, as far as there are any, by name: (N, 3, S, S) to (N, F) or (N, C).

    Attributes:
        input: What is done to images before; None where nothing is.
        backbone: From images to features.
        pre_feature: What heads read; None where they read the backbone.
        head: A plain linear layer; None where features are handed over.
    """

    def __init__(
        self, backbone: nn.Module, pre_feature: nn.Module | None, head: nn.Module | None, before: nn.Module | None
    ) -> None:
        super().__init__()
        self.input, self.backbone, self.pre_feature, self.head = before, backbone, pre_feature, head

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.backbone(images if self.input is None else self.input(images))
        if self.pre_feature is not None:
            x = self.pre_feature(x)
        return x if self.head is None else self.head(x)


@dataclass(frozen=True)
class Subject:
    """What is handed over."""

    model: Model  # the recipe's
    module: nn.Module  # the weights under the names that they get, on the CPU, in eval mode
    live: Forward  # what the files are held against: the part of the encoder or classifier itself
    device: torch.device  # where `live` computes
    output: OutputSpec


def backbone_of(encoder: Encoder, model: Model, *, device: torch.device) -> Subject:
    """The backbone, from images to (N, F), by torchvision's or timm's names, which follow those of an input layer."""
    output = OutputSpec(name="features", dim=feature_dim(encoder, "backbone"))
    whole = encoder.backbone if encoder.input is None else Stack(encoder.backbone, None, None, encoder.input)
    return Subject(model, _portable(whole), partial(encoder.features, features="backbone"), device, output)


def encoder_of(encoder: Encoder, model: Model, *, device: torch.device) -> Subject:
    """Backbone and `pre_feature`, from images to what heads read; the projector served the objective alone."""
    module = _portable(Stack(encoder.backbone, encoder.pre_feature, None, encoder.input))
    output = OutputSpec(name="features", dim=feature_dim(encoder, "pre_feature"))
    return Subject(model, module, encoder.features, device, output)


def classifier_of(classifier: Classifier, model: Model, *, device: torch.device) -> Subject:
    """Encoder and head, from images to logits; a head that standardises its features becomes a plain linear layer.

    Raises:
        CfamcError: Exit 2; the head reads random crops of an image, which no file of weights can hold.
    """
    if classifier.crops is not None:
        raise invalid(
            "a head on aggregated crops reads random crops, which are no part of a network's weights",
            "export --part encoder, or name a linear, robust-linear or finetune head with --head",
        )
    encoder, head = classifier.encoder, _plain_linear(classifier.head)
    pre_feature = encoder.pre_feature if classifier.features == "pre_feature" else None
    module = Stack(encoder.backbone, pre_feature, head, encoder.input)
    return Subject(model, _portable(module), classifier, device, OutputSpec(name="logits", dim=head.out_features))


def require(wanted: Format) -> None:
    """Refuse a format whose libraries are missing, before any work is done.

    Raises:
        CfamcError: Exit 2, with how to install them.
    """
    if wanted == "onnx":
        require_libraries("onnx", "onnxscript", "onnxruntime", by="--format onnx", extra="onnx")


def write(subject: Subject, path: Path, images: Tensor, *, data: DataUsed, wanted: Format) -> CheckRecord:
    """Write a file, read it back and compare; the caller removes what does not agree.

    Args:
        subject: What to write.
        path: The file, in a folder where nothing else needs it yet.
        images: uint8, (IMAGES, 3, S, S), real ones; their size is the size that .pt2 and ONNX files take.
        data: Where they are from.
        wanted: How to write it.

    Raises:
        CfamcError: Exit 1; the file cannot be read back, or what was read computes something else.
    """
    _save(subject, path, images, wanted=wanted)
    try:
        reader, forward = read_back(subject, path, wanted=wanted)
    except Exception as error:  # whatever a library raises at a file that it cannot read
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise CfamcError(f"{path.name} cannot be read back: {cause}") from error
    largest = compare(subject, forward, images, name=f"{path.name}, read back by {reader},")
    return CheckRecord(reader=reader, batches=BATCHES, rtol=RTOL, atol=ATOL, largest_difference=largest, data=data)


@torch.no_grad()
def compare(subject: Subject, forward: Forward, images: Tensor, *, name: str) -> float:
    """Hold what was read back against the live model on batches of 1, 2 and 7 different images.

    Args:
        subject: The live model.
        forward: What was read back: (n, 3, S, S) in [0, 1] on the CPU to (n, F) or (n, C).
        images: uint8, (IMAGES, 3, S, S).
        name: What messages call it.

    Returns:
        The largest difference of an output.

    Raises:
        CfamcError: Exit 1; some output is further off than RTOL and ATOL allow, or another class has the highest
            logit.
    """
    largest = 0.0
    for chunk in torch.split(images, list(BATCHES)):
        x = chunk.float() / 255
        with full_precision(subject.device):
            wanted = subject.live(x.to(subject.device)).float().cpu()
        found = forward(x)
        where = f"{name} differs from the live model at batch {len(x)}"
        if found.shape != wanted.shape:
            raise CfamcError(f"{where}: shape {tuple(found.shape)} where {tuple(wanted.shape)} is right")
        difference = float((found - wanted).abs().max())
        if not torch.allclose(found, wanted, rtol=RTOL, atol=ATOL):
            raise CfamcError(
                f"{where} by up to {difference:.3g}, more than {RTOL:g} relative and {ATOL:g} absolute",
                hint="nothing was handed over; other versions of the libraries may do better",
            )
        if subject.output.name == "logits" and not torch.equal(found.argmax(1), wanted.argmax(1)):
            raise CfamcError(f"{where}: another class", hint="nothing was handed over")
        largest = max(largest, difference)
    return largest


def some_images(images: Tensor) -> Tensor:
    """The first images of a set, uint8, (IMAGES, 3, S, S); a smaller set is gone through again."""
    return images[torch.arange(IMAGES) % len(images)]


def _save(subject: Subject, path: Path, images: Tensor, *, wanted: Format) -> None:
    match wanted:
        case "safetensors":
            checkpoint.write_tensors(path, subject.module.state_dict())
        case "robustbench":
            state = subject.module.state_dict()
            checkpoint.write_tensors(path, {zoo_name(name): tensor for name, tensor in state.items()})
        case "pt2":
            torch.export.save(_traced(subject.module, images), path)
        case "onnx":
            traced, outputs = _traced(subject.module, images), [subject.output.name]
            program = torch.onnx.export(traced, dynamo=True, input_names=[INPUT], output_names=outputs, verbose=False)
            assert program is not None, "dynamo returns a program"
            weights = sum(tensor.nbytes for tensor in subject.module.state_dict().values())
            program.save(path, external_data=weights > _ONNX_LIMIT)
        case _:
            assert_never(wanted)


def zoo_name(name: str) -> str:
    """What the ResNets of RobustBench's model zoo, which are kuangliu's, call a tensor of a classifier.

    Args:
        name: Such as "backbone.layer2.0.downsample.0.weight" or "head.bias".
    """
    return name.removeprefix("backbone.").replace("downsample.", "shortcut.").replace("head.", "linear.")


def _traced(module: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The module as a graph for any batch size, without the paths of this machine's source files."""
    example = images[:2].float() / 255  # a batch of 1 would be taken for a constant
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(module, (example,), dynamic_shapes=dynamic)
    for graph in program.graph_module.modules():
        if isinstance(graph, torch.fx.GraphModule):
            for node in graph.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def read_back(subject: Subject, path: Path, *, wanted: Format) -> tuple[str, Forward]:
    """Read a file that `write` left, by its own library; no tensor of the live model is part of that.

    Returns:
        The library with its version, and what the file computes: (n, 3, S, S) in [0, 1] on the CPU to (n, F) or (n, C).
    """
    match wanted:
        case "safetensors":
            twin = _twin(subject)
            twin.load_state_dict(checkpoint.read_tensors(path))
            return _version("torchvision" if subject.model.timm is None else "timm"), twin.eval()
        case "robustbench":
            twin, tensors = _twin(subject), checkpoint.read_tensors(path)
            twin.load_state_dict({name: tensors[zoo_name(name)] for name in twin.state_dict()})
            return _version("torchvision"), twin.eval()
        case "pt2":
            return _version("torch"), torch.export.load(path).module()
        case "onnx":
            return _version("onnxruntime"), _onnx_session(path)
        case _:
            assert_never(wanted)


def _onnx_session(path: Path) -> Forward:
    import onnx
    import onnxruntime

    onnx.checker.check_model(path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; what a reader sees comes from here
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])


class _PlainInput(nn.Module):
    """What model cards say of an input layer, by torch's own functions."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        for name, buffer in like.named_buffers():
            self.register_buffer(name, torch.empty_like(buffer))

    def forward(self, x: Tensor) -> Tensor:
        held = dict(self.named_buffers())
        if "size" in held:
            side = (int(held["size"]),) * 2
            x = nn.functional.interpolate(x, side, mode="bilinear", align_corners=False, antialias=True)
        return (x - held["mean"]) / held["std"] if "mean" in held else x


def _twin(subject: Subject) -> nn.Module:
    """Other modules of the same names: torchvision's or timm's own backbone, and plain layers on it."""
    with torch.random.fork_rng(devices=[]):  # the initial weights are drawn, and overwritten
        own = torchvision_backbone if subject.model.timm is None else timm_backbone
        backbone, stack = own(subject.model), subject.module
        if not isinstance(stack, Stack):
            return backbone
        pre_feature, head, hidden = None, None, subject.model.hidden_dim
        if stack.pre_feature is not None:
            dim = stack.pre_feature.state_dict()["0.weight"].shape[1]
            pre_feature = nn.Sequential(nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        if isinstance(stack.head, nn.Linear):
            head = nn.Linear(stack.head.in_features, stack.head.out_features)
        return Stack(backbone, pre_feature, head, None if stack.input is None else _PlainInput(stack.input))


def torchvision_backbone(model: Model) -> nn.Module:
    """Torchvision's own ResNet with the recipe's stem and width, without a classifier, as model cards build it."""
    import torchvision

    net: Any = getattr(torchvision.models, model.backbone)(weights=None)
    width, padding, block = model.width, PADDING[model.stem], type(net.layer1[0])
    if model.stem == "imagenet":
        net.conv1 = nn.Conv2d(3, width, 7, 2, padding, bias=False)
    else:
        net.conv1, net.maxpool = nn.Conv2d(3, width, 3, 1, padding, bias=False), nn.Identity()
    if model.stem == "cifar-linear":
        net.relu = nn.Identity()  # each block has its own
    net.inplanes, net.bn1 = width, nn.BatchNorm2d(width)  # the constructor knows no width but 64
    for stage, depth in enumerate(DEPTHS[model.backbone]):
        setattr(net, f"layer{stage + 1}", net._make_layer(block, width * 2**stage, depth, stride=2 if stage else 1))
    net.fc = nn.Identity()
    built: nn.Module = net
    return built


def timm_backbone(model: Model) -> nn.Module:
    """Timm's own net, with the options of the recipe and without a classifier, as model cards build it."""
    import timm

    net: nn.Module = timm.create_model(model.timm or "", num_classes=0, **model.options)
    return net


def _portable(module: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, without gradients, in the memory layout that every library expects."""
    moved = copy.deepcopy(module).to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    return moved.eval().requires_grad_(False)


def _plain_linear(head: LinearHead) -> nn.Linear:
    """The head with its standardisation folded into the weights, in float64."""
    weight, bias = head.weight.detach().cpu().double(), head.bias.detach().cpu().double()
    if head.mean is not None and head.std is not None:
        weight = weight / head.std.cpu().double()
        bias = bias - weight @ head.mean.cpu().double()
    plain = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    plain.load_state_dict({"weight": weight.float(), "bias": bias.float()}, assign=True)
    return plain


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"
