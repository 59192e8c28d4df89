"""Recipes by name or file: those that ship with slimnas, and a user's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slimnas.arch.documents import dump_yaml, load_document, parse_spec
from slimnas.errors import SpecError, suggest
from slimnas.train.network_recipe import NetworkRecipe

SCHEMA = "slimnas/recipe/1"
WHAT = "a training recipe"
RECIPES = Path(__file__).resolve().parent / "recipes"


def shipped_recipes() -> list[str]:
    """Names of the recipes that ship with slimnas."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str | Path) -> NetworkRecipe:
    """Read a recipe, by the name of a shipped one or from a YAML file.

    A name wins over a file of that name; `./name` is always a file.

    Raises:
        SpecError: no such recipe, or a damaged file.
    """
    name, path = str(name_or_path), Path(name_or_path)
    known = shipped_recipes()
    if name in known:
        path = RECIPES / f"{name}.yaml"
    elif not path.is_file() and path.suffix not in (".yaml", ".yml"):
        raise SpecError(
            f"no recipe or file {name!r}{suggest(name, known)}; shipped recipes: {', '.join(known)}"
        )
    return parse_spec(NetworkRecipe, load_document(path, SCHEMA, WHAT), source=str(path))


def override_recipe(
    recipe: NetworkRecipe, values: Mapping[str, Any], *, source: str = "recipe"
) -> NetworkRecipe:
    """The recipe with some keys changed, checked as if it had been read so.

    Args:
        recipe: to start from; it stays as it is.
        values: key -> value. A mapping is laid over the recipe's own one, such as `randaugment`.
        source: what the values came from, for messages.

    Raises:
        SpecError: an unknown key, or a value that a recipe may not have.
    """
    body = recipe.model_dump(mode="json")
    for key, value in values.items():
        own = body.get(key)
        body[key] = {**own, **value} if isinstance(own, dict) and isinstance(value, dict) else value
    return parse_spec(NetworkRecipe, body, source=source)


def recipe_yaml(recipe: NetworkRecipe) -> str:
    """The recipe as a document that `load_recipe` reads, every value written out."""
    return dump_yaml(SCHEMA, recipe.model_dump(mode="json"))
