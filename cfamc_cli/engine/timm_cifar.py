"""timm's ResNets with the stem for small images, as resnet18_cifar and so on: importing this registers them with timm.

timm hard-codes a stem of stride 4 and 64 channels. The config.json of an export names these, so that
`timm.create_model("local-dir:FOLDER", pretrained=True)` makes them.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from cfamc_cli.recipe.schema import DEPTHS


class CifarResNet(ResNet):
    """A ResNet of timm that begins with a 3x3 convolution of stride 1 and no pooling; its width is even."""

    def __init__(self, *arguments: Any, channels: tuple[int, ...] = (64, 128, 256, 512), **options: Any) -> None:
        options |= {"channels": channels, "stem_type": "deep", "stem_width": channels[0] // 2}  # else it is 64 wide
        super().__init__(*arguments, **options)
        net: Any = self  # of which timm says more than holds
        like = {"device": net.bn1.weight.device, "dtype": net.bn1.weight.dtype}
        net.conv1, net.maxpool = nn.Conv2d(net.in_chans, channels[0], 3, 1, 1, bias=False, **like), nn.Identity()
        net.feature_info = [info | {"reduction": max(1, info["reduction"] // 4)} for info in net.feature_info]


def _register(backbone: str) -> None:
    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        block = Bottleneck if backbone == "resnet50" else BasicBlock
        given = {"block": block, "layers": DEPTHS[backbone]} | options
        net: nn.Module = build_model_with_cfg(CifarResNet, build.__name__, pretrained, **given)
        return net

    build.__name__ = f"{backbone}_cifar"
    register_model(build)


for _backbone in DEPTHS:
    _register(_backbone)
