"""Studies are checked against their recipe before anything starts: names, forms, bounds and trial 0."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from setwise.models.config import ModelConfig, SetPredictionConfig
from setwise.pipelines import recipe as recipes
from setwise.platform import config
from setwise.platform.errors import ConfigError
from setwise.sweeps import space
from setwise.sweeps.domain import Domain
from setwise.sweeps.space import Study

HEAD = "recipe: digits_cnn_bigru\ntrials: 3\n"


def load(tmp_path: Path, text: str, *overrides: str) -> tuple[Study, recipes.Recipe]:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    return space.load(str(path), list(overrides))


def mistakes(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    *lines, count = str(caught.value).replace(f"{tmp_path}/", "").splitlines()
    assert count == f"{len(lines)} mistake{'s' * (len(lines) > 1)}; nothing was started."
    return lines


@pytest.mark.parametrize("name", space.names())
def test_every_shipped_study_loads_and_its_trial_0_is_the_recipe_itself(name: str) -> None:
    study, base = space.load(name)
    values = space.default_values(study, base)
    assert values.keys() <= study.space.keys()
    assert all(study.space[setting].contains(value) for setting, value in values.items())
    assert study.recipe_of(base, values) == base


@pytest.mark.parametrize("name", space.names())
def test_whatever_a_shipped_study_draws_is_a_recipe(name: str) -> None:
    study, base = space.load(name)
    chance = random.Random(0)
    for _ in range(30):
        study.recipe_of(base, {setting: draw(domain, chance) for setting, domain in study.space.items()})


def draw(domain: Domain, chance: random.Random) -> Any:
    """A value of the domain, by Optuna's own account of it."""
    distribution = domain.distribution()
    if domain.choice is not None:
        return distribution.to_external_repr(chance.randrange(len(domain.choice)))
    low, high = distribution.low, distribution.high
    return chance.randint(low, high) if domain.int is not None else chance.uniform(low, high)


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("similarity.alfa", "similarity.alpha"),
        ("alpha", "similarity.alpha"),
        ("loss.alpha", "similarity.alpha"),
        ("optimizer.learning_rte", None),
        ("model.num_slots", "model.set_prediction.num_slots"),
        ("train.lr", "optimizer.lr"),
        ("train", None),
    ],
)
def test_an_unknown_name_has_its_place_and_the_nearest(tmp_path: Path, name: str, meant: str | None) -> None:
    text = f"{HEAD}space:\n  loss.margin: {{uniform: [0.1, 0.3]}}\n  {name}: {{uniform: [0.1, 20]}}\n"
    (line,) = mistakes(tmp_path, text)
    assert line.startswith(f"study.yaml:5:3: space.{name}: '{name}' is not a setting of a recipe.")
    if meant is not None:
        assert line.endswith(f"Did you mean '{meant}'?")


def test_a_typo_in_a_domain_or_in_the_study_is_found(tmp_path: Path) -> None:
    text = f"{HEAD}trails: 3\nspace:\n  loss.margin: {{unifrom: [0.1, 0.3]}}\n"
    lines = mistakes(tmp_path, text)
    assert any(line.startswith("study.yaml:3:1: 'trails' is not a setting. Did you mean 'trials'?") for line in lines)
    assert any(line.startswith("study.yaml:5:17: 'space.loss.margin.unifrom' is not a setting.") for line in lines)


def test_what_is_fixed_for_all_trials_is_checked_as_part_of_the_recipe(tmp_path: Path) -> None:
    text = HEAD + "overrides:\n  train.epochs: 3\n  train.epocs: 3\n  loss.margin: 7\n" + "space:\n"
    text += "  similarity.alpha: {uniform: [1, 20]}\n"
    lines = mistakes(tmp_path, text)
    assert len(lines) == 2
    assert "study.yaml:5:3: 'train.epocs' is not a setting. Did you mean 'train.epochs'?" in lines
    assert any(line.startswith("study.yaml:6:3: loss.margin: ") for line in lines)
    _, base = load(tmp_path, text.replace("  train.epocs: 3\n  loss.margin: 7\n", ""))
    assert base.train.epochs == 3


@pytest.mark.parametrize("first", ["train.epochs: 3", "train: {epochs: 3}", "train: 3"])
def test_contradictory_overrides_are_a_mistake_and_no_crash(tmp_path: Path, first: str) -> None:
    text = f"{HEAD}overrides: {{{first}, train.epochs.x: 1}}\nspace: {{loss.margin: {{uniform: [0.1, 0.3]}}}}\n"
    with pytest.raises(ConfigError):
        load(tmp_path, text)


# --- forms and bounds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "domain", "message"),
    [
        ("similarity.alpha", "{}", "give exactly one of choice, uniform, loguniform, int"),
        ("similarity.alpha", "{uniform: [1, 20], choice: [1, 16]}", "give exactly one of"),
        ("similarity.alpha", "{choice: [16]}", "at least 2 items"),
        ("similarity.alpha", "{uniform: [20, 1]}", "the lower bound comes first"),
        ("similarity.alpha", "{uniform: [16, 16]}", "differs from the upper"),
        ("similarity.alpha", "{uniform: [1, 2, 3]}", "at most 2 items"),
        ("similarity.alpha", "{loguniform: [0, 64]}", "bounds must be above 0"),
        ("similarity.alpha", "{int: [1.5, 20]}", "valid integer"),
        ("similarity.alpha", "3", "dictionary"),
        ("similarity.alpha", "{uniform: [0, 20]}", "greater than 0"),
        ("similarity.alpha", "{uniform: [1, 5000]}", "less than or equal to 1024"),
        ("similarity.alpha", "{uniform: [1, .inf]}", "finite"),
        ("similarity.alpha", "{uniform: [.nan, 20]}", "similarity.alpha"),
        ("similarity.alpha", "{uniform: [17, 20]}", "16.0, which trial 0 uses, lies outside"),
        ("loss.negatives", "{choice: [all, hardest, nearest]}", "'nearest'"),
        ("train.batch_size", "{int: [1, 100]}", "greater than or equal to 2"),
        ("similarity.kind", "{uniform: [1, 2]}", "similarity.kind"),
        ("model.image_encoder.channels", "{int: [8, 64]}", "channels"),
        ("model.image_encoder.channels", "{choice: [8, 64]}", "channels"),
    ],
)
def test_a_domain_that_cannot_be_is_a_mistake_at_its_place(
    tmp_path: Path, setting: str, domain: str, message: str
) -> None:
    lines = mistakes(tmp_path, f"{HEAD}space:\n  {setting}: {domain}\n")
    assert all(re.match(rf"study\.yaml:4:\d+: space\.{re.escape(setting)}", line) for line in lines), lines
    assert any(message in line for line in lines), lines


def test_all_wrong_domains_are_reported_together(tmp_path: Path) -> None:
    text = f"{HEAD}space:\n  loss.margn: {{uniform: [0, 1]}}\n  similarity.alpha: {{uniform: [0, 5000]}}\n"
    assert len(mistakes(tmp_path, text)) == 3


def test_a_space_is_needed(tmp_path: Path) -> None:
    for text in (HEAD, f"{HEAD}space: {{}}\n"):
        (line,) = mistakes(tmp_path, text)
        assert "space" in line


def test_a_logarithmic_domain_is_drawn_as_one() -> None:
    assert Domain(loguniform=(1e-3, 1.0)).distribution().log is True
    assert Domain(uniform=(1e-3, 1.0)).distribution().log is False


# --- conditions -------------------------------------------------------------------------------------------------

SLOTS = "model.set_prediction.num_slots"
TWO = f"{HEAD}space:\n  {SLOTS}: {{choice: [1, 2, 4]}}\n  loss.diversity_weight: {{uniform: [0, 1], when: %s}}\n"


@pytest.mark.parametrize(
    ("condition", "drawn_at"),
    [
        (f"{SLOTS} > 1", {2, 4}),
        (f"{SLOTS} >= 4", {4}),
        (f"{SLOTS} == 1", {1}),
        (f"{SLOTS} != 2", {1, 4}),
        (f"'{SLOTS} in [1, 4]'", {1, 4}),
        (f"'{SLOTS} not in [1, 4]'", {2}),
        ("similarity.kind == smooth_chamfer", {1, 2, 4}),
        ("similarity.kind == chamfer", "it holds of no value"),
        (f"{SLOTS} > 8", "it holds of no value"),
        (f"{SLOTS} > many", "cannot be compared"),
        (f"{SLOTS} = 1", "a condition is written"),
        (f"{SLOTS} in 4", "compares with a list"),
        (f"'{SLOTS} > [1, 2]'", "compares with one value"),
        ("model.num_slots > 1", f"Did you mean '{SLOTS}'?"),
    ],
)
def test_a_setting_varies_only_where_its_condition_holds(
    tmp_path: Path, condition: str, drawn_at: set[int] | str
) -> None:
    if isinstance(drawn_at, str):
        (line,) = mistakes(tmp_path, TWO % condition)
        assert line.startswith("study.yaml:5:") and drawn_at in line
        return
    study, base = load(tmp_path, TWO % condition)
    flat = config.flatten(base)
    assert {k for k in (1, 2, 4) if study.varies("loss.diversity_weight", {**flat, SLOTS: k})} == drawn_at


def test_a_condition_asks_for_what_stands_before_it(tmp_path: Path) -> None:
    text = f"{HEAD}space:\n  loss.diversity_weight: {{uniform: [0, 1], when: {SLOTS} > 1}}\n"
    text += f"  {SLOTS}: {{choice: [1, 4]}}\n"
    (line,) = mistakes(tmp_path, text)
    assert "must stand before 'loss.diversity_weight'" in line


def test_a_number_between_whole_numbers_is_no_domain_of_a_whole_setting(tmp_path: Path) -> None:
    lines = mistakes(tmp_path, f"{HEAD}space: {{train.batch_size: {{uniform: [64, 256]}}}}\n")
    assert any("valid integer" in line for line in lines), lines
    assert not Domain(int=(1, 4)).contains(2.5) and Domain(int=(1, 4)).contains(2)


# --- what goes together -----------------------------------------------------------------------------------------

ALPHA = "space: {similarity.alpha: {uniform: [1, 20]}}\n"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("objectives: [val/rsum, query_ms]\npruning: {grace_epochs: 1}\n", "pruning: it goes by val/rsum alone"),
        ("objectives: [embedding_size]\n", "val/rsum comes first"),
        ("objectives: [query_ms, val/rsum]\n", "val/rsum comes first"),
        ("objectives: [val/rsum, val/rsum]\n", "one is named twice"),
        ("objectives: [val/rsum, speed]\n", "objectives"),
        ("population: {}\ntrials: 3\n", "it takes 4 trials"),
        ("population: {}\ntrials: 8\npruning: {}\n", "choose one of the two"),
        ("sampler: grid\n", "a grid is made of choices"),
        ("sampler: best\n", "sampler"),
        ("max_hours: 0\n", "max_hours"),
    ],
)
def test_settings_that_exclude_each_other_are_a_mistake(tmp_path: Path, settings: str, message: str) -> None:
    lines = mistakes(tmp_path, f"recipe: digits_cnn_bigru\n{settings}{ALPHA}")
    assert any(message in line for line in lines), lines


def test_a_population_varies_no_shapes(tmp_path: Path) -> None:
    text = f"recipe: digits_cnn_bigru\npopulation: {{}}\ntrials: 4\nspace: {{{SLOTS}: {{choice: [1, 4]}}}}\n"
    (line,) = mistakes(tmp_path, text)
    assert "in the middle of a training" in line


def test_a_grid_has_every_combination_once(tmp_path: Path) -> None:
    text = f"recipe: digits_cnn_bigru\nsampler: grid\ntrials: 6\nspace:\n  {SLOTS}: {{choice: [1, 4]}}\n"
    text += "  similarity.alpha: {choice: [4.0, 8.0, 16.0]}\n"
    study, _ = load(tmp_path, text)
    assert [tuple(values.values()) for values in study.grid()] == [
        (slots, alpha) for slots in (1, 4) for alpha in (4.0, 8.0, 16.0)
    ]
    (line,) = mistakes(tmp_path, text.replace("trials: 6", "trials: 7"))
    assert "the grid has 6 points" in line


def of_the_method(name: str) -> bool:
    """Whether a recipe is one of DivE's, and not of a system before it."""
    model = recipes.load(name).model
    return isinstance(model, ModelConfig) and isinstance(model.set_prediction, SetPredictionConfig)


@pytest.mark.parametrize("recipe", [name for name in recipes.names() if of_the_method(name)])
@pytest.mark.parametrize("name", ["slots", "temperature", "loss_weights", "paper"])
def test_the_papers_studies_fit_every_recipe_of_the_method(name: str, recipe: str) -> None:
    space.load(name, [f"recipe={recipe}"])


def test_a_preset_lies_between_the_recipe_and_what_is_typed() -> None:
    _, plain = space.load("digits", [])
    _, placed = space.load("digits", ["train.precision=fp32"], "a100x2")
    assert plain.train.workers == 1 and placed.train.workers == 2 and placed.train.precision == "fp32"


def test_how_much_is_worked_off_is_not_what_makes_a_study() -> None:
    few, _ = space.load("digits", ["trials=3", "max_hours=1"])
    many, _ = space.load("digits", ["trials=30", "max_gpu_hours=2"])
    another, _ = space.load("digits", ["seed=1"])
    assert few.identity == many.identity != another.identity


# --- overrides --------------------------------------------------------------------------------------------------


def test_an_override_goes_to_the_study_or_to_the_recipe_by_its_name(tmp_path: Path) -> None:
    text = f"{HEAD}overrides: {{train.epochs: 3}}\nspace: {{similarity.alpha: {{uniform: [1, 20]}}}}\n"
    study, base = load(tmp_path, text, "trials=5", "train.epochs=4", "similarity.alpha=2", "pruning=null")
    assert (study.trials, study.pruning, base.train.epochs, base.similarity.alpha) == (5, None, 4, 2)


def test_a_default_moved_outside_by_an_override_is_a_mistake(tmp_path: Path) -> None:
    text = f"{HEAD}space: {{similarity.alpha: {{uniform: [1, 20]}}}}\n"
    (line,) = mistakes(tmp_path, text, "similarity.alpha=30")
    assert "30.0, which trial 0 uses, lies outside" in line


def test_an_unknown_recipe_or_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'digits_cnn_bigru'"):
        load(tmp_path, "recipe: digts_cnn_bigru\nspace: {similarity.alpha: {uniform: [1, 20]}}\n")
    with pytest.raises(ConfigError, match=r"no study is called 'digts'.*Did you mean 'digits'"):
        space.load("digts")


def test_a_study_is_told_from_a_recipe(tmp_path: Path) -> None:
    assert space.is_study(space.find("digits"))
    assert not space.is_study(recipes.find("digits_cnn_bigru"))


def test_settings_of_the_command_line_belong_to_the_study_where_they_change_it() -> None:
    plain, _ = space.load("digits")
    same, _ = space.load("digits", [f"train.epochs={plain.overrides['train.epochs']}"])
    assert same == plain
    other, base = space.load("digits", ["train.epochs=4", "loss.margin=0.3", "trials=2"])
    assert other.overrides == {**plain.overrides, "train.epochs": 4, "loss.margin": 0.3}
    assert (base.train.epochs, base.loss.margin, other.trials) == (4, 0.3, 2)


# --- variants ---------------------------------------------------------------------------------------------------

VARIANTS = """recipe: digits_cnn_bigru
overrides: {train.epochs: 3, loss.margin: 0.3}
variants:
  plain: {}
  mil: {overrides: {similarity.kind: mil, loss.margin: 0.1}}
  vector: {group: K, overrides: {model.set_prediction.num_slots: 1}}
"""


def test_variants_are_a_grid_with_the_budget_of_the_study(tmp_path: Path) -> None:
    study, base = load(tmp_path, VARIANTS + "seeds: 2\n", "train.batch_size=30")
    order = [(seed, name) for seed in (0, 1) for name in ("plain", "mil", "vector")]
    assert study.grid() == [{"train.seed": seed, "variant": name} for seed, name in order]
    assert (study.trials, study.sampler) == (6, "grid")
    recipes_of = [study.recipe_of(base, values) for values in study.grid()]
    assert [one.train.seed for one in recipes_of] == [0, 0, 0, 1, 1, 1]
    assert {(one.train.epochs, one.train.batch_size) for one in recipes_of} == {(3, 30)}
    assert [one.loss.margin for one in recipes_of[:3]] == [0.3, 0.1, 0.3]  # type: ignore[union-attr]
    assert [one.similarity.kind for one in recipes_of[:3]] == ["smooth_chamfer", "mil", "smooth_chamfer"]
    assert [one.retriever.set_prediction.num_slots for one in recipes_of[:3]] == [4, 4, 1]
    assert base == recipes_of[0] and space.default_values(study, base) == study.grid()[0]


def test_every_variant_comes_once_before_other_seeds_of_systems_and_those_before_other_seeds_of_ablations(
    tmp_path: Path,
) -> None:
    text = VARIANTS.replace("  mil: {", "  mil: {group: similarity, ") + "seeds: 3\n"
    study, _ = load(tmp_path, text)
    assert [(point["train.seed"], point["variant"]) for point in study.grid()] == [
        *((0, "plain"), (0, "mil"), (0, "vector"), (1, "plain"), (2, "plain")),
        *((1, "mil"), (1, "vector"), (2, "mil"), (2, "vector")),
    ]
    deck, _ = space.load("deck")
    seeds = {
        name: [p["train.seed"] for p in deck.grid()[: deck.trials] if p["variant"] == name] for name in deck.variants
    }
    claimed = {name for claim in deck.deck.claims for name in (claim.better, claim.than)}
    assert {name for name, found in seeds.items() if len(found) == 3} == claimed | {
        name for name, one in deck.variants.items() if one.group == "systems"
    }
    assert all(len(found) in (1, 3) for found in seeds.values()) and "dive_k1" in claimed


def test_a_variant_is_its_own_recipe_and_one_seed_is_no_parameter(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: digits_cnn_bigru\nmodel: {embed_size: 24}\nsimilarity: {kind: chamfer}\n")
    text = VARIANTS + f"  other: {{recipe: {own}, overrides: {{model.embed_size: 32}}}}\nseeds: 1\n"
    study, base = load(tmp_path, text)
    assert list(study.space) == ["variant"] and study.trials == 4
    other = study.recipe_of(base, {"variant": "other"})
    assert (other.retriever.embed_size, other.similarity.kind, other.train.epochs) == (32, "chamfer", 3)
    own.unlink()  # what a study trains is known from its own record
    assert study.recipe_of(base, {"variant": "other", "train.seed": 7}).train.seed == 7
    assert study.each_recipe(base)[-1] == other and space.load("digits")[0].each_recipe(base) == [base]


def test_every_mistake_in_variants_has_its_place(tmp_path: Path) -> None:
    text = """recipe: digits_cnn_bigru
variants:
  good: {}
  a: {overrides: {model.set_prediction.numslots: 1}}
  b: {recipe: digits_cnn_bigrus}
  c: {overrides: {similarity.kind: cross_attention}}
  d: {overrides: {train.epochs: 3}}
  e: {overrides: {model.embed_size: -1}}
  f: {recipe: digits_slot_autoencoder}
deck: {baseline: god, claims: [{says: x, better: good, than: z}]}
"""
    baseline, claim, a, b, c, d, e, f = mistakes(tmp_path, text)
    assert baseline.startswith("study.yaml:10:8: deck.baseline: no variant is called 'god'. Did you mean 'good'?")
    assert claim.startswith("study.yaml:10:56: deck.claims.0.than: no variant is called 'z'. There are: good, a, ")
    assert a.startswith("study.yaml:4:19: 'model.set_prediction.numslots' is not a setting. Did you mean")
    assert a.endswith("(variant 'a')")
    assert b.startswith("study.yaml:5:7: variants.b: no recipe is called 'digits_cnn_bigrus'. Did you mean")
    assert c.startswith("study.yaml:6:19: similarity.kind=cross_attention and")
    assert d.startswith("study.yaml:7:3: variants.d: train.epochs is 3 and 24 in 'good'")
    assert e.startswith("study.yaml:8:19: model.embed_size: ") and e.endswith("(variant 'e')")
    assert f.startswith("study.yaml:9:3: variants.f: a model of kind 'slot_autoencoder' has no embeddings")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("sampler: tpe", "variants are a grid"),
        ("pruning: {grace_epochs: 1}", "variants are a grid"),
        ("population: {perturb_epochs: 1}", "variants are a grid"),
        ("objectives: [val/rsum, query_ms]", "trained for val/rsum alone"),
        ("trials: 10", "the grid has 9 points"),
        ("space: {similarity.alpha: {choice: [1, 2]}}", "leave one of the two out"),
        ("seeds: 0", "seeds: input should be greater than or equal to 1, not 0.\n1 mistake;"),
        ("deck: {baseline: plane}", "Did you mean 'plain'"),
        ("deck: {claims: [{says: x, better: plain, than: none}]}", "no variant is called 'none'"),
    ],
)
def test_what_variants_do_not_go_with(tmp_path: Path, more: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        load(tmp_path, f"{VARIANTS}{more}\n")


def test_seeds_and_settings_are_the_study_s_own_and_one_variant_is_no_comparison(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study.yaml:7:19: train.seed: variants are trained with the seeds"):
        load(tmp_path, VARIANTS + "  z: {overrides: {train.seed: 1}}\n")
    with pytest.raises(ConfigError, match=r"train.seed: variants are trained with the seeds"):
        load(tmp_path, VARIANTS, "train.seed=1")
    with pytest.raises(ConfigError, match=r"variants.z.settings: setwise writes them"):
        load(tmp_path, VARIANTS + "  z: {settings: {}}\n")
    with pytest.raises(ConfigError, match="give two or more"):
        load(tmp_path, "recipe: digits_cnn_bigru\nvariants: {only: {}}\n")
    with pytest.raises(ConfigError, match="it is the page of a study with variants"):
        load(tmp_path, HEAD + "deck: {images: 5}\nspace:\n  loss.margin: {uniform: [0.1, 0.3]}\n")


def test_overrides_of_a_variant_may_be_nested(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study.yaml:7:\d+: train.seed: variants are trained with the seeds"):
        load(tmp_path, VARIANTS + "  z: {overrides: {train: {seed: 1}}}\n")
    study, _ = load(tmp_path, VARIANTS + "  z: {overrides: {model.set_prediction: {num_slots: 2}}}\n")
    assert study.variants["z"].overrides == {"model.set_prediction.num_slots": 2}
    assert study.variants["z"].trained.retriever.set_prediction.num_slots == 2


def test_claims_may_change_without_making_another_study(tmp_path: Path) -> None:
    first, _ = load(tmp_path, VARIANTS)
    second, _ = load(tmp_path, VARIANTS + "deck: {baseline: mil, claims: [{says: x, better: mil, than: plain}]}\n")
    assert first != second and first.identity == second.identity
    other, _ = load(tmp_path, VARIANTS, "loss.mmd_weight=0.5")
    assert other.identity != first.identity


def test_a_file_with_variants_is_a_study(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(VARIANTS)
    assert space.is_study(tmp_path / "one.yaml")


def test_a_study_of_a_recipe_that_retrieves_nothing_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("trials: 2\nrecipe: digits_cnn_captioner\nspace: {optimizer.lr: {loguniform: [0.001, 0.01]}}\n")
    with pytest.raises(ConfigError, match=r"study\.yaml:2:1: recipe: 'digits_cnn_captioner' is of kind 'captioner'"):
        space.load(str(file))
