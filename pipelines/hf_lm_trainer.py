"""A small language model in a Hugging Face Trainer, taught by stored labels of every token.

    softlabel generate --data 'train.jsonl?key=id' --teacher lm:models/teacher --max-length 512 --encoding topk \\
        --temperature 1 --out labels/train
    python pipelines/hf_lm_trainer.py --data 'train.jsonl?key=id' --labels labels/train --teacher models/teacher \\
        --out runs/student

The student has fewer layers than the teacher and begins at random. The SFTTrainer of TRL is a Trainer too: the two
methods below are all that it needs. Needs the extra 'hf', and accelerate.
"""

import argparse
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

import softlabel
from softlabel.dataset.tokenize import tokenize_source
from softlabel.inputs.vocabulary import read_vocabulary
from softlabel.loader.token_batch import TokenBatch
from softlabel.loader.token_loader import TokenLoader
from softlabel.loss import linear_distillation_loss


class TokenTrainer(Trainer):
    """The Trainer with its batches and its loss replaced."""

    def __init__(self, *args: Any, loader: TokenLoader, soft_weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.loader, self.soft_weight = loader, soft_weight
        # The loss is a mean over its batch: the Trainer has to divide it where it accumulates gradients.
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> Any:
        return self.loader

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert isinstance(inputs, TokenBatch)
        batch = inputs.to(self.args.device)
        # Documents of a line are told apart by their positions, which begin at 0 in each.
        outputs = model.base_model(input_ids=batch.tokens, position_ids=batch.position_ids, use_cache=False)
        head, size = model.get_output_embeddings(), self.loader.store.run.num_classes  # type: ignore[union-attr]
        loss = linear_distillation_loss(
            batch.at_places(outputs.last_hidden_state),
            head.weight[:size],  # the last layer may be padded
            None if head.bias is None else head.bias[:size],
            batch.target,
            batch.hard_labels,
            temperature=self.loader.temperature,
            soft_weight=self.soft_weight,
            hard_weight=1 - self.soft_weight,
            soft_mask=batch.has_target,
        )
        return (loss, outputs) if return_outputs else loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="documents, a SOURCE")
    parser.add_argument("--labels", required=True, help="store with their labels")
    parser.add_argument("--teacher", required=True, help="folder with config.json and tokenizer.json")
    parser.add_argument("--out", required=True, help="folder for the trained student")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--pack", type=int, default=512, help="positions of a line, which takes several documents")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--soft-weight", type=float, default=0.9)
    options = parser.parse_args()
    set_seed(0)
    store = softlabel.open_store(options.labels)
    assert store.run.tokens is not None, "labels of documents"
    source = tokenize_source(
        softlabel.open_source(options.data), read_vocabulary(options.teacher), max_length=store.run.tokens.max_length
    )
    loader = TokenLoader(source, store, batch_tokens=options.batch_tokens, pack=options.pack, tail="drop")
    config = AutoConfig.from_pretrained(options.teacher, num_hidden_layers=options.layers, local_files_only=True)
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "final_logit_softcapping"):
        if getattr(config, name, None) not in (None, 1.0):
            parser.error(f"--teacher: its config has {name}; give logit_scale= or softcap= to the loss above")
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    arguments = TrainingArguments(
        output_dir=options.out, num_train_epochs=options.epochs, learning_rate=options.lr, seed=0, report_to=[],
        save_strategy="no", logging_steps=10, lr_scheduler_type="cosine", remove_unused_columns=False,
    )  # fmt: skip
    trainer = TokenTrainer(model=student, args=arguments, loader=loader, soft_weight=options.soft_weight)
    done = trainer.train()
    trainer.save_model(options.out)
    print(f"{options.out}: {done.global_step} steps, loss {done.training_loss:.4f}")


if __name__ == "__main__":
    main()
