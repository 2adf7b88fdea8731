"""Command lines repeat some names and defaults of libraries that they may not import; these tests compare them."""

import inspect
from typing import Any, get_args, get_type_hints

import pytest

from isthmus import cli
from isthmus.command_line import CommandPage


@pytest.fixture(scope="module")
def pages() -> dict[str, CommandPage]:
    return {page.path: page for page in cli.pages()}


def default(pages: dict[str, CommandPage], path: str, option: str) -> str | None:
    (found,) = [each for each in pages[path].options if option in each.names]
    return found.default


def joined(values: Any) -> str:
    return ",".join(map(str, values))


def test_the_layouts_and_presets_are_those_that_there_are() -> None:
    from isthmus.command_line import Layout
    from isthmus.data.layouts.listing import AUTO, READERS
    from isthmus.distill.recipes import PRESETS
    from isthmus.experiments.personal.options import PRESET, Preset

    assert set(get_args(get_args(Layout)[0])) == {AUTO, *READERS}
    (named, none) = get_args(get_args(Preset)[0])
    assert set(get_args(named)) == set(PRESETS) and none is type(None) and PRESET in PRESETS


def test_what_a_device_sends_is_what_the_contract_names() -> None:
    from isthmus.edge.commands.options import RunOptions, UploadOptions
    from isthmus.proto.messages import NumberType, UploadMode

    assert set(get_args(get_type_hints(UploadOptions)["mode"])) == {mode.value for mode in UploadMode}
    assert set(get_args(get_type_hints(RunOptions)["number_type"])) == {kind.value for kind in NumberType}


def test_strategies_and_policies_are_named_in_the_help(pages: dict[str, CommandPage]) -> None:
    from isthmus.cloud.elastic.policies.by_name import DEFAULT_POLICY, POLICIES
    from isthmus.distill.selection import STRATEGIES
    from isthmus.experiments.elastic import warmed

    assert all(name in pages["isthmus distill select"].text for name in STRATEGIES)
    for path, option in (("isthmus elastic replay", "--policy"), ("isthmus cloud serve", "--elastic-policy")):
        assert default(pages, path, option) == DEFAULT_POLICY
        assert all(name in pages[path].text for name in POLICIES)
    assert default(pages, "isthmus experiment warmup", "--policies") == joined(warmed.POLICIES)


def test_defaults_of_preparing_are_the_library_s(pages: dict[str, CommandPage]) -> None:
    from isthmus.cloud.elastic.prepare import profiler, prompts
    from isthmus.cloud.elastic.tasks.task import PROMPT_MODES

    assert default(pages, "isthmus elastic prompts", "--epochs") == str(prompts.PROMPTS.epochs)
    assert default(pages, "isthmus elastic prompts", "--learning-rate") == str(prompts.PROMPTS.learning_rate)
    assert default(pages, "isthmus elastic profile", "--gammas") == joined(profiler.GAMMAS)
    assert default(pages, "isthmus elastic profile", "--sizes") == joined(profiler.SIZES)
    from isthmus.cloud.commands.options import Mode

    assert get_args(Mode) == PROMPT_MODES


def test_defaults_of_tuning_are_the_library_s(pages: dict[str, CommandPage]) -> None:
    from isthmus.cloud.commands.options import WarmupOptions
    from isthmus.cloud.warmup.tuning import FROZEN, TARGETS, TUNE

    path = "isthmus elastic warmup run"
    assert default(pages, path, "--epochs") == str(TUNE.epochs)
    assert default(pages, path, "--batch-size") == str(TUNE.batch_size)
    assert default(pages, path, "--learning-rate") == str(TUNE.learning_rate)
    assert default(pages, path, "--frozen") == joined(FROZEN)
    assert set(get_args(get_type_hints(WarmupOptions)["target"])) == set(TARGETS)


def test_the_ladder_is_every_method_that_is_not_the_paper_s(pages: dict[str, CommandPage]) -> None:
    from isthmus.experiments.personal.cells.cells import SCENARIOS
    from isthmus.experiments.personal.cells.methods import METHODS, PAPER

    path = "isthmus experiment paper"
    assert default(pages, path, "--ladder") == joined(name for name in METHODS if name not in PAPER)
    assert default(pages, path, "--scenarios") == joined(SCENARIOS)


def test_a_language_model_has_the_same_settings_alone_and_beside_the_rest(pages: dict[str, CommandPage]) -> None:
    from isthmus.cloud.generation.model.kv import LAYOUTS
    from isthmus.cloud.generation.policies.by_name import DEFAULT_POLICY, POLICIES
    from isthmus.cloud.generation.serve.settings import GenerationSettings
    from isthmus.command_line import option_fields

    alone, beside = ("isthmus generate serve", "isthmus cloud serve")
    for field in option_fields(GenerationSettings):
        name = field.name.replace("_", "-")
        if name not in ("model", "upstream"):
            assert default(pages, beside, f"--generate-{name}") == default(pages, alone, f"--{name}"), name
    assert default(pages, beside, "--generate-upstream") == default(pages, alone, "--generate-upstream")
    assert default(pages, beside, "--generate-model") is None
    assert get_args(get_type_hints(GenerationSettings)["layout"]) == LAYOUTS
    for path, option in (("isthmus generate replay", "--policy"), (alone, "--policy"), (beside, "--generate-policy")):
        assert default(pages, path, option) == DEFAULT_POLICY
        assert all(
            name in pages[path].text for name in POLICIES if path.endswith("replay") or name not in ("static", "magnus")
        )


def test_the_service_s_number_types_are_those_of_elastic_serving() -> None:
    from isthmus.cloud.elastic.serve.settings import ElasticSettings, NumberTypeChoice
    from isthmus.cloud.settings import CloudSettings

    hints = get_type_hints(CloudSettings)
    assert get_args(hints["elastic_number_type"]) == get_args(NumberTypeChoice)
    of_service = inspect.signature(CloudSettings).parameters
    for name, parameter in inspect.signature(ElasticSettings).parameters.items():
        if name not in ("model", "state"):
            of_both = name if name == "executor" else f"elastic_{name}"
            assert of_service[of_both].default == parameter.default, name
