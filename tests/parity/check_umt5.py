"""The text encoder: tokens of padded prompts to rows, with and without the padding; buckets of distances."""

import pytest
import torch

from longtake.models import umt5
from tests.parity.fixture import Fixture


@torch.no_grad()
def check(fixture: Fixture) -> None:
    pytest.importorskip("transformers")
    encoder = umt5.encoder_of(fixture.weights, torch.float32)
    ids, mask = fixture.inputs["ids"], fixture.inputs["mask"]
    fixture.compare("hidden_all_rows", encoder(input_ids=ids, attention_mask=mask).last_hidden_state)
    rows = [umt5.rows_of(encoder, one[:tokens]) for one, tokens in zip(ids, mask.sum(dim=1), strict=True)]
    fixture.compare("prompt_embeds", torch.stack([umt5.padded(one, ids.shape[1]) for one in rows]))
    places = torch.arange(ids.shape[1])
    queries = places[[0, len(places) // 2, -1]]
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    fixture.compare("bucket_table", attention._relative_position_bucket(places[None] - queries[:, None]))
