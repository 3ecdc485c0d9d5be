"""A Modelfile for ollama, whose chat template is in Go's text/template.

Our own template has a translation written by hand; another's is learnt (ollama_templates.py).
"""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from model.config import MiniMindConfig
from model.errors import UserError
from model.formats.gguf_format import yarn_flags
from model.formats.ollama_templates import learn_template
from model.inference.thinking import EMPTY_THOUGHT, can_close_thoughts, closes_thoughts

CONTEXT = 2048  # limit of ollama's num_ctx, whose KV cache is allocated at once
MODELFILE = """FROM ./{file}
TEMPLATE \"\"\"{template}\"\"\"
PARAMETER stop "{stop}"
PARAMETER num_ctx {context}
"""
# Our own template, but for a second system message, which ollama joins to the first.
#
# ollama reads the tags of calls and thoughts from the template. That of a call is the first text
# within the first `if` on .ToolCalls, where nothing but text may stand before it; it does not see
# $message.ToolCalls. Those of a thought are the first and last text around the last .Thinking.
TEMPLATE = """{{- if or .System .Tools }}<|im_start|>system
{{ .System }}{{ if .Tools }}{{ if .System }}

{{ end }}You can call these tools:
<tools>
{{ range .Tools }}{{ . }}
{{ end }}</tools>
Write a call like this, with JSON arguments:
<tool_call>
{"name": <tool>, "arguments": <arguments>}
</tool_call>{{ end }}<|im_end|>
{{ end }}
{{- $previous := "" }}
{{- range $i, $message := .Messages }}
{{- if and (eq $previous "tool") (ne .Role "tool") }}<|im_end|>
{{ end }}
{{- if eq .Role "user" }}<|im_start|>user
{{ .Content }}<|im_end|>
{{ else if eq .Role "assistant" }}<|im_start|>assistant
{{ if .Thinking }}<think>
{{ .Thinking }}
</think>{{ end }}
{{- if and $message.Thinking (or .Content (not $message.ToolCalls)) }}
{{ end }}{{ .Content }}
{{- if and $message.ToolCalls (or .Content $message.Thinking) }}
{{ end }}
{{- if .ToolCalls }}<tool_call>
{{ range $n, $call := .ToolCalls }}{{ if $n }}
<tool_call>
{{ end }}{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}
</tool_call>{{ end }}{{ end }}<|im_end|>
{{ else if eq .Role "tool" }}{{ if ne $previous "tool" }}<|im_start|>user{{ end }}
<tool_response>
{{ .Content }}
</tool_response>
{{- end }}
{{- $previous = .Role }}
{{- end }}
{{- if eq $previous "tool" }}<|im_end|>
{{ end }}<|im_start|>assistant
"""
# For a model that was trained on empty thoughts: it thinks only where ollama's `think` is on.
THINK = "{{ if .Think }}<think>\n{{ else }}" + EMPTY_THOUGHT + "{{ end }}"


def modelfile(gguf_file: Path, config: MiniMindConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The Modelfile of a GGUF file in the same folder, for `ollama create NAME -f Modelfile`.
    UserError if ollama cannot run the model as it is."""
    if flags := yarn_flags(config):
        raise UserError(f"ollama has no such setting of YaRN ({flags}), but llama.cpp has")
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template, which --ollama translates")
    note = ""
    if can_close_thoughts(tokenizer):
        template, stop = TEMPLATE, "<|im_end|>"
        template += THINK if closes_thoughts(tokenizer) else ""
    else:
        pieces = learn_template(tokenizer)
        template, stop = pieces.in_go(), pieces.stop
        if not pieces.has_tools:
            note = "# The template is the tokenizer's own, without tools.\n"
    context = min(config.max_position_embeddings, CONTEXT)
    settings = dict(file=gguf_file.name, template=template, stop=stop, context=context)
    return note + MODELFILE.format(**settings)
