"""LoRA: fine-tune a chat model for a persona or a domain by a small addition to its matrices.

    W·x + alpha/r · B·A·x         (Hu et al. 2021, arXiv 2106.09685, eq. 3)

W is frozen; --lora_r rows of A and columns of B are trained, by the loss of train_full_sft.py. The
layer is in model/model_lora.py. The additions alone are saved, out/lora/{name}_{hidden_size}.pth.

    python trainer/train_lora.py --data_path dataset/lora_identity.jsonl
    python eval_llm.py --lora_weight lora_identity
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from model.command_line import option
from model.errors import UserError
from model.model_lora import add_lora, lora_state, save_lora
from model.weights import load_tokenizer
from trainer.common.arguments import DATASET, LEARNING_RATE_HELP, LoraArgs
from trainer.common.command import run_stage
from trainer.common.evaluation import answer, held_out_loss
from trainer.common.optimizers import make_optimizer
from trainer.trainer_utils import Run, read_rows, starting_model


@dataclass
class Args(LoraArgs):
    data_path: list[str] = option(
        [str(DATASET / "lora_identity.jsonl")], 'JSONL of {"conversations": [messages]}'
    )
    from_weight: str = option("full_sft", "stage that the addition is for")
    learning_rate: float = option(1e-3, LEARNING_RATE_HELP)
    epochs: int = option(50, "times to go through the data")
    lora_name: str = option("", "name of the addition; default: that of the data file")
    sample_prompt: str = option("Who are you?", "asked at every evaluation")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_weight:
            raise UserError("--save_weight: an addition has its name from --lora_name")

    @property
    def stage(self) -> str:
        """lora/ and the name: where the addition is saved under save_dir."""
        data_file = Path(self.data_path[0]).name
        return "lora/" + (self.lora_name or data_file.removesuffix(".gz").removesuffix(".jsonl"))


def main(args: Args) -> dict[str, Any]:
    tokenizer = load_tokenizer(args.tokenizer_path)
    model = starting_model(args, tokenizer)
    settings = args.settings()
    add_lora(model, settings)
    run = Run(args, args.stage, model.config, tokenizer)
    rows, held_out = read_rows(run, "conversations")
    loader = run.loader(rows)
    run.announce(model, rows, held_out)
    trained = sum(weight.numel() for weight in lora_state(model).values())
    run.print(f"LoRA: {trained:,} parameters are trained, rank {args.lora_r}")

    model = run.distribute(model)
    optimizer = make_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay)
    run.resume(model, optimizer)

    for window in run.steps(loader):
        for batch in window:
            with run.forward(model, sync=batch is window[-1]):
                outputs = model(
                    **batch.inputs,
                    labels=batch.labels,
                    num_items_in_batch=window.labelled,
                    return_logits=False,
                )
            run.backward(outputs.loss, window.balance_loss(batch, outputs))
        run.update(model, optimizer)
        if held_out and run.due(args.eval_interval):
            figures = held_out_loss(run, model, held_out)
            run.log_evaluation(answer(run, model, args.sample_prompt), **figures)
        run.log()
        run.save_every(model, optimizer, save=partial(save_lora, settings=settings))
    return run.finish()


if __name__ == "__main__":
    run_stage(main, Args, __doc__)
