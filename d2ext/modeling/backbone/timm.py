"""Networks of timm as detectron2 backbones: any with `features_only`, alone or under a pyramid.

timm is optional (`pip install timm`). Its Swin transformers shift windows before they pad, so that
opposite borders look at each other where the size of an image is no multiple of the window; the
detectors of the Swin paper pad first, and so do the networks here.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from types import MethodType, ModuleType

import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import shifted_window_attention

from d2ext.errors import UserError
from d2ext.modeling.backbone.global_attention import apply_global_blocks, build_global_blocks
from d2ext.modeling.backbone.norm import resolve_norm
from d2ext.modeling.backbone.pyramid import SimpleFeaturePyramid
from d2ext.modeling.backbone.timm_layers import number_layers, stage_ends, without_decay
from d2ext.modeling.backbone.timm_weights import load_vit_weights, resize_positions

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

HUB = "hub"
# What networks have whose last stage cannot be dilated.
_AT_STRIDE_16 = (
    "; for a map of stride 16 take level p4 of build_timm_fpn_backbone, or res4, with "
    "MODEL.TIMM.OUTPUT_STRIDE 32"
)
PATCH = 16  # pixels; to which networks with patches of 14 are resampled, so that strides halve


_SKIPPED: ContextVar[bool] = ContextVar("part_weights_skipped", default=False)


@contextlib.contextmanager
def without_part_weights() -> Iterator[None]:
    """Build networks without their pretrained weights, because those of the whole model follow:
    nothing is downloaded, and a file may be gone."""
    token = _SKIPPED.set(True)
    try:
        yield
    finally:
        _SKIPPED.reset(token)


def require_timm() -> ModuleType:
    """timm, or a `UserError` that says how to get it."""
    try:
        import timm
    except ImportError as error:
        raise UserError(
            "networks of timm need the package timm: pip install timm, or pip install '.[timm]' "
            "in a checkout"
        ) from error
    return timm


def pixel_statistics(name: str) -> dict[str, list[float]]:
    """Mean and standard deviation of the pixels that a network of timm was trained with.

    Returns:
        `mean` and `std`, three numbers each in RGB order, for pixels of 0 to 255.
    """
    config = _check_name(name).default_cfg
    return {key: [round(255 * x, 4) for x in config[key]] for key in ("mean", "std")}


def _settings(name: str) -> dict:
    statistics = pixel_statistics(name)
    return {
        "input_format": "RGB",
        "pixel_mean": statistics["mean"],
        "pixel_std": statistics["std"],
    }


@functools.cache
def _check_name(name: str):
    """The class of a network, without weights and without memory for them."""
    timm = require_timm()
    if not timm.is_model(name.split(".")[0]):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        hint = f" (such as {', '.join(near)})" if near else ""
        raise UserError(f"MODEL.TIMM.NAME: timm {timm.__version__} has no network '{name}'{hint}")
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False)


class TimmBackbone(Backbone):
    """A network of timm: N x 3 x H x W -> feature maps `res2` to `res5`, or `last` of a plain ViT.

    Names are detectron2's, so that configs of every network fit: `res2` is the first feature map
    of stride 4 or more, as timm's `feature_info` tells. All are N x C x H x W. A plain ViT has one
    map, of stride 16.
    """

    @configurable
    def __init__(
        self,
        *,
        name: str,
        pretrained: str = "",
        out_features: Sequence[str] = (),
        in_channels: int = 3,
        drop_path: float = 0.0,
        freeze_at: int = 0,
        norm: str = "FrozenBN",
        out_norm: str = "",
        output_stride: int = 32,
        global_blocks: int = 0,
        positions: int = 0,
        checkpointing: bool = False,
    ):
        """
        Args:
            name: of timm's network, with or without a tag (`convnext_tiny.fb_in1k`).
            pretrained: "hub": timm's weights, from its hub or its cache; or the path of a file with
                weights of this network; or the name of a plain ViT (`vit_base_patch16_224.mae`)
                whose weights one with windows, `samvit_base_patch16`, starts from; "": random ones.
            out_features: of `res2` ... `res5`, what is given; empty: all.
            drop_path: rate of stochastic depth in the last block, rising linearly from the first.
            freeze_at: number of leading stages without training (1: stem, 2: + res2, ...).
            norm: what batch norms become: "FrozenBN" (fixed statistics and weights), or "" to
                leave them as they are.
            out_norm: "LN": a layer norm on every feature map given, as in the detectors of
                Swin and ConvNeXt; "": none.
            output_stride: 16 dilates the last stage of networks that can be.
            global_blocks: number of blocks of attention over the whole last map (HTC++).
            positions: rows and columns of the table of positions of `samvit`, which is resampled to
                the image as it is used; 0: the network's own, 64. ViTDet keeps those of its
                pretraining, 14.
            checkpointing: compute the features again in the backward pass, for less memory.
        """
        super().__init__()
        pretrained = "" if _SKIPPED.get() else pretrained
        plain = is_plain_vit(name)
        names = ["last"] if plain else ["res2", "res3", "res4", "res5"]
        kept = list(out_features) or names
        unknown = [x for x in kept if x not in names]
        if unknown:
            raise UserError(
                f"MODEL.TIMM.OUT_FEATURES: {name} has no '{unknown[0]}', but {', '.join(names)}"
            )
        if global_blocks and names[-1] not in kept:
            raise UserError(f"MODEL.TIMM.GLOBAL_BLOCKS: OUT_FEATURES has no '{names[-1]}'")
        other = pretrained if _is_network(pretrained) else ""
        own = "" if other else pretrained
        self.net = _create(name, own, plain, in_channels, drop_path, output_stride)
        if positions:
            resize_positions(self.net, positions, name)
        if other:
            weights = _create(other, HUB, is_plain_vit(other), in_channels, 0.0, 32).state_dict()
            load_vit_weights(self.net, weights, other)
        # What pretrained weights need from the model, see `d2ext.checkpoint.settings`.
        self.needed_settings = _settings(other or name) if pretrained else {}
        info = self.net.feature_info
        channels, strides, modules = info.channels(), info.reduction(), info.module_name()
        first = 0 if plain else next(i for i, stride in enumerate(strides) if stride >= 4)
        if not plain and len(strides) - first != len(names):
            raise UserError(
                f"MODEL.TIMM.NAME: {name} has feature maps of strides {strides}; 4, 8, 16 and 32 "
                "are needed"
            )
        self._places = {x: first + names.index(x) for x in kept}
        self._out_features = kept
        self._out_feature_channels = {x: channels[i] for x, i in self._places.items()}
        self._out_feature_strides = {x: strides[i] for x, i in self._places.items()}
        self._channels_last = "NHWC" in str(getattr(self.net, "output_fmt", ""))
        if norm == "FrozenBN":
            from timm.layers import freeze_batch_norm_2d

            self.net = freeze_batch_norm_2d(self.net)
        elif norm:
            raise UserError(f"MODEL.TIMM.NORM is '{norm}'; it has to be 'FrozenBN' or ''")
        if out_norm not in ("", "LN"):
            raise UserError(f"MODEL.TIMM.OUT_NORM is '{out_norm}'; it has to be 'LN' or ''")
        eps = next((m.eps for m in self.net.modules() if isinstance(m, nn.LayerNorm)), 1e-5)
        self.out_norms = nn.ModuleDict(
            {x: nn.LayerNorm(self._out_feature_channels[x], eps) for x in kept if out_norm}
        )
        _pad_before_shifting(self.net)
        self.global_blocks = build_global_blocks(channels[-1], global_blocks, drop_path)
        if checkpointing:
            self.net.set_grad_checkpointing(True)
        self._name, self._stages = name, [] if plain else modules[first:]
        self._freeze(freeze_at)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec):
        timm = cfg.MODEL.TIMM
        return {
            "name": timm.NAME,
            # Weights of the whole model, which MODEL.WEIGHTS names, come later.
            "pretrained": "" if cfg.MODEL.WEIGHTS else timm.PRETRAINED,
            "out_features": timm.OUT_FEATURES,
            "in_channels": input_shape.channels,
            "drop_path": timm.DROP_PATH,
            "freeze_at": timm.FREEZE_AT,
            "norm": timm.NORM,
            "out_norm": timm.OUT_NORM,
            "output_stride": timm.OUTPUT_STRIDE,
            "global_blocks": timm.GLOBAL_BLOCKS,
            "positions": timm.POSITIONS,
            "checkpointing": timm.CHECKPOINTING,
        }

    @property
    def size_divisibility(self) -> int:
        """In pixels: images are padded to multiples of it."""
        return max(self.net.feature_info.reduction())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """N x 3 x H x W -> feature maps by name; see the class."""
        maps, out = self.net(x), {}
        for name, place in self._places.items():
            feature = maps[place]
            if name == self._out_features[-1] and len(self.global_blocks):
                feature = apply_global_blocks(self.global_blocks, feature, self._channels_last)
            if self._channels_last:
                if name in self.out_norms:
                    feature = self.out_norms[name](feature)
                feature = feature.permute(0, 3, 1, 2)
            elif name in self.out_norms:
                feature = self.out_norms[name](feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            out[name] = feature.contiguous()
        return out

    def layer_numbers(self) -> tuple[dict[str, int], int]:
        """The layer of each parameter by its name, from 0, and the last layer's number; see
        `number_layers`. What follows the network, norms and global blocks, belongs to none."""
        numbers, last = number_layers(self.net, _check_name(self._name), self._stages, self._name)
        return {f"net.{name}": number for name, number in numbers.items()}, last

    def names_without_decay(self) -> set[str]:
        """Parameters of two and more dimensions that timm leaves out of the weight decay."""
        return {f"net.{name}" for name in without_decay(self.net, _check_name(self._name))}

    def _freeze(self, freeze_at: int) -> None:
        """Stop the training of what comes before a stage, in the order in which timm made it."""
        if not freeze_at:
            return
        if not self._stages:
            raise UserError("MODEL.TIMM.FREEZE_AT: a plain ViT has no stages; use SOLVER.FREEZE")
        if not 0 < freeze_at <= len(self._stages) + 1:
            raise UserError(
                f"MODEL.TIMM.FREEZE_AT is {freeze_at}; it has to be 0 to {len(self._stages) + 1}"
            )
        start, ends = stage_ends([n for n, _ in self.net.named_parameters()], self._stages)
        for parameter in list(self.net.parameters())[: [start, *ends][freeze_at - 1]]:
            parameter.requires_grad_(False)


def is_plain_vit(name: str) -> bool:
    """Whether a network of timm keeps one stride from its first block to its last one."""
    net = _check_name(name)
    from timm.models import Eva, VisionTransformer, VisionTransformerSAM

    return isinstance(net, (VisionTransformer, VisionTransformerSAM, Eva))


def _is_network(name: str) -> bool:
    """Whether weights are named by a network of timm, and not by a file."""
    if name in ("", HUB) or Path(name).is_file():
        return False
    return require_timm().is_model(name.split(".")[0])


def _create(
    name: str, pretrained: str, plain: bool, in_channels: int, drop_path: float, output_stride: int
) -> nn.Module:
    timm, full = require_timm(), _check_name(name)
    options = {"features_only": True, "in_chans": in_channels}
    if plain:
        options["out_indices"] = [len(full.blocks) - 1]
        options["patch_size"] = PATCH
        if not hasattr(full, "neck"):  # SAM's interpolates its positions by itself
            options["dynamic_img_size"] = True
    elif _is_swin(full):
        # All windows whole, and those of the last stage shifted as well, as at any other size.
        options |= {"strict_img_size": False, "always_partition": True}
    if drop_path:
        options["drop_path_rate"] = drop_path
    if output_stride != 32:
        options["output_stride"] = output_stride
    if pretrained and pretrained != HUB:
        if not Path(pretrained).is_file():
            raise UserError(f"MODEL.TIMM.PRETRAINED: there is no file '{pretrained}'")
        options["pretrained_cfg_overlay"] = {"file": pretrained}
    try:
        return timm.create_model(name, pretrained=bool(pretrained), **options)
    except (OSError, RuntimeError, KeyError) as error:
        if not pretrained:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"weights of timm's {name} cannot be loaded: {reason}") from error
    except (TypeError, NotImplementedError, AssertionError) as error:
        raise UserError(
            f"timm's {name} cannot be a backbone with these settings (MODEL.TIMM): {error}"
            + (_AT_STRIDE_16 if output_stride != 32 else "")
        ) from error


def _is_swin(net: nn.Module) -> bool:
    from timm.models import SwinTransformer

    return isinstance(net, SwinTransformer)


def _pad_before_shifting(net: nn.Module) -> None:
    """Give the blocks of a Swin transformer the attention of its paper's detectors."""
    from timm.models.swin_transformer import SwinTransformerBlock

    for block in net.modules():
        if isinstance(block, SwinTransformerBlock):
            block._attn = MethodType(_padded_attention, block)


def _padded_attention(block: nn.Module, x: Tensor) -> Tensor:
    """N x H x W x C -> the same; torchvision's function pads, then shifts."""
    attention = block.attn
    return shifted_window_attention(
        x,
        attention.qkv.weight,
        attention.proj.weight,
        attention._get_rel_pos_bias(),
        list(block.window_size),
        attention.num_heads,
        list(block.shift_size),
        qkv_bias=attention.qkv.bias,
        proj_bias=attention.proj.bias,
        training=block.training,
    )


class TimmFPN(FPN):
    """`TimmBackbone` under detectron2's pyramid with one max-pooled extra level: `p2` to `p6`."""

    @configurable
    def __init__(
        self, *, bottom_up: TimmBackbone, out_channels: int = 256, fpn_norm: str = "", fuse="sum"
    ):
        """
        Args:
            bottom_up: of no plain ViT.
            out_channels: of every level.
            fpn_norm: norm of the pyramid, see `resolve_norm`.
        """
        strides = [shape.stride for shape in bottom_up.output_shape().values()]
        if any(b != 2 * a for a, b in zip(strides, strides[1:])):
            raise UserError(
                f"a feature pyramid needs strides that double, not {strides}: take all features of "
                "a network with stages, MODEL.TIMM.OUTPUT_STRIDE 32"
            )
        top = LastLevelMaxPool()
        top.in_feature = f"p{int(math.log2(strides[-1]))}"
        features = list(bottom_up.output_shape())
        super().__init__(bottom_up, features, out_channels, resolve_norm(fpn_norm), top, fuse)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: ShapeSpec):
        return {
            "bottom_up": TimmBackbone(cfg, input_shape),
            "out_channels": cfg.MODEL.FPN.OUT_CHANNELS,
            "fpn_norm": cfg.MODEL.FPN.NORM,
            "fuse": cfg.MODEL.FPN.FUSE_TYPE,
        }


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """yaml entry point of `TimmBackbone` (`MODEL.BACKBONE.NAME`)."""
    return TimmBackbone(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """yaml entry point of `TimmFPN`, or of `SimpleFeaturePyramid` over a plain ViT."""
    if not is_plain_vit(cfg.MODEL.TIMM.NAME):
        return TimmFPN(cfg, input_shape)
    return SimpleFeaturePyramid(
        bottom_up=TimmBackbone(cfg, input_shape),
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM or "LN",
    )
