"""What `longtake evaluate` found, in words: one line for each recipe and moment."""

from collections.abc import Iterator, Sequence
from typing import Any


def scores_in_words(results: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{result['recipe']} at {second} s: {_shares_in_words(shares)}, "
        f"one subject {_share(result['one_subject'][second])}"
        for result in results
        for second, shares in result["at"].items()
    )


def redirects_in_words(results: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{result['recipe']}: reached within 4 s: {_shares_in_words(result['reached_within_4s'])} "
        f"(by chance: {_shares_in_words(result['reached_within_4s_control'])}), "
        f"after {_share(result['median_seconds'])} s in the middle; kept {_share(result['kept_unchanged'])} "
        f"({_share(result['kept_unchanged_control'])} when left alone)"
        for result in results
    )


def recall_in_words(results: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{result['recipe']}, seen {seen}, after {second} s: {_shares_in_words(shares)} "
        f"(returned {_share(table['returned'][second])}, stayed away {_share(table['stayed_away'][second])})"
        for result in results
        for seen, table in (("later", result), ("first", result["seen_first"]))
        for second, shares in table["after"].items()
    )


def differences_in_words(results: list[dict[str, Any]]) -> str:
    return "\n".join(
        f"{result['second']} less {result['first']}, {name}: {one['second'] - one['first']:+.3f} "
        f"({one['interval_95'][0]:+.3f} to {one['interval_95'][1]:+.3f}; {one['pairs']} videos of each)"
        for result in results
        for name, one in result["differences"].items()
    )


def memory_in_words(results: list[dict[str, Any]]) -> str:
    return "\n".join(line for result in results for line in _memory_lines(result))


def _memory_lines(result: dict[str, Any]) -> Iterator[str]:
    name = result["recipe"]
    for rule, state in result["mean_of_layers"].items():
        yield (
            f"{name}, far state {rule}, after {result['hours']:g} h: "
            f"rank {state['effective_rank'][-1]:.1f}, saturation {state['saturation'][-1]:.4f}; "
            f"reads back with an error of {state['read_back'][0]:.3f} at once, {state['read_back'][-1]:.3f} oldest, "
            f"{state['read_back_never']:.3f} what it never saw; remembers "
            f"{_span([layer['states'][rule]['remembered_seconds'] for layer in result['layers']])}"
        )
    growth = result["error_growth"]
    latents, pictures = growth["latents"]["mean"], growth["pictures"]["mean"]
    yield (
        f"{name}: a change of {growth['perturb']:g} is {latents[-1]:.3f} after {len(latents) - 1} blocks "
        f"({_share(growth['unrelated_latents'][-1])} between unrelated streams), in pictures {pictures[-1]:.3f} "
        f"({_share(growth['unrelated_pictures'][-1])})"
    )


def _span(seconds: Sequence[float | None]) -> str:
    """How far back layers remember."""
    known = [one for one in seconds if one is not None]
    if not known:
        return "nothing"
    return f"{min(known):g} to {max(known):g} s in {len(known)} of {len(seconds)} layers"


def _shares_in_words(shares: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {_share(share)}" for name, share in shares.items())


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.2f}"
