"""The chat template in ollama's language: our own, and others, learnt from what they say."""

import json
import os
import shutil
import subprocess

import pytest
from foreign_templates import GEMMA, LLAMA3, MINIMIND3, TEMPLATES, foreign_tokenizer

from model.config import MiniMindConfig
from model.errors import UserError
from model.formats.ollama_format import TEMPLATE, TOOLS, learn_template, modelfile
from model.inference.thinking import close_thoughts
from model.weights import load_tokenizer

CALL = {"id": "call00000", "type": "function"}
CALL["function"] = {"name": "second", "arguments": {"x": 1}}
TURNS = [
    {"role": "user", "content": "What time is it? 几点了？"},
    {"role": "assistant", "content": "12"},
    {"role": "user", "content": "and {{ now }}?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
AGENT = [
    SYSTEM,
    *TURNS,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "13", "tool_call_id": "call00000"},
]
HAVE_TOOLS = ("qwen3", "minimind-3")
CASES = {
    name: [
        (TURNS[:1], None),
        (TURNS, None),
        *([] if name in ("gemma", "mistral", "llama-2") else [([SYSTEM, *TURNS], None)]),
        *([(AGENT, TOOLS), (TURNS, TOOLS[:1])] if name in HAVE_TOOLS else []),
    ]
    for name in TEMPLATES
}


def expected(tokenizer, messages, tools):
    return tokenizer.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )


UNTRANSLATED = ("no prompt", "deepseek")


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name not in UNTRANSLATED])
def test_what_is_learnt_says_what_the_template_says(name):
    tokenizer = foreign_tokenizer(TEMPLATES[name])
    pieces = learn_template(tokenizer)
    assert pieces.has_tools == (name in HAVE_TOOLS)
    for messages, tools in CASES[name]:
        assert pieces.write(messages, tools) == expected(tokenizer, messages, tools)


@pytest.mark.parametrize(
    ("template", "stop"),
    [(LLAMA3, "<|eot_id|>"), (GEMMA, "<end_of_turn>"), (MINIMIND3, "<|im_end|>")],
)
def test_a_modelfile_has_the_tokenizers_own_template(template, stop, tmp_path):
    text = modelfile(tmp_path / "m.gguf", MiniMindConfig(), foreign_tokenizer(template))
    assert f'PARAMETER stop "{stop}"' in text.splitlines()
    assert "You can call these tools" not in text
    assert text.startswith("# The template is the tokenizer's own, without tools.\n") == (
        template != MINIMIND3
    )


def test_a_template_that_cannot_be_translated_is_told(tmp_path):
    reversed_roles = "{% for m in messages[::-1] %}{{ m.content }}{% endfor %}"
    numbered = "{% for m in messages %}{{ loop.index }}{{ m.content }}<s>{% endfor %}"
    for template in (reversed_roles, numbered):
        with pytest.raises(UserError, match="cannot be translated for ollama"):
            modelfile(tmp_path / "m.gguf", MiniMindConfig(), foreign_tokenizer(template))


def test_our_own_closes_a_thought_where_the_model_learnt_so(tmp_path):
    tokenizer = load_tokenizer()
    assert TEMPLATE in modelfile(tmp_path / "m.gguf", MiniMindConfig(), tokenizer)
    close_thoughts(tokenizer)
    text = modelfile(tmp_path / "m.gguf", MiniMindConfig(), tokenizer)
    assert '<|im_start|>assistant\n<think>\n\n</think>\n\n"""' in text


GO = """package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"text/template"
)

type Object map[string]any

func (o Object) String() string { b, _ := json.Marshal(map[string]any(o)); return string(b) }

type Function struct { Name string; Arguments Object }
type Call struct { Function Function }
type Message struct { Role, Content string; ToolCalls []Call }
type Case struct { Template, System string; Tools []Object; Messages []Message }

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	texts := []string{}
	for _, each := range cases {
		parsed := template.Must(template.New("").Parse(each.Template))
		var out bytes.Buffer
		if err := parsed.Execute(&out, each); err != nil { panic(err) }
		texts = append(texts, out.String())
	}
	b, _ := json.Marshal(texts)
	fmt.Println(string(b))
}
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("go"), reason="ollama's template was not run: Go is missing")
def test_go_says_what_the_templates_say(tmp_path):
    """Go writes the keys of tools in order and without spaces, so these are compared as JSON."""
    cases, texts = [], []
    for name in TEMPLATES:
        tokenizer = foreign_tokenizer(TEMPLATES[name])
        for messages, tools in CASES[name] if name not in UNTRANSLATED else ():
            calls = [
                {**m, "ToolCalls": [{"Function": c["function"]} for c in m.get("tool_calls", [])]}
                for m in messages
            ]
            system = messages[0]["content"] if messages[0]["role"] == "system" else ""
            case = {"Template": learn_template(tokenizer).in_go(), "System": system}
            cases.append({**case, "Tools": tools or [], "Messages": calls})
            texts.append(expected(tokenizer, messages, tools))
    (tmp_path / "main.go").write_text(GO)
    environment = os.environ | {"HOME": str(tmp_path), "GOFLAGS": "-mod=mod", "GO111MODULE": "off"}
    result = subprocess.run(
        ["go", "run", "main.go"],
        cwd=tmp_path,
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr

    def loose(text):
        lines = text.split("\n")
        return [
            json.dumps(json.loads(line), sort_keys=True) if line.startswith("{") else line
            for line in lines
        ]

    for theirs, ours in zip(json.loads(result.stdout), texts, strict=True):
        assert loose(theirs) == loose(ours)
