"""`longtake explain`: what a recipe does, block by block."""

from json import dumps
from typing import Annotated

from tyro.conf import Positional, arg

from longtake.cli.options import Switch
from longtake.cli.terminal import print_result


def explain(
    recipe: Annotated[Positional[str | None], arg(metavar="RECIPE")] = None,
    blocks: Annotated[int | None, arg(metavar="N")] = None,
    json: Switch = False,
) -> int:
    """Say what a recipe does, block by block: what is attended, at which positions, and what becomes of the past.

    Args:
        recipe: The method to explain; without one, all are listed.
        blocks: How many blocks to tell of; unless given, those until all that follow are alike.
        json: Print one JSON object.
    """
    from longtake import explain as words

    if recipe is None:
        listed = words.recipes_in_short()
        print(dumps(listed, indent=2) if json else "\n".join(f"{name:18} {about}" for name, about in listed.items()))
    else:
        told = words.explain(recipe, blocks)
        print_result(told, json, words.in_words)
    return 0
