"""DPO: it begins at log 2, its reference does not move, a run resumes to the same bits, and pairs are read whole."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

from utils.models import adapters, loading
from utils.runtime import Stop
from utils.tests import tiny
from utils.training import preference, trainer
from utils.training.checkpoints import Checkpoints

RECIPE = replace(tiny.RECIPE, batch_size=2)
PAIRS = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": "I do not know."} for row in tiny.ROWS]


def weights(model, adapter: str) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if f".{adapter}." in name])


def run(base, tokenizer, checkpoints):
    model = adapters.add(loading.load_base(base), RECIPE)
    made = preference.build(model, tokenizer, preference.encode(tokenizer, PAIRS, 128), RECIPE, checkpoints, beta=0.5)
    before = weights(model, "ref")
    log = trainer.run(made, live=False)
    assert torch.equal(weights(model, "ref"), before) and not torch.equal(weights(model, "default"), before)
    return model, log


def test_a_run_begins_at_log_two_in_fp32_and_resumes_to_the_same_bits(base, tokenizer, tmp_path):
    whole, log = run(base, tokenizer, Checkpoints(tmp_path / "run", every=3))
    assert log[0]["rewards/margins"] == 0 and abs(log[0]["loss"] - 0.693147) < 1e-6 and log[-1]["rewards/margins"] > 0
    assert {p.dtype for p in whole.parameters() if p.requires_grad} == {torch.float32}
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    assert torch.equal(
        weights(run(base, tokenizer, Checkpoints(tmp_path / "run"))[0], "default"), weights(whole, "default")
    )


def test_pairs_of_a_file_are_checked_and_encoded_by_the_template(tokenizer, tmp_path):
    bad = [{**PAIRS[0], "rejected": ""}, {"prompt": "x", "chosen": 3, "rejected": "y"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [*PAIRS, *bad])), encoding="utf-8")
    rows = preference.read(str(tmp_path / "pairs.jsonl"))
    assert [row["chosen"] for row in rows] == [pair["chosen"] for pair in PAIRS]
    ids = preference.encode(tokenizer, [*rows, {**PAIRS[0], "chosen": "a " * 200}], 128)
    assert len(ids) == len(PAIRS) and tokenizer.decode(ids[0]["rejected_ids"]).strip() == "I do not know.</s>"


def test_a_frozen_adapter_is_refused(adapted, tokenizer):
    with pytest.raises(Stop, match="frozen"):
        preference.build(adapted.requires_grad_(False), tokenizer, PAIRS, RECIPE)
