"""MiniMind → a GGUF file, which llama.cpp, ollama and many others run.

Each MiniMind model is the same computation as an architecture of llama.cpp:

| MiniMind                        | llama.cpp   | q and k  | other differences in the weights      |
|---------------------------------|-------------|----------|---------------------------------------|
| dense                           | llama       | permuted |                                       |
| dense, q/k norm                 | qwen3       |          |                                       |
| MoE, shared experts             | bailingmoe  | permuted | shared experts are one                |
| MoE, shared experts, q/k norm   | bailingmoe2 |          | likewise; q, k and v are one matrix   |
| MoE                             | llama       | permuted |                                       |
| MoE, q/k norm                   | qwen3moe    |          |                                       |

"Permuted": RoPE pairs dimensions i and i + D/2 of a head here, but 2i and 2i + 1 there, so the rows
of q_proj and k_proj change places. The routed experts of a layer are one tensor, [E, out, in].

The file also holds the tokenizer and the chat template.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, TokenType
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from model.errors import UserError
from model.formats.experts import join_experts
from model.formats.minimind_format import ROUTER_BIAS
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

DTYPES = {
    "float16": GGMLQuantizationType.F16,
    "float32": GGMLQuantizationType.F32,
    "q8_0": GGMLQuantizationType.Q8_0,  # blocks of 32 weights: 8 bits each, and one scale
}
FILE_TYPES = {
    "float16": gguf.LlamaFileType.MOSTLY_F16,
    "float32": gguf.LlamaFileType.ALL_F32,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
PERMUTED = (MODEL_ARCH.LLAMA, MODEL_ARCH.BAILINGMOE)

# llama.cpp implements each pre-tokenizer by hand, under a name; a file can only name one.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    rf"{WORDS}|\p{{N}}|{PUNCTUATION}": "qwen2",
    rf"{WORDS}|\p{{N}}{{1,3}}|{PUNCTUATION}": "llama-bpe",
}


# -- architecture ----------------------------------------------------------------------------------


def architecture(config: MiniMindConfig) -> MODEL_ARCH:
    """The equivalent architecture of llama.cpp. UserError if there is none."""
    if not config.use_moe:
        return MODEL_ARCH.QWEN3 if config.qk_norm else MODEL_ARCH.LLAMA
    if config.n_shared_experts and config.qk_norm:
        return MODEL_ARCH.BAILINGMOE2
    if config.scoring_func != "softmax":
        raise UserError(
            'llama.cpp supports scoring_func "sigmoid" only with q/k norm and shared experts'
        )
    if config.n_shared_experts:
        return MODEL_ARCH.BAILINGMOE
    if not config.norm_topk_prob:
        raise UserError("llama.cpp supports norm_topk_prob False only with shared experts")
    return MODEL_ARCH.QWEN3MOE if config.qk_norm else MODEL_ARCH.LLAMA


def write_hyperparameters(writer: gguf.GGUFWriter, config: MiniMindConfig) -> None:
    """The config in the terms of llama.cpp."""
    assert config.intermediate_size is not None  # MiniMindConfig.__post_init__ has set both
    assert config.moe_intermediate_size is not None
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.inference_rope_scaling:
        default = 0.1 * math.log(config.yarn_factor) + 1  # llama.cpp multiplies by it anyway
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(config.yarn_factor)
        writer.add_rope_scaling_orig_ctx_len(config.yarn_original_length)
        writer.add_rope_scaling_attn_factors((config.yarn_attention_factor or default) / default)
        writer.add_rope_scaling_yarn_beta_fast(config.yarn_beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(config.yarn_beta_slow)
    if config.use_moe:
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_count(config.n_shared_experts)
        writer.add_expert_weights_norm(config.norm_topk_prob)
        writer.add_expert_weights_scale(1.0)
        kind = config.scoring_func.upper()
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType[kind])


def yarn_flags(config: MiniMindConfig) -> str:
    """Flags for the programs of llama.cpp: YaRN settings that they do not read from the file."""
    betas = config.yarn_beta_fast, config.yarn_beta_slow
    if not config.inference_rope_scaling or betas == (32, 1):
        return ""
    return f"--yarn-beta-fast {config.yarn_beta_fast:g} --yarn-beta-slow {config.yarn_beta_slow:g}"


# -- weights ---------------------------------------------------------------------------------------


def to_gguf_state(state: dict[str, Tensor], config: MiniMindConfig) -> dict[str, Tensor]:
    """The weights in the layout and under the names of llama.cpp; only moved, nothing computed.
    Works on a state dict of anything of these shapes, which read_gguf makes use of."""
    kind, state = architecture(config), dict(state)
    bailing = kind in (MODEL_ARCH.BAILINGMOE, MODEL_ARCH.BAILINGMOE2)
    if config.tie_word_embeddings and not bailing:  # those two need the head in any case
        del state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        block = f"model.layers.{layer}."
        if kind in PERMUTED:
            for name in ("q_proj", "k_proj"):
                weight = f"{block}self_attn.{name}.weight"
                state[weight] = permute(state[weight], config.head_dim)
        if kind == MODEL_ARCH.BAILINGMOE2:
            parts = [state.pop(f"{block}self_attn.{name}_proj.weight") for name in "qkv"]
            state[f"{block}self_attn.qkv_proj.weight"] = torch.cat(parts)
        if config.use_moe:
            experts, shared = f"{block}mlp.experts", f"{block}mlp.shared_experts"
            join_experts(state, experts, config.n_routed_experts, experts)
            if config.n_shared_experts:
                join_experts(state, shared, config.n_shared_experts, shared, wide=True)
    to_gguf_name = gguf_names(kind, config.num_hidden_layers)
    return {to_gguf_name(name): weight for name, weight in state.items()}


def permute(weight: Tensor, head_dim: int) -> Tensor:
    """[H·D, C]: rows i and i + D/2 of each head become rows 2i and 2i + 1."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def gguf_names(kind: MODEL_ARCH, layers: int) -> Callable[[str], str]:
    """A function from MiniMind's names of weights to those of llama.cpp."""
    table = gguf.get_tensor_name_map(kind, layers)

    def to_gguf_name(name: str) -> str:
        if name.endswith(ROUTER_BIAS):
            return f"blk.{name.split('.')[2]}.exp_probs_b.bias"
        found = table.get_name(name, try_suffixes=(".weight",))
        if found is None:
            raise UserError(f"the installed gguf has no name for {name} in {kind.name}")
        return found

    return to_gguf_name


@torch.no_grad()
def read_gguf(path: Path, model: MiniMindForCausalLM) -> dict[str, Tensor]:
    """The weights in a file that was written from `model`, with their rounding, as a state dict.

    Instead of an inverse of to_gguf_state, the function itself is applied to the index of each
    number: it shows where every number of the file came from.
    """
    state, indices, total = model.state_dict(), {}, 0
    for name, weight in state.items():
        indices[name] = torch.arange(total, total + weight.numel()).view_as(weight)
        total += weight.numel()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    numbers = torch.full((total,), math.nan)
    for name, index in to_gguf_state(indices, model.config).items():
        tensor = tensors.pop(name)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        numbers[index.flatten()] = torch.tensor(values).flatten()
    if model.config.tie_word_embeddings:
        indices["lm_head.weight"] = indices["model.embed_tokens.weight"]
    return {name: numbers[index] for name, index in indices.items()}


def check_roundtrip(state: dict[str, Tensor], read: dict[str, Tensor], dtype: str) -> None:
    """UserError if the weights read from a file differ from those of the model by more than the
    rounding of `dtype`."""
    for name, weight in state.items():
        # relative; q8_0: half a step of 1/127 of the largest, and a little for the rounded scale
        tolerance = {"float32": 0.0, "float16": 2**-11, "q8_0": 0.6 / 127}[dtype]
        size = weight.abs()
        if dtype == "q8_0" and weight.dim() > 1:  # at least the largest of its block
            size = size.amax(-1, keepdim=True)
        if not ((weight - read[name]).abs() <= tolerance * size + 2**-25 * (tolerance > 0)).all():
            raise UserError(f"{name} differs from the model's by more than rounding")


# -- tokenizer -------------------------------------------------------------------------------------


def write_tokenizer(
    writer: gguf.GGUFWriter,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    stops: int | list[int] | None = None,
) -> None:
    """Tokens, merges, special tokens and the chat template. UserError if llama.cpp would tokenize
    differently."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    if content["model"]["type"] != "BPE" or content["normalizer"] or not content["pre_tokenizer"]:
        raise UserError("llama.cpp supports byte-level BPE tokenizers without normalizer only")
    tokens = [f"[unused {n}]" for n in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for token, n in content["model"]["vocab"].items():
        tokens[n], types[n] = token, TokenType.NORMAL
    for added in content["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(content["pre_tokenizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    for number in stops if isinstance(stops, list) else []:
        if number != tokenizer.eos_token_id:  # what the chat template ends a turn with
            writer.add_eot_token_id(number)
    writer.add_add_bos_token(False)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = template.get("default")
    if template:
        writer.add_chat_template(strip_generation_tags(template))


def pre_tokenizer_name(pre_tokenizer: dict) -> str:
    """llama.cpp's name of the pre-tokenizer in a tokenizer.json."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    split, last = steps[:-1], steps[-1]
    if last["type"] == "ByteLevel" and not last.get("add_prefix_space"):
        if not split and last.get("use_regex", True):
            return "gpt-2"
        if len(split) == 1 and not last.get("use_regex", True):
            pattern = split[0].get("pattern", {}).get("Regex")
            if split[0].get("behavior") == "Isolated" and pattern in PRE_TOKENIZERS:
                return PRE_TOKENIZERS[pattern]
        digits = {"type": "Digits", "individual_digits": True}
        if split == [digits] and last.get("use_regex", True):
            return "smollm"
    raise UserError("llama.cpp does not support the pre_tokenizer of this tokenizer")


def strip_generation_tags(template: str) -> str:
    """A chat template without {% generation %}, which marks trained text for transformers only."""
    return re.sub(r"{%(-?)\s*(?:end)?generation\s*(-?)%}", r"{#\1 \2#}", template)


# -- files -----------------------------------------------------------------------------------------


@torch.no_grad()
def save_gguf(
    model: MiniMindForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    dtype: str,
    name: str,
) -> None:
    """Write a model with its tokenizer.

    Args:
        dtype: one of DTYPES.
        name: the name that programs show.

    Raises:
        UserError: llama.cpp supports no such model or tokenizer.
    """
    config = model.config
    weights = to_gguf_state(model.state_dict(), config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture(config)])
    writer.add_name(name)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_hyperparameters(writer, config)
    write_tokenizer(writer, tokenizer, config.vocab_size, config.eos_token_id)
    for tensor, weight in weights.items():
        kind = tensor_type(tensor, weight, DTYPES[dtype])
        writer.add_tensor(
            tensor, gguf.quants.quantize(weight.float().numpy(), kind), raw_dtype=kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_type(name: str, weight: Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    """The type of a tensor: float32 for norms and routers, which are small and sensitive."""
    if weight.dim() == 1 or "ffn_gate_inp" in name:
        return GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return GGMLQuantizationType.F16 if weight.shape[-1] % block else wanted
