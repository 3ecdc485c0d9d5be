"""Vercel's AI SDK: chats by @ai-sdk/openai-compatible, /v1/responses by @ai-sdk/openai."""

from scripted import CALL, HELLO, WEATHER

SCRIPT = """
import { generateText, streamText, Output, tool, stepCountIs } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { createOpenAI } from "@ai-sdk/openai";
import { z } from "zod";

const url = process.argv[2];
const compatible = createOpenAICompatible({
  name: "minimind", baseURL: url, supportsStructuredOutputs: true, includeUsage: true,
});
const openai = createOpenAI({ baseURL: url, apiKey: "none" });
const told = {};
for (const [name, model] of [
  ["chat", compatible("minimind")], ["responses", openai.responses("minimind")],
]) {
  const whole = await generateText({ model, prompt: "Hi" });
  const stream = streamText({ model, prompt: "Hi" });
  let streamed = "", pieces = 0;
  for await (const piece of stream.textStream) { streamed += piece; pieces += 1; }
  const schema = z.object({ name: z.string(), age: z.number().int(), tags: z.array(z.string()) });
  const { output } = await generateText({
    model, prompt: "Hi", output: Output.object({ schema }),
  });
  const calls = [];
  const asked = {
    model,
    prompt: "the weather in Paris?",
    stopWhen: stepCountIs(3),
    tools: {
      get_weather: tool({
        description: "the weather",
        inputSchema: z.object({ city: z.string() }),
        execute: async (input) => { calls.push(input); return { weather: "sunny" }; },
      }),
    },
  };
  const answer = (await generateText(asked)).text;
  const answered = streamText(asked);
  let again = "";
  for await (const piece of answered.textStream) again += piece;
  told[name] = {
    whole: whole.text, streamed, pieces, usage: whole.usage.totalTokens > 0,
    object: schema.safeParse(output).success, calls, answer, again,
  };
}
console.log(JSON.stringify(told));
"""


def test_ai_sdk(engine, server):
    for told in engine.node(SCRIPT, server.url).values():
        assert told["whole"] == told["streamed"] == HELLO
        assert told["pieces"] > 3 and told["usage"] and told["object"]
        assert told["calls"] == [CALL["arguments"]] * 2
        assert told["answer"] == told["again"] == WEATHER
