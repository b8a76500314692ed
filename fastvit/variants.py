"""The table of variants: timm's names and what they stand for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import partial
from typing import Any

from .layers import LayerNorm, RmsNorm, SwiGLU, SwiGLUPacked

Pixels = tuple[tuple[float, ...], tuple[float, ...]]

HALF: Pixels = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET: Pixels = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP: Pixels = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
UNIT: Pixels = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

# size: (embed_dim, depth, num_heads, mlp_ratio)
SIZES = {
    "tiny": (192, 12, 3, 4.0),
    "xsmall": (256, 10, 4, 4.0),
    "wee": (256, 14, 4, 5.0),
    "little": (320, 14, 5, 5.6),
    "small": (384, 12, 6, 4.0),
    "small36": (384, 36, 6, 4.0),
    "medium": (512, 12, 8, 4.0),
    "mediumd": (512, 20, 8, 4.0),
    "betwixt": (640, 12, 10, 4.0),
    "base": (768, 12, 12, 4.0),
    "base16": (768, 12, 16, 4.0),
    "so150m2": (832, 21, 13, 34 / 13),
    "plus": (896, 12, 14, 4.0),
    "so150m": (896, 18, 14, 2.572),
    "large": (1024, 24, 16, 4.0),
    "so400m": (1152, 27, 16, 3.7362),
    "so400m_exact": (1152, 27, 16, 4304 / 1152),
    "huge": (1280, 32, 16, 4.0),
    "giant": (1408, 40, 16, 48 / 11),
    "giant_beit3": (1408, 40, 16, 4.3637),
    "giant_swiglu": (1536, 40, 24, 2.66667 * 2),
    "giant_radio": (1536, 40, 24, 4.0),
    "giantopt": (1536, 40, 16, 4.0),
    "gigantic": (1664, 48, 16, 64 / 13),
    "aim_large": (1024, 24, 8, 2.75),
    "aim_huge": (1536, 24, 12, 2.6667),
    "aim_1b": (2048, 24, 16, 2.75),
    "aim_3b": (3072, 24, 24, 2.6667),
    "test": (64, 6, 2, 3.0),
    "test2": (64, 8, 2, 3.0),
    "test3": (96, 9, 3, 2.0),
    "test4": (96, 9, 3, 3.0),
}

PLAIN: dict[str, Any] = {}
SCALED = {"init_values": 1e-5}
DEIT3 = {"no_embed_class": True, "init_values": 1e-6}
REGISTERS = {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True}
TIPS = {"init_values": 1.0, "reg_tokens": 1, "no_embed_class": True}
SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": "silu"}
CLIPPED = {"pre_norm": True, "norm_layer": partial(LayerNorm, eps=1e-5)}
QUICK = {**CLIPPED, "act_layer": "quick_gelu"}
MAP = {"class_token": False, "global_pool": "map"}
GAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}
GAP_SCALED = {**GAP, "qkv_bias": False, "init_values": 1e-6}
REG1_GAP = {"class_token": False, "no_embed_class": True, "reg_tokens": 1, "global_pool": "avg", "init_values": 1e-5}
REG4_GAP = {**REG1_GAP, "reg_tokens": 4}
TANH = {"act_layer": "gelu_tanh"}
RADIO = {"no_embed_class": True, "final_norm": False}
BEIT3 = {
    "scale_attn_norm": True,
    "scale_mlp_norm": True,
    "global_pool": "avg",
    "norm_layer": partial(LayerNorm, eps=1e-5),
}
AIM_NORM = partial(RmsNorm, eps=1e-5)
AIM = {
    **GAP,
    "qkv_bias": False,
    "proj_bias": False,
    "act_layer": "silu",
    "norm_layer": AIM_NORM,
    "embed_norm_layer": AIM_NORM,
    "mlp_layer": SwiGLU,
}
SO150M = {"class_token": False, "reg_tokens": 4}
SO150M2 = {"class_token": False, "reg_tokens": 1, "global_pool": "avg", "qkv_bias": False, "init_values": 1e-5}
TEST_POOLED = {"class_token": False, "reg_tokens": 1, "init_values": 1e-5}

# (name; {} is the image side, size, patch side, image sides, classes, pixel statistics, other arguments)
ROWS: tuple[tuple[str, str, int, tuple[int, ...], int, Pixels, dict[str, Any]], ...] = (
    ("vit_tiny_patch16_{}", "tiny", 16, (224, 384), 1000, HALF, PLAIN),
    ("vit_small_patch8_{}", "small", 8, (224,), 0, IMAGENET, PLAIN),
    ("vit_small_patch16_{}", "small", 16, (224, 384), 1000, HALF, PLAIN),
    ("vit_small_patch32_{}", "small", 32, (224, 384), 1000, HALF, PLAIN),
    ("vit_small_patch16_36x1_{}", "small36", 16, (224,), 1000, HALF, SCALED),
    ("vit_base_patch8_{}", "base", 8, (224,), 1000, HALF, PLAIN),
    ("vit_base_patch16_{}", "base", 16, (224, 384), 1000, HALF, PLAIN),
    ("vit_base_patch32_{}", "base", 32, (224, 384), 1000, HALF, PLAIN),
    ("vit_base_patch16_{}_miil", "base", 16, (224,), 11221, UNIT, {"qkv_bias": False}),
    ("vit_base_patch16_plus_{}", "plus", 16, (240,), 1000, HALF, SCALED),
    ("vit_base_patch32_plus_{}", "plus", 32, (256,), 1000, HALF, SCALED),
    ("vit_large_patch14_{}", "large", 14, (224,), 1000, HALF, PLAIN),
    ("vit_large_patch16_{}", "large", 16, (224, 384), 1000, HALF, PLAIN),
    ("vit_large_patch32_{}", "large", 32, (224,), 0, HALF, PLAIN),
    ("vit_large_patch32_{}", "large", 32, (384,), 1000, HALF, PLAIN),
    ("vit_huge_patch14_{}", "huge", 14, (224,), 0, HALF, PLAIN),
    ("vit_giant_patch14_{}", "giant", 14, (224,), 1000, HALF, PLAIN),
    ("vit_gigantic_patch14_{}", "gigantic", 14, (224,), 1000, HALF, PLAIN),
    ("flexivit_small", "small", 16, (240,), 1000, HALF, {"no_embed_class": True}),
    ("flexivit_base", "base", 16, (240,), 1000, HALF, {"no_embed_class": True}),
    ("flexivit_large", "large", 16, (240,), 1000, HALF, {"no_embed_class": True}),
    ("eva_large_patch14_{}", "large", 14, (196, 336), 1000, CLIP, {"global_pool": "avg"}),
    ("deit_tiny_patch16_{}", "tiny", 16, (224,), 1000, IMAGENET, PLAIN),
    ("deit_small_patch16_{}", "small", 16, (224,), 1000, IMAGENET, PLAIN),
    ("deit_base_patch16_{}", "base", 16, (224, 384), 1000, IMAGENET, PLAIN),
    ("deit3_small_patch16_{}", "small", 16, (224, 384), 1000, IMAGENET, DEIT3),
    ("deit3_medium_patch16_{}", "medium", 16, (224,), 1000, IMAGENET, DEIT3),
    ("deit3_base_patch16_{}", "base", 16, (224, 384), 1000, IMAGENET, DEIT3),
    ("deit3_large_patch16_{}", "large", 16, (224, 384), 1000, IMAGENET, DEIT3),
    ("deit3_huge_patch14_{}", "huge", 14, (224,), 1000, IMAGENET, DEIT3),
    ("vit_small_patch14_dinov2", "small", 14, (518,), 0, IMAGENET, SCALED),
    ("vit_base_patch14_dinov2", "base", 14, (518,), 0, IMAGENET, SCALED),
    ("vit_large_patch14_dinov2", "large", 14, (518,), 0, IMAGENET, SCALED),
    ("vit_giant_patch14_dinov2", "giant_swiglu", 14, (518,), 0, IMAGENET, SCALED | SWIGLU),
    ("vit_small_patch14_reg4_dinov2", "small", 14, (518,), 0, IMAGENET, REGISTERS),
    ("vit_base_patch14_reg4_dinov2", "base", 14, (518,), 0, IMAGENET, REGISTERS),
    ("vit_large_patch14_reg4_dinov2", "large", 14, (518,), 0, IMAGENET, REGISTERS),
    ("vit_giant_patch14_reg4_dinov2", "giant_swiglu", 14, (518,), 0, IMAGENET, REGISTERS | SWIGLU),
    ("vit_base_patch14_reg1_tipsv2", "base", 14, (448,), 0, UNIT, TIPS),
    ("vit_large_patch14_reg1_tipsv2", "large", 14, (448,), 0, UNIT, TIPS),
    ("vit_so400m_patch14_reg1_tipsv2", "so400m_exact", 14, (448,), 0, UNIT, TIPS),
    ("vit_giant_patch14_reg1_tipsv2", "giant_swiglu", 14, (448,), 0, UNIT, TIPS | SWIGLU),
    ("vit_xsmall_patch16_clip_{}", "xsmall", 16, (224,), 512, CLIP, CLIPPED),
    ("vit_medium_patch16_clip_{}", "medium", 16, (224,), 512, CLIP, CLIPPED),
    ("vit_medium_patch32_clip_{}", "medium", 32, (224,), 512, CLIP, CLIPPED),
    ("vit_betwixt_patch32_clip_{}", "betwixt", 32, (224,), 512, CLIP, CLIPPED),
    ("vit_base_patch16_clip_{}", "base", 16, (224, 384), 1000, CLIP, CLIPPED),
    ("vit_base_patch32_clip_{}", "base", 32, (224, 384, 448), 1000, CLIP, CLIPPED),
    ("vit_base_patch32_clip_{}", "base", 32, (256,), 512, CLIP, CLIPPED),
    ("vit_base_patch16_plus_clip_{}", "plus", 16, (240,), 640, CLIP, CLIPPED),
    ("vit_large_patch14_clip_{}", "large", 14, (224, 336), 1000, HALF, CLIPPED),
    ("vit_huge_patch14_clip_{}", "huge", 14, (224, 336), 1000, CLIP, CLIPPED),
    ("vit_huge_patch14_clip_{}", "huge", 14, (378,), 1024, CLIP, CLIPPED),
    ("vit_giant_patch14_clip_{}", "giant", 14, (224,), 1024, CLIP, CLIPPED),
    ("vit_gigantic_patch14_clip_{}", "gigantic", 14, (224, 378), 1280, CLIP, CLIPPED),
    ("vit_base_patch16_clip_quickgelu_{}", "base", 16, (224,), 512, CLIP, QUICK),
    ("vit_base_patch32_clip_quickgelu_{}", "base", 32, (224,), 512, CLIP, QUICK),
    ("vit_large_patch14_clip_quickgelu_{}", "large", 14, (224, 336), 768, CLIP, QUICK),
    ("vit_huge_patch14_clip_quickgelu_{}", "huge", 14, (224, 378), 1024, CLIP, QUICK),
    ("vit_gigantic_patch14_clip_quickgelu_{}", "gigantic", 14, (224,), 1280, CLIP, QUICK),
    ("vit_base_patch16_siglip_{}", "base", 16, (224, 256, 384, 512), 0, HALF, MAP),
    ("vit_base_patch16_siglip_gap_{}", "base", 16, (224, 256, 384, 512), 0, HALF, GAP),
    ("vit_base_patch32_siglip_{}", "base", 32, (256,), 0, HALF, MAP | TANH),
    ("vit_base_patch32_siglip_gap_{}", "base", 32, (256,), 0, HALF, GAP | TANH),
    ("vit_large_patch16_siglip_{}", "large", 16, (256, 384), 0, HALF, MAP),
    ("vit_large_patch16_siglip_{}", "large", 16, (512,), 0, HALF, MAP | TANH),
    ("vit_large_patch16_siglip_gap_{}", "large", 16, (256, 384), 0, HALF, GAP),
    ("vit_large_patch16_siglip_gap_{}", "large", 16, (512,), 0, HALF, GAP | TANH),
    ("vit_so400m_patch14_siglip_{}", "so400m", 14, (224, 378, 384), 0, HALF, MAP),
    ("vit_so400m_patch14_siglip_gap_{}", "so400m", 14, (224, 378, 384, 448, 896), 0, HALF, GAP),
    ("vit_so400m_patch16_siglip_{}", "so400m", 16, (256, 384, 512), 0, HALF, MAP | TANH),
    ("vit_so400m_patch16_siglip_gap_{}", "so400m", 16, (256, 384, 512), 0, HALF, GAP | TANH),
    ("vit_giantopt_patch16_siglip_{}", "giantopt", 16, (256, 384), 0, HALF, MAP | TANH),
    ("vit_giantopt_patch16_siglip_gap_{}", "giantopt", 16, (256, 384), 0, HALF, GAP | TANH),
    ("vit_medium_patch16_gap_{}", "medium", 16, (240,), 11821, HALF, GAP_SCALED),
    ("vit_medium_patch16_gap_{}", "medium", 16, (256, 384), 1000, HALF, GAP_SCALED),
    ("vit_betwixt_patch16_gap_{}", "betwixt", 16, (256,), 1000, HALF, GAP_SCALED),
    ("vit_base_patch16_gap_{}", "base16", 16, (224,), 1000, HALF, GAP),
    ("vit_huge_patch14_gap_{}", "huge", 14, (224,), 0, IMAGENET, GAP),
    ("vit_huge_patch16_gap_{}", "huge", 16, (448,), 0, IMAGENET, GAP),
    ("vit_giant_patch16_gap_{}", "giant", 16, (224,), 0, IMAGENET, GAP),
    ("vit_wee_patch16_reg1_gap_{}", "wee", 16, (256,), 1000, HALF, REG1_GAP),
    ("vit_little_patch16_reg1_gap_{}", "little", 16, (256,), 1000, HALF, REG1_GAP),
    ("vit_little_patch16_reg4_gap_{}", "little", 16, (256,), 1000, HALF, REG4_GAP),
    ("vit_medium_patch16_reg1_gap_{}", "medium", 16, (256,), 1000, HALF, REG1_GAP),
    ("vit_medium_patch16_reg4_gap_{}", "medium", 16, (256,), 1000, HALF, REG4_GAP),
    ("vit_mediumd_patch16_reg4_gap_{}", "mediumd", 16, (256, 384), 1000, HALF, REG4_GAP),
    ("vit_betwixt_patch16_reg1_gap_{}", "betwixt", 16, (256,), 1000, HALF, REG1_GAP),
    ("vit_betwixt_patch16_reg4_gap_{}", "betwixt", 16, (256, 384), 1000, HALF, REG4_GAP),
    ("vit_base_patch16_reg4_gap_{}", "base", 16, (256,), 1000, HALF, {**REG4_GAP, "init_values": None}),
    ("vit_so150m_patch16_reg4_map_{}", "so150m", 16, (256,), 1000, HALF, SO150M | {"global_pool": "map"}),
    ("vit_so150m_patch16_reg4_gap_{}", "so150m", 16, (256, 384), 1000, HALF, SO150M | GAP),
    ("vit_so150m2_patch16_reg1_gap_{}", "so150m2", 16, (256, 384, 448), 1000, HALF, SO150M2),
    ("vit_intern300m_patch14_{}", "large", 14, (448,), 0, IMAGENET,
     {"init_values": 0.1, "final_norm": False, "dynamic_img_size": True}),
    ("vit_base_patch16_radio_v3", "base", 16, (512,), 0, CLIP, RADIO | {"reg_tokens": 7, "init_values": 1e-5}),
    ("vit_large_patch16_radio_v3", "large", 16, (512,), 0, CLIP, RADIO | {"reg_tokens": 7, "init_values": 1e-5}),
    ("vit_huge_patch16_radio_v3", "huge", 16, (512,), 0, CLIP, RADIO | {"reg_tokens": 7}),
    ("vit_giant_patch16_radio_v3", "giant_radio", 16, (512,), 0, CLIP, RADIO | {"reg_tokens": 7}),
    ("vit_so400m_patch16_radio_v4", "so400m_exact", 16, (512,), 0, CLIP, RADIO | {"reg_tokens": 9}),
    ("vit_huge_patch16_radio_v4", "huge", 16, (512,), 0, CLIP, RADIO | {"reg_tokens": 9}),
    ("beit3_base_patch16_{}", "base", 16, (224,), 1000, IMAGENET, BEIT3),
    ("beit3_large_patch16_{}", "large", 16, (224,), 1000, IMAGENET, BEIT3),
    ("beit3_giant_patch14_{}", "giant_beit3", 14, (224, 336), 1000, IMAGENET, BEIT3),
    ("aimv2_large_patch14_{}", "aim_large", 14, (224, 336, 448), 0, CLIP, AIM),
    ("aimv2_huge_patch14_{}", "aim_huge", 14, (224, 336, 448), 0, CLIP, AIM),
    ("aimv2_1b_patch14_{}", "aim_1b", 14, (224, 336, 448), 0, CLIP, AIM),
    ("aimv2_3b_patch14_{}", "aim_3b", 14, (224, 336, 448), 0, CLIP, AIM),
    ("test_vit", "test", 16, (160,), 1000, HALF, {"dynamic_img_size": True}),
    ("test_vit2", "test2", 16, (160,), 1000, HALF, TEST_POOLED | {"global_pool": "avg", "dynamic_img_size": True}),
    ("test_vit3", "test3", 16, (160,), 1000, HALF, TEST_POOLED | {"global_pool": "map", "pool_include_prefix": True}),
    ("test_vit4", "test4", 16, (160,), 1000, HALF,
     TEST_POOLED | {"global_pool": "avg", "dynamic_img_size": True, "norm_layer": "rmsnorm"}),
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A named model: the arguments that make it, and the pixels that its trained weights expect."""

    arguments: dict[str, Any]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def config(self, name: str) -> dict[str, Any]:
        """What timm's data code reads from ``model.pretrained_cfg``."""
        side = self.arguments["img_size"]
        return {
            "architecture": name,
            "num_classes": self.num_classes,
            "input_size": (3, side, side),
            "mean": self.mean,
            "std": self.std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }


def _variants() -> dict[str, Variant]:
    variants = {}
    for name, size, patch, sides, num_classes, (mean, std), other in ROWS:
        width, depth, heads, ratio = SIZES[size]
        for side in sides:
            arguments: dict[str, Any] = {"img_size": side, "patch_size": patch, "embed_dim": width, "depth": depth}
            arguments |= {"num_heads": heads, "mlp_ratio": ratio, **other}
            variants[name.format(side)] = Variant(arguments, num_classes, mean, std)
    return variants


VARIANTS = _variants()


def find_variant(name: str) -> Variant:
    """The variant of that name. A pretrained tag after a dot, as in ``vit_base_patch16_224.augreg``, is left out."""
    plain = name.split(".", 1)[0]
    if plain not in VARIANTS:
        near = difflib.get_close_matches(plain, VARIANTS, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else f"; there are {len(VARIANTS)} in fastvit.variants"
        raise ValueError(f"create_model: no variant is called {plain!r}{hint}")
    return VARIANTS[plain]
