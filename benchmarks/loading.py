"""Peak memory of loading a network of a published size straight to a device, beside what its weights take.

python benchmarks/loading.py wan2.1-1.3b FOLDER [--form safetensors|shards|pt] [--device cuda]   # prints JSON

Random weights in bfloat16 are written into the folder first, under the published names, by another process, which then
ends. Exits 1 where the device's peak is above 1.15 times the weights.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from longtake.evaluation.steady import machine
from longtake.models.checkpoints import NETWORKS, load_wan
from longtake.models.standins import drawn
from longtake.models.wan import WanTransformer

MOST = 1.15
SHARD = 5 * 10**9  # bytes


def main() -> int:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("model", choices=sorted(NETWORKS))
    asked.add_argument("folder", type=Path)
    asked.add_argument("--form", choices=("safetensors", "shards", "pt"), default="safetensors")
    asked.add_argument("--device", default="cuda")
    asked.add_argument("--write", action="store_true", help="write the files, and no more")
    options = asked.parse_args()
    if options.write:
        write(options.model, options.folder, options.form, torch.device(options.device))
        return 0
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--write"], check=True)
    on_gpu = torch.device(options.device).type == "cuda"
    if on_gpu:
        torch.zeros(1, device=options.device)  # the device's own context is not the loader's
        torch.cuda.reset_peak_memory_stats()
    host = _host_peak()
    before = time.perf_counter()
    network = load_wan(options.folder, device=options.device)
    seconds = time.perf_counter() - before
    weights = sum(x.nbytes for x in network.state_dict().values())
    peak = torch.cuda.max_memory_allocated() if on_gpu else _host_peak()
    result = {
        "model": options.model, "form": options.form, "weights_gb": weights / 1e9, "seconds": seconds,
        "device_peak_share": peak / weights, "device_taken_share": torch.cuda.max_memory_reserved() / weights,
        "host_peak_gb": (_host_peak() - host) / 1e9,
    }  # fmt: skip
    print(json.dumps(result | machine(network.patch_embedding.weight.device), indent=1))
    return 0 if peak <= MOST * weights else 1


def write(model: str, folder: Path, form: str, device: torch.device) -> None:
    """A checkpoint of random weights; in shards, with their index."""
    tensors = drawn(lambda: WanTransformer(NETWORKS[model]), device, torch.bfloat16).state_dict()
    folder.mkdir(parents=True)
    if form == "pt":
        torch.save({"generator": {f"model.{name}": x.cpu() for name, x in tensors.items()}}, folder / "model.pt")
        return
    place, size, shards = {}, 0, [{}]
    for name, x in tensors.items():
        if form == "shards" and size + x.nbytes > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = x.cpu()
        size += x.nbytes
    name_of = "diffusion_pytorch_model-{:05}.safetensors" if form == "shards" else "diffusion_pytorch_model.safetensors"
    for number, shard in enumerate(shards):
        save_file(shard, folder / name_of.format(number))
        place |= dict.fromkeys(shard, name_of.format(number))
    if form == "shards":
        index = {"metadata": {}, "weight_map": place}
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def _host_peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
