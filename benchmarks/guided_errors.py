"""How far is a converted teacher from its teacher with a prompt, without one, and as guidance weighs the two?

    python benchmarks/guided_errors.py RUN [RUN ...] --json errors.json      # folders with converted.safetensors
    python benchmarks/guided_errors.py RUN --clips 2 --json errors.json      # less exact
    python benchmarks/guided_errors.py --masked 7 --json layers.json         # what not to see frames to come costs

Mean squared differences of velocities on clips that nobody learned from, at noise levels of sampling. Sampling follows
u + w (c - u), of a prompt's velocity c and of u without: so an error that both have weighs once, and one of either
weighs w or w - 1 times. With --masked in the place of a converted teacher: the teacher as it is, but for one layer that
attends, exactly, only up to the end of each chunk; one layer after the other.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from longtake.distillation.stages.world import embed
from longtake.flow import add_noise, guided
from longtake.models.features import Conversion
from longtake.models.wan import WanTransformer, converted
from longtake.recipes.weight_files import CODEC_FILE, CONVERTED_FILE, ENCODER_FILE, TEACHER_FILE, load_codec
from longtake.recipes.weight_files import load_network as load
from longtake.toy.clips import ClipPool

WEIGHTS = Path(__file__).parent.parent / "src" / "longtake" / "toy" / "weights"
UNSEEN = 987  # seed of the clips; trainings take 40 to 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--masked", type=int, metavar="FRAMES", help="chunks of so many latent frames")
    parser.add_argument("--levels", nargs="+", type=float, default=[0.95, 0.8, 0.5])
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument(
        "--at-once", type=int, default=4, metavar="CLIPS", help="how many are painted at once: which they are"
    )
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    text, teacher, _ = load(WEIGHTS / TEACHER_FILE, here)
    codec = load_codec([WEIGHTS / CODEC_FILE, WEIGHTS / ENCODER_FILE], here)
    clips = ClipPool(codec, args.clips, UNSEEN, here, at_once=args.at_once).draw(args.clips, teacher.config.extent)
    noise = torch.randn_like(clips.latents_BFCHW)
    with torch.no_grad():
        said = embed(text, clips.tokens_BPL)
        nothing = embed(text, torch.zeros_like(clips.tokens_BPL[:, :1]))

        def both(of: WanTransformer, level: float) -> list[Tensor]:
            level_BF = torch.full(noise.shape[:2], level, device=here)
            noisy = add_noise(clips.latents_BFCHW, noise, level_BF)
            view = of.clip_view(noisy)
            prompts = ((said, clips.prompt_BF), (nothing, None))
            return [of(noisy, level_BF, of.prompt_keys(text), view, prompt) for text, prompt in prompts]

        asked = {level: both(teacher, level) for level in args.levels}
        rows = []
        for name, made in networks(args.runs, teacher, args.masked):
            for level in args.levels:
                rows.append({"run": name, "level": level, **errors(asked[level], both(made, level), args.guidance)})
                print(rows[-1], flush=True)
    args.json.write_text(json.dumps({"clips": args.clips, "guidance": args.guidance, "rows": rows}, indent=1))


def networks(runs: Sequence[Path], teacher: WanTransformer, masked: int | None) -> Iterator[tuple[str, WanTransformer]]:
    """Each run's converted teacher; then the teacher with one layer that sees nothing later than its chunk."""
    for run in runs:
        yield run.name, load(run / CONVERTED_FILE, next(teacher.parameters()).device)[1]
    if masked:
        before = teacher.config.extent - masked  # an overlap so long that nothing is left for sums
        for layer in range(teacher.config.layers):
            conversion = Conversion(layers=(layer,), current=masked, overlap=before, degree=1)
            yield f"layer {layer}", converted(teacher, conversion)


def errors(teacher: list[Tensor], made: list[Tensor], guidance: float) -> dict[str, float]:
    """Mean squared differences, and the correlation of those with a prompt and without."""
    of_prompt, of_none = (one - other for one, other in zip(made, teacher, strict=True))

    def size(x: Tensor) -> float:
        return x.float().square().mean().item()

    return {
        "prompt": size(of_prompt),
        "no_prompt": size(of_none),
        "correlation": (of_prompt * of_none).mean().item() / (size(of_prompt) * size(of_none)) ** 0.5,
        "guided": size(guided(*made, guidance) - guided(*teacher, guidance)),
        "what_a_prompt_changes": size(teacher[0] - teacher[1]),
        "of_which_is_lost": size(of_prompt - of_none),
    }


if __name__ == "__main__":
    main()
