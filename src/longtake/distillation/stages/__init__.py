"""The stages from nothing to a streaming student. Each trains modules in place; where clips come from is handed in.

    codec               pictures -> codec
    teacher             clips -> bidirectional teacher and its text encoder, by flow matching
    attention_matching  teacher + prompts -> teacher with converted layers, whose features alone learn
    finetune            converted teacher + clips -> the same, all of it, by flow matching
    teacher_forcing     teacher or student + clips -> causal student, by flow matching in front of the clean past
    ode                 teacher + prompts -> causal student, by regression of the teacher's trajectories
    dmd                 teacher + student + prompts + clips -> few-step student, by distribution matching on its own
                        rollouts

Every process draws its own noise and prompts; what has to be alike in all (recipe, exit step, length) comes from
shared dice.
"""

from longtake.distillation.stages.attention_matching import train_attention_matching
from longtake.distillation.stages.codec import train_codec
from longtake.distillation.stages.dmd import train_dmd
from longtake.distillation.stages.ode import train_ode
from longtake.distillation.stages.settings import (
    AttentionMatchingStage,
    CodecStage,
    DmdStage,
    FinetuneStage,
    OdeStage,
    Stage,
    TeacherForcingStage,
    TeacherStage,
)
from longtake.distillation.stages.teacher_forcing import train_teacher_forcing
from longtake.distillation.stages.whole_clips import train_finetune, train_teacher

__all__ = [
    "AttentionMatchingStage",
    "CodecStage",
    "DmdStage",
    "FinetuneStage",
    "OdeStage",
    "Stage",
    "TeacherForcingStage",
    "TeacherStage",
    "train_attention_matching",
    "train_codec",
    "train_dmd",
    "train_finetune",
    "train_ode",
    "train_teacher",
    "train_teacher_forcing",
]
