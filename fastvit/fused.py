"""Run the parts of a ViT on the fused ops, reading its modules by timm's attribute names.

The same functions serve fastvit's own modules and, unchanged, other libraries' blocks with those names. What an op
cannot express (a hook, a LoRA adapter, active dropout, another activation) is run by the modules themselves, part by
part, with the same result; ``why_not_fused`` names the module and the rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as module_state

from .block_parts import BlockParts, read_block, row_scale
from .block_plan import class_token_heads, class_token_linears, looks_ahead, run_block, run_blocks
from .kinds import ACTIVATIONS, HEAD_NORMS, is_watched, kind_of
from .ops import attention, attention_packed, layernorm_linear, layernorm_mlp, linear_residual, patch_embed
from .reference import HeadNorm, normalize_pixels, unpack_qkv
from .resample import resample_pos_embed

for _op in ("attention", "attention_packed", "layernorm_linear", "layernorm_mlp", "linear_residual", "patch_embed"):
    torch.fx.wrap(_op)  # symbolic tracing records the op itself, not the checks inside it


def why_not_skip(module: Any, name: str, *kinds: str) -> list[str]:
    """Reasons why an op may not stand in for ``module``: it is none of ``kinds``, or its call is watched or changed."""
    kind = kind_of(module)
    if kind not in kinds:
        return [f"{name} is a {type(module).__qualname__}, the fused ops take {' or '.join(kinds)}"]
    if module is None:
        return []
    if is_watched(module):
        return [f"{name} has hooks, which a fused op would not call"]
    own = module.__dict__  # not getattr: this runs at every forward, and a missing attribute is slow to miss
    if "forward" in own:
        return [f"{name}.forward was replaced on this instance"]
    if "parametrizations" in own["_modules"]:
        return [f"{name} is parametrised, so its weight is computed at each call"]
    weight = own["_parameters"].get("weight")
    if weight is not None and type(weight) not in (nn.Parameter, Tensor):
        return [f"{name}.weight is a {type(weight).__name__}, the fused ops take plain tensors"]
    if kind in HEAD_NORMS and (len(own["normalized_shape"]) != 1 or own.get("_fast_norm")):
        return [f"{name} normalises over {tuple(module.normalized_shape)} or by timm's fast norm, expected (E,)"]
    return []


def why_not_skip_dropout(module: nn.Module | None, name: str) -> list[str]:
    reasons = why_not_skip(module, name, "Dropout", "Identity")
    if not reasons and isinstance(module, nn.Dropout) and module.p > 0 and module.training:
        return [f"{name} is active (p={module.p})"]
    return reasons


def _why_not_norm_linear(norm: nn.Module, norm_name: str, linear: nn.Module, linear_name: str) -> list[str]:
    return why_not_skip(norm, norm_name, "LayerNorm") or why_not_skip(linear, linear_name, "Linear")


def _why_not_attention_module(attn: Any) -> list[str]:
    """Reasons why ``attn`` must be called as a whole; otherwise its parts are judged one by one."""
    reasons = why_not_skip(attn, "attn", "Attention")
    if reasons:
        return reasons
    if not getattr(attn, "fused_attn", True):
        return ["attn.fused_attn is False, so the attention weights are wanted"]
    if getattr(attn, "gate", None) is not None:
        return ["attn.gate gates the attention output"]
    return []


def _why_not_packed(attn: Any) -> list[str]:
    """Reasons why q and k must be normalised by modules, apart from the attention."""
    return why_not_skip(attn.q_norm, "attn.q_norm", "Identity", *HEAD_NORMS) or why_not_skip(
        attn.k_norm, "attn.k_norm", kind_of(attn.q_norm)
    )


def head_norms(attn: Any) -> dict[str, Any]:
    """q_norm and k_norm as the attention ops take them; {} where ``attn`` has none."""
    kind = kind_of(attn.q_norm)
    if kind == "Identity":
        return {}
    modules = {"q_norm": attn.q_norm, "k_norm": attn.k_norm}
    return {
        name: HeadNorm(norm.weight, getattr(norm, "bias", None), norm.eps, kind == "RmsNorm")
        for name, norm in modules.items()
    }


def _why_not_project(
    linear: nn.Module, drop: nn.Module, scale: nn.Module | None, drop_path: nn.Module | None, names: tuple[str, ...]
) -> list[str]:
    return (
        why_not_skip(linear, names[0], "Linear")
        or why_not_skip_dropout(drop, names[1])
        or why_not_skip(scale, names[2], "LayerScale", "Identity")
        or why_not_skip(drop_path, names[3], "DropPath", "Identity")
    )


def _why_not_mlp(block: Any) -> list[str]:
    """Reasons why LN2, the MLP and the residual are not one op."""
    mlp = block.mlp
    return (
        why_not_skip(mlp, "mlp", "Mlp")
        or _why_not_norm_linear(block.norm2, "norm2", mlp.fc1, "mlp.fc1")
        or why_not_skip(mlp.act, "mlp.act", *ACTIVATIONS)
        or why_not_skip_dropout(mlp.drop1, "mlp.drop1")
        or why_not_skip(getattr(mlp, "norm", None), "mlp.norm", "Identity")
        or _why_not_project(mlp.fc2, mlp.drop2, *_branch(block, 2), _MLP_NAMES)
    )


_PROJ_NAMES = ("attn.proj", "attn.proj_drop", "ls1", "drop_path1")
_MLP_NAMES = ("mlp.fc2", "mlp.drop2", "ls2", "drop_path2")


def _branch(block: Any, number: int) -> tuple[nn.Module | None, nn.Module | None]:
    return getattr(block, f"ls{number}", None), getattr(block, f"drop_path{number}", None)


def _why_not_block(block: Any) -> list[str]:
    if kind_of(block) != "Block":
        return [f"block is a {type(block).__qualname__}, expected timm's or fastvit's Block"]
    if _is_everything_watched():
        return ["hooks are registered for every module, which a fused op would not call"]
    return ["torch.jit is tracing"] if torch.jit.is_tracing() else []


def _is_everything_watched() -> bool:
    return bool(
        module_state._global_forward_hooks
        or module_state._global_forward_pre_hooks
        or module_state._global_backward_hooks
        or module_state._global_backward_pre_hooks
    )


def _may_read(x: Any) -> bool:
    """Whether a block may be read in one pass: no tracer follows, which wants to see every access."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return False
    return not _is_everything_watched() and torch._C._get_tracing_state() is None


def _attend_read(parts: BlockParts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Attention's result before its projection, and ``x`` for the residual connection."""
    qkv, x = layernorm_linear(x, *parts.norm1, *parts.qkv, eps=parts.eps1, with_input=True)
    num_heads, dropout_p, scale = parts.heads
    return attention_packed(qkv, num_heads, dropout_p=dropout_p, scale=scale, **parts.head_norms), x


def _project_read(parts: BlockParts, tokens: Tensor, residual: Tensor) -> Tensor:
    factors = row_scale(parts.drop_path1, residual)
    return linear_residual(tokens, *parts.proj, residual, layer_scale=parts.gamma1, row_scale=factors)


def _run_ops(parts: BlockParts, x: Tensor, memory: str) -> Tensor:
    return _run_mlp(parts, _project_read(parts, *_attend_read(parts, x)), memory)


def _run_class_token_ops(parts: BlockParts, x: Tensor) -> Tensor:
    return _run_mlp(parts, _project_read(parts, _attend_class_token(parts, x), x[:, :1]))


def _run_mlp(parts: BlockParts, x: Tensor, memory: str = "default") -> Tensor:
    options: dict[str, Any] = {"act": parts.act, "eps": parts.eps2, "memory": memory}
    return layernorm_mlp(x, *parts.mlp, layer_scale=parts.gamma2, row_scale=row_scale(parts.drop_path2, x), **options)


def why_not_fused(block: Any) -> list[str]:
    """Every reason why a part of ``block`` runs outside the four fused ops in its present mode; [] when none does."""
    reasons = _why_not_block(block)
    if reasons:
        return reasons
    attn, whole = block.attn, _why_not_attention_module(block.attn)
    if whole:
        reasons += whole
    else:
        reasons += _why_not_norm_linear(block.norm1, "norm1", attn.qkv, "attn.qkv")
        reasons += _why_not_packed(attn)
        reasons += why_not_skip(getattr(attn, "norm", None), "attn.norm", "Identity")
        reasons += _why_not_project(attn.proj, attn.proj_drop, *_branch(block, 1), _PROJ_NAMES)
    return reasons + _why_not_mlp(block)


def block_forward(
    block: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, memory: str = "default"
) -> Tensor:
    """One pre-norm transformer block on four ops.

    block      has norm1, attn.{qkv, q_norm, k_norm, attn_drop, proj, proj_drop}, ls1, drop_path1, norm2,
               mlp.{fc1, act, drop1, fc2, drop2}, ls2, drop_path2
    x          (B, N, E)
    attn_mask  broadcastable to (B, H, N, N); bool (True takes part) or float (added)
    memory     "default" | "lean", as layernorm_mlp has it
    returns    (B, N, E)  dtype of x
    """
    parts = read_block(block) if attn_mask is None and not is_causal and _may_read(x) else None
    if parts is not None:
        out = run_block(parts, x, memory)
        return out if out is not None else _run_ops(parts, x, memory)
    if _why_not_block(block):
        x = _add_branch(block, 1, x, _call_attention(block.attn, block.norm1(x), attn_mask, is_causal))
        return _add_branch(block, 2, x, block.mlp(block.norm2(x)))
    return mlp_residual(block, attention_residual(block, x, attn_mask, is_causal), memory)


def blocks_forward(blocks: Iterable[Any], kind: type[nn.Module], x: Tensor) -> tuple[Tensor, int]:
    """``block(x)`` for the first of these blocks, and how many they are: as far as one call each is all they need.

    kind  the class of blocks whose forward is ``block_forward`` and nothing else
    x     (B, N, E)
    """
    parts: list[BlockParts] = []
    if not _may_read(x) or torch.is_grad_enabled() or not looks_ahead(x):
        return x, 0
    for block in blocks:
        is_plain = type(block) is kind and not is_watched(block) and not _is_replaced(block)
        read = read_block(block) if is_plain else None
        if read is None:
            break
        parts.append(read)
    return run_blocks(parts, x)


def _is_replaced(block: Any) -> bool:
    """Whether a call of it is not its class's forward, but one given to this instance, or compiled."""
    return "forward" in block.__dict__ or block._compiled_call_impl is not None


def class_token_block_forward(block: Any, x: Tensor) -> Tensor:
    """``block(x)[:, :1]`` without the work for the other tokens: the last block when only the class token is read.

    Keys and values come from all tokens; the query, the projection and the MLP run for token 0. A hook or a module of
    an unknown kind, which may want all tokens, gets them.

    x        (B, N, E)
    returns  (B, 1, E)
    """
    parts = read_block(block) if _may_read(x) and not is_watched(block) else None
    if parts is not None:
        out = run_block(parts, x, class_token=True)
        return out if out is not None else _run_class_token_ops(parts, x)
    attn = block.attn
    if (
        any(is_watched(module) or not kind_of(module) for module in block.modules())
        or _why_not_block(block)
        or _why_not_attention_module(attn)
        or _why_not_norm_linear(block.norm1, "norm1", attn.qkv, "attn.qkv")
    ):
        return block(x)[:, :1]
    norm, linear = (block.norm1.weight, block.norm1.bias), (attn.qkv.weight, attn.qkv.bias)
    tokens = _attend(attn, *_class_token_qkv(x, norm, linear, block.norm1.eps, attn.num_heads))
    return mlp_residual(block, _project_attention(block, tokens, x[:, :1]))


def _attend_class_token(parts: BlockParts, x: Tensor) -> Tensor:
    """Attention's result (B, 1, H * D) for token 0, before its projection."""
    num_heads, dropout_p, scale = parts.heads
    q, k, v = _class_token_qkv(x, parts.norm1, parts.qkv, parts.eps1, num_heads)
    return attention(q, k, v, dropout_p=dropout_p, scale=scale, **parts.head_norms).transpose(1, 2).flatten(2)


def _class_token_qkv(
    x: Tensor, norm: tuple[Any, Any], linear: tuple[Any, Any], eps: float, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, H, 1, D) of token 0, and k and v (B, H, N, D) of all."""
    q, kv = (layernorm_linear(*arguments, eps=eps) for arguments in class_token_linears(x, norm, linear))
    return class_token_heads(q, kv, num_heads)


def attention_residual(block: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """``x + drop_path1(ls1(attn(norm1(x))))``."""
    attn = block.attn
    if _why_not_attention_module(attn):
        return _add_branch(block, 1, x, _call_attention(attn, block.norm1(x), attn_mask, is_causal))
    qkv, x = _norm_linear(block.norm1, "norm1", attn.qkv, "attn.qkv", x)
    return _project_attention(block, attend_packed(attn, qkv, attn_mask, is_causal), x)


def mlp_residual(block: Any, x: Tensor, memory: str = "default") -> Tensor:
    """``x + drop_path2(ls2(mlp(norm2(x))))``."""
    mlp, norm = block.mlp, block.norm2
    if not _why_not_mlp(block):
        gamma, row_scale = branch_scales(*_branch(block, 2), x)
        return layernorm_mlp(
            x,
            norm.weight,
            norm.bias,
            mlp.fc1.weight,
            mlp.fc1.bias,
            mlp.fc2.weight,
            mlp.fc2.bias,
            act=activation_name(mlp.act),
            eps=norm.eps,
            layer_scale=gamma,
            row_scale=row_scale,
            memory=memory,
        )
    if why_not_skip(mlp, "mlp", "Mlp", "GluMlp"):
        return _add_branch(block, 2, x, mlp(norm(x)))
    hidden, x = _norm_linear(norm, "norm2", mlp.fc1, "mlp.fc1", x)
    hidden = mlp.drop1(gated_activation(mlp, hidden) if kind_of(mlp) == "GluMlp" else mlp.act(hidden))
    if getattr(mlp, "norm", None) is not None:
        hidden = mlp.norm(hidden)
    return _project(block, 2, mlp.fc2, mlp.drop2, _MLP_NAMES, hidden, x)


def gated_activation(mlp: Any, hidden: Tensor) -> Tensor:
    """One half of ``hidden`` times the activation of the other."""
    first, second = hidden.chunk(2, dim=-1)
    return first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second


def attend_packed(attn: Any, qkv: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """The attention core of a timm Attention module, (B, N, 3 * H * D) to (B, N, H * D)."""
    if attn_mask is None and not is_causal and not _why_not_packed(attn):
        dropout_p = _dropout_p(attn.attn_drop)
        return attention_packed(qkv, attn.num_heads, dropout_p=dropout_p, scale=attn.scale, **head_norms(attn))
    q, k, v = unpack_qkv(qkv, attn.num_heads)
    return _attend(attn, q, k, v, attn_mask, is_causal)


def _attend(attn: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False):
    """q, k, v (B, H, N, D), before their norms, to (B, Nq, H * D)."""
    norms = {}
    if _why_not_packed(attn):
        q, k = attn.q_norm(q), attn.k_norm(k)
    else:
        norms = head_norms(attn)
    tokens = attention(
        q,
        k,
        v,
        attn_mask=attn_mask,
        is_causal=is_causal,
        dropout_p=_dropout_p(attn.attn_drop),
        scale=attn.scale,
        **norms,
    )
    return tokens.transpose(1, 2).flatten(2)


def _dropout_p(drop: nn.Module | None) -> float:
    return drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0


def _project_attention(block: Any, tokens: Tensor, residual: Tensor) -> Tensor:
    attn = block.attn
    if getattr(attn, "norm", None) is not None:
        tokens = attn.norm(tokens)
    return _project(block, 1, attn.proj, attn.proj_drop, _PROJ_NAMES, tokens, residual)


def _project(
    block: Any, number: int, linear: Any, drop: nn.Module, names: tuple[str, ...], x: Tensor, residual: Tensor
) -> Tensor:
    """``residual + drop_path(ls(drop(linear(x))))``."""
    if _why_not_project(linear, drop, *_branch(block, number), names):
        return _add_branch(block, number, residual, drop(linear(x)))
    gamma, row_scale = branch_scales(*_branch(block, number), residual)
    return linear_residual(x, linear.weight, linear.bias, residual, layer_scale=gamma, row_scale=row_scale)


def _norm_linear(norm: Any, norm_name: str, linear: Any, linear_name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """``linear(norm(x))``, and ``x`` for the residual connection."""
    if _why_not_norm_linear(norm, norm_name, linear, linear_name):
        return linear(norm(x)), x
    return layernorm_linear(x, norm.weight, norm.bias, linear.weight, linear.bias, eps=norm.eps, with_input=True)


def _add_branch(block: Any, number: int, residual: Tensor, branch: Tensor) -> Tensor:
    for module in _branch(block, number):
        branch = branch if module is None else module(branch)
    return residual + branch


def _call_attention(attn: nn.Module, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    if attn_mask is None and not is_causal:
        return attn(x)
    return attn(x, attn_mask=attn_mask, is_causal=is_causal)


def branch_scales(scale: Any, drop_path: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """LayerScale's gamma (E,) and DropPath's factor for each sample (B,): 0 or, when it rescales, 1 / keep_prob."""
    gamma = scale.gamma if kind_of(scale) == "LayerScale" else None
    if kind_of(drop_path) != "DropPath" or not drop_path.drop_prob or not drop_path.training:
        return gamma, None
    return gamma, row_scale(drop_path, x)


def activation_name(act: nn.Module) -> str:
    """The op's name for an activation module that ``why_not_skip`` let through."""
    if getattr(act, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return ACTIVATIONS[kind_of(act)]


def why_not_fused_embed(vit: Any) -> list[str]:
    """Reasons why patches, prefix tokens and positions are not embedded by one op."""
    embed = vit.patch_embed
    reasons = why_not_skip(embed, "patch_embed", "PatchEmbed")
    if reasons:
        return reasons
    reasons = why_not_skip(embed.proj, "patch_embed.proj", "Conv2d")
    reasons += why_not_skip(embed.norm, "patch_embed.norm", "Identity")
    if getattr(vit, "dist_token", None) is not None:
        reasons.append("dist_token is a prefix token that this embedding does not know")
    if torch.jit.is_tracing():
        reasons.append("torch.jit is tracing")
    return reasons


def embed_forward(vit: Any, images: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
    """Images to tokens: patches, class and register tokens, positions, position dropout.

    vit        has patch_embed, cls_token, reg_token, pos_embed, pos_drop, no_embed_class, dynamic_img_size
    images     (B, C, IH, IW)  float, or uint8 with mean and std
    mean, std  (C,)            in units of [0, 1] pixels
    returns    (B, T + L, E)
    """
    if isinstance(images, torch.fx.Proxy):  # its size and dtype are not known yet
        return vit._pos_embed(vit.patch_embed(images))
    embed, weight = vit.patch_embed, vit.patch_embed.proj.weight
    if images.dtype == torch.uint8 and embed.dynamic_img_pad:  # timm pads after normalising: the border is the mean
        images, mean, std = normalize_pixels(images, mean, std, weight.dtype), None, None
    grid = None if why_not_fused_embed(vit) else _grid(embed, images)
    if grid is None:
        pixels = images if mean is None else normalize_pixels(images, mean, std, weight.dtype)
        return vit._pos_embed(embed(pixels))
    below, right = grid[0] * weight.shape[2] - images.shape[2], grid[1] * weight.shape[3] - images.shape[3]
    if below != 0 or right != 0:  # pads when positive; crops, as a strided convolution does, when negative
        images = F.pad(images, (0, right, 0, below))
    pos_embed = vit.pos_embed
    if pos_embed is not None and vit.dynamic_img_size:
        num_prefix_tokens = 0 if vit.no_embed_class else vit.num_prefix_tokens
        pos_embed = resample_pos_embed(pos_embed, grid, embed.grid_size, num_prefix_tokens)
    tokens = patch_embed(
        images,
        weight,
        embed.proj.bias,
        pos_embed=None if pos_embed is None else pos_embed[0],
        prefix=_prefix(vit),
        mean=mean,
        std=std,
    )
    return tokens if pos_embed is None else vit.pos_drop(tokens)


def _prefix(vit: Any) -> Tensor | None:
    """The prefix tokens (T, E), class token first."""
    tokens = [token[0] for token in (vit.cls_token, vit.reg_token) if token is not None]
    if len(tokens) == 2:
        return torch.cat(tokens)
    return tokens[0] if tokens else None


def _grid(embed: Any, images: Tensor) -> tuple[int, int] | None:
    """The grid of patches of ``images``; None when ``embed`` would refuse their size (and should say so itself)."""
    (height, width), (rows, columns) = images.shape[2:], embed.patch_size
    if embed.img_size is not None and embed.strict_img_size:
        if height != embed.img_size[0] or width != embed.img_size[1]:
            return None
    elif not embed.dynamic_img_pad and (height % rows != 0 or width % columns != 0):
        return None
    if embed.dynamic_img_pad:
        return -(-height // rows), -(-width // columns)
    return height // rows, width // columns
