"""LoRA: fine-tune a chat model for a persona or a domain by low-rank adapters of its matrices.

    h = W·x + alpha/r · B·A·x         (Hu et al. 2021, arXiv 2106.09685, eq. 3)

W is frozen; A (--lora_r rows) and B (--lora_r columns) are trained with the loss of
train_full_sft.py. The layer is in model/model_lora.py. Only the adapter is saved, as
out/lora/{name}_{hidden_size}.pth.

    python trainer/train_lora.py --data_path dataset/lora_identity.jsonl
    python eval_llm.py --lora_weight lora_identity

--lora_weight goes on with an adapter that exists, also one of an earlier MiniMind.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dataset.released import data_option
from model.command_line import option, setting
from model.errors import UserError
from trainer.common.arguments import LEARNING_RATE_HELP, LORA, ConversationArgs, LoraArgs
from trainer.common.command import parse_trainer, run_trainer


@dataclass
class Args(ConversationArgs, LoraArgs):
    data_path: list[str] = data_option("lora", 'JSONL of {"conversations": [messages]}')
    from_weight: str = option("full_sft", "stage that the adapter is for")
    learning_rate: float = option(1e-3, LEARNING_RATE_HELP)
    epochs: int = option(50, "passes through the data")
    lora_name: str = option(
        "", "the adapter's; default: that of the data file", group=LORA, name=True
    )
    lora_weight: str = setting(
        "",
        "an adapter to go on with, by its name or as a .pth; it has its own rank, alpha and layers",
        group=LORA,
        may_differ=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_weight:
            raise UserError("--save_weight is not for LoRA: --lora_name names the adapter")

    @property
    def adapter(self) -> str:
        """The adapter's name."""
        data_file = Path(self.data_path[0]).name
        return self.lora_name or data_file.removesuffix(".gz").removesuffix(".jsonl")


if __name__ == "__main__":  # before the slow imports: --help and mistakes answer at once
    args = parse_trainer(Args, __doc__)


from model.formats.lora_format import load_lora, resolve_lora, save_lora
from model.model_lora import LoraConfig, add_lora, lora_state
from model.model_minimind import MiniMindForCausalLM
from model.weights import load_tokenizer
from trainer.common.context import Context
from trainer.common.evaluation import evaluate_loss, sample_answer
from trainer.common.optimizers import make_optimizer
from trainer.common.setup import init_model, load_packed, prepare_model
from trainer.trainer_utils import Run


def continue_lora(args: Args, model: MiniMindForCausalLM) -> LoraConfig:
    """Add the adapter of --lora_weight. UserError if flags say that it should be another one."""
    path = resolve_lora(args.lora_weight, model.config, args.save_dir)
    config = load_lora(model, path)
    if args.lora_config() not in (LoraConfig(), config):
        raise UserError(
            f"{path} has lora_r {config.r}, lora_alpha {config.alpha:g}, lora_dropout "
            f"{config.dropout:g} and lora_targets {' '.join(config.target_modules)}, which flags "
            "cannot change; leave them away"
        )
    return config


def main(args: Args) -> dict[str, Any]:
    # Setup.
    ctx = Context.create(args)
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = init_model(args, tokenizer)
    # Freezes all weights and adds A and B. B starts at 0, so that the first step sees the base
    # model; with A at 0 too, neither would ever get a gradient.
    if args.lora_weight:
        config = continue_lora(args, model)
    else:
        config = args.lora_config()
        add_lora(model, config)
    train_data, val_data = load_packed(ctx, tokenizer, "conversations")
    run = Run(ctx, args.stage(args.adapter), model, tokenizer, train_data, val_data)
    trainable = sum(weight.numel() for weight in lora_state(model).values())
    ctx.print(f"LoRA: {trainable:,} trainable parameters, rank {config.r}")

    model = prepare_model(ctx, model)
    # takes the trainable parameters only: no gradients and moments for frozen ones, which is what
    # LoRA saves in memory
    optimizer = make_optimizer(
        model, args.optimizer, args.learning_rate, args.weight_decay, ctx.dtype
    )
    run.resume(model, optimizer)

    for global_batch in run.steps():
        # Forward and backward, as in train_full_sft.py.
        for batch in global_batch:
            with run.forward(model, sync=batch is global_batch[-1]):
                outputs = model(
                    **batch.inputs,
                    labels=batch.labels,  # -100 wherever the token is not the assistant's
                    num_items_in_batch=global_batch.num_label_tokens,  # of all ranks
                    return_logits=False,
                )
            run.backward(outputs.loss, global_batch.aux_loss(batch, outputs))
        run.update(model, optimizer)

        # Evaluate, log, and save the adapter alone.
        if val_data and run.is_due(args.eval_interval):
            sample = sample_answer(ctx, model, tokenizer, args.sample_prompt)
            run.log_evaluation(sample, **evaluate_loss(ctx, model, tokenizer, val_data))
        run.log()
        run.save_every(model, optimizer, save=partial(save_lora, config=config))
    return run.finish()


if __name__ == "__main__":
    run_trainer(main, args)
