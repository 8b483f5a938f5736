import json
from time import perf_counter

import torch

from longtake.attention.block_sparse import attend_gathered, attend_masked, best_blocks, block_scores

torch.manual_seed(0)
for dtype, (keys, share), size in [
    (dtype, window, size)
    for dtype in (torch.float32, torch.bfloat16)
    for window in ((756, 0.2), (504, 0.3), (756, 0.5))
    for size in (4, 6, 9, 12)
]:
    q, k, v = (torch.randn(1, tokens, 4, 64).to(dtype) for tokens in (252, keys, keys))
    blocks = {"block_q": size, "block_k": size}
    chosen = best_blocks(block_scores(q, k, **blocks), share)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        least = {"gathered_ms": 1e9, "masked_ms": 1e9}
        for _ in range(12):
            for name, way in zip(least, (attend_gathered, attend_masked), strict=True):
                way(q, k, v, chosen, **blocks)
                began = perf_counter()
                for _ in range(3):
                    way(q, k, v, chosen, **blocks)
                least[name] = min(least[name], 1000 / 3 * (perf_counter() - began))
        about = {"dtype": str(dtype), "keys": keys, "share": share, "block": size, "threads": threads}
        print(json.dumps(about | {name: round(ms, 3) for name, ms in least.items()}), flush=True)
