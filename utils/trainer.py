"""The trainer of a run: trl's, with checkpoints that are whole and less work for the loss on a CPU."""

from utils.checkpoints import Checkpoints


def trainer_class():
    """SFTTrainer, which on a CPU computes the same loss from the labelled positions alone.

    trl 1.16 does so only where Triton runs. Elsewhere it scores every position of the batch, prompt and padding
    included, and then masks them: a quarter of the time of a run on two cores.
    """
    import torch
    from peft import PeftModel
    from transformers import LlamaForCausalLM
    from trl import SFTTrainer

    class Trainer(SFTTrainer):
        checkpoints: Checkpoints | None = None

        def _save_checkpoint(self, model, trial):
            folder = self.args.output_dir
            with self.checkpoints.saving(self.state.global_step) as unfinished:
                self.args.output_dir = str(unfinished)
                try:
                    super()._save_checkpoint(model, trial)
                finally:
                    self.args.output_dir = folder

        def create_model_card(self, *arguments, **named):
            pass  # it would be written beside each checkpoint, and nobody publishes those

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            # Other architectures may do more than this between their layers and the loss (Gemma 2 squeezes logits).
            if return_outputs or not isinstance(base, LlamaForCausalLM) or model.device.type != "cpu":
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            labels = inputs["labels"][:, 1:]
            scored = labels != -100
            hidden = base.model(inputs["input_ids"], inputs["attention_mask"], use_cache=False).last_hidden_state
            logits = base.lm_head(hidden[:, :-1][scored]).float()
            summed = torch.nn.functional.cross_entropy(logits, labels[scored], reduction="sum")
            items = scored.sum() if num_items_in_batch is None else num_items_in_batch
            return summed / torch.as_tensor(items).clamp(min=1)  # no label at all: zero, which the guard explains

    return Trainer
