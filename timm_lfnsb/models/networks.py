"""Lightweight facial expression recognition networks: LFN, LFNSB, MFN, DDAMFN and MobileFaceNet.

All five share one skeleton: a stem of stride 2, three stages of inverted bottlenecks that end at stride 16,
one last convolution, and a head that turns the final map (7x7 for a 112x112 face) into an embedding.

Papers:
* LFN, LFNSB: `A Lightweight Model Enhancing Facial Expression Recognition with Spatial Bias and Cosine-Harmony
  Loss` - https://doi.org/10.20944/preprints202408.1304.v1
* MFN, DDAMFN: `A Dual-Direction Attention Mixed Feature Network for Facial Expression Recognition`
  - https://doi.org/10.3390/electronics12173595
* MobileFaceNet: `MobileFaceNets: Efficient CNNs for Accurate Real-Time Face Verification on Mobile Devices`
  - https://arxiv.org/abs/1804.07573

Modules: MixConv - https://arxiv.org/abs/1907.09595; coordinate attention - https://arxiv.org/abs/2103.02907;
RepVGGDW - https://arxiv.org/abs/2307.09283; Spatial Bias - https://doi.org/10.1016/j.eswa.2023.122053

Where the papers and the authors' released code disagree, these networks follow the released code, which is what
gives the published parameter counts; results/paper.md lists the differences.
"""
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import to_2tuple
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices

from ..labels import EXPRESSIONS_7, EXPRESSIONS_8
from ..weights.fetch import prefer_hub
from ..weights.names import HUB_REVISIONS, WEIGHTS_DIR, hub_id
from .checkpoint_keys import checkpoint_filter_fn, take_features
from .cpu import FusedBottleneck, spatial_size
from .layers import ConvNormAct, CoordAttn, DirectionAttention, GDConv, Mix, MixConv, RepVggDw, StemConv, fold_norm
from .names import check_model_name

__all__ = ['MixedFeatureNet']


class Bottleneck(nn.Module):
    """Expand 1x1, depthwise convolution, coordinate attention, project 1x1; residual at stride 1.

    Where `mixed`, the depthwise convolution has kernels of several sizes. MobileFaceNet's own has one, norm and PReLU
    behind it, and no attention.
    """

    def __init__(
            self, in_chs: int, out_chs: int, mix: Mix, stride: int = 1, mixed: bool = True, device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        mid_chs = sum(mix.values())
        self.mixed, self.residual = mixed, stride == 1
        self.expand = ConvNormAct(in_chs, mid_chs, **dd)
        self.conv_dw = MixConv(mix, stride, **dd) if mixed else ConvNormAct(
            mid_chs, mid_chs, max(mix), stride, groups=mid_chs, **dd)
        self.attn = CoordAttn(mid_chs, max(8, mid_chs // 32), **dd) if mixed else nn.Identity()
        self.project = ConvNormAct(mid_chs, out_chs, act=False, **dd)
        self.as_built = str(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = x
        x = self.expand(x)
        x = self.conv_dw(x)
        x = self.attn(x)
        x = self.project(x)
        return x + shortcut if self.residual else x

    def fuse(self) -> nn.Module:
        """A mixed block as one module of bare parameters, unless somebody put other parts into it."""
        plain = str(self) == self.as_built
        for part in self.children():
            if hasattr(part, 'reparameterize'):
                part.reparameterize()  # type: ignore[operator]
        return FusedBottleneck(self) if self.mixed and plain else self


class EmbeddingHead(nn.Module):
    """GDConv, linear layer without bias and batch norm: the head of LFN, MFN and MobileFaceNet."""

    def __init__(self, in_chs: int, embed_dim: int, map_size: Tuple[int, int], device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.gdconv = GDConv(in_chs, map_size, **dd)
        self.linear = nn.Linear(in_chs, embed_dim, bias=False, **dd)
        self.bn = nn.BatchNorm1d(embed_dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.linear(self.gdconv(x).flatten(1)))

    def reparameterize(self) -> None:
        if fold_norm(self.linear, self.bn):
            self.bn = nn.Identity()  # type: ignore[assignment]


class SpatialBiasHead(nn.Module):
    """Spatial Bias: the map reduced to 2x2 positions, which a 1-D convolution over the channel axis mixes.

    (B, C, H, W) -> 1x1 convolution, norm, ReLU -> (B, 66, H, W) -> average pool -> (B, 66, 2, 2) -> the 4 positions
    as channels, kernel 3 over the 66 entries without padding -> (B, 4, 64) -> (B, 256). Any map of at least 2x2.
    """

    def __init__(self, in_chs: int, embed_dim: int, map_size: Tuple[int, int], device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        reduced_chs = embed_dim // 4 + 2  # the unpadded kernel of 3 takes two entries off again
        self.reduce = ConvNormAct(in_chs, reduced_chs, act=False, **dd)
        self.conv = nn.Conv1d(4, 4, 3, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.reduce(x))
        # Exactly adaptive_avg_pool2d(x, 2), written as a plain pool because exporters know that one.
        height, width = spatial_size(x)
        torch._assert(height >= 2, 'Spatial Bias needs a map of 2x2 or more: give images of 17 px or more.')
        torch._assert(width >= 2, 'Spatial Bias needs a map of 2x2 or more: give images of 17 px or more.')
        x = F.avg_pool2d(x, ((height + 1) // 2, (width + 1) // 2), (height // 2, width // 2))
        x = self.conv(x.flatten(2).transpose(1, 2))
        return x.transpose(1, 2).flatten(1)


class DualDirectionHead(nn.Module):
    """DDAMFN's head: the element-wise maximum of two direction attentions times the features, then GDConv."""

    def __init__(self, in_chs: int, embed_dim: int, map_size: Tuple[int, int], device=None, dtype=None):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        assert embed_dim == in_chs, 'The dual direction head keeps the number of channels.'
        self.attn1 = DirectionAttention(in_chs, map_size, **dd)
        self.attn2 = DirectionAttention(in_chs, map_size, **dd)
        self.gdconv = GDConv(in_chs, map_size, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * torch.maximum(self.attn1(x), self.attn2(x))
        return self.gdconv(x).flatten(1)


# global_pool name -> the head that turns the final map into the embedding
HEADS = {'gdc': EmbeddingHead, 'sb': SpatialBiasHead, 'dda': DualDirectionHead}


class MixedFeatureNet(nn.Module):
    """Mixed feature network for 112x112 faces, stride 16.

    Args:
        stages: For each stage its output channels and the depthwise mix of each block; the first block has stride 2.
        final_chs: Channels of a last 1x1 convolution, or None for a RepVGGDW layer at the channels of the last stage.
        mixed: Mixed bottlenecks with coordinate attention, else MobileFaceNet's plain ones.
        stem_act: PReLU behind both convolutions of the stem.
        global_pool: How the final map becomes the embedding: 'gdc' (linear GDConv), 'sb' (Spatial Bias),
            'dda' (dual direction attention), or '' for the map itself (only with num_classes=0).
        head: The network's own choice of the above, which `reset_classifier` can return to.
        embed_dim: Size of the embedding (`pre_logits`).
        num_classes: Number of classes, 0 for the embedding alone.
        in_chans: Number of image channels.
        img_size: Image height and width the head is built for; 'sb' takes any size whatever this says.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
            self,
            stages: Tuple[Tuple[int, List[Mix]], ...],
            final_chs: Optional[int] = None,
            mixed: bool = True,
            stem_act: bool = False,
            head: str = 'gdc',
            embed_dim: int = 256,
            num_classes: int = 7,
            in_chans: int = 3,
            global_pool: Optional[str] = None,
            img_size: Union[int, Tuple[int, int]] = 112,
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        stem_chs = 64

        self.stem = nn.Sequential(
            StemConv(in_chans, stem_chs, 3, stride=2, act=stem_act, **dd),
            ConvNormAct(stem_chs, stem_chs, 3, groups=stem_chs, act=stem_act, **dd),
        )
        self.feature_info = [dict(num_chs=stem_chs, reduction=2, module='stem.1')]

        prev_chs = stem_chs
        self.stages = nn.Sequential()
        for i, (out_chs, mixes) in enumerate(stages):
            layers = nn.Sequential()
            for j, mix in enumerate(mixes):
                layers.append(Bottleneck(prev_chs, out_chs, mix, 2 if j == 0 else 1, mixed, **dd))
                prev_chs = out_chs
            self.stages.append(layers)
            self.feature_info.append(dict(num_chs=out_chs, reduction=4 * 2 ** i, module=f'stages.{i}'))
        layers.append(ConvNormAct(prev_chs, final_chs, **dd) if final_chs else RepVggDw(prev_chs, 3, **dd))
        self.num_features = self.feature_info[-1]['num_chs'] = final_chs or prev_chs

        height, width = to_2tuple(img_size)
        map_size = (-(-height // 16), -(-width // 16))
        self.head_pool = self.global_pool = head
        self.head = HEADS[head](self.num_features, embed_dim, map_size, **dd)
        self.head_hidden_size = embed_dim
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, head if global_pool is None else global_pool)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        return set()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        blocks = r'^stages\.(\d+)' if coarse else [(r'^stages\.(\d+)\.(\d+)', None), (r'^head', (99999,))]
        return dict(stem=r'^stem', blocks=blocks)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        if global_pool not in (None, '', self.head_pool):
            raise ValueError(
                f"global_pool={global_pool!r}: this network pools with {self.head_pool!r}, or '' for the map itself.")
        if num_classes > 0:
            if global_pool == '' or not self.head_pool:
                raise ValueError('A 4-D feature map has no classifier: use num_classes=0 with it.')
            self.global_pool = self.head_pool
        elif global_pool is not None:
            self.global_pool = global_pool
        self.num_classes = num_classes
        weight = next(self.stem.parameters())
        self.fc = nn.Linear(
            self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype,
        ) if num_classes > 0 else nn.Identity()
        self.fc.train(self.training)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """Forward through the features and return intermediate maps.

        Args:
            x: Images (B, C, H, W).
            indices: The last n maps if int, all if None, else those selected: 0 is the stem, 1 to 3 the stages.
            norm: Without effect, the last stage has no norm of its own.
            stop_early: Leave out the stages after the last selected map.
            output_fmt: 'NCHW'.
            intermediates_only: Leave out the final map, which else comes before the list of the others.
        """
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        intermediates = []
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)

        x = self.stem(x)
        if 0 in take_indices:
            intermediates.append(x)
        if torch.jit.is_scripting() or not stop_early:  # TorchScript cannot slice
            stages = self.stages
        else:
            stages = self.stages[:max_index]
        for i, stage in enumerate(stages):
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
            if i + 1 in take_indices:
                intermediates.append(x)
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Cut off the stages (and the head) that the selected intermediate maps do not need."""
        take_indices, max_index = feature_take_indices(len(self.stages) + 1, indices)
        prune_end = max_index < len(self.stages)
        self.stages = self.stages[:max_index]
        if prune_head or prune_end:
            # The head is sized for the final map, so it goes with the last stage.
            self.head = nn.Identity()
            self.head_pool = ''
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']  # type: ignore[assignment]
            self.reset_classifier(0, '')
        return take_indices

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for stage in self.stages:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        if self.global_pool:
            x = self.head(x)
        x = self.head_drop(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x


# 'fixed_input_size': a GDConv covers the whole map, Spatial Bias takes any.
def _cfg(arch: str, label_names: Tuple[str, ...], **kwargs: Any) -> Dict[str, Any]:
    return {
        'num_classes': len(label_names), 'label_names': label_names,
        'input_size': (3, 112, 112), 'pool_size': (7, 7), 'fixed_input_size': arch != 'lfnsb',
        'crop_pct': 1.0, 'crop_mode': 'squash', 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.0.conv', 'classifier': 'fc', 'license': 'apache-2.0', 'paper_ids': _PAPERS[arch],
        **kwargs,
    }


_PAPERS = {
    'lfn_small': 'doi:10.20944/preprints202408.1304.v1',
    'lfnsb': 'doi:10.20944/preprints202408.1304.v1',
    'mfn': 'doi:10.3390/electronics12173595',
    'ddamfn': 'doi:10.3390/electronics12173595',
    'mobilefacenet': 'arXiv:1804.07573',
}

# Input of the weights that were not trained at 112 px.
_TRAINED_AT = {
    name: {'input_size': (3, 64, 64), 'pool_size': (4, 4)} for name in ('lfnsb.ferplus_64', 'lfnsb.ferplus_balanced')}

default_cfgs = generate_default_cfgs({
    # The embedded file comes before the Hub in timm's order of sources; see `prefer_hub`.
    **{
        name: _cfg(
            name.split('.')[0], EXPRESSIONS_8, file=str(WEIGHTS_DIR / f'{name}.safetensors'), hf_hub_id=hub_id(name),
            **_TRAINED_AT.get(name, {}))
        for name in HUB_REVISIONS
    },
    # Label sets and input configs without weights, for runs on data that nobody may redistribute.
    **{f'{arch}.rafdb': _cfg(arch, EXPRESSIONS_7) for arch in _PAPERS},
    **{f'{arch}.affectnet7': _cfg(arch, EXPRESSIONS_7) for arch in _PAPERS},
    **{f'{arch}.affectnet8': _cfg(arch, EXPRESSIONS_8) for arch in _PAPERS},
})

# Output channels and the mix of each block. The paper's Table 1 prints other expansion factors and 128 channels at
# 28x28; these are the released code's, which give the paper's parameter count.
_LFN_STAGES = (
    (64, [{3: 64, 5: 32}] + 9 * [{3: 96}]),
    (128, [{3: 128, 5: 64}] + 16 * [{3: 192}]),
    (256, [{3: 256, 5: 256, 7: 256}] + 6 * [{3: 172, 5: 170}]),
)
_MFN_STAGES = (
    (64, [{3: 64, 5: 32, 7: 32}] + 9 * [{3: 96, 5: 32}]),
    (128, [{3: 128, 5: 64, 7: 64}] + 16 * [{3: 192, 5: 64}]),
    (256, [{3: 256, 5: 256, 7: 256, 9: 256}] + 6 * [{3: 172, 5: 170, 7: 170}]),
)
_MOBILEFACENET_STAGES = (
    (64, 5 * [{3: 128}]),
    (128, 7 * [{3: 256}]),
    (128, [{3: 512}] + 2 * [{3: 256}]),
)


def _create_network(variant: str, pretrained: bool, kwargs: Dict[str, Any], **model_args: Any) -> MixedFeatureNet:
    if isinstance(tag := kwargs.get('pretrained_cfg'), str):
        check_model_name(f'{variant}.{tag}')
    if pretrained:
        kwargs = prefer_hub(variant, kwargs)
    model = build_model_with_cfg(
        MixedFeatureNet, variant, pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), flatten_sequential=True),
        **{**model_args, **kwargs},
    )
    if kwargs.get('features_only'):  # what timm's checkpoint_path loads after this
        model.register_load_state_dict_pre_hook(take_features)
    return model


@register_model
def lfn_small(pretrained: bool = False, **kwargs: Any) -> MixedFeatureNet:
    """LFN with the head of MFN: the paper's network without Spatial Bias."""
    return _create_network('lfn_small', pretrained, kwargs, stages=_LFN_STAGES)


@register_model
def lfnsb(pretrained: bool = False, **kwargs: Any) -> MixedFeatureNet:
    """LFN with Spatial Bias, the paper's network."""
    return _create_network('lfnsb', pretrained, kwargs, stages=_LFN_STAGES, head='sb')


@register_model
def mfn(pretrained: bool = False, **kwargs: Any) -> MixedFeatureNet:
    """MFN, the backbone of DDAMFN, with its embedding head."""
    return _create_network('mfn', pretrained, kwargs, stages=_MFN_STAGES, final_chs=512, stem_act=True)


@register_model
def ddamfn(pretrained: bool = False, **kwargs: Any) -> MixedFeatureNet:
    """DDAMFN: MFN with two direction attention heads."""
    return _create_network(
        'ddamfn', pretrained, kwargs, stages=_MFN_STAGES, final_chs=512, stem_act=True, head='dda', embed_dim=512)


@register_model
def mobilefacenet(pretrained: bool = False, **kwargs: Any) -> MixedFeatureNet:
    """MobileFaceNet, the baseline of the paper's Table 2, with the 128 values of its own paper as embedding."""
    return _create_network(
        'mobilefacenet', pretrained, kwargs, stages=_MOBILEFACENET_STAGES, final_chs=512, mixed=False, stem_act=True,
        embed_dim=128)
