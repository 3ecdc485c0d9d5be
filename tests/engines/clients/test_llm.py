"""llm, the command: a model in extra-openai-models.yaml; prompt, conversation, schema, tool."""

import json

from scripted import HELLO, WEATHER

MODEL = """
- model_id: minimind
  model_name: minimind
  api_base: {url}
  supports_schema: true
  supports_tools: true
"""
TOOL = "def get_weather(city: str) -> str: return 'sunny'"


def test_llm(engine, server, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    (tmp_path / "extra-openai-models.yaml").write_text(MODEL.format(url=server.url))
    llm = [engine.program("llm"), "prompt", "-m", "minimind"]
    assert engine.run(*llm, "Hi", cwd=tmp_path).strip() == HELLO
    assert engine.run(*llm, "Hi", "--no-stream", cwd=tmp_path).strip() == HELLO
    assert engine.run(*llm, "-c", "Hi again", cwd=tmp_path).strip() == HELLO
    assert server.asked[-1].count("<|im_start|>user") == 2
    said = engine.run(*llm, "Hi", "--schema", "name, age int", cwd=tmp_path)
    assert isinstance(json.loads(said)["age"], int)
    question = "the weather in Paris?"
    said = engine.run(*llm, question, "--functions", TOOL, cwd=tmp_path)
    assert said.strip().endswith(WEATHER)
