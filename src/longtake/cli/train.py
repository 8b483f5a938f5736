"""`longtake train`: the embedded model's parts, one stage a call."""

from collections.abc import Callable
from json import dumps
from pathlib import Path
from typing import Annotated

from tyro.conf import arg
from tyro.extras import SubcommandApp

app = SubcommandApp()
_STAGES = {
    "codec": "Pictures to latents and back, from nothing.",
    "teacher": "The bidirectional teacher, on the codec's latents; goes on from a teacher if --from holds one.",
    "attention_matching": "The teacher with some layers converted (ReHyAt), taught to answer as their softmax does.",
    "finetune": "The whole converted teacher on clips; with softmax=true the teacher itself, to compare it with.",
    "teacher_forcing": "The causal student from the teacher, in front of clean clips.",
    "ode": "The causal student by regression of the teacher's trajectories, from a student if --from holds one.",
    "dmd": "The few-step student, by distribution matching on its own rollouts.",
}


def _stage_verb(stage: str) -> Callable[..., int]:
    def run(
        out: Annotated[Path, arg(metavar="DIR")],
        start: Annotated[str | None, arg(name="from", metavar="DIR")] = None,
        recipe: tuple[str, ...] = (),
        set: Annotated[tuple[str, ...], arg(metavar="KEY=VALUE")] = (),
    ) -> int:
        from longtake.training import train

        record = train(stage, start=start, out=out, recipe_names=recipe, settings=set)
        if record:
            print(dumps(record, indent=2))
        return 0

    run.__doc__ = f"""{_STAGES[stage]}

    A run that was stopped goes on when the same command is given again. Many processes: torchrun -m longtake.cli ...

    Args:
        out: Folder for weights, record, metrics and samples.
        start: Folder of the weights to start from; toy is the embedded model.
        recipe: What a student is trained under, in turn, unless named self_forcing_sink and self_forcing; options may
            follow: hybrid_forcing:share=0.1,far=none.
        set: Settings of the stage, values in JSON: seconds=60 lr=1e-4.
    """
    return run


for _stage in _STAGES:
    app.command(name=_stage)(_stage_verb(_stage))


@app.command(name="report")
def train_report(out: Annotated[Path, arg(metavar="DIR")]) -> int:
    """Draw a run's curves and film its student, where the machine that trained could not.

    Args:
        out: The folder of the run.
    """
    from longtake.training import report

    print(*report(out), sep="\n")
    return 0
