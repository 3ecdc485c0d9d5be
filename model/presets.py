"""The sizes of the released MiniMind models, for training one from nothing. Imports nothing slow.

| preset          | hidden × layers | heads / KV | feed-forward         | parameters  |
|-----------------|-----------------|------------|----------------------|-------------|
| minimind-3      | 768 × 8         | 8 / 4      | 2432                 | 63,912,192  |
| minimind-3-moe  | 768 × 8         | 8 / 4      | 4 experts, top 1     | 198,416,640 |
| minimind2-small | 512 × 8         | 8 / 2      | 1408                 | 25,829,888  |
| minimind2       | 768 × 16        | 8 / 2      | 2048                 | 104,030,976 |
| minimind2-moe   | 640 × 8         | 8 / 2      | 4 + 1 experts, top 2 | 145,029,760 |
"""

from typing import Any

MINIMIND_2 = dict(
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    qk_norm=False,
    rms_norm_eps=1e-5,
)
MINIMIND_3 = dict(
    hidden_size=768,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=2432,  # 64 · ceil(π · 768 / 64)
    qk_norm=True,
    rms_norm_eps=1e-6,
)
PRESETS: dict[str, dict[str, Any]] = {
    "minimind-3": MINIMIND_3,
    "minimind-3-moe": dict(
        MINIMIND_3,
        use_moe=True,
        n_routed_experts=4,
        n_shared_experts=0,
        num_experts_per_tok=1,
        moe_intermediate_size=2432,
        aux_loss_alpha=5e-4,
    ),
    "minimind2-small": dict(MINIMIND_2, hidden_size=512, intermediate_size=1408),
    "minimind2": dict(MINIMIND_2, hidden_size=768, num_hidden_layers=16, intermediate_size=2048),
    "minimind2-moe": dict(
        MINIMIND_2,
        hidden_size=640,
        intermediate_size=1728,
        use_moe=True,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=1728,
    ),
}


def with_preset(argv: list[str]) -> list[str]:
    """A command line with the flags of its --preset in front, which the others override. An unknown
    name is left to the parser."""
    name = ""
    for word, following in zip(argv, [*argv[1:], ""], strict=False):
        if word == "--preset":
            name = following
        elif word.startswith("--preset="):
            name = word.removeprefix("--preset=")
    flags = []
    for field, value in PRESETS.get(name, {}).items():
        flags += [f"--{field}", str(int(value) if isinstance(value, bool) else value)]
    return flags + argv
