"""The commands before a run: validate, show, list, explain, schema."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from mrlm_cli.cli.arguments import LENIENT, AsJson, Overlay, Overrides, is_override, print_json, words
from mrlm_cli.errors import RecipeError, UserError

_PANEL = "Before"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("list", rich_help_panel=_PANEL)(list_)
    app.command("show", rich_help_panel=_PANEL, context_settings=LENIENT)(show)
    app.command("validate", rich_help_panel=_PANEL, context_settings=LENIENT)(validate)
    app.command("explain", rich_help_panel=_PANEL)(explain)
    app.command("schema", rich_help_panel=_PANEL)(schema)


def validate(
    context: typer.Context,
    files: Annotated[
        list[str], typer.Argument(metavar="RECIPE... [KEY=VALUE]...", help="Recipes or fragments, then overrides.")
    ],
    overlay: Overlay = None,
) -> None:
    """Check recipes and fragments, and whether what they name is there; every problem with file, line and column."""
    from mrlm_cli import api
    from mrlm_cli.recipe import compose

    given = words(context, files)
    overrides = [word for word in given if is_override(word)]
    recipes = [word for word in given if not is_override(word)]
    if not recipes:
        raise UserError("expected a recipe: mrlm validate RECIPE [key=value …]")
    problems: list[str] = []
    for recipe in recipes:
        try:
            checked = compose.check(recipe, overrides, overlay)
        except RecipeError as error:
            problems.append(str(error))
            continue
        absent = api.absent(checked)
        wrong = [one.text for one in absent if not one.later]
        if wrong:
            problems += wrong
            continue
        kind = f"a valid fragment: {', '.join(checked.sections) or 'empty'}" if checked.fragment else "a valid recipe"
        print(f"{recipe}: {kind}", *(f"  not here yet: {one.text}" for one in absent), sep="\n")
    if problems:
        raise RecipeError("\n".join(problems))


def show(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A recipe's file, or the name of a shipped one.")],
    overrides: Overrides = None,
    overlay: Overlay = None,
    as_json: AsJson = False,
) -> None:
    """Every value of a recipe, where it came from, and the numbers that follow."""
    from mrlm_cli.cli.plan import derived_lines
    from mrlm_cli.recipe import compose
    from mrlm_cli.recipe.derived import derive

    file, *settings = words(context, [recipe, *(overrides or ())])
    composed = compose.load(file, settings, overlay)
    derived = derive(composed.recipe, composed.folders)
    if as_json:
        data = composed.recipe.model_dump(mode="json")
        print_json({"recipe": data, "origins": composed.origins, "derived": asdict(derived)})
        return
    rows = [(key, compose.as_yaml(value)) for key, value in compose.values(composed.recipe).items()]
    wide, long = max(len(key) for key, _ in rows), min(40, max(len(value) for _, value in rows))
    for key, value in rows:
        print(f"{key:<{wide}}  {value:<{long}}  {composed.origins[key]}")
    print("\nderived")
    print("\n".join(derived_lines(derived)))


def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="recipes, fragments, environments, rewards, algorithms, data, engines, metrics, runs; by default all.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What there is: recipes, environments, rewards, algorithms, data, engines, metrics, runs."""
    from mrlm_cli.cli import listing

    found = listing.listed(kind)
    if as_json:
        print_json(found)
        return
    for title, rows in found.items():
        print(title if rows else f"{title}: none")
        wide = max((len(name) for name in rows), default=0)
        for name, sentence in rows.items():
            print(f"  {name:<{wide}}  {sentence}")


def explain(
    key: Annotated[str, typer.Argument(help="A key such as optimizer.lr, a metric, or a registered name.")],
    as_json: AsJson = False,
) -> None:
    """What a setting or a metric means: sentence, type, default, range, formula."""
    from mrlm_cli.cli import explaining

    found = explaining.explained(key)
    if as_json:
        print_json([entry.data for entry in found])
    else:
        print("\n\n".join(entry.text for entry in found))


def schema() -> None:
    """JSON Schema of a recipe, for editors."""
    from mrlm_cli.recipe.json_schema import recipe_schema

    print_json(recipe_schema())
