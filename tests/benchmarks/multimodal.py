"""Building, saving and reopening the joined model at its real size: time, and peak memory against its own bytes.

BiomedCLIP's ViT-B/16 and a 22-layer TinyLlama with 11 layers of 4 experts, random weights, bfloat16. Each
measurement has a process of its own; memory is counted above what the bare imports take.

python tests/benchmarks/multimodal.py [FOLDER]     needs 12 GB of disk and 8 GB of memory
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MEASURED = """
import json, resource, sys, time
import torch
from moellava.model.builder_enhanced import load_pretrained_model
import open_clip, timm
from safetensors import safe_open

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**10

base, start = peak(), time.perf_counter()
{statement}
print(json.dumps({{"seconds": time.perf_counter() - start, "peak": peak() - base, **result}}))
"""

BUILD = """
loaded = load_pretrained_model({{"model_name_or_path": {language_model!r}, "mm_vision_tower": {tower!r}}})
bytes_ = sum(w.numel() * w.element_size() for w in loaded.model.parameters()) / 2**20
result = {{"bytes": bytes_, "parameters": loaded.model.num_parameters()}}
if {save!r}:
    loaded.model.save_pretrained({save!r}); loaded.processor.save_pretrained({save!r})
"""

# Every weight is read, not only mapped: a file that is mapped costs nothing until somebody looks.
REOPEN = """
loaded = load_pretrained_model({saved!r})
checksum = sum(float(w.detach().view(-1)[:: 1024].float().sum()) for w in loaded.model.parameters())
result = {{"bytes": sum(w.numel() * w.element_size() for w in loaded.model.parameters()) / 2**20}}
"""

READ = """
from pathlib import Path
total = 0.0
kept = []
for path in sorted(Path({saved!r}).glob("*.safetensors")):
    with safe_open(path, framework="pt") as file:
        kept += [file.get_tensor(key) for key in file.keys()]
checksum = sum(float(w.view(-1)[:: 1024].float().sum()) for w in kept)
result = {{}}
"""


def measure(statement: str, **names: object) -> dict[str, float]:
    code = MEASURED.format(statement=statement.format(**names))
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    from moellava.testing import write_biomedclip, write_tinyllama

    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    tower, language_model, saved = (folder / name for name in ("biomedclip", "tinyllama", "saved"))
    write_biomedclip(tower, num_text_layers=1)
    write_tinyllama(
        language_model,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    parts = {"language_model": str(language_model), "tower": str(tower)}
    measure(BUILD, **parts, save=str(saved))  # warms the disk cache as well
    build = measure(BUILD, **parts, save="")
    reopen, read = measure(REOPEN, saved=str(saved)), measure(READ, saved=str(saved))
    time.sleep(1)
    print(f"parameters {build['parameters']:,}; the model's own bytes {build['bytes']:,.0f} MiB")
    print("| step | seconds | peak MiB | ratio | bound |")
    print("|---|---|---|---|---|")
    ratio = build["peak"] / build["bytes"]
    print(
        f"| build from parts | {build['seconds']:.1f} | {build['peak']:,.0f} | {ratio:.2f}x the model's bytes | 1.1x |"
    )
    ratio = reopen["peak"] / reopen["bytes"]
    print(f"| reopen, memory | | {reopen['peak']:,.0f} | {ratio:.2f}x the model's bytes | 1.05x |")
    ratio = reopen["seconds"] / read["seconds"]
    print(f"| reopen, time | {reopen['seconds']:.1f} | | {ratio:.2f}x reading with safetensors | 1.5x |")


if __name__ == "__main__":
    main()
