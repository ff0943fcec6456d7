"""The encoder: a backbone, `pre_feature`, and the projector.

The backbone is a ResNet with torchvision's parameter names at any width, or one that timm makes (timm_backbone).

ResNet: He et al., arXiv:1512.03385, with the stride of a bottleneck on its 3x3 convolution as in torchvision; heads as
in EMP-SSL (arXiv:2304.03977). Symbols: F backbone features (8 width; 32 width for bottlenecks), D embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from cfamc_cli.engine.costs import require_library, require_size
from cfamc_cli.engine.crops import interpolation
from cfamc_cli.recipe.schema import DEPTHS, PADDING, Features, Model, Normalize, Stem


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.bn2(self.conv2(x))
        return F.relu(x + shortcut, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut; four times as many channels come out."""

    expansion = 4

    def __init__(self, inputs: int, width: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = _shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = self.bn3(self.conv3(x))
        return F.relu(x + shortcut, inplace=True)


class _NarrowShortcut(nn.Conv2d):
    """A strided 1x1 convolution that takes its pixels first.

    Below 8 channels, oneDNN's weight gradient of the strided kind writes beyond its buffer (torch 2.14, AVX2,
    channels_last), which ends the process.
    """

    def forward(self, x: Tensor) -> Tensor:
        down, across = self.stride
        return F.conv2d(x[..., ::down, ::across], self.weight, self.bias)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    convolution = _NarrowShortcut if inputs < 8 else nn.Conv2d
    return nn.Sequential(convolution(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """A ResNet without its classifier: (N, 3, S, S) in [0, 1] to (N, F) features.

    The "cifar" stem is a 3x3 convolution of stride 1 without pooling; "imagenet" is 7x7, stride 2, then max-pooling.
    Two that others train: "cifar-padded" pads by 2 instead of 1, "cifar-linear" has no ReLU behind its batch norm.

    Attributes:
        memory: "recompute" keeps of each block only what goes into it while training, and makes the rest again in the
            backward pass: less memory, a third more arithmetic, and the same bits.
    """

    memory: Literal["full", "recompute"] = "full"

    def __init__(self, backbone: str, *, stem: Stem, width: int) -> None:
        super().__init__()
        block = Bottleneck if backbone == "resnet50" else BasicBlock
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(3, width, 7, 2, PADDING[stem], bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, 2, 1)
        else:
            self.conv1 = nn.Conv2d(3, width, 3, 1, PADDING[stem], bias=False)
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.Identity() if stem == "cifar-linear" else nn.ReLU(inplace=True)
        inputs = width
        for stage, depth in enumerate(DEPTHS[backbone]):
            blocks = []
            for place in range(depth):
                stride = 2 if stage > 0 and place == 0 else 1
                blocks.append(block(inputs, width * 2**stage, stride=stride))
                inputs = width * 2**stage * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.feature_dim = inputs
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        blocks = [block for stage in range(1, 5) for block in self.get_submodule(f"layer{stage}").children()]
        if self.memory == "recompute" and self.training and torch.is_grad_enabled():
            x = _recomputed(self._stem, x, norms=[self.bn1])
            for block in blocks:
                x = _recomputed(block, x, norms=_norms(block))
        else:
            x = self._stem(x)
            for block in blocks:
                x = block(x)
        return x.mean((2, 3))

    def _stem(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return pooled


class Input(nn.Module):
    """What a network does to images before its first layer: (N, 3, H, W) in [0, 1], resized and normalised.

    Resizing is that of crops, two interpolation matrices with antialiasing, so that attacks pass through it. Mean, std
    and size are buffers: a network that sees other pixels is another one, to its digest and where it is handed over.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, normalize: Normalize | None, size: int | None) -> None:
        super().__init__()
        self.side = size
        if size is not None:
            self.register_buffer("size", torch.tensor(size))
        self.normalizes = normalize is not None
        if normalize is not None:
            self.register_buffer("mean", torch.tensor(normalize.mean).view(3, 1, 1))
            self.register_buffer("std", torch.tensor(normalize.std).view(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.side is not None and x.shape[-2:] != (self.side, self.side):
            whole = torch.is_autocast_enabled(x.device.type)  # half the digits would move pixels by a grey level
            with torch.autocast(x.device.type, enabled=False) if whole else nullcontext():
                rows, columns = (
                    interpolation(x.new_zeros(()), x.new_full((), pixels), source=pixels, size=self.side)
                    for pixels in x.shape[-2:]
                )
                x = rows @ x @ columns.T
        return (x - self.mean) / self.std if self.normalizes else x


def input_of(model: Model) -> Input | None:
    """What stands before the backbone; None where that sees pixels as they are."""
    plain = model.normalize is None and model.input_size is None
    return None if plain else Input(model.normalize, model.input_size)


class Encoder(nn.Module):
    """Backbone, `pre_feature` (what heads read) and projector (what the objective reads).

    Attributes:
        input: What is done to images before; None where nothing is.
        feature_dim: F.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.input = input_of(model)
        self.backbone: nn.Module
        if model.timm is None:
            self.backbone = ResNet(model.backbone, stem=model.stem, width=model.width)
            self.feature_dim = self.backbone.feature_dim
        else:
            require_library(model)
            from cfamc_cli.engine import timm_backbone

            self.backbone = timm_backbone.create(model)
            self.feature_dim = timm_backbone.features_of(self.backbone)
        self.pre_feature = nn.Sequential(
            nn.Linear(self.feature_dim, model.hidden_dim), nn.BatchNorm1d(model.hidden_dim), nn.ReLU()
        )
        self.projector = nn.Sequential(
            nn.Linear(model.hidden_dim, model.hidden_dim),
            nn.BatchNorm1d(model.hidden_dim),
            nn.ReLU(),
            nn.Linear(model.hidden_dim, model.embedding_dim),
        )

    def recompute(self) -> None:
        """Keep of each block only what goes into it while training; see `ResNet.memory`."""
        if isinstance(self.backbone, ResNet):
            self.backbone.memory = "recompute"
        else:
            from cfamc_cli.engine import timm_backbone

            timm_backbone.recompute(self.backbone, _in_training)

    def features(self, x: Tensor, *, features: Features = "pre_feature") -> Tensor:
        """What a head reads: (N, 3, S, S) in [0, 1] to (N, hidden_dim) or (N, F).

        Raises:
            CfamcError: Exit 2; a backbone of timm does not take images of that size.
        """
        x = x if self.input is None else self.input(x)
        if not torch.compiler.is_compiling():
            require_size(self.model, *x.shape[-2:])
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.backbone(x)
        return x if features == "backbone" else self.pre_feature(x)

    def forward(self, x: Tensor) -> Tensor:
        """Unit-norm embeddings: (N, 3, S, S) in [0, 1] to (N, D), float32 also under autocast."""
        z: Tensor = self.projector(self.features(x))
        return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=-1)

    def embed(self, groups: Sequence[Tensor]) -> Tensor:
        """Embeddings of all crops, each group in a forward pass of its own.

        Args:
            groups: (V_g, B, 3, S_g, S_g) in [0, 1] each.

        Returns:
            (V, B, D), unit norm, groups in order.
        """
        return torch.cat([self(group.flatten(0, 1)).unflatten(0, group.shape[:2]) for group in groups])


def build_encoder(model: Model, *, generator: torch.Generator) -> Encoder:
    """A fresh encoder on the CPU whose weights depend on the generator alone; the caller's RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(generator.initial_seed())  # torch.manual_seed would seed every device
        return Encoder(model).to(memory_format=torch.channels_last)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within, batch norm in training mode still uses batch statistics but leaves its running ones alone."""
    norms = _norms(module)
    tracked = [norm.track_running_stats for norm in norms]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm, track in zip(norms, tracked, strict=True):
            norm.track_running_stats = track


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Within, a compiled module runs as it is written: for what is seldom done, such as other shapes."""
    compiled, module._compiled_call_impl = module._compiled_call_impl, None
    try:
        yield
    finally:
        module._compiled_call_impl = compiled


def _norms(module: nn.Module) -> list[_BatchNorm]:
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


def _recomputed(part: Callable[..., Any], *x: Any, norms: Sequence[_BatchNorm], **further: Any) -> Any:
    """What `part` makes of `x`, keeping `x` alone for the backward pass, which makes the rest again."""
    second = _like_now(norms, [norm.track_running_stats for norm in norms])
    return checkpoint(
        part, *x, use_reentrant=False, preserve_rng_state=False, context_fn=lambda: (nullcontext(), second), **further
    )


def _in_training(forward: MethodType, *x: Any, **further: Any) -> Any:
    """What a block's own `forward` makes of `x`, `_recomputed` while it trains."""
    block: Any = forward.__self__
    if not block.training or not torch.is_grad_enabled():
        return forward(*x, **further)
    return _recomputed(forward, *x, norms=_norms(block), **further)


@contextmanager
def _like_now(norms: Sequence[_BatchNorm], tracked: Sequence[bool]) -> Iterator[None]:
    """Within, batch norm is as it was when `tracked` was read, but moves no running statistics.

    They are still handed to the kernels, where they were, since checkpoints count what is saved for the backward pass.
    """
    now = [(norm.track_running_stats, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, track in zip(norms, tracked, strict=True):
        norm.track_running_stats, norm.momentum = track, 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = torch.empty_like(norm.num_batches_tracked)
    try:
        yield
    finally:
        for norm, (track, momentum, count) in zip(norms, now, strict=True):
            norm.track_running_stats, norm.momentum, norm.num_batches_tracked = track, momentum, count
