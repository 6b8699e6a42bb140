"""What the benchmark measures: settings, shapes, and the lengths of real rows."""

from dataclasses import replace

from utils.benchmark.measure import Setting

# Usual is what most tutorials run: prepare_model_for_kbit_training, peft's own forward, and a little dropout (QLoRA's
# own scripts: 0.1 for a 7B, 0.05 for a 65B; the share does not change the time).
FAST, USUAL = Setting(), Setting(dropout=0.05, upcast=True, liger=False, fused=False)
# Lengths in tokens of Llama-2's tokenizer of the 999 rows of data/alpaca_en_demo.json (hiyouga/LLaMA-Factory, commit
# ff6d4d1), in this course's template: percentiles 0.5, 1.5, ... 99.5.
ALPACA = [31, 36, 39, 40, 41, 44, 45, 46, 47, 49, 50, 51, 53, 53, 54, 55, 57, 58, 59, 60, 61, 63, 65, 67, 68, 70, 71]
ALPACA += [73, 76, 78, 81, 83, 87, 90, 94, 98, 100, 106, 109, 112, 117, 121, 125, 130, 135, 140, 144, 147, 153, 158]
ALPACA += [165, 169, 173, 176, 181, 186, 190, 194, 204, 209, 215, 220, 226, 233, 240, 246, 253, 260, 268, 283, 289]
ALPACA += [294, 302, 311, 315, 322, 326, 335, 346, 352, 362, 367, 374, 382, 389, 401, 409, 415, 421, 433, 441, 452]
ALPACA += [458, 473, 479, 503, 515, 550, 580, 655]

GRID = {  # kind of checkpointing: (batch, length)
    "all": [(1, 512), (8, 512), (1, 1024), (4, 1024), (1, 2048), (2, 2048), (4, 2048), (1, 4096), (2, 4096)]
    + [(1, 8192), (1, 16384)],
    "none": [(1, 512), (2, 512), (4, 512), (1, 1024), (2, 1024), (1, 2048), (2, 2048)],
    2: [(1, 512), (1, 1024), (2, 1024), (1, 2048), (2, 2048), (1, 4096)],
    4: [(1, 1024), (1, 2048)],
    "offload": [(1, 2048), (2, 2048), (8, 512), (1, 4096), (1, 8192), (1, 16384)],
}
ONE, MORE = [(1, 2048)], [(1, 2048), (1, 512), (2, 2048)]
LEVERS = [  # (setting, (batch, length) of each measurement, gradients against fp32?)
    (USUAL, MORE, False),
    (replace(FAST, checkpoint="none"), MORE, True),
    (FAST, MORE + [(1, 4096)], False),
    (replace(FAST, checkpoint=2), [*ONE, (1, 4096)], False),
    (replace(FAST, fused=False, checkpoint="none"), MORE, True),
    (replace(FAST, fused=False), ONE, False),
    (replace(FAST, fused=False, liger=False), ONE, True),
    (replace(USUAL, dropout=0.0), ONE, True),
    (replace(USUAL, dropout=0.0, liger=True), ONE, True),
    (replace(USUAL, dropout=0.0, fused=True), ONE, False),
    (replace(USUAL, upcast=False), ONE, False),
    (replace(USUAL, liger=True), ONE, False),
    (replace(USUAL, checkpoint="none"), ONE, False),
    (replace(FAST, fused=False, compiled=True, checkpoint="none"), ONE, False),
    (replace(FAST, compiled=True, checkpoint="none"), ONE, False),
    (replace(FAST, double_quant=False, checkpoint="none"), ONE, False),
    (replace(FAST, liger=False, checkpoint="none"), ONE, False),
    (replace(FAST, checkpoint="offload"), ONE, False),
    (replace(FAST, liger_first=True, fused=False, checkpoint="none"), ONE, False),
    (replace(FAST, any_attention=True, checkpoint="none"), ONE, False),
    (replace(FAST, any_attention=True), ONE, False),
    (replace(USUAL, any_attention=True), ONE, False),
]
