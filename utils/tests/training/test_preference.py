"""DPO: it begins at log 2, its reference does not move, a run resumes to the same bits, and pairs are read whole."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from utils.models import adapters, loading
from utils.runtime import Stop
from utils.tests.tiny import ROWS, TWO_PASSES
from utils.training import guards, preference, trainer
from utils.training.checkpoints import Checkpoints

PAIRS = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": "I do not know."} for row in ROWS]


def weights(model, adapter: str) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if f".{adapter}." in name])


def run(base, tokenizer, saved):
    model, pairs = adapters.add(loading.load_base(base), TWO_PASSES), preference.encode(tokenizer, PAIRS, 128)
    made = preference.build(model, tokenizer, pairs, TWO_PASSES, saved, beta=0.5)
    before = weights(model, "ref")
    log = trainer.run(made, live=False)
    assert torch.equal(weights(model, "ref"), before) and not torch.equal(weights(model, "default"), before)
    return weights(model, "default"), log, {p.dtype for p in model.parameters() if p.requires_grad}


def test_a_run_begins_at_log_two_in_fp32_and_resumes_to_the_same_bits(base, tokenizer, tmp_path):
    whole, log, dtypes = run(base, tokenizer, Checkpoints(tmp_path, every=3))
    assert log[0]["rewards/margins"] == 0 and abs(log[0]["loss"] - 0.693147) < 1e-6 and log[-1]["rewards/margins"] > 0
    assert dtypes == {torch.float32}
    shutil.rmtree(tmp_path / "checkpoint-6")
    assert torch.equal(run(base, tokenizer, Checkpoints(tmp_path))[0], whole)


def test_an_adapter_that_was_loaded_for_use_is_trained(base, tokenizer, tmp_path):
    adapters.add(loading.load_base(base), TWO_PASSES).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(loading.load_base(base), tmp_path)
    model.set_adapter("default")
    preference.build(model, tokenizer, preference.encode(tokenizer, PAIRS, 128), TWO_PASSES)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"default"}


def test_pairs_of_a_file_are_checked_and_encoded_by_the_template(tokenizer, tmp_path):
    bad = [{**PAIRS[0], "rejected": ""}, {"prompt": "x", "chosen": 3, "rejected": "y"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [*PAIRS, *bad])), encoding="utf-8")
    rows = preference.read(str(tmp_path / "pairs.jsonl"))
    ids = preference.encode(tokenizer, [*rows, {**PAIRS[0], "chosen": "a " * 200}], 128)
    assert len(rows) == len(ids) == len(PAIRS)
    assert tokenizer.decode(ids[0]["rejected_ids"]).strip() == "I do not know.</s>"


def test_a_run_whose_pairs_are_all_learned_is_told_so():
    args, at = SimpleNamespace(learning_rate=1.0), SimpleNamespace(global_step=9)
    with pytest.raises(Stop, match="step 9: every pair is learned"):
        guards.Guard().on_log(args, at, None, {"grad_norm": 0.0, "rewards/margins": 9.0})


def test_a_frozen_adapter_is_refused(adapted, tokenizer):
    with pytest.raises(Stop, match="frozen"):
        preference.build(adapted.requires_grad_(False), tokenizer, PAIRS, TWO_PASSES)
