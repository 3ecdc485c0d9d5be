"""Flags that chat, web page, server and evaluation share: which model, and how to sample. Imports
nothing slow."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from model.command_line import default_of, names_where, option, tell
from model.paths import (
    OUT,
    TOKENIZER,
    check_model_folder,
    check_tokenizer_folder,
    check_weights,
    is_hf_folder,
    resolve_weights,
)

if TYPE_CHECKING:
    from model.inference.sampling import SamplingParams

# groups of --help
MODEL, LONG_TEXTS, SAMPLING, MACHINE = "model", "long texts (YaRN)", "sampling", "machine"
SERVER, LIMITS = "server", "limits"
BARE = "what the shapes in a .pth without .json do not tell"
BARE_HELP = "config field; default: as MiniMind of that generation"
OWN_WEIGHTS = ("weight", "hidden_size", "num_hidden_layers", "use_moe", "save_dir")


@dataclass
class YarnArgs:
    """How a model reads texts longer than those of its training."""

    inference_rope_scaling: bool = option(
        False, "YaRN, for texts longer than in training", group=LONG_TEXTS
    )
    yarn_factor: float | None = option(
        None,
        "context length / trained length; default: 4",
        group=LONG_TEXTS,
        needs="inference_rope_scaling",
    )
    yarn_original_length: int | None = option(
        None, "trained length; default: 2048", group=LONG_TEXTS, needs="inference_rope_scaling"
    )
    yarn_beta_fast: float | None = option(
        None,
        "dimensions with more rotations are not scaled; default: 32",
        group=LONG_TEXTS,
        needs="inference_rope_scaling",
    )
    yarn_beta_slow: float | None = option(
        None,
        "dimensions with fewer rotations are fully interpolated; default: 1",
        group=LONG_TEXTS,
        needs="inference_rope_scaling",
    )
    yarn_attention_factor: float | None = option(
        None,
        "factor on cos and sin of the rotation; default: 0.1 · ln(factor) + 1",
        group=LONG_TEXTS,
        needs="inference_rope_scaling",
    )


@dataclass
class ConfigArgs(YarnArgs):
    """Fields of the config that a bare .pth leaves open."""

    num_attention_heads: int | None = option(None, BARE_HELP, group=BARE, at_least=1)
    num_experts_per_tok: int | None = option(None, BARE_HELP, group=BARE, at_least=1)
    rms_norm_eps: float | None = option(None, BARE_HELP, group=BARE, above=0)
    rope_theta: float | None = option(None, BARE_HELP, group=BARE, above=0)
    max_position_embeddings: int | None = option(None, BARE_HELP, group=BARE, at_least=1)

    def config_fields(self) -> dict[str, Any]:
        """The config fields that flags set."""
        given = {name: getattr(self, name) for name in BARE_FIELDS}
        if self.inference_rope_scaling:
            yarn = {n: v for n, v in vars(self).items() if n.startswith("yarn_")}
            given |= {"inference_rope_scaling": True, **yarn}
        return {name: value for name, value in given.items() if value is not None}


BARE_FIELDS = sorted(names_where(ConfigArgs, "group", BARE))


@dataclass
class ModelArgs(ConfigArgs):
    """Which model to load, and on what device."""

    groups = (MODEL, SAMPLING, LONG_TEXTS, BARE, MACHINE)

    load_from: str = option(
        str(TOKENIZER),
        "./model: own weights from save_dir; else a transformers folder",
        group=MODEL,
        check=check_model_folder,
    )
    weight: str = option(
        "full_sft", "own weights: a stage, such as pretrain, a .pth or a folder", group=MODEL
    )
    lora_weight: str = option(
        "", "own weights: a LoRA adapter, such as lora_identity, or a .pth", group=MODEL
    )
    hidden_size: int | None = option(
        None, "own weights: hidden size; default: the newest file", group=MODEL, at_least=1
    )
    num_hidden_layers: int | None = option(
        None, "own weights: depth, which the file must have; default: its own", group=MODEL
    )
    use_moe: bool | None = option(
        None, "own weights: with experts (1) or without (0); default: the newest file", group=MODEL
    )
    save_dir: str = option(str(OUT), "folder of own weights", group=MODEL)
    tokenizer_path: str = option(
        "",
        "folder of the tokenizer; default: load_from, or beside the weights",
        group=MODEL,
        check=check_tokenizer_folder,
    )
    device: str = option("auto", "auto, cuda, cuda:1, mps or cpu", group=MACHINE)
    dtype: Literal["bfloat16", "float16", "float32"] = option(
        "bfloat16", "of the weights on CUDA; elsewhere float32", group=MACHINE
    )

    def __post_init__(self) -> None:
        if self.lora_weight in ("None", "none"):  # as MiniMind's own scripts have it
            self.lora_weight = ""
        if all(is_hf_folder(folder) for folder in listed(self.load_from)):
            defaults = {each.name: default_of(each) for each in fields(self)}
            for name in OWN_WEIGHTS:
                if getattr(self, name) != defaults[name]:
                    tell(
                        f"--{name} has no effect: it chooses own weights, and --load_from names a "
                        "transformers folder"
                    )

    def check_files(self) -> None:
        """UserError if there are no such weights."""
        for folder in listed(self.load_from):
            for weight in listed(self.weight):
                find_model(replace(self, load_from=folder), weight)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def find_model(args: ModelArgs, weight: str | None = None) -> Path:
    """The folder that --load_from names, if it holds a model, or else the weights of --weight."""
    if is_hf_folder(args.load_from):
        return Path(args.load_from)
    check_model_folder(args.load_from)
    name = args.weight if weight is None else weight
    found = resolve_weights(name, args.hidden_size, args.save_dir, use_moe=args.use_moe)
    return check_weights(found)


@dataclass
class ChatArgs(ModelArgs):
    """Which model to load, and how to sample its answers."""

    historys: int = option(
        0, "number of earlier messages in the prompt; 0: each prompt alone", at_least=0
    )
    max_new_tokens: int = option(
        512, "maximum length of an answer, in tokens", group=SAMPLING, at_least=1
    )
    temperature: float = option(0.85, "sampling temperature; 0: greedy", group=SAMPLING, at_least=0)
    top_p: float = option(
        0.85,
        "nucleus sampling: smallest set of tokens with this probability",
        group=SAMPLING,
        above=0,
        at_most=1,
    )
    top_k: int = option(
        0, "sample from the k most likely tokens; 0: all", group=SAMPLING, at_least=0
    )
    repetition_penalty: float = option(
        1.0, "above 1 makes repetition less likely", group=SAMPLING, above=0
    )
    open_thinking: bool = option(
        False, "start answers with <think>, for reasoning models", group=SAMPLING
    )
    seed: int | None = option(
        None,
        "random seed of the sampling; default: a new one each time",
        group=SAMPLING,
        at_least=0,
        below=2**31,
    )

    def sampling(self) -> "SamplingParams":
        from model.inference.sampling import SamplingParams

        return SamplingParams(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )


@dataclass
class ServerArgs(ModelArgs):
    """Which model to serve, where, and with what limits."""

    groups = (MODEL, SERVER, LIMITS, SAMPLING, LONG_TEXTS, MACHINE)

    host: str = option(
        "127.0.0.1",
        "address to listen on; 0.0.0.0: reachable from other machines",
        group=SERVER,
    )
    port: int = option(8000, "port to listen on", group=SERVER, at_least=0, at_most=65535)
    api_key: str = option("", "API key that clients must send; default: none needed", group=SERVER)
    model_name: str = option("minimind", "name of the model in the API", group=SERVER)
    allow_origins: list[str] = option(
        ["localhost"],
        "web pages that may use the server: localhost (pages of this machine), origins such as "
        "https://chat.example, * (all; set an --api_key), none",
        group=SERVER,
    )
    allow_hosts: list[str] = option(
        [],
        "names by which clients may address the server, besides localhost, --host and plain "
        "addresses; * for any",
        group=SERVER,
    )
    tools: Literal["fit", "all", "none"] = option(
        "fit",
        "fit: the last tools of a request are left out where they do not fit into --max_length; "
        "all: such requests are refused; none: tools are ignored, unless a call is forced",
        group=SERVER,
    )
    strict_requests: bool = option(
        False, "refuse what is not exactly in OpenAI's form", group=SERVER
    )
    max_batch: int = option(
        32, "maximum number of requests decoded at a time", group=LIMITS, at_least=1
    )
    max_queue: int = option(
        256,
        "maximum number of requests waiting; more are refused",
        group=LIMITS,
        at_least=0,
    )
    max_length: int = option(
        4096,
        "maximum length of prompt and reply together, in tokens",
        group=LIMITS,
        at_least=1,
        alias=("max_seq_len",),
    )
    max_new_tokens: int = option(
        512, "maximum length of a reply; default of requests", group=SAMPLING, at_least=1
    )
    prefill_tokens: int = option(
        512, "maximum number of prompt tokens per engine step", group=LIMITS, at_least=1
    )
    max_body: int = option(2 * 2**20, "bytes of a request's body", group=LIMITS, at_least=1)
    max_messages: int = option(1000, "messages of a request", group=LIMITS, at_least=1)
    max_tools: int = option(512, "tools of a request", group=LIMITS, at_least=1)
    max_replies: int = option(
        128, "replies to a request: its prompts times n", group=LIMITS, at_least=1
    )
    max_reply_tokens: int = option(
        2**16, "replies to a request times their maximum length", group=LIMITS, at_least=1
    )
    max_stop: int = option(1000, "characters of a stop string", group=LIMITS, at_least=1)
    max_schema: int = option(
        50_000,
        "characters of a JSON schema, or of those of all forced tools",
        group=LIMITS,
        at_least=1,
    )
    max_wait: float = option(
        20,
        "seconds within which a request has to arrive; also for idle connections",
        group=LIMITS,
        above=0,
    )
    open_thinking: bool = option(
        False, "start replies with <think>; default of requests", group=SAMPLING
    )
    temperature: float = option(
        0.85, "sampling temperature; default of requests", group=SAMPLING, at_least=0
    )
    top_p: float = option(
        0.85,
        "nucleus sampling; default of requests",
        group=SAMPLING,
        above=0,
        at_most=1,
    )
    top_k: int = option(
        0, "sample from the k most likely tokens; default of requests", group=SAMPLING, at_least=0
    )
