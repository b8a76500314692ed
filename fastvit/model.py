"""The Vision Transformer: timm's constructor, attributes, methods and parameter names, on fused ops."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import weight_init as initial
from .checkpoints import load_checkpoint
from .fused import blocks_forward, is_watched
from .intermediates import IntermediateLayers
from .layers import (
    Attention,
    Block,
    LayerNorm,
    Mlp,
    PatchDropout,
    PatchEmbed,
    class_token_block_forward,
    embed_forward,
    get_act_layer,
    get_norm_layer,
)
from .norm_act import Layer, one_of
from .pool import AttentionPoolLatent, AttentionPoolPrr
from .resample import resample_pos_embed
from .variants import find_variant

torch.fx.wrap("resample_pos_embed")

POOLS = ("", "avg", "avgmax", "max", "token", "map", "prr")
_BLOCK_FORWARD = Block.forward  # what a plan of a block stands for


class VisionTransformer(IntermediateLayers):
    """A ViT that takes timm's arguments and checkpoints.

    Arguments have the meaning and the defaults that they have in timm 1.0.31. Four more are keyword only:

    pixel_mean, pixel_std  of [0, 1] pixels; with them the model takes raw uint8 images as well. Float images
                           are used as they come
    cls_only_last_block    run the last block for the class token alone where nothing else reads its output: the
                           same logits and gradients for less work

    "An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale" (Dosovitskiy et al., 2021).
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        pos_embed: str = "learn",
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        pool_include_prefix: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        fix_init: bool = False,
        embed_layer: Callable[..., nn.Module] = PatchEmbed,
        embed_norm_layer: Layer = None,
        norm_layer: Layer = None,
        act_layer: Layer = None,
        block_fn: Callable[..., nn.Module] = Block,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        attn_layer: Layer = Attention,
        device=None,
        dtype=None,
        *,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        cls_only_last_block: bool = True,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        _check_pool("global_pool", global_pool, class_token)
        one_of("pos_embed", pos_embed, ("", "none", "learn"))
        one_of("weight_init", weight_init, ("skip", *initial.MODES))
        norm = get_norm_layer(norm_layer) or LayerNorm
        embed_norm = get_norm_layer(embed_norm_layer, "embed_norm_layer")
        act = get_act_layer(act_layer) or nn.GELU
        use_fc_norm = global_pool in ("avg", "avgmax", "max") if fc_norm is None else fc_norm

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.num_reg_tokens = reg_tokens
        self.has_class_token = class_token
        self.no_embed_class = no_embed_class
        self.pool_include_prefix = pool_include_prefix or global_pool == "prr"
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self.cls_only_last_block = cls_only_last_block
        self.pretrained_cfg: dict[str, Any] = {}
        self.default_cfg: dict[str, Any] = {}
        self._set_pixel_statistics(pixel_mean, pixel_std, device)

        embed_args: dict[str, Any] = {"strict_img_size": False, "output_fmt": "NHWC"} if dynamic_img_size else {}
        if embed_norm is not None:
            embed_args["norm_layer"] = embed_norm
        self.patch_embed = embed_layer(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=not pre_norm,  # a norm follows at once and would take most of it away again, as in CLIP
            dynamic_img_pad=dynamic_img_pad,
            **embed_args,
            **factory,
        )
        self.cls_token = _parameter(class_token, (1, 1, embed_dim), factory)
        self.reg_token = _parameter(reg_tokens, (1, reg_tokens, embed_dim), factory)
        positions = self.patch_embed.num_patches + (0 if no_embed_class else self.num_prefix_tokens)
        self.pos_embed = _parameter(pos_embed == "learn", (1, positions, embed_dim), factory)
        self.pos_drop = nn.Dropout(p=pos_drop_rate)
        self.patch_drop = (
            PatchDropout(patch_drop_rate, num_prefix_tokens=self.num_prefix_tokens)
            if patch_drop_rate > 0
            else nn.Identity()
        )
        self.norm_pre = norm(embed_dim, **factory) if pre_norm else nn.Identity()
        drop_path_rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        self.blocks = nn.Sequential(
            *[
                block_fn(
                    dim=embed_dim,
                    num_heads=num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    scale_attn_norm=scale_attn_norm,
                    scale_mlp_norm=scale_mlp_norm,
                    proj_bias=proj_bias,
                    init_values=init_values,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path_rates[i],
                    norm_layer=norm,
                    act_layer=act,
                    mlp_layer=mlp_layer,
                    attn_layer=attn_layer,
                    depth=i,
                    **factory,
                )
                for i in range(depth)
            ]
        )
        reduction = self.patch_embed.feat_ratio() if hasattr(self.patch_embed, "feat_ratio") else patch_size
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.norm = norm(embed_dim, **factory) if final_norm and not use_fc_norm else nn.Identity()
        self.attn_pool = self._attention_pool(num_heads, mlp_ratio, norm, act, factory)
        self.fc_norm = norm(embed_dim, **factory) if final_norm and use_fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Linear(embed_dim, num_classes, **factory) if num_classes > 0 else nn.Identity()
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        self.fix_init = fix_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def _attention_pool(self, num_heads, mlp_ratio, norm, act, factory) -> nn.Module | None:
        if self.global_pool == "map":
            return AttentionPoolLatent(
                self.embed_dim, num_heads=num_heads, mlp_ratio=mlp_ratio, norm_layer=norm, act_layer=act, **factory
            )
        if self.global_pool == "prr":
            pool_type = "token" if self.has_class_token else "avg"
            return AttentionPoolPrr(self.embed_dim, num_heads, pool_type=pool_type, norm_layer=norm, **factory)
        return None

    def _set_pixel_statistics(self, mean: Sequence[float] | None, std: Sequence[float] | None, device: Any) -> None:
        if (mean is None) != (std is None):
            raise ValueError("pixel_mean and pixel_std belong together, only one was given")
        self._pixel_statistics = {"pixel_mean": mean, "pixel_std": std}
        for name, values in self._pixel_statistics.items():
            if values is not None and len(values) != self.in_chans:
                raise ValueError(f"{name} has {len(values)} values, expected one for each of {self.in_chans} channels")
            buffer = None if values is None else torch.tensor(values, dtype=torch.float32, device=device)
            self.register_buffer(name, buffer, persistent=False)

    def _apply(self, fn: Callable, recurse: bool = True) -> VisionTransformer:
        """Move and cast as usual, but keep the pixel statistics: in float32, and with values after a stay on meta."""
        before = {name: getattr(self, name) for name in self._pixel_statistics}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if old is not None and (new.dtype != old.dtype or (old.is_meta and not new.is_meta)):
                exact = torch.tensor(self._pixel_statistics[name], dtype=torch.float32, device=new.device)
                setattr(self, name, exact)
        return self

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Initialise by ``mode``, or by the mode the model was made with; see ``weight_init``."""
        mode = mode or self.weight_init_mode
        one_of("mode", mode, initial.MODES)
        if self.pos_embed is not None:
            initial.truncated_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        head_bias = -math.log(self.num_classes) if "nlhb" in mode else 0.0
        initial.init_weights(self, mode, head_bias, needs_reset)
        if self.fix_init:
            self.fix_init_weight()

    def fix_init_weight(self) -> None:
        """Scale each block's last projections down with its depth."""
        with torch.no_grad():
            for i, block in enumerate(self.blocks):
                scale = math.sqrt(2.0 * (i + 1))
                block.attn.proj.weight.div_(scale)
                block.mlp.fc2.weight.div_(scale)

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load a JAX checkpoint (``.npz``, as published for the original ViTs)."""
        from .checkpoints import load_npz

        load_npz(self, checkpoint_path, prefix)

    def no_weight_decay(self) -> set[str]:
        """Parameters that an optimiser should not shrink."""
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable
        if hasattr(self.patch_embed, "set_grad_checkpointing"):
            self.patch_embed.set_grad_checkpointing(enable)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head for ``num_classes`` (0: none), and another pooling if ``global_pool`` says so."""
        if global_pool is not None:
            _check_pool("global_pool", global_pool, self.has_class_token)
            attends = global_pool in ("map", "prr")
            if attends and global_pool != self.global_pool:
                raise ValueError(f"global_pool is {global_pool!r}: reset_classifier cannot add an attention pool")
            self.attn_pool = self.attn_pool if attends else None
            self.global_pool = global_pool
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
        self.head.train(self.training)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images or patches of another size; the position table and the patch projection are resampled."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        if self.pos_embed is None or self.patch_embed.grid_size == old_grid:
            return
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        table = resample_pos_embed(self.pos_embed.detach(), self.patch_embed.grid_size, old_grid, prefix)
        self.pos_embed = nn.Parameter(table, requires_grad=self.pos_embed.requires_grad)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add prefix tokens and positions to patch tokens (B, L, E), or (B, rows, columns, E) with a dynamic size."""
        grid = (x.shape[1], x.shape[2]) if self.dynamic_img_size else None
        x = x.flatten(1, 2) if grid else x
        tokens = [token for token in (self.cls_token, self.reg_token) if token is not None]
        prefix = [token.expand(x.shape[0], -1, -1) for token in tokens]
        if self.pos_embed is None:
            return torch.cat([*prefix, x], dim=1)
        pos_embed: Tensor = self.pos_embed
        if grid:
            num_prefix_tokens = 0 if self.no_embed_class else self.num_prefix_tokens
            pos_embed = resample_pos_embed(pos_embed, grid, self.patch_embed.grid_size, num_prefix_tokens)
        if self.no_embed_class:
            x = torch.cat([*prefix, x + pos_embed], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + pos_embed
        return self.pos_drop(x)

    def _embed(self, images: Tensor) -> Tensor:
        """Images to the tokens that enter the first block."""
        raw = not isinstance(images, torch.fx.Proxy) and images.dtype == torch.uint8
        if raw and self.pixel_mean is None:
            raise ValueError("images are uint8, expected normalised floats, or a model with pixel_mean and pixel_std")
        tokens = embed_forward(self, images, *((self.pixel_mean, self.pixel_std) if raw else ()))
        return self.norm_pre(self.patch_drop(tokens))

    def _run_block(
        self, block: nn.Module, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            return block(x, attn_mask=attn_mask, is_causal=is_causal)
        if self.grad_checkpointing:
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def _run_blocks(
        self, blocks: list[nn.Module], x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        done = 0
        is_plain = attn_mask is None and not is_causal and Block.forward is _BLOCK_FORWARD
        if is_plain and not self.grad_checkpointing:
            x, done = blocks_forward(blocks, Block, x)
        for block in blocks[done:]:
            x = self._run_block(block, x, attn_mask, is_causal)
        return x

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images to normalised tokens, (B, T + L, E)."""
        x = self._embed(x)
        is_plain = attn_mask is None and not is_causal and not self.grad_checkpointing
        if is_plain and is_watched(self.blocks):
            return self.norm(self.blocks(x))
        return self.norm(self._run_blocks(list(self.blocks), x, attn_mask, is_causal))

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens (B, T + L, E) to features (B, E); the tokens themselves when there is no pooling."""
        if self.attn_pool is not None:
            return self.attn_pool(x if self.pool_include_prefix else x[:, self.num_prefix_tokens :])
        pool_type = self.global_pool if pool_type is None else pool_type
        if not pool_type:
            return x
        if pool_type == "token":
            return x[:, 0]
        x = x if self.pool_include_prefix else x[:, self.num_prefix_tokens :]
        if pool_type == "avg":
            return x.mean(dim=1)
        if pool_type == "max":
            return x.amax(dim=1)
        one_of("pool_type", pool_type, ("", "avg", "avgmax", "max", "token"))
        return 0.5 * (x.amax(dim=1) + x.mean(dim=1))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens to logits, or to the features before the classifier."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images to logits.

        x          (B, C, IH, IW)  normalised floats; or raw uint8, with pixel_mean and pixel_std
        attn_mask  broadcastable to (B, H, N, N); bool (True takes part) or float (added)
        returns    (B, num_classes)
        """
        if attn_mask is None and not is_causal and self._only_class_token_is_read():
            return self.forward_head(self._class_token_features(x))
        return self.forward_head(self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal))

    def _class_token_features(self, images: Tensor) -> Tensor:
        """``forward_features(images)[:, :1]``."""
        x, (*blocks, last) = self._embed(images), self.blocks
        x = self._run_blocks(blocks, x)
        if self.grad_checkpointing:
            return self.norm(checkpoint(class_token_block_forward, last, x, use_reentrant=False))
        return self.norm(class_token_block_forward(last, x))

    def _only_class_token_is_read(self) -> bool:
        """Whether nothing but the head sees the last block's output: no hook, no pooling, no method overridden."""
        if not self.cls_only_last_block or self.global_pool != "token" or self.attn_pool is not None:
            return False
        if not len(self.blocks) or is_watched(self.blocks) or is_watched(self.norm):
            return False
        return isinstance(self.blocks[-1], Block) and all(
            getattr(type(self), name) is getattr(VisionTransformer, name)
            for name in ("forward_features", "forward_head", "pool")
        )


def _parameter(wanted: Any, shape: tuple[int, ...], factory: dict[str, Any]) -> nn.Parameter | None:
    return nn.Parameter(torch.empty(shape, **factory)) if wanted else None


def _check_pool(argument: str, global_pool: str, class_token: bool) -> None:
    one_of(argument, global_pool, POOLS)
    if global_pool == "token" and not class_token:
        raise ValueError(f"{argument} is 'token', expected another pooling without a class token")


def create_model(
    name: str,
    pretrained: bool = False,
    checkpoint_path: str | os.PathLike | None = None,
    num_classes: int | None = None,
    **overrides: Any,
) -> VisionTransformer:
    """A variant by timm's name, with any of ``VisionTransformer``'s arguments overridden.

    checkpoint_path  a local file of weights; its position table is resampled to this model's grid if need be
    num_classes      another number than the checkpoint has starts a new head; 0 leaves the head out

    The model also takes raw uint8 images, which it normalises with the variant's own mean and std.

    >>> create_model("vit_base_patch16_224", num_classes=10, checkpoint_path="vit_b16.safetensors")
    """
    variant = find_variant(name)
    if pretrained and checkpoint_path is None:
        raise ValueError(
            f"create_model: pretrained=True for {name!r} needs a local file, nothing is downloaded: pass"
            f" checkpoint_path='{name}.safetensors' (or .pth, .npz)"
        )
    arguments = {**variant.arguments, **overrides}
    arguments["num_classes"] = variant.num_classes if num_classes is None else num_classes
    if arguments.get("in_chans", 3) == 3 and "pixel_mean" not in arguments:
        arguments.update(pixel_mean=variant.mean, pixel_std=variant.std)
    model = VisionTransformer(**arguments)
    model.pretrained_cfg = model.default_cfg = variant.config(name)
    if checkpoint_path is not None:
        load_checkpoint(model, checkpoint_path, new_head=num_classes is not None)
    return model
