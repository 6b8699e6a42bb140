"""A merge that is the trained model, shard by shard, under names that others know; GGUF where its packages are."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils import runtime
from utils.data import template
from utils.models import adapters, export, loading
from utils.tests import tiny

TALK = {"system": "Be brief.", "history": [{"instruction": "Who?", "output": "Ada"}], "instruction": "When?"}
MESSAGES = [("system", "Be brief."), ("user", "Who?"), ("assistant", "Ada"), ("user", "When?")]


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(export, "OUTPUTS", tmp_path / "outputs")
    return tmp_path / "outputs"


@pytest.fixture(scope="module")
def adapter(stirred, tokenizer, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapters, "OUTPUTS", tmp_path_factory.mktemp("outputs"))
        return adapters.save(stirred, tokenizer, tiny.RECIPE, tiny.ROWS, {"exact": 0.5})


def test_the_merged_model_is_the_trained_one(adapter, stirred, base, capsys):
    ids, folder = torch.arange(3, 40)[None], export.merge(adapter)
    assert "needs 0.00 GB of disk and 0.27 GB of memory" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        difference = (model(ids).logits - stirred(ids).logits).abs().max()
        alone = (loading.load_base(base)(ids).logits - stirred(ids).logits).abs().max()
    assert difference < 0.01 * alone  # what is left is the rounding to the base's 16 bits
    assert model.generation_config.eos_token_id == 2
    card = (folder / "README.md").read_text("utf-8")
    assert '"exact": 0.5' in card and str(Path(base).parent) not in card


def test_what_is_sent_names_no_folder_of_this_machine(adapter, base, tmp_path):
    sent = adapters.to_send(adapter)
    texts = {path.name: path.read_text("utf-8") for path in sent.glob("*.json")}
    assert not any(base in text for text in texts.values()) and f'"base": "{Path(base).name}"' in texts["run.json"]
    assert not list(sent.glob("*.csv")) and not list(sent.glob("*.md")) and (sent / adapters.WEIGHTS).is_file()
    for bad in (f"{Path.home()}/x", "hf_" + "a1" * 12):
        other = shutil.copytree(adapter, tmp_path / "other", dirs_exist_ok=True)
        (other / "run.json").write_text(json.dumps({"base": base, "data": bad}))
        with pytest.raises(runtime.Stop, match=r"run.json holds a token or a path of this machine"):
            adapters.to_send(other)


def test_shards_are_merged_like_one_file(adapter, base, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(export.merge(adapter)).state_dict()
    cut = tmp_path / Path(base).name
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16).save_pretrained(cut, max_shard_size="50KB")
    tiny.make_tokenizer(cut, add_bos_token=True)
    folder = export.merge(adapter, base=str(cut))
    assert len(list(folder.glob("*.safetensors"))) > 2
    parts = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_the_chat_template_is_the_courses(adapter, tokenizer, tmp_path):
    messages = [{"role": role, "content": text} for role, text in MESSAGES]
    found = AutoTokenizer.from_pretrained(export.merge(adapter))
    assert found.apply_chat_template(messages).input_ids == template.encode_prompt(tokenizer, TALK)
    if not tiny.LLAMA_2_TOKENIZER.is_file():
        pytest.skip("the tokenizer of Llama-2 is not here: the same for it is not tested")
    llama = tiny.make_tokenizer(tmp_path / "llama-2", True, tiny.LLAMA_2_TOKENIZER.read_bytes())
    llama.chat_template = template.CHAT
    assert llama.apply_chat_template(messages).input_ids == template.encode_prompt(llama, TALK)


def test_what_cannot_be_merged_says_why_and_leaves_nothing(adapter, base, tmp_path, outputs, monkeypatch):
    other = tiny.make_base(tmp_path / Path(base).name, seed=1)
    with pytest.raises(runtime.Stop, match="same name, other weights"):
        export.merge(adapter, base=other)
    with pytest.raises(runtime.Stop, match="was made for base; this base is other"):  # before a download
        export.merge(adapter, base="owner/other")
    spoiled = Path(shutil.copytree(adapter, tmp_path / "dora"))
    config = (spoiled / adapters.CONFIG).read_text("utf-8").replace('"use_dora": false', '"use_dora": true')
    (spoiled / adapters.CONFIG).write_text(config, "utf-8")
    with pytest.raises(runtime.Stop, match="has use_dora, which is not merged here"):
        export.merge(spoiled)
    headed = Path(shutil.copytree(adapter, tmp_path / "headed"))
    head = "base_model.model.lm_head.lora_"
    more = {f"{head}A.weight": torch.ones(4, 64), f"{head}B.weight": torch.ones(384, 4)}
    save_file(adapters.tensors(adapter) | more, headed / adapters.WEIGHTS)
    with pytest.raises(runtime.Stop, match="has lm_head, which is not merged here"):
        export.merge(headed)
    for module, name, have in ((export.shutil, "disk_usage", 10), (export.psutil, "virtual_memory", 10**8)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *_, have=have: type("Free", (), {"free": have, "available": have}))
            with pytest.raises(runtime.Stop, match=r"free are .* Make room: nothing was written"):
                export.merge(adapter)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "nf4", full)
        with pytest.raises(runtime.Stop, match=r"not written \(No space left on device\); nothing of it is left"):
            export.merge(adapter)
    assert not list((outputs / "merged").iterdir())


def test_no_network_no_converter(adapter, outputs, monkeypatch):
    monkeypatch.setattr(export.subprocess, "run", lambda *a, **k: type("Done", (), {"returncode": 1}))
    with pytest.raises(runtime.Stop, match="a download of 77 MB, and pip cannot make it. Go online once"):
        export.gguf(export.merge(adapter))
    assert [path.name for path in outputs.rglob("*") if "gguf" in path.name or "llama-cpp" in path.name] == ["gguf"]


def test_the_serve_command_of_chapter_07_has_known_options():
    chapter = (runtime.ROOT / "notebooks" / "07_merge_and_export.ipynb").read_text("utf-8")
    [command] = re.findall(r"transformers serve MERGED [^\\]+", chapter)
    program = Path(sys.executable).with_name("transformers")
    told = subprocess.run([program, "serve", "--help"], capture_output=True, text=True).stdout
    assert [option for option in re.findall(r"--\w+", command) if option not in told] == []


def test_gguf_needs_tokenizer_model(adapter):
    folder = export.merge(adapter)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(runtime.Stop, match=r"has no tokenizer\.model"):
        export.gguf(folder)


@pytest.fixture
def gguf(outputs, monkeypatch):
    """The package, where it and llama.cpp's converter are at hand (chapter 07 fetched it, or it is fetched now)."""
    package = pytest.importorskip("gguf", reason="the package gguf is not installed: GGUF files are not tested")
    monkeypatch.setattr(export, "OUTPUTS", runtime.OUTPUTS)
    try:
        tools = export.converter()
    except runtime.Stop as stop:
        pytest.skip(str(stop))
    monkeypatch.setattr(export, "OUTPUTS", outputs)
    monkeypatch.setattr(export, "converter", lambda: tools)
    return package


def test_gguf_holds_template_and_end(adapter, base, gguf):
    fields = gguf.GGUFReader(export.gguf(export.merge(adapter))).fields
    assert fields["tokenizer.chat_template"].contents() == template.CHAT
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    lora = gguf.GGUFReader(export.gguf(base, "f32", adapter=adapter))
    assert lora.fields["adapter.lora.alpha"].contents() == tiny.RECIPE.lora_alpha


def test_notebook_11_exports_if_it_is_told_to(adapter, base, gguf, outputs, capsys):
    cells = json.loads((runtime.ROOT / "notebooks" / "11_your_own_llama.ipynb").read_text("utf-8"))["cells"]
    [cell] = ["".join(cell["source"]) for cell in cells if "EXPORT = False" in "".join(cell["source"])]
    names = {"folder": adapter, "world": SimpleNamespace(base=base), "export": export, "runtime": runtime}
    exec(cell.replace("EXPORT = False", "EXPORT = True"), names)
    [file] = (outputs / "gguf").glob("*/model.gguf")
    told = capsys.readouterr().out
    assert f"GGUF:  {file}" in told and re.search(r"model: .*/merged/base-", told)
