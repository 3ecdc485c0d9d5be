"""Released models in small, with random weights: a transformers folder, and a bare .pth.

The folder of 2026 is a Qwen3, whose tokenizer has a chat template in Qwen3's form, without marks
for the assistant's tokens; that of 2025 is a Llama. The .pth holds the same weights, in float16.
"""

import io
import json
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from model.weights import TOKENIZER

SIZES = dict(
    vocab_size=6400,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=8,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
# The form of Qwen3's: a thought, empty or not, opens each answer; tools come by `tools` alone.
TEMPLATE = """{%- if tools %}
{{- '<|im_start|>system\\n# Tools\\n\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n<think>\\n' + (message.reasoning_content or '') }}
{{- '\\n</think>\\n\\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{%- set call = call.function or call %}
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
{{- (call.arguments | tojson) + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.content %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n<think>\\n' + ('' if open_thinking else '\\n</think>\\n\\n') }}
{%- endif %}
"""


def models(year: int) -> dict[str, dict[str, bytes]]:
    """{repository: its files}"""
    torch.manual_seed(year)
    if year == 2025:
        kind, config = (
            LlamaForCausalLM,
            LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=384, rms_norm_eps=1e-5),
        )
        names = "MiniMind2-Small", "MiniMind2-Pytorch"
    else:
        kind, config = (
            Qwen3ForCausalLM,
            Qwen3Config(
                **SIZES,
                num_key_value_heads=4,
                intermediate_size=448,
                rms_norm_eps=1e-6,
                head_dim=16,
            ),
        )
        names = "minimind-3", "minimind-3-pytorch"
    model = kind(config).half()
    weights = io.BytesIO()
    torch.save(model.state_dict(), weights)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model.save_pretrained(folder)
        for each in TOKENIZER.glob("tokenizer*.json"):
            shutil.copy(each, folder)
        if year == 2026:
            settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            settings["chat_template"] = TEMPLATE
            (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        files = {each.name: each.read_bytes() for each in folder.iterdir()}
    return {
        f"models/jingyaogong/{names[0]}": files,
        f"models/jingyaogong/{names[1]}": {"full_sft_128.pth": weights.getvalue()},
    }
