"""One training stage, from a folder of weights to a folder of weights, on the toy world.

Every folder holds whatever has been made so far: codec_decoder, codec_encoder, teacher, converted and student
(.safetensors). A stage reads what it needs from one folder and leaves that in another, with what it made:

    stage               reads                                   makes
    codec               nothing                                 codec
    teacher             codec; goes on from a teacher, if any   teacher
    attention_matching  codec, teacher                          converted
    finetune            codec, teacher, converted               converted (with softmax=true teacher, of the teacher)
    teacher_forcing     codec, teacher; from a student, if any  student
    ode                 codec, teacher; from a student, if any  student
    dmd                 codec, teacher, student                 student

Under a recipe with converted layers, a student that has to begin as something begins as `converted`, and one with no
such layers gets those of `converted`, if it is there.

Beside the weights: record.json (configuration, time, machine), metrics.jsonl, curves.png, samples/*.png and, where
PyAV is installed, mp4. A folder that holds state.pt holds a run that was stopped; the same command goes on with it.
"""

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake import __version__, parallel, recipes
from longtake.distillation import stages
from longtake.distillation.stages import (
    AttentionMatchingStage,
    CodecStage,
    DmdStage,
    FinetuneStage,
    OdeStage,
    TeacherForcingStage,
    TeacherStage,
    strips,
)
from longtake.distillation.trainer import STATE_FILE, Dice, Run, read_metrics, tell
from longtake.evaluation.speed import cpu_name
from longtake.files import whole
from longtake.generation.recipe import Recipe
from longtake.generation.stream import to_uint8
from longtake.media.pictures import contact_sheet, save_png
from longtake.models.light_codec import LightCodec, LightCodecConfig
from longtake.models.text import WordEncoder, WordEncoderConfig
from longtake.models.wan import WanConfig, WanTransformer, converted_as, reading_far, with_far_maps
from longtake.recipes.engines import latent_size
from longtake.recipes.weight_files import (
    CODEC_FILE,
    CONVERTED_FILE,
    ENCODER_FILE,
    NETWORK_FILE,
    TEACHER_FILE,
    load_codec,
    load_network,
    packaged,
    save_codec,
    save_network,
)
from longtake.toy import captions, world
from longtake.toy.clips import ClipPool, Prompts, sample_prompts
from longtake.toy.scenes import CLIP_PICTURES, RATE, sample_scenes

RECORD_FILE, CONFIG_FILE, CURVES_FILE, LOCK_FILE = "record.json", "config.json", "curves.png", "lock"
HELD_OUT_SEED = 11
FILMED = 4  # streams in a film


def train(
    name: str,
    *,
    start: str | Path | None,
    out: Path,
    recipe_names: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a stage to its end, or go on with one that was stopped; returns its record (in the first process).

    start: a folder of weights, or "toy" for the embedded model's. recipe_names: what a student is trained under, in
    turn; none given: `_STUDENT`. settings: "key=value" of the stage's settings, values in JSON.
    Raises ValueError for unknown stages and settings, for what the stage has no use for, for a folder that lacks what
    it reads, and for one that holds another run; KeyboardInterrupt after Ctrl-C or SIGTERM, with the state saved.
    """
    if name not in STAGES:
        raise ValueError(f"no stage {name!r}: there are {', '.join(STAGES)}")
    kind = STAGES[name]
    stage = with_settings(kind.settings(), settings)
    if recipe_names and not kind.recipes:
        raise ValueError(f"{name} trains no student: leave out --recipe")
    if start is not None and not kind.reads:
        raise ValueError(f"{name} begins with nothing: leave out --from")
    names = list(recipe_names or kind.recipes)
    chosen = [recipes.recipe_named(recipe) for recipe in names]
    source = None if start is None else _folder_named(start)
    rank, processes, device = parallel.join()
    try:
        run, inputs = Run(out, device, rank), _Inputs(source, device)
        for file in kind.reads:
            inputs.path(file)
        if name == "codec" and processes > 1:
            raise ValueError("the codec trains in one process: start it without torchrun")
        asked = {"stage": name, "from": str(start), "recipes": names, "config": asdict(stage)}
        with _claimed(run, asked):
            torch.manual_seed(_seed_of_noise(stage.seed, rank))
            torch.backends.cudnn.allow_tf32 = True  # not of matrices: far states and block scores want all of fp32
            spent = kind.train(stage, inputs, chosen, run)
            return _finish(run, inputs, kind, spent, processes)
    finally:
        parallel.leave()


def _seed_of_noise(seed: int, rank: int) -> int:
    """Of what a process draws for itself; seed + rank would be the same for the next run's neighbour."""
    return Random(f"{seed} {rank}").getrandbits(32)  # torch's generators on the host look at the low 32 bits alone


def _folder_named(start: str | Path) -> Path:
    """A folder of weights; "toy" is that of the embedded model. ValueError if there is none."""
    folder = packaged(CODEC_FILE).parent if str(start) == "toy" else Path(start)
    if not folder.is_dir():
        raise ValueError(f"no folder {start}: name one that holds weights, or toy")
    return folder


def with_settings(stage: Any, settings: Sequence[str]) -> Any:
    """A stage with some of its settings changed: "lr=1e-4", 'levels=[4, 2]', 'network={"dim": 64}'.

    They are changed all at once: what one of them allows another may hang on.
    """
    known = {field.name for field in fields(stage)}
    changed = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in known:
            raise ValueError(f"{type(stage).__name__} has no setting {key!r}; it has {', '.join(sorted(known))}")
        try:
            changed[key] = _changed(getattr(stage, key), _in_json(value))
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"setting {setting!r} does not work: {error}") from None
    return replace(stage, **changed)


def _in_json(text: str) -> Any:
    """A value, or the text itself, which is that of no setting."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _changed(old: Any, new: Any) -> Any:
    """A JSON value in the type of the setting it replaces; of a configuration it names the fields that change."""
    kind: Any = {WanConfig: dict, tuple: list, bool: bool}.get(type(old), (int, float))
    if not isinstance(new, kind) or isinstance(new, bool) != isinstance(old, bool):
        raise ValueError(f"a value such as {json.dumps(old, default=asdict)} is wanted, not {new}")
    if isinstance(old, WanConfig):
        return WanConfig.of(asdict(old) | new)
    if isinstance(old, tuple):
        return tuple(_changed(0, number) for number in new)  # they are all of whole numbers
    if isinstance(old, int) and new != int(new):
        raise ValueError(f"a whole number is wanted, not {new}")
    return type(old)(new)


# ---------------------------------------------------------------------------------------------------------------------
# Stages: load, train, save
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    """What a stage starts from; files that are not there are named with what makes them."""

    source: Path | None
    device: torch.device

    def path(self, file: str) -> Path:
        if self.source is None:
            raise ValueError(f"this stage reads {file}: name the folder that holds it with --from")
        if not (self.source / file).is_file():
            raise ValueError(
                f"{self.source} holds no {file}, which this stage reads: run the stage that makes it first"
            )
        return self.source / file

    def has(self, file: str) -> bool:
        return self.source is not None and (self.source / file).is_file()

    def world(self, run: Run) -> "ToyWorld":
        return ToyWorld(load_codec([self.path(CODEC_FILE), self.path(ENCODER_FILE)], self.device), run)

    def network(self, file: str) -> tuple[WordEncoder, WanTransformer, float]:
        text, network, description = load_network(self.path(file), self.device)
        return text, network, description["shift"]

    def student(self, chosen: Sequence[Recipe]) -> tuple[WordEncoder, WanTransformer, float]:
        """The student, or the teacher where there is none yet, to train under these recipes.

        It can read a far state if one of them has one. If one of them has converted layers, so has the network: the
        converted teacher, or a student with its features where none of its own layers is converted yet.
        """
        converts = any(recipe.joint for recipe in chosen) and self.has(CONVERTED_FILE)
        begin = CONVERTED_FILE if converts else TEACHER_FILE
        text, network, shift = self.network(NETWORK_FILE if self.has(NETWORK_FILE) else begin)
        if converts and network.config.conversion is None:
            network = converted_as(network, self.network(CONVERTED_FILE)[1])
        return text, reading_far(network) if any(recipe.far for recipe in chosen) else network, shift

    def teacher_of(self, text: WordEncoder) -> WanTransformer:
        """The teacher, whose prompts the text encoder of what was made of it has to read as its own does."""
        own, teacher, _ = self.network(TEACHER_FILE)
        if own.config != text.config or not all(map(_alike, own.parameters(), text.parameters())):
            raise ValueError(f"{self.source} holds a network of another teacher: their text encoders differ")
        return teacher

    def hand_on(self, files: Sequence[str], out: Path) -> None:
        """Leave in the output folder what the stage read."""
        for file in files:
            with whole(out / file) as beside:
                shutil.copyfile(self.path(file), beside)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether weights are the same but for rounding, as of int8 files."""
    return bool((one - other).abs().max() <= 0.02 * one.abs().max())


def _train_codec(stage: CodecStage, inputs: _Inputs, chosen: Sequence[Recipe], run: Run) -> dict[str, float]:
    named = {field.name for field in fields(LightCodecConfig)}
    config = LightCodecConfig(**{key: value for key, value in vars(stage).items() if key in named})
    codec = LightCodec(config).to(run.device)
    painter = _painter(run)

    def pictures(dice: Dice) -> tuple[Tensor, Tensor]:
        scenes = sample_scenes(stage.batch, dice.below(1 << 60), device=run.device)
        first = torch.randint(CLIP_PICTURES, (stage.batch,), generator=dice.generator).to(run.device)
        return world.render(scenes, stage.pictures, first, painter)

    spent = stages.train_codec(codec, pictures, lambda name: _show_codec(codec, name, run), stage, run)
    save_codec(run.out, codec, int8=True)
    saved = load_codec([run.out / CODEC_FILE, run.out / ENCODER_FILE], run.device)
    return spent | _codec_report(saved, run)


def _show_codec(codec: LightCodec, name: str, run: Run) -> None:
    """Held-out pictures above what the codec makes of them."""
    frames = world.render(sample_scenes(6, 7, device=run.device, held_out=True), 17).frames_BFCHW[:, 4:9]
    both = torch.stack([frames[:, -1], codec.decode(codec.encode(frames)[0])[0][:, -1].clamp(-1, 1)])
    save_png(_samples(run.out) / f"{name}.png", contact_sheet(to_uint8(both).flatten(0, 1).cpu().numpy(), 6))


@torch.no_grad()
def _codec_report(codec: LightCodec, run: Run) -> dict[str, float]:
    """PSNR of what was saved, over everything and over the subject, with noise of 0, 0.2 and 0.5 in the latents."""
    report = {}
    rendered = world.render(sample_scenes(16, 7, device=run.device, held_out=True), 33)
    latents, _ = codec.encode(rendered.frames_BFCHW)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(7)).to(latents)
    mask = rendered.mask_BFHW.unsqueeze(2)
    for sigma in (0.0, 0.2, 0.5):
        decoded = codec.decode(latents + sigma * noise)[0].clamp(-1, 1)
        error = (decoded - rendered.frames_BFCHW).square() / 4
        report[f"psnr_noise_{sigma}"] = -10 * error.mean().log10().item()
        report[f"psnr_subject_noise_{sigma}"] = -10 * ((error * mask).sum() / (3 * mask.sum())).log10().item()
        both = torch.cat([rendered.frames_BFCHW[:12, 9:10], decoded[:12, 9:10], decoded[:12, 20:21]], dim=1)
        sheet = contact_sheet(to_uint8(both).flatten(0, 1).cpu().numpy(), 6)
        save_png(_samples(run.out) / f"noise_{sigma}.png", sheet)
    return report


def _train_teacher(stage: TeacherStage, inputs: _Inputs, chosen: Sequence[Recipe], run: Run) -> dict[str, float]:
    if inputs.has(TEACHER_FILE):
        text, network, shift = inputs.network(TEACHER_FILE)
        if (network.config, shift) != (stage.network, stage.shift):
            raise ValueError(f"{inputs.source} holds a teacher of another shape or shift: start from its codec alone")
    else:
        config = WordEncoderConfig(
            words=len(captions.VOCABULARY), length=captions.TEXT_LENGTH, dim=stage.network.text_dim
        )
        text, network = WordEncoder(config).to(run.device), WanTransformer(stage.network).to(run.device)
    spent = stages.train_teacher(text, network, inputs.world(run), stage, run)
    _save(TEACHER_FILE, text, network, stage.shift, run, role="teacher", int8=True)
    return spent


def _train_attention_matching(
    stage: AttentionMatchingStage, inputs: _Inputs, chosen: Sequence[Recipe], run: Run
) -> dict[str, Any]:
    text, teacher, shift = inputs.network(TEACHER_FILE)
    network, spent = stages.train_attention_matching(text, teacher, inputs.world(run), shift, stage, run)
    _save(CONVERTED_FILE, text, network, shift, run, role="converted teacher")
    return spent


def _train_finetune(stage: FinetuneStage, inputs: _Inputs, chosen: Sequence[Recipe], run: Run) -> dict[str, float]:
    file = TEACHER_FILE if stage.softmax else CONVERTED_FILE
    text, network, shift = inputs.network(file)
    anchor = inputs.teacher_of(text) if stage.anchored else None
    spent = stages.train_finetune(text, network, inputs.world(run), shift, stage, run, anchor)
    _save(file, text, network, shift, run, role="teacher" if stage.softmax else "converted teacher")
    return spent


def _train_teacher_forcing(
    stage: TeacherForcingStage, inputs: _Inputs, chosen: Sequence[Recipe], run: Run
) -> dict[str, float]:
    text, network, shift = inputs.student(chosen)
    inputs.teacher_of(text)  # which refuses a student of another
    if stage.far_maps and not any(recipe.far for recipe in chosen):
        raise ValueError("far_maps is for recipes with a far state, such as hybrid_forcing")
    network = with_far_maps(network) if stage.far_maps else network
    spent = stages.train_teacher_forcing(text, network, inputs.world(run), chosen, shift, stage, run)
    _save(NETWORK_FILE, text, network, shift, run, role="student", trained_under=chosen)
    return spent


def _train_ode(stage: OdeStage, inputs: _Inputs, chosen: Sequence[Recipe], run: Run) -> dict[str, float]:
    text, network, shift = inputs.student(chosen)
    teacher = inputs.teacher_of(text)
    spent = stages.train_ode(text, network, teacher, inputs.world(run), chosen, shift, stage, run)
    _save(NETWORK_FILE, text, network, shift, run, role="student", trained_under=chosen)
    return spent


def _train_dmd(stage: DmdStage, inputs: _Inputs, chosen: Sequence[Recipe], run: Run) -> dict[str, float]:
    text, network, shift = inputs.student(chosen)
    teacher = inputs.teacher_of(text)
    spent = stages.train_dmd(text, network, teacher, inputs.world(run), chosen, shift, stage, run)
    int8 = not stage.rank  # whose rounding would be of every rank
    _save(NETWORK_FILE, text, network, shift, run, role="student", trained_under=chosen, int8=int8)
    return spent


def _save(
    file: str, text: WordEncoder, network: WanTransformer, shift: float, run: Run, *,
    role: str, trained_under: Sequence[Recipe] = (), int8: bool = False,
) -> None:  # fmt: skip
    """int8: as a package has it. What other stages go on from, or are compared with, stays as it is."""
    if run.first:
        names = [recipe.name for recipe in trained_under]
        save_network(run.out / file, text, network, role=role, shift=shift, int8=int8, recipes=names)


@dataclass(frozen=True)
class _Kind:
    """A stage: its settings, the files it must have (which it hands on), what runs it, and what its student is trained
    under if no recipe is named: nothing, where it trains none."""

    settings: Callable[[], stages.Stage]
    reads: tuple[str, ...]
    train: Callable[[Any, _Inputs, Sequence[Recipe], Run], dict[str, Any]]
    recipes: tuple[str, ...] = ()


_CODEC = (CODEC_FILE, ENCODER_FILE)
_STUDENT = ("self_forcing_sink", "self_forcing")
STAGES = {
    "codec": _Kind(CodecStage, (), _train_codec),
    "teacher": _Kind(TeacherStage, _CODEC, _train_teacher),
    "attention_matching": _Kind(AttentionMatchingStage, (*_CODEC, TEACHER_FILE), _train_attention_matching),
    "finetune": _Kind(FinetuneStage, (*_CODEC, TEACHER_FILE), _train_finetune),
    "teacher_forcing": _Kind(TeacherForcingStage, (*_CODEC, TEACHER_FILE), _train_teacher_forcing, _STUDENT),
    "ode": _Kind(OdeStage, (*_CODEC, TEACHER_FILE), _train_ode, _STUDENT),
    "dmd": _Kind(DmdStage, (*_CODEC, TEACHER_FILE, NETWORK_FILE), _train_dmd, _STUDENT),
}


# ---------------------------------------------------------------------------------------------------------------------
# The world that stages learn from
# ---------------------------------------------------------------------------------------------------------------------


class ToyWorld:
    """Clips, prompts and pictures of the toy world, through its codec (see `stages.world.World`)."""

    def __init__(self, codec: LightCodec, run: Run):
        self._codec, self._run = codec, run
        self.latent_size = latent_size(codec)

    def clips(self, size: int, seed: int, frames: int, memory_share: float = 0.0, looks_soon: bool = False) -> ClipPool:
        pictures = max(CLIP_PICTURES, 1 + (frames - 1) * self._codec.temporal_factor)
        pool = ClipPool(
            self._codec, size, seed * 1000 + self._run.rank, self._run.device, _painter(self._run),
            pictures=pictures, memory_share=memory_share, looks_soon=looks_soon,
        )  # fmt: skip
        if self._run.first:
            tell(f"painting {size} clips to learn from")
        return pool

    def prompts(self, count: int, seed: int, frames: int, looks_away: bool = True) -> Prompts:
        own, pace = seed * 1000 + self._run.rank, self._codec.temporal_factor
        return sample_prompts(count, own, self._run.device, pace, frames, looks_away=looks_away)

    def held_out(self, count: int) -> Tensor:
        return _held_out_tokens(count).to(self._run.device)

    def show(self, name: str, latents_BFCHW: Tensor) -> None:
        pictures = to_uint8(self._codec.decode(latents_BFCHW.float())[0])
        chosen = pictures[:, torch.linspace(4, pictures.shape[1] - 1, 8).long()]
        save_png(_samples(self._run.out) / f"{name}.png", contact_sheet(chosen.flatten(0, 1).cpu().numpy(), 8))


def _held_out_tokens(count: int) -> Tensor:
    scenes = sample_scenes(count, HELD_OUT_SEED, held_out=True, changes=0.0)
    return captions.caption_tokens(scenes, HELD_OUT_SEED)[:, 0]


def _painter(run: Run) -> world.Painter:
    """One kernel instead of hundreds, compiled once a shape, where that pays."""
    return torch.compile(world.paint, dynamic=False) if run.device.type == "cuda" else world.paint


# ---------------------------------------------------------------------------------------------------------------------
# The output folder
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def _claimed(run: Run, asked: dict[str, Any]) -> Iterator[None]:
    """Hold the folder for one run: a new one, or one of exactly this kind that was stopped."""
    config = run.out / CONFIG_FILE
    wanted = json.loads(json.dumps(asked))  # as it is read back
    if (run.out / RECORD_FILE).exists():
        raise ValueError(f"{run.out} holds a finished run: choose another folder")
    if (run.out / STATE_FILE).exists() and json.loads(config.read_text()) != wanted:
        raise ValueError(f"{run.out} holds a run with other settings ({config}): choose another folder")
    if not run.first:
        yield
        return
    run.out.mkdir(parents=True, exist_ok=True)
    with (run.out / LOCK_FILE).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process trains into {run.out} right now") from None
        _write_json(config, wanted)
        try:
            yield
        finally:
            Path(lock.name).unlink()


def _finish(run: Run, inputs: _Inputs, kind: _Kind, spent: dict[str, Any], processes: int) -> dict[str, Any]:
    """Hand on what was read, write the record, and forget the state: the run is over. {} but for the first."""
    if not run.first:
        return {}
    inputs.hand_on([file for file in kind.reads if not (run.out / file).exists()], run.out)
    record = {
        **json.loads((run.out / CONFIG_FILE).read_text()),
        "spent": spent,
        "date": time.strftime("%Y-%m-%d"),
        "processes": processes,
        "device": torch.cuda.get_device_name() if run.device.type == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "longtake": __version__,
    }
    _write_json(run.out / RECORD_FILE, record)
    (run.out / STATE_FILE).unlink(missing_ok=True)
    report(run.out)
    return record


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with whole(path) as beside:
        beside.write_text(json.dumps(content, indent=1) + "\n")


def _samples(out: Path) -> Path:
    folder = out / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def report(out: Path) -> list[Path]:
    """Draw a run's curves (with matplotlib) and film what its student streams (with PyAV); what is missing is left out.

    Returns the files written. ValueError if there is no run in the folder.
    """
    if not (out / CONFIG_FILE).exists():
        raise ValueError(f"{out} holds no training run")
    config = json.loads((out / CONFIG_FILE).read_text())
    written = []
    if find_spec("matplotlib") and read_metrics(out):
        written.append(_draw_curves(out))
    if find_spec("av") and STAGES[config["stage"]].recipes:
        written += [_film(out, name) for name in dict.fromkeys(config["recipes"])]
    return written


def _draw_curves(out: Path) -> Path:
    """Every metric over steps, each in a panel of its own; not every step has every metric."""
    from matplotlib.figure import Figure

    rows = read_metrics(out)
    names = [name for name in dict.fromkeys(chain(*rows)) if name not in ("step", "seconds")]
    figure = Figure(figsize=(4 * len(names), 3), layout="constrained")
    for panel, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        panel.plot(*zip(*points, strict=True), linewidth=0.8)
        panel.set(title=name, xlabel="step", yscale="log")
        panel.grid(alpha=0.3)
    path = out / CURVES_FILE
    figure.savefig(path, dpi=110)
    return path


def _film(out: Path, recipe: str) -> Path:
    """Streams of held-out prompts side by side, as long as the strips."""
    from longtake.media.mp4 import Mp4Writer, part_of

    levels = json.loads((out / CONFIG_FILE).read_text())["config"].get("levels")
    if isinstance(levels, list):
        levels = levels[0] if levels else None  # None: the recipe's own
    engine = recipes.load(out, recipe=recipe, levels=levels)
    tokens = _held_out_tokens(FILMED)
    path = _samples(out) / f"{engine.recipe.file_name}.mp4"
    columns = 2
    with engine.stream_batch([captions.decode(row.tolist()) for row in tokens], seeds=range(FILMED)) as streams:
        pictures = torch.cat(list(islice(streams, strips.LOOKED_AT_BLOCKS)), dim=1)
    frames = [contact_sheet(moment.cpu().numpy(), columns) for moment in pictures.unbind(1)]
    height, width = (size // 2 * 2 for size in frames[0].shape[:2])
    part_of(path).unlink(missing_ok=True)  # of a writer that was killed
    with Mp4Writer(path, width, height, RATE, overwrite=True) as writer:
        writer.write(np.stack(frames)[:, :height, :width])
    return path
