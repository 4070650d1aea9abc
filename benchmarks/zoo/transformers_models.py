"""One tiny, randomly initialised network of each model type of Hugging Face's transformers.

A configuration is made small by the names of its fields: widths 32, two layers, four heads, few tokens, small pictures.
What does not build that way, or needs weights or data from elsewhere, is recorded as not built.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers
import transformers.models.llama.modeling_llama  # what most share is imported here, once
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.zoo.problem import Problem, draw, scalar

LARGEST = 3_000_000  # parameters; more are not tiny
TOKENS, PICTURE, PATCH = 99, 32, 8
LENGTH = 8  # tokens in a sentence

_SIZES: list[tuple[str, int]] = [  # the first that fits a field's whole name
    (r".*codebook_size", 64),  # a power of 2
    (r".*(vocab_size|num_embeddings)", TOKENS),
    (r"mask_time_length|mask_feature_length", 2),
    (r"num_groups|num_conv_pos_embedding_groups", 4),
    (r".*(key_value_heads|kv_heads|key_heads|num_query_groups)", 2),
    (r".*(attention_heads|_heads|n_heads?|num_heads|encoder_heads|value_heads|heads|nhead)", 4),
    (r"qk_head_dim", 16),
    (r".*(head_dim|head_size|d_kv|d_head|dim_head|kv_channels|attention_head_dim|rope_head_dim|rotary_dim)", 8),
    (r".*(lora_rank|lowrank|gate_rank)", 8),
    (r".*(intermediate_size.*|ffn_dim|mlp_dim|d_ff|dff|dim_ff|dim_feedforward|feedforward_dim|linear_units)", 64),
    (r"(?!num_hidden_layers_).*(hidden_layers|_layers|n_layers?|layers|depth|num_blocks|encoder_layer)", 2),
    (r"(.*hidden_size|.*d_model|.*embed_dim|.*embedding_size|.*n_embd|.*hidden_dim|dim|.*projection_dim)", 32),
    (r"(.*_hidden_dim|d_latents|emb_dim|.*out_channels|.*_channels_out|.*feature_size|.*codebook_dim)", 32),
    (r"(num_experts_per_tok|moe_topk|top_k|moe_k|.*experts_per_token|index_topk|topk_group|n_group)", 2),
    (r"(.*experts|.*num_experts)", 4),
    (r"(max_position_embeddings|.*position_embeddings|n_positions|n_ctx|block_size|max_seq_len.*)", 64),
    (r"(image_size|img_size|crop_size|train_size)", PICTURE),
    (r"patch_size", PATCH),
    (r"num_mel_bins|n_mel_bins", 16),
    (r".*(sliding_window|window_size)", 4),
    (r"num_queries|num_query_tokens|num_latents|.*latent_query_num", 4),
    (r"max_source_positions|max_target_positions", 32),
]
_OVERRIDES: dict[str, dict[str, Any]] = {
    "reformer": {
        "is_decoder": True, "axial_pos_embds": False, "hash_seed": 0, "num_buckets": 2, "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "feed_forward_size": 64,
        # its reversible layers draw their masks from seeds of the clock
        "hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0,
    },
}  # fmt: skip
_KEPT = re.compile(r".*(num_channels|token_id|index|kernel_size|stride|cost|coefficient|ratio|factor|num_labels).*")


def _smaller(name: str, value: Any) -> Any:
    """A field's value in a tiny configuration; None to leave it."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int):
        if name.endswith(("token_id", "token_index")) and value >= TOKENS:
            return 10 + sum(map(ord, name)) % (TOKENS - 20)
        if _KEPT.fullmatch(name):
            return None
        size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
        return size if size is not None and value > size else None
    if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
        if name in ("depths", "layer_depths", "num_conv_blocks", "n_attn_blocks", "stage_num_blocks"):
            return type(value)([1] * len(value))
        if re.fullmatch(r".*(hidden_sizes|conv_dim|embed_dim|widths|embed_dims)", name):
            return type(value)(16 * (1 + (value[k] > value[0])) for k in range(len(value)))
        if name in ("num_heads", "num_attention_heads"):
            return type(value)([2] * len(value))
        if name == "image_size":
            return type(value)([PICTURE] * len(value))
        if name == "patch_size":
            return type(value)(min(v, PATCH) for v in value)
    return None


def _fields(config: Any) -> Iterator[tuple[str, Any]]:
    """Fields of a configuration that its own class declares."""
    common = {field.name for field in dataclasses.fields(transformers.PreTrainedConfig)}
    for field in dataclasses.fields(config):
        if field.name not in common and hasattr(config, field.name):
            yield field.name, getattr(config, field.name)


def tiny(kind: type) -> dict[str, Any]:
    """Arguments that make a configuration class small."""
    config = kind()
    small: dict[str, Any] = {}
    latent = hasattr(config, "kv_lora_rank")  # multi-head latent attention has as many keys as queries
    for name, value in _fields(config):
        if isinstance(value, transformers.PreTrainedConfig):
            small[name] = tiny(type(value)) | {"model_type": value.model_type}
        elif (less := 4 if latent and name == "num_key_value_heads" else _smaller(name, value)) is not None:
            small[name] = less
    return small


HEADS = (  # the first that a model type has
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)  # fmt: skip


def _class_names() -> dict[str, str]:
    """Model type -> the class to build."""
    found: dict[str, str] = {}
    for head in HEADS:
        for kind, name in getattr(modeling_auto, head).items():
            found.setdefault(kind, name if isinstance(name, str) else name[0])
    return found


def build(kind: str, class_name: str) -> Problem:
    """The tiny network of a model type with a loss."""
    transformers.logging.set_verbosity_error()
    config_class = CONFIG_MAPPING[kind]
    config = config_class(**{**tiny(config_class), **_OVERRIDES.get(kind, {})})
    model_class = getattr(transformers, class_name)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = model_class(config).train()
    inputs = arguments(model)
    return Problem(model, partial(_loss, model, inputs))


def arguments(model: nn.Module) -> dict[str, Any]:
    """Random inputs by the names of what `forward` takes."""
    config = model.config
    text = config.get_text_config()
    tokens = min(getattr(text, "vocab_size", None) or TOKENS, TOKENS)
    words = lambda: torch.randint(4, min(tokens, 10), (2, LENGTH), generator=torch.Generator().manual_seed(2))
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or PICTURE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    channels = channels if isinstance(channels, int) else 3
    mel = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 16
    makers: dict[str, Callable[[], Any]] = {
        "input_ids": words,
        "decoder_input_ids": words,
        "pixel_values": lambda: draw(2, channels, height, width),
        "input_values": lambda: draw(2, 4000),
        "input_features": lambda: draw(2, mel, 2 * getattr(config, "max_source_positions", 32)),
        "bbox": lambda: torch.tensor([1, 2, 3, 4]).expand(2, LENGTH, 4),
    }
    accepted = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    wanted = {main, "bbox"} | ({"decoder_input_ids"} if getattr(config, "is_encoder_decoder", False) else set())
    if "input_ids" in accepted and "pixel_values" in accepted and main == "pixel_values":
        wanted.add("input_ids")
    if hasattr(config, "vision_config") and hasattr(config, "text_config") and "CLIP" in type(model).__name__.upper():
        wanted |= {"input_ids", "pixel_values"}
    wanted |= {name for name, parameter in accepted.items() if parameter.default is inspect.Parameter.empty}
    return {name: makers[name]() for name in wanted if name in accepted and name in makers}


def _loss(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """A smooth scalar of all floating-point outputs with fixed random weights."""
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    dtype = next(model.parameters()).dtype
    given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    return scalar(model(**given, **extra, return_dict=True))


_PART = re.compile(r".*_(text|vision|vision_model|audio|encoder|decoder|text_model|audio_encoder|vision_encoder)")


def cases(parts: bool = False) -> dict[str, Callable[[], Problem]]:
    """Name -> how to build it, of whole networks or of parts that are model types of their own."""
    kinds = {kind: name for kind, name in sorted(_class_names().items()) if bool(_PART.fullmatch(kind)) == parts}
    return {f"transformers/{kind}": partial(build, kind, name) for kind, name in kinds.items()}
