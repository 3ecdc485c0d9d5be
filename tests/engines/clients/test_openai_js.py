"""OpenAI's own client for JavaScript, with schemas of zod."""

from scripted import CALL, HELLO, WEATHER

SCRIPT = """
import OpenAI from "openai";
import { zodResponseFormat, zodFunction, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none" });
const hello = { model: "minimind", messages: [{ role: "user", content: "Hi" }] };
const whole = (await client.chat.completions.create(hello)).choices[0].message.content;
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...hello, stream: true }))
  streamed += chunk.choices[0]?.delta?.content ?? "";
const Person = z.object({
  name: z.string(),
  kind: z.enum(["a", "b"]),
  born: z.object({ year: z.number().int() }).nullable(),
  tags: z.array(z.string()).max(3),
});
const parsed = await client.chat.completions.parse({
  ...hello, response_format: zodResponseFormat(Person, "person"),
});
const weather = zodFunction({
  name: "get_weather",
  parameters: z.object({ city: z.string() }),
  function: ({ city }) => `sunny in ${city}`,
});
const runner = client.chat.completions.runTools({
  model: "minimind",
  messages: [{ role: "user", content: "the weather in Paris?" }],
  tools: [weather],
});
const answer = await runner.finalContent();
const calls = runner.messages.flatMap((message) => message.tool_calls ?? []);
const response = await client.responses.create({ model: "minimind", input: "Hi" });
const structured = await client.responses.parse({
  model: "minimind", input: "Hi", text: { format: zodTextFormat(Person, "person") },
});
console.log(JSON.stringify({
  whole, streamed, answer,
  person: Person.safeParse(parsed.choices[0].message.parsed).success,
  calls: calls.map((call) => JSON.parse(call.function.arguments)),
  response: response.output_text,
  structured: Person.safeParse(structured.output_parsed).success,
}));
"""


def test_openai_js(engine, server):
    said = engine.node(SCRIPT, server.url)
    assert said["whole"] == said["streamed"] == said["response"] == HELLO
    assert said["person"] and said["structured"]
    assert said["calls"] == [CALL["arguments"]]
    assert said["answer"] == WEATHER
