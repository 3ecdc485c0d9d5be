"""Chat in the terminal with a server that speaks OpenAI's API: this project's, or any other.

    python scripts/chat_openai_api.py                                       the local server
    python scripts/chat_openai_api.py --base_url http://host:8000/v1 --model NAME --api_key KEY

Enter sends; /clear forgets the conversation, /quit or Ctrl-D quits; Ctrl-C stops an answer.
"""

from dataclasses import dataclass

from model.command_line import option, parse_command_line
from model.errors import UserError, exit_on_user_error


@dataclass
class Args:
    base_url: str = option("http://127.0.0.1:8000/v1", "URL of the server")
    api_key: str = option("none", "API key, if the server needs one")
    model: str = option("minimind", "name of the model on the server")
    system: str = option("", "system message")
    historys: int = option(
        6, "number of earlier messages to send; 0: each prompt alone", at_least=0
    )
    max_tokens: int = option(512, "maximum length of an answer, in tokens", at_least=1)
    temperature: float = option(0.85, "sampling temperature; 0: greedy", at_least=0)
    top_p: float = option(
        0.85,
        "nucleus sampling: smallest set of tokens with this probability",
        above=0,
        at_most=1,
    )
    open_thinking: bool = option(False, "start answers with <think>, for reasoning models")
    stream: bool = option(True, "print the answer as it is generated")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_command_line(Args, __doc__)


import openai

from scripts.serving.prompts import last_exchanges, read_prompts


def main(args: Args) -> None:
    client = openai.OpenAI(base_url=args.base_url, api_key=args.api_key)
    system = [{"role": "system", "content": args.system}] if args.system else []
    history: list[dict[str, str]] = []
    for prompt in read_prompts():
        if prompt == "/quit":
            return
        if prompt == "/clear":
            history.clear()
            continue
        history.append({"role": "user", "content": prompt})
        answer = print_answer(client, system + last_exchanges(history, args.historys), args)
        history.append({"role": "assistant", "content": answer})


def print_answer(client: openai.OpenAI, messages: list[dict[str, str]], args: Args) -> str:
    """Print the server's answer and return its content. UserError if there is none."""
    request = dict(
        model=args.model,
        messages=messages,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
    )
    if args.open_thinking:
        request["extra_body"] = {"chat_template_kwargs": {"open_thinking": True}}
    content = ""
    try:
        if not args.stream:
            content = client.chat.completions.create(**request).choices[0].message.content or ""
            print(content)
            return content
        with client.chat.completions.create(**request, stream=True) as chunks:
            try:
                for chunk in chunks:
                    delta = chunk.choices[0].delta if chunk.choices else None
                    reasoning = getattr(delta, "reasoning_content", None)
                    print(reasoning or (delta and delta.content) or "", end="", flush=True)
                    content += (delta and delta.content) or ""
            except KeyboardInterrupt:
                print(" [stopped]", end="")
        print("\n")
        return content
    except openai.APIConnectionError as error:
        raise UserError(
            f"no server answers at {args.base_url}; `python scripts/serve_openai_api.py` starts one"
        ) from error
    except openai.APIStatusError as error:
        message = error.body.get("message") if isinstance(error.body, dict) else None
        raise UserError(
            f"the server refused the request ({error.status_code}): {message or error}"
        ) from error


if __name__ == "__main__":
    with exit_on_user_error():
        main(args)
