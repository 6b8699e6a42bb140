"""A program for test_runtime: every library call that the notebooks make, on a random Llama of toy size."""

# ruff: noqa: E402 - quiet() comes before the imports, as it does in a notebook
from utils import runtime

runtime.quiet()

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import SFTConfig, SFTTrainer

words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(200))])}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
).save_pretrained("base")
LlamaForCausalLM(
    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256)
).save_pretrained("base")

four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained("base", quantization_config=four_bit, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained("base")
trainer = SFTTrainer(
    model,
    SFTConfig(
        "run",
        max_steps=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        optim="paged_adamw_8bit",
        disable_tqdm=True,
        save_strategy="no",
    ),
    train_dataset=Dataset.from_list([{"prompt": "w1 w2 w3", "completion": " w4 w5"}] * 16),
    processing_class=tokenizer,
    peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
)
trainer.train()
trainer.model.generate(**tokenizer(["w1 w2", "w2 w3"], return_tensors="pt"), max_new_tokens=4, do_sample=False)
trainer.model.save_pretrained("adapter")
base = AutoModelForCausalLM.from_pretrained("base", quantization_config=four_bit, dtype=torch.float32)
PeftModel.from_pretrained(base, "adapter")
