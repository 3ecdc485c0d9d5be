"""Talk to a server of OpenAI's API in the terminal, this project's or any other.

    python scripts/chat_openai_api.py                                       the one on this machine
    python scripts/chat_openai_api.py --base_url http://host:8000/v1 --model NAME --api_key KEY

Enter sends; /clear forgets the conversation, /quit or Ctrl-D ends; Ctrl-C stops an answer.
"""

from dataclasses import dataclass

import openai

from eval_llm import prompts
from model.command_line import option, parse_arguments
from model.errors import UserError, exit_on_user_error


@dataclass
class Args:
    base_url: str = option("http://127.0.0.1:8000/v1", "where the server is")
    api_key: str = option("none", "what the server asks for")
    model: str = option("minimind", "which of its models")
    system: str = option("", "a first message that says who it is to be")
    historys: int = option(6, "how many earlier messages it sees; 0: each question alone")
    max_tokens: int = option(512, "longest answer")
    temperature: float = option(0.85, "how freely it chooses; 0: always the likeliest token")
    top_p: float = option(0.85, "choose among the likeliest tokens that make up this share")
    open_thinking: bool = option(False, "let it think first, if it has learnt to")
    stream: bool = option(True, "show the answer as it comes")


def main(args: Args) -> None:
    client = openai.OpenAI(base_url=args.base_url, api_key=args.api_key)
    system = [{"role": "system", "content": args.system}] if args.system else []
    history: list[dict[str, str]] = []
    for line in prompts("type", []):
        if line == "/quit":
            return
        if line == "/clear":
            history.clear()
            continue
        history.append({"role": "user", "content": line})
        recent = history[-1 - args.historys // 2 * 2 :]  # whole exchanges
        history.append({"role": "assistant", "content": answer(client, system + recent, args)})


def answer(client: openai.OpenAI, messages: list[dict[str, str]], args: Args) -> str:
    """Print the answer; the text of it. UserError where there is none."""
    settings = dict(
        model=args.model,
        messages=messages,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
    )
    if args.open_thinking:
        settings["extra_body"] = {"chat_template_kwargs": {"open_thinking": True}}
    text = ""
    try:
        if not args.stream:
            text = client.chat.completions.create(**settings).choices[0].message.content or ""
            print(text)
            return text
        with client.chat.completions.create(**settings, stream=True) as chunks:
            try:
                for chunk in chunks:
                    delta = chunk.choices[0].delta if chunk.choices else None
                    thought = getattr(delta, "reasoning_content", None)
                    print(thought or (delta and delta.content) or "", end="", flush=True)
                    text += (delta and delta.content) or ""
            except KeyboardInterrupt:
                print(" [stopped]", end="")
        print("\n")
        return text
    except openai.APIConnectionError as error:
        raise UserError(
            f"no server answers at {args.base_url}; `python scripts/serve_openai_api.py` starts one"
        ) from error
    except openai.APIStatusError as error:
        said = error.body.get("message") if isinstance(error.body, dict) else None
        raise UserError(f"the server refuses ({error.status_code}): {said or error}") from error


if __name__ == "__main__":
    with exit_on_user_error():
        main(parse_arguments(Args, __doc__))
