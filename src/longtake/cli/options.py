"""Options that several verbs have. Where `--help` says the same of them everywhere, it is said here."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, arg

Switch = FlagCreatePairsOff[bool]  # has no --no-... beside it
DeviceName = Annotated[str | None, arg(metavar="NAME")]
Device = Annotated[str | None, arg(metavar="NAME", help="cpu, cuda, cuda:1, ...; unless given, the best there is.")]
PrecisionName = Literal["auto", "float32", "bfloat16"]
Precision = Annotated[
    PrecisionName, arg(aliases=["--precision"], help="Precision; auto takes the fastest that is safe.")
]
StreamPrecision = Annotated[
    PrecisionName | Literal["fp8"],
    arg(
        aliases=["--precision"],
        help="Precision; auto takes the fastest that is safe. fp8: bfloat16, with large products of eight bits.",
    ),
]
Compile = Annotated[bool, arg(help="On a GPU by fused kernels and recorded graphs, else by plain torch: docs/gpu.md.")]
Method = Annotated[
    str | None,
    arg(
        metavar="RECIPE",
        help="The method; `longtake explain` lists them. Unless given, hybrid_forcing for toy, the one a published "
        "model was trained under, else self_forcing_sink.",
    ),
]
Levels = Annotated[
    int | None, arg(metavar="N", help="Denoising steps of a block; unless given, as many as the recipe has.")
]
CodecDevice = Annotated[
    str | None,
    arg(metavar="NAME", help="Device of the codec alone, such as cuda:1: it decodes while the next block is made."),
]
Codec = Annotated[str | None, arg(metavar="NAME|PATH")]
Base = Annotated[
    str | None,
    arg(
        metavar="NAME|DIR",
        help="Whose text encoder and VAE a Wan student takes: a pulled name, or a whole Wan2.1 model's folder; unless "
        "given, its own folder's, or wan2.1-1.3b as pulled.",
    ),
]
Seconds = Annotated[float | None, arg(metavar="FLOAT")]
Mp4 = Annotated[Path | None, arg(aliases=["-o"], metavar="PATH")]
Opening = Annotated[Path | None, arg(aliases=["--video"], metavar="FILE")]
OneFile = Annotated[Path | None, arg(metavar="FILE")]
