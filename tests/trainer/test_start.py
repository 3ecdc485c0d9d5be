"""What a training starts from: presets, folders of several kinds, files of earlier versions."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_mistakes import complaint
from toy import Trainer, flags, name_of, saved_teacher
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from model.command_line import parse_arguments
from model.errors import UserError
from model.formats.hf_format import save_hf_folder
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.presets import PRESETS, with_preset
from model.weights import TOKENIZER, count_parameters, load_model, load_tokenizer, tokenizer_hash
from trainer import train_distillation, train_full_sft, train_lora, train_pretrain, train_reward
from trainer.common.setup import init_model

pytestmark = pytest.mark.usefixtures("in_a_hurry")
UNSET = dict.fromkeys(  # of the toys: as the weights have them
    ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
)


# -- presets ---------------------------------------------------------------------------------------

# of the released models; where they are rounded, in millions
PARAMETERS = {
    "minimind-3": 63_912_192,
    "minimind-3-moe": 198_416_640,
    "minimind2-small": 25.83,
    "minimind2": 104.03,
    "minimind2-moe": 145.03,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_of_the_released_model(name, tokenizer):
    with torch.device("meta"):
        model = MiniMindForCausalLM(MiniMindConfig(vocab_size=6400, **PRESETS[name]))
    count, expected = count_parameters(model), PARAMETERS[name]
    assert count == expected if isinstance(expected, int) else round(count / 1e6, 2) == expected


@pytest.mark.parametrize("words", ["--preset minimind-3-moe", "--preset=minimind-3-moe"])
def test_a_preset_is_the_flags_of_its_sizes(words):
    args = train_pretrain.Args(preset="minimind-3-moe")
    assert (args.use_moe, args.aux_loss_alpha, args.rms_norm_eps) == (True, 5e-4, 1e-6)
    argv = with_preset([*words.split(), "--num_hidden_layers", "2"])
    assert argv[-2:] == ["--num_hidden_layers", "2"] and argv.count("--num_hidden_layers") == 2
    assert argv[argv.index("--use_moe") + 1] == "1"
    assert with_preset(["--hidden_size", "8"]) == ["--hidden_size", "8"]


def test_a_zero_overrides_a_preset():
    zeros = ["--n_shared_experts", "0", "--aux_loss_alpha", "0", "--qk_norm", "0"]
    argv = with_preset(["--preset", "minimind-3-moe", *zeros])
    args = parse_arguments(train_pretrain.Args, argv=argv)
    assert (args.n_shared_experts, args.aux_loss_alpha, args.qk_norm) == (0, 0, False)


@pytest.mark.parametrize("experts", [4, 2])
def test_flags_override_a_preset(train, command, experts):
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4)
    sizes["intermediate_size"] = 64
    more = {"moe_intermediate_size": 32, "n_routed_experts": experts} if experts == 2 else {}
    settings = train.settings(max_steps=1, preset="minimind-3-moe", **{**sizes, **more})
    code, printed = command(train.stage, *flags(settings))
    assert code == 0, printed.err
    info = json.loads((train.folder / "a" / "out" / "pretrain_64_moe.json").read_text())
    config = info["config"]
    assert config["n_routed_experts"] == experts and config["num_experts_per_tok"] == 1
    assert config["moe_intermediate_size"] == (32 if experts == 2 else 2432)
    assert (config["intermediate_size"], config["num_key_value_heads"]) == (64, 4)
    assert (config["rms_norm_eps"], config["aux_loss_alpha"]) == (1e-6, 5e-4)


def test_an_unknown_preset_is_named(train, command):
    code, printed = command(train.stage, *flags(train.settings(preset="minimind-4")))
    assert code == 2 and "--preset is one of minimind-3, minimind-3-moe" in complaint(printed)


def test_a_preset_of_other_sizes_than_the_weights_is_refused(train):
    path = saved_teacher(train.folder, hidden_size=768, num_attention_heads=8, qk_norm=True)
    settings = train.settings(from_weight=path, preset="minimind-3", **UNSET)
    args = train_full_sft.Args(**settings)
    with pytest.raises(UserError, match="intermediate_size 2048, as its .json says, and not 2432"):
        init_model(args, load_tokenizer())


# -- folders ---------------------------------------------------------------------------------------


@pytest.fixture
def their_tokenizer(tmp_path) -> Path:
    """A folder with a tokenizer of as many tokens, one of which is another."""
    folder = tmp_path / "tokenizer"
    load_tokenizer().save_pretrained(folder)
    words = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(words.replace("<answer>", "<ansver>"), "utf-8")
    return folder


def qwen3(folder: Path) -> None:
    config = Qwen3Config(
        vocab_size=6400,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=64,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def llama_in_shards(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=6400,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="200KB")
    assert (folder / "model.safetensors.index.json").exists()


def native(folder: Path) -> None:
    model = load_model(saved_teacher(folder))
    model.save_pretrained(folder)


FOLDERS = {"qwen3": qwen3, "llama_in_shards": llama_in_shards, "native": native}


@pytest.mark.parametrize("stage", [train_full_sft, train_lora, train_reward], ids=name_of)
@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_is_what_a_training_starts_from(tmp_path, their_tokenizer, kind, stage):
    """With its own tokenizer, unless a flag names one."""
    FOLDERS[kind](their_tokenizer)
    train = Trainer(tmp_path, stage)
    start = dict(from_weight=str(their_tokenizer), max_steps=1, **UNSET)
    train(**start)
    (path,) = (train.folder / "a" / "out").rglob("*_48.json")
    info = json.loads(path.read_text())
    assert info["tokenizer_hash"] == tokenizer_hash(load_tokenizer(their_tokenizer))
    assert info["tokenizer_hash"] != tokenizer_hash(load_tokenizer())
    args = stage.Args(**train.settings(**{**start, "hidden_size": 64}))
    with pytest.raises(UserError, match="hidden_size 48, as its config.json says, and not 64"):
        init_model(args, load_tokenizer(their_tokenizer))
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        train(**start, tokenizer_path=str(TOKENIZER))


def test_a_folder_gives_the_losses_of_its_file(train, tokenizer):
    path = saved_teacher(train.folder)
    save_hf_folder(load_model(path), tokenizer, train.folder / "folder")
    losses = []
    for start in (path, str(train.folder / "folder")):
        train(Path(start).stem, from_weight=start, max_steps=2, **UNSET)
        losses.append([record["loss"] for record in train.log(Path(start).stem)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_the_tokenizer_of_a_new_student_is_its_teachers(tmp_path, their_tokenizer):
    qwen3(their_tokenizer)
    train = Trainer(tmp_path, train_distillation)
    train(max_steps=1, teacher_weight=str(their_tokenizer))
    (path,) = (train.folder / "a" / "out").rglob("*_32.json")
    assert json.loads(path.read_text())["tokenizer_hash"] == tokenizer_hash(
        load_tokenizer(their_tokenizer)
    )


# -- files of earlier versions ---------------------------------------------------------------------


def test_a_bare_file_needs_to_know_its_tokenizer(train, command, their_tokenizer):
    path = Path(saved_teacher(train.folder, num_attention_heads=8))
    path.with_suffix(".json").unlink()
    start = dict(from_weight=str(path), max_steps=1, **UNSET)
    given = {name: each for name, each in train.settings(**start).items() if each is not None}
    code, printed = command(train.stage, *flags(given))
    assert code == 2
    assert re.search("which tokenizer .* with; name its folder with --tok", complaint(printed))
    assert "UserWarning" not in printed.err
    train(**start, tokenizer_path=str(TOKENIZER))
    beside = their_tokenizer / path.name
    path.rename(beside)
    train("b", **{**start, "from_weight": str(beside)})
    for name, folder in {"a": TOKENIZER, "b": their_tokenizer}.items():
        info = json.loads((train.folder / name / "out" / "pretrain_48.json").read_text())
        assert info["tokenizer_hash"] == tokenizer_hash(load_tokenizer(folder))


def test_a_resume_file_of_an_earlier_version_is_a_start(train):
    path = Path(saved_teacher(train.folder))
    resume = train.folder / "full_sft_48_resume.pth"
    torch.save({"model": torch.load(path), "optimizer": {}, "epoch": 1, "step": 7}, resume)
    sizes = {**UNSET, "num_attention_heads": 4, "num_key_value_heads": 2}
    start = dict(max_steps=1, tokenizer_path=str(TOKENIZER), learning_rate=1e-9)
    train("a", from_weight=str(resume), **start, **sizes)
    train("b", from_weight=str(path), **start, **UNSET)
    losses = [train.log(name)[0]["loss"] for name in "ab"]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)  # rms_norm_eps, YaRN: as its generation


@pytest.mark.parametrize("stage", ["ppo_actor", "full_dist"])
def test_weights_of_their_stages_are_found_by_name(train, tokenizer, stage):
    path = saved_teacher(train.folder, f"{stage}_48")
    args = train.stage.Args(
        **train.settings(from_weight=stage, **UNSET) | {"save_dir": str(train.folder)}
    )
    state = load_model(path).state_dict()
    for name, weight in init_model(args, tokenizer).state_dict().items():
        assert torch.equal(weight, state[name])
