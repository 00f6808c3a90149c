"""The page of recipes is made of the frozen values: every row and sentence of it."""

from pathlib import Path

from muonclip.core import RECIPES

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
HEADING = "| recipe | μ, Nesterov | polynomial | update RMS | decay | heads | clip | rate; schedule |"
RMS = {
    "match_rms_adamw": "0.2",
    "match_rms_adamw_closed_form": "√((1−β₁)/(1+β₁)) = 0.229",
    ("match_rms_adamw", 0.18): "0.18",
}


def table():
    return [HEADING, "|" + "---|" * (HEADING.count("|") - 1), *map(row, RECIPES.values())]


def row(recipe):
    def cell(name, text):
        return f"{text} ({recipe.lender})" if name in recipe.borrowed else text

    polynomial = "not published" if recipe.ns_coefficients is None else recipe.ns_coefficients
    steps = recipe.ns_steps or {"deepseek_v4": 10}.get(polynomial, 5)
    nesterov = {True: "yes", False: "no", None: "not published"}[recipe.nesterov]
    rate = ["not published" if recipe.lr is None else str(recipe.lr), recipe.schedule or "not published"]
    cells = [
        f"`{recipe.name}`",
        cell("momentum", f"{recipe.momentum:g}, {nesterov}"),
        cell("ns_coefficients", f"{polynomial} × {steps}" if recipe.ns_coefficients else f"{polynomial}, × {steps}"),
        RMS[recipe.adjust_lr_fn],
        f"{recipe.weight_decay:g}",
        recipe.heads,
        cell("tau", recipe.no_clip or f"τ = {recipe.tau:g}"),
        "; ".join(rate),
    ]
    return "| " + " | ".join(cells) + " |"


def test_the_table_and_the_sentences_of_the_page_are_those_of_the_values():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    wanted = [*table(), *(f"- `{name}` ({recipe.source}): {recipe.sentence}" for name, recipe in RECIPES.items())]
    missing = [line for line in wanted if line not in lines]
    assert not missing, "write into docs/recipes.md:\n" + "\n".join(wanted)
