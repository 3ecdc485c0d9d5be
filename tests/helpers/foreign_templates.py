"""Chat templates in the forms in which models are published, and a tokenizer that has one.

Where a template can be marked by hand, ⟦ and ⟧ stand around what the assistant writes: as
{% generation %} marks they give the masks that must be found without them.
"""

from model.weights import load_tokenizer

CHATML = """
{%- for message in messages -%}
  {%- if message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\\n' -}}⟦{{- message.content + '<|im_end|>' -}}⟧{{- '\\n' -}}
  {%- else -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

# A default system message, as Qwen2.5 and SmolLM have it.
DEFAULT_SYSTEM = (
    """
{%- if messages[0].role != 'system' -%}
  {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
"""
    + CHATML
)

TOOLS = """
{%- if tools -%}
  {{- '<|im_start|>system\\n' -}}
  {%- if messages[0].role == 'system' -%}{{- messages[0].content + '\\n\\n' -}}{%- endif -%}
  {{- '# Tools\\n\\nYou are provided with function signatures:\\n<tools>' -}}
  {%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
  {{- '\\n</tools><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
  {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' -}}
{%- endif -%}
"""

CALLS = """
{%- for tool_call in message.tool_calls or [] -%}
  {%- if (loop.first and content) or not loop.first -%}{{- '\\n' -}}{%- endif -%}
  {%- if tool_call.function -%}{%- set tool_call = tool_call.function -%}{%- endif -%}
  {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' -}}
  {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson -}}
  {{- '}\\n</tool_call>' -}}
{%- endfor -%}
"""

RESULTS = """
  {%- elif message.role == 'tool' -%}
    {%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}
      {{- '<|im_start|>user' -}}
    {%- endif -%}
    {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
    {%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
"""  # noqa: E501

# Thoughts of turns before the last question are dropped; a last turn without any has empty ones.
QWEN3 = (
    TOOLS
    + """
{%- set ns = namespace(last=messages | length - 1, open=true) -%}
{%- for message in messages[::-1] -%}
  {%- set index = messages | length - 1 - loop.index0 -%}
  {%- if ns.open and message.role == 'user' -%}
    {%- set ns.open = false -%}{%- set ns.last = index -%}
  {%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
  {%- set content = message.content if message.content is string else '' -%}
  {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
  {%- elif message.role == 'assistant' -%}
    {%- set thoughts = '' -%}
    {%- if message.reasoning_content is string -%}
      {%- set thoughts = message.reasoning_content -%}
    {%- elif '</think>' in content -%}
      {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' -}}⟦
    {%- if loop.index0 > ns.last and (loop.last or thoughts) -%}
      {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}
    {%- else -%}
      {{- content -}}
    {%- endif -%}
"""
    + CALLS
    + "{{- '<|im_end|>' -}}⟧{{- '\\n' -}}"
    + RESULTS
    + """
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
  {%- if enable_thinking is defined and enable_thinking is false -%}
    {{- '<think>\\n\\n</think>\\n\\n' -}}
  {%- endif -%}
{%- endif -%}
"""  # noqa: E501
)

# Thoughts in every turn, empty or not; the prompt opens them, or closes empty ones. What the model
# writes therefore begins within a thought, or behind the empty one.
MINIMIND3 = (
    TOOLS
    + """
{%- for message in messages -%}
  {%- set content = message.content if message.content is string else '' -%}
  {%- if message.role == 'user' or (message.role == 'system' and not loop.first) -%}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
  {%- elif message.role == 'assistant' -%}
    {%- set thoughts = message.reasoning_content or '' -%}
    {%- if '</think>' in content -%}
      {%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
      {%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n<think>\\n' -}}
    {%- if thoughts.strip('\\n') -%}
      ⟦{{- thoughts.strip('\\n') + '\\n</think>\\n\\n' -}}⟧
    {%- else -%}
      {{- '\\n</think>\\n\\n' -}}
    {%- endif -%}
    ⟦{{- content.lstrip('\\n') -}}
"""
    + CALLS
    + "{{- '<|im_end|>' -}}⟧{{- '\\n' -}}"
    + RESULTS
    + """
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n<think>\\n' -}}
  {%- if not open_thinking -%}{{- '\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""  # noqa: E501
)

LLAMA3 = """
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
  {%- if message['role'] == 'assistant' -%}
    ⟦{{- message['content'] | trim + '<|eot_id|>' -}}⟧
  {%- else -%}
    {{- message['content'] | trim + '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

# Roles are plain text here; only </s> is a token.
ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n' -}}⟦{{- message['content'] + eos_token -}}⟧{{- '\\n' -}}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

# No system message, roles in turn, content stripped, and the assistant is called model.
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
  {{- raise_exception('System role not supported') -}}
{%- endif -%}
{%- for message in messages -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
  {%- endif -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '<start_of_turn>model\\n' -}}
    ⟦{{- message['content'] | trim + '<end_of_turn>' -}}⟧{{- '\\n' -}}
  {%- else -%}
    {{- '<start_of_turn>user\\n' + message['content'] | trim + '<end_of_turn>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

# No header before an answer, and nothing that add_generation_prompt would add.
MISTRAL = """{{ bos_token }}
{%- for message in messages -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
  {%- endif -%}
  {%- if message['role'] == 'user' -%}
    {{- ' [INST] ' + message['content'] + ' [/INST]' -}}
  {%- else -%}
    ⟦{{- ' ' + message['content'] + eos_token -}}⟧
  {%- endif -%}
{%- endfor -%}"""

# The same with a system message within the first question, and a space before the end.
LLAMA2 = """
{%- if messages[0]['role'] == 'system' -%}
  {%- set rest = messages[1:] -%}
  {%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' -%}
{%- else -%}
  {%- set rest = messages -%}{%- set system = '' -%}
{%- endif -%}
{%- for message in rest -%}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
  {%- endif -%}
  {%- set content = (system if loop.first else '') + message['content'].strip() -%}
  {%- if message['role'] == 'user' -%}
    {{- bos_token + '[INST] ' + content + ' [/INST]' -}}
  {%- else -%}
    ⟦{{- ' ' + content + ' ' + eos_token -}}⟧
  {%- endif -%}
{%- endfor -%}"""

# A conversation without a question to answer ends with one more token.
PHI3 = """
{%- for message in messages -%}
  {{- '<|' + message['role'] + '|>\\n' -}}
  {%- if message['role'] == 'assistant' -%}
    ⟦{{- message['content'] + '<|eot_id|>' -}}⟧
  {%- else -%}
    {{- message['content'] + '<|eot_id|>' -}}
  {%- endif -%}
  {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
"""

# The prompt opens a thought, of which a conversation keeps nothing.
DEEPSEEK = """{{ bos_token }}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '<|start_header_id|>' -}}
    ⟦{{- message['content'].split('</think>')[-1] + eos_token -}}⟧
  {%- elif message['role'] == 'user' -%}
    {{- '<|end_header_id|>' + message['content'] -}}
  {%- else -%}
    {{- message['content'] -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|><think>\\n' -}}{%- endif -%}"""

# A header before an answer that the template never writes at the end of a prompt.
NO_PROMPT = CHATML.partition("{%- if add_generation_prompt")[0]

TEMPLATES = {
    "chatml": CHATML,
    "default system": DEFAULT_SYSTEM,
    "qwen3": QWEN3,
    "minimind-3": MINIMIND3,
    "llama-3": LLAMA3,
    "zephyr": ZEPHYR,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "llama-2": LLAMA2,
    "phi-3": PHI3,
    "deepseek": DEEPSEEK,
    "no prompt": NO_PROMPT,
}


def foreign_tokenizer(template: str, marked: bool = False, eos: str = "</s>"):
    """Our vocabulary with the control tokens of others, and their template."""
    tokenizer = load_tokenizer()
    tokens = ["<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokens += ["<start_of_turn>", "<end_of_turn>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.bos_token, tokenizer.eos_token = "<s>", eos
    for sign, mark in (("⟦", "{%- generation -%}"), ("⟧", "{%- endgeneration -%}")):
        template = template.replace(sign, mark if marked else "")
    tokenizer.chat_template = template
    return tokenizer
