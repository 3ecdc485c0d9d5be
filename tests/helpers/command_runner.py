"""Runs command lines of Python scripts one after the other, for test_commands_in_texts.py.

Reads a JSON object a line from stdin: words (the script or -m and a module, then its arguments),
folder, typed (what stands in its stdin) and parse (only read the flags). Answers each with a line:
exit code, output and seconds. Every command is forked from this process, which has imported
already what takes seconds to import. The argument is a file for what a command prints.
"""

import argparse
import json
import os
import runpy
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

import eval_llm  # noqa: F401
import trainer.train_ppo
import trainer.train_reward  # noqa: F401
from model.command_line import parse_arguments

sys.path.append(str(Path(__file__).parent))
from toy import ended, fork  # noqa: E402


def parse_only() -> None:
    """Let every command end as soon as its flags have been read."""

    def stop_after(parse):
        def parse_and_stop(*args, **options):
            parse(*args, **options)
            print("parsed")
            sys.exit(0)

        return parse_and_stop

    original, ours = parse_arguments, stop_after(parse_arguments)
    for module in list(sys.modules.values()):
        if getattr(module, "parse_arguments", None) is original:
            module.parse_arguments = ours
    argparse.ArgumentParser.parse_args = stop_after(argparse.ArgumentParser.parse_args)


def run(job: dict) -> None:
    """What `python WORDS` does, in this process."""
    os.chdir(job["folder"])
    with tempfile.TemporaryFile() as typed:
        typed.write(job["typed"].encode())
        typed.seek(0)
        os.dup2(typed.fileno(), 0)
    sys.stdin = open(0, closefd=False)
    if job["parse"]:
        parse_only()
    first, *rest = job["words"]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = job["words"]
        sys.path.insert(0, str(Path(first).resolve().parent))
        runpy.run_path(first, run_name="__main__")


def main() -> None:
    torch.set_num_threads(1)
    log = Path(sys.argv[1])
    for line in sys.stdin:
        job, began = json.loads(line), time.monotonic()
        code = ended(fork(lambda job=job: run(job), log))
        answer = [code, log.read_text(errors="replace"), time.monotonic() - began]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
