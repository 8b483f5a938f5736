"""Every file of test vectors is checked by the function for its kind; nothing is chosen by file name.

LONGTAKE_FIXTURES names the folder (default: ../shared/fixtures beside the checkout).
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.parity import (
    check_block_sparse_attention,
    check_causal_kv_stream,
    check_dmd_losses,
    check_hybrid_attention,
    check_hybrid_pipeline,
    check_rolling_pipeline,
    check_scheduler,
    check_self_forcing_pipeline,
    check_umt5,
    check_wan_dit,
    check_wan_vae,
)
from tests.parity.fixture import Fixture, kind_of, read_fixture

FOLDER = Path(os.environ.get("LONGTAKE_FIXTURES", Path(__file__).parents[3] / "shared" / "fixtures"))

CHECKS: dict[str, Callable[[Fixture], None]] = {
    "wan_dit": check_wan_dit.check,
    "causal_kv_stream": check_causal_kv_stream.check,
    "self_forcing_pipeline": check_self_forcing_pipeline.check,
    "scheduler": check_scheduler.check,
    "dmd_losses": check_dmd_losses.check,
    "wan_vae": check_wan_vae.check,
    "block_sparse_attention": check_block_sparse_attention.check,
    "hybrid_attention": check_hybrid_attention.check,
    "hybrid_pipeline": check_hybrid_pipeline.check,
    "rolling_pipeline": check_rolling_pipeline.check,
    "umt5": check_umt5.check,
}


def _files() -> list:
    paths = sorted(FOLDER.glob("*.safetensors")) if FOLDER.is_dir() else []
    absent = pytest.mark.skip(reason=f"no test vectors in {FOLDER.name}/ (set LONGTAKE_FIXTURES)")
    return [pytest.param(path, id=path.stem) for path in paths] or [pytest.param(None, id="none", marks=absent)]


@pytest.mark.parametrize("path", _files())
def test_file(path: Path) -> None:
    kind = kind_of(path)
    assert kind in CHECKS, f"{path.name}: no check for kind {kind!r}"
    fixture = read_fixture(path)
    CHECKS[kind](fixture)
    missed = sorted(fixture.outputs.keys() - fixture.compared)
    assert not missed, f"{path.name}: outputs that nothing was compared with: {missed}"
