"""A run's TOML file: what is wrong in it is named, what is right reaches the devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_sdk.adapters import AdapterSpec, Slot
from edge_sdk.errors import SettingsError
from edge_sdk.protocol import PROTOCOL
from edge_sdk.softlabels import SoftLabels
from edge_sdk.tasks import Task
from edge_sdk.training.batches import Training
from edge_server import settings as run_settings
from edge_server.knowledge.filters import Filter
from edge_server.llm.jobs import LlmSettings, Tuning
from edge_server.settings import AdapterSettings, RunSettings
from edge_server.systems.crosslm import CrossLm
from edge_server.systems.lpfl import LpFl
from tests import factories

EXAMPLES = Path(__file__).parent.parent / "examples"
TASK = {"labels": '["bad", "good"]', "pattern": '"{text}"', "verbalizer": '[["poor"], ["fine"]]'}

Lines = dict[str, str]

DEEP = tuple(
    Slot(f"encoder.layer.{layer}.attention.self.{name}", 8, 8) for layer in (0, 1, 2, 10) for name in ("query", "key", "value")
)


def toml(folder: Path, sections: dict[str, Lines]) -> Path:
    """A file with these sections; the section "" is the top."""
    blocks = [
        "\n".join([f"[{name}]" if name else "", *(f"{key} = {value}" for key, value in lines.items())])
        for name, lines in sorted(sections.items())
    ]
    path = folder / "run.toml"
    path.write_text("\n".join(blocks) + "\n")
    return path


def with_line(folder: Path, section: str, key: str, value: str) -> Path:
    """A good file but for one line."""
    sections: dict[str, Lines] = {"": {}, "task": dict(TASK), "adapter": {}, "lpfl": {}, "lpfl.training": {}, "lpfl.soft": {}}
    sections[section][key] = value
    return toml(folder, sections)


def modules(adapter: AdapterSettings) -> list[str]:
    """The slots a run on a model with layers 0, 1, 2 and 10 trains, without their common parts."""
    made = run_settings.manifest(RunSettings(factories.ENCODER_TASK, adapter=adapter), factories.bundle(slots=DEEP))
    return [slot.module.removeprefix("encoder.layer.").replace(".attention.self.", " ") for slot in made.adapter.slots]


def test_a_task_is_all_a_file_needs(tmp_path: Path) -> None:
    """Everything else has a default."""
    loaded = run_settings.load(toml(tmp_path, {"task": TASK}))

    assert loaded == RunSettings(Task(("bad", "good"), "{text}", (("poor",), ("fine",))))
    assert (loaded.system, loaded.adapter, loaded.lpfl) == ("lpfl", AdapterSettings(), LpFl())


def test_every_section_reaches_its_settings(tmp_path: Path) -> None:
    """Values land where the file puts them; a whole number is fine where a real one is meant."""
    loaded = run_settings.load(
        toml(
            tmp_path,
            {
                "": {"system": '"lpfl"'},
                "task": {**TASK, "scale": "20", "max_tokens": "48"},
                "adapter": {"rank": "4", "alpha": "8", "modules": '["query"]', "top_layers": "2"},
                "lpfl": {"versions": "3", "wait_seconds": "1"},
                "lpfl.training": {"steps": "2", "learning_rate": "1e-4"},
                "lpfl.soft": {"growth": "16", "limit": "0.5"},
            },
        )
    )

    assert (loaded.task.scale, loaded.task.max_tokens) == (20.0, 48)
    assert loaded.adapter == AdapterSettings(4, 8.0, ("query",), 2)
    assert loaded.lpfl == LpFl(
        versions=3, wait_seconds=1.0, training=Training(steps=2, learning_rate=1e-4), soft=SoftLabels(growth=16, limit=0.5)
    )


@pytest.mark.parametrize("section", ["", "task", "adapter", "lpfl", "lpfl.training", "lpfl.soft"])
def test_an_unknown_key_is_named(tmp_path: Path, section: str) -> None:
    """A misspelt key in any section is an error that names file and key, never a silent default."""
    with pytest.raises(SettingsError, match=r"run\.toml: .*`colour`"):
        run_settings.load(with_line(tmp_path, section, "colour", "1"))


def test_an_unknown_section_is_named(tmp_path: Path) -> None:
    """A misspelt section is an unknown key of the file."""
    with pytest.raises(SettingsError, match="`lpf1`"):
        run_settings.load(toml(tmp_path, {"task": TASK, "lpf1": {"versions": "2"}}))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("task", "labels", '"bad"'),
        ("task", "pattern", "1"),
        ("task", "verbalizer", '["poor", "fine"]'),
        ("adapter", "rank", "2.5"),
        ("adapter", "modules", '"query"'),
        ("adapter", "min_layers", "1.5"),
        ("adapter", "min_rank", "true"),
        ("adapter", "freeze_a", "1"),
        ("lpfl", "average", '"median"'),
        ("lpfl", "average", "1"),
        ("lpfl", "versions", '"many"'),
        ("lpfl", "upload", '"int4"'),
        ("lpfl", "rule", '"median"'),
        ("lpfl", "rule", '{name = "mode"}'),
        ("lpfl", "buffer_size", "true"),
        ("lpfl", "wait_seconds", "1979-05-27"),
        ("lpfl.training", "steps", "[1]"),
        ("lpfl.soft", "limit", '"half"'),
    ],
)
def test_a_wrong_type_is_named(tmp_path: Path, section: str, key: str, value: str) -> None:
    """A value of another type is refused with the place it stands at, not converted."""
    with pytest.raises(SettingsError, match=rf"\$\.{section}\.{key}"):
        run_settings.load(with_line(tmp_path, section, key, value))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("task", "labels", '["good", "good"]'),
        ("task", "pattern", '"no place for it"'),
        ("task", "verbalizer", '[["poor"], []]'),
        ("task", "scale", "0"),
        ("task", "max_tokens", "513"),
        ("adapter", "rank", "0"),
        ("adapter", "rank", "257"),
        ("adapter", "alpha", "-1"),
        ("adapter", "alpha", "nan"),
        ("adapter", "alpha", "inf"),
        ("adapter", "top_layers", "-1"),
        ("adapter", "min_layers", "-1"),
        ("adapter", "min_rank", "-1"),
        ("adapter", "min_rank", "9"),
        ("lpfl", "versions", "0"),
        ("lpfl", "server_lr", "0"),
        ("lpfl", "clip_norm", "0.5"),
        ("lpfl", "clip_norm", "-3"),
        ("lpfl", "clip_norm", "inf"),
        ("lpfl", "rule", '{name = "krum", byzantine = 0}'),
        ("lpfl", "wait_seconds", "inf"),
        ("lpfl.training", "steps", "0"),
        ("lpfl.training", "learning_rate", "1.5"),
        ("lpfl.soft", "limit", "1.5"),
        ("lpfl.soft", "growth", "-1"),
        ("lpfl.soft", "temperature", "inf"),
        ("lpfl.soft", "weight", "inf"),
        ("lpfl.training", "clip", "inf"),
        ("lpfl.training", "steps", "1000000000"),
        ("lpfl", "seed", "-5"),
        ("task", "scale", "inf"),
    ],
)
def test_a_value_out_of_bounds_is_named(tmp_path: Path, section: str, key: str, value: str) -> None:
    """Bounds are checked when the file is read, before a server starts; the message names file and setting."""
    with pytest.raises(SettingsError, match=rf"run\.toml: .*{key}"):
        run_settings.load(with_line(tmp_path, section, key, value))


def test_a_file_without_a_task_is_refused(tmp_path: Path) -> None:
    """There is no default task."""
    with pytest.raises(SettingsError, match="`task`"):
        run_settings.load(toml(tmp_path, {"lpfl": {"versions": "2"}}))


@pytest.mark.parametrize("key", ["labels", "pattern", "verbalizer"])
def test_a_task_without_a_part_is_refused(tmp_path: Path, key: str) -> None:
    """Labels, pattern and verbalizer have no defaults, and the missing one is named."""
    with pytest.raises(SettingsError, match=f"`{key}`"):
        run_settings.load(toml(tmp_path, {"task": {name: value for name, value in TASK.items() if name != key}}))


def test_an_unknown_system_is_refused(tmp_path: Path) -> None:
    """Only systems that exist can be asked for."""
    with pytest.raises(SettingsError, match=r"'fedmagic'.*\$\.system"):
        run_settings.load(with_line(tmp_path, "", "system", '"fedmagic"'))


@pytest.mark.parametrize("content", [b"[task\n", b"a = 1\na = 2\n", b"name = '\xff'\n"])
def test_a_file_that_is_not_toml_is_refused(tmp_path: Path, content: bytes) -> None:
    """Broken syntax, a key twice, or bytes that are not UTF-8."""
    (tmp_path / "run.toml").write_bytes(content)
    with pytest.raises(SettingsError, match=r"run\.toml is not TOML"):
        run_settings.load(tmp_path / "run.toml")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The message has the path and the reason."""
    with pytest.raises(SettingsError, match=r"nowhere\.toml: No such file"):
        run_settings.load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize(("name", "words", "fewest"), [("minilm", ("query", "value"), 0), ("smollm2", ("q_proj", "v_proj"), 12)])
def test_the_examples_load(name: str, words: tuple[str, str], fewest: int) -> None:
    """The files people copy from are valid, and say what they are meant to say."""
    loaded = run_settings.load(EXAMPLES / f"{name}.toml")

    assert loaded.task.labels == ("negative", "positive")
    assert loaded.adapter == AdapterSettings(rank=8, alpha=16.0, modules=words, min_layers=fewest)
    assert loaded.lpfl.soft is not None


def test_the_example_with_an_llm_loads() -> None:
    """Its prompts end where a quotation begins, and the LLM's words are one for each label."""
    loaded = run_settings.load(EXAMPLES / "crosslm.toml")

    assert loaded.system == "crosslm"
    assert loaded.crosslm is not None
    assert all(prompt.endswith('<|im_start|>assistant\n"') for prompt in loaded.crosslm.prompts)
    assert len(loaded.crosslm.llm.words) == len(loaded.task.labels)


def test_a_manifest_tells_devices_the_run() -> None:
    """Task, system and bundle as they are, and an adapter for exactly the chosen slots."""
    bundle = factories.bundle(slots=DEEP)
    made = run_settings.manifest(RunSettings(factories.ENCODER_TASK, adapter=AdapterSettings(3, 6.0, ("key",))), bundle)

    assert (made.protocol, made.system, made.task, made.bundle) == (PROTOCOL, "lpfl", factories.ENCODER_TASK, bundle)
    assert made.adapter == AdapterSpec((DEEP[1], DEEP[4], DEEP[7], DEEP[10]), 3, 6.0)


def test_what_devices_may_choose_reaches_them(tmp_path: Path) -> None:
    """Layers, rank, frozen A and average of a file end up in manifest and system; by default there is no choice."""
    lines = {"rank": "4", "min_layers": "3", "min_rank": "2"}
    averaged = run_settings.load(toml(tmp_path, {"task": TASK, "adapter": lines, "lpfl": {"average": '"products"'}}))
    frozen = run_settings.load(toml(tmp_path, {"task": TASK, "adapter": {**lines, "freeze_a": "true"}}))
    plain = RunSettings(factories.ENCODER_TASK)

    bundle = factories.bundle(slots=DEEP)
    made = [run_settings.manifest(settings, bundle) for settings in (averaged, frozen, plain)]
    assert [(m.min_layers, m.min_rank, m.adapter.freeze_a) for m in made] == [(3, 2, False), (3, 2, True), (0, 0, False)]
    assert [averaged.lpfl.average, frozen.lpfl.average, plain.lpfl.average] == ["products", "factors", "factors"]


def test_products_do_not_go_with_a_frozen_a(tmp_path: Path) -> None:
    """Averaging products would change the A that every device holds still, so the file is refused."""
    both: dict[str, Lines] = {"task": TASK, "adapter": {"freeze_a": "true"}, "lpfl": {"average": '"products"'}}
    with pytest.raises(SettingsError, match="take factors"):
        run_settings.load(toml(tmp_path, both))


@pytest.mark.parametrize(
    "rest", [{"adapter": {"freeze_a": "true"}}, {"lpfl": {"average": '"products"'}}, {"adapter": {"rank": "2"}}]
)
def test_a_smaller_rank_needs_what_can_average_it(tmp_path: Path, rest: dict[str, Lines]) -> None:
    """With factors alone a file with a smaller `min_rank` is refused by name; a frozen A, products or one rank make it good."""
    bad: dict[str, Lines] = {"task": TASK, "adapter": {"rank": "4", "min_rank": "2"}}
    with pytest.raises(
        SettingsError, match=r"run\.toml: .*adapter\.min_rank set lpfl\.average to products, or adapter\.freeze_a"
    ):
        run_settings.load(toml(tmp_path, bad))

    good = {**bad, **rest, "adapter": bad["adapter"] | rest.get("adapter", {})}
    assert run_settings.load(toml(tmp_path, good)).adapter.min_rank == 2


RULES = ['"median"', '"trimmed_mean", byzantine = 1', '"krum", byzantine = 1, keep = 2']


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("choice", [{"min_rank": "2"}, {"min_layers": "1"}])
def test_a_rule_that_compares_needs_updates_of_one_shape(tmp_path: Path, rule: str, choice: dict[str, str]) -> None:
    """Where devices may train less, what one number says has no counterpart in the others' updates; sizes can be compared."""
    bad: dict[str, Lines] = {
        "task": TASK,
        "adapter": {"freeze_a": "true", **choice},
        "lpfl": {"buffer_size": "5", "rule": f"{{name = {rule}}}"},
    }
    with pytest.raises(SettingsError, match=r"lpfl\.rule compares updates of one shape"):
        run_settings.load(toml(tmp_path, bad))

    good: tuple[dict[str, Lines], ...] = ({"adapter": {}}, {"lpfl": {"rule": '{name = "norm_bounded"}'}})
    assert all(run_settings.load(toml(tmp_path, {**bad, **rest})).lpfl.rule for rest in good)


def test_fewer_layers_need_no_other_average() -> None:
    """A layer is averaged over those who trained it, so factors will do; but not more layers than `top_layers` leaves."""
    adapter = AdapterSettings(top_layers=1, min_layers=1)
    bundle = factories.bundle(slots=DEEP)
    assert run_settings.manifest(RunSettings(factories.ENCODER_TASK, adapter=adapter), bundle).min_layers == 1

    with pytest.raises(SettingsError, match="min_layers = 2 is more than the 1 layers"):
        run_settings.manifest(RunSettings(factories.ENCODER_TASK, adapter=AdapterSettings(top_layers=1, min_layers=2)), bundle)


@pytest.mark.parametrize("adapter", [AdapterSettings(), AdapterSettings(modules=("query",), top_layers=1)])
def test_a_bundle_without_slots_is_refused(adapter: AdapterSettings) -> None:
    """Where there is nothing to train, the server says so instead of starting a run."""
    with pytest.raises(SettingsError, match="no layer that can carry an adapter"):
        run_settings.manifest(RunSettings(factories.ENCODER_TASK, adapter=adapter), factories.bundle(slots=()))


def test_no_modules_means_all_of_them() -> None:
    """The default puts LoRA into every slot of the bundle."""
    assert len(modules(AdapterSettings())) == len(DEEP) == 12


def test_an_unknown_module_is_named_beside_the_known_ones() -> None:
    """A module the bundle does not have is refused with the list of those it has."""
    with pytest.raises(SettingsError, match="no layer named 'q_proj'; it has: key, query, value"):
        modules(AdapterSettings(modules=("query", "q_proj")))


def test_a_part_of_a_name_is_no_module() -> None:
    """`ery` is not `query`: only whole parts of a path count."""
    with pytest.raises(SettingsError, match="'ery'"):
        modules(AdapterSettings(modules=("ery",)))


def test_top_layers_picks_those_nearest_the_output() -> None:
    """Layers count by number, not by text: the topmost of 0, 1, 2 and 10 is 10."""
    assert modules(AdapterSettings(modules=("query",), top_layers=1)) == ["10 query"]
    assert modules(AdapterSettings(modules=("query", "key"), top_layers=9)) == ["2 query", "2 key", "10 query", "10 key"]
    assert modules(AdapterSettings(modules=("value",), top_layers=99)) == ["0 value", "1 value", "2 value", "10 value"]


# A run with an LLM ----------------------------------------------------------------------------------------------------
CROSSLM: dict[str, Lines] = {"": {"system": '"crosslm"'}, "task": TASK, "crosslm": {"prompts": '["a {label} film"]'}}


def with_crosslm(folder: Path, section: str, key: str, value: str) -> Path:
    """A good file of a run with an LLM but for one line."""
    return toml(folder, {**CROSSLM, section: {**CROSSLM.get(section, {}), key: value}})


def test_prompts_are_all_a_run_with_an_llm_needs(tmp_path: Path) -> None:
    """Everything else has a default, and devices are told the system."""
    loaded = run_settings.load(toml(tmp_path, CROSSLM))
    made = run_settings.manifest(loaded, factories.bundle())

    assert (loaded.system, loaded.crosslm, made.system) == ("crosslm", CrossLm(("a {label} film",)), "crosslm")


def test_every_table_of_a_run_with_an_llm_reaches_its_settings(tmp_path: Path) -> None:
    """Values land where the file puts them."""
    tables: dict[str, Lines] = {
        **CROSSLM,
        "crosslm": {
            **CROSSLM["crosslm"],
            "names": '["poor", "fine"]',
            "form": '"agree"',
            "judges": "7",
            "label_temperature": "0.25",
        },
        "crosslm.alone": {"steps": "3"},
        "crosslm.federated": {"versions": "6", "average": '"products"'},
        "crosslm.federated.soft": {"growth": "9"},
        "crosslm.federated.training": {"steps": "4"},
        "crosslm.filter": {"min_words": "2"},
        "crosslm.llm": {"model": '"here"', "layers": "3"},
        "crosslm.training": {"steps": "5"},
        "crosslm.tuning": {"contrast": '"none"'},
    }

    assert run_settings.load(toml(tmp_path, tables)).crosslm == CrossLm(
        ("a {label} film",),
        ("poor", "fine"),
        form="agree",
        judges=7,
        label_temperature=0.25,
        alone=Training(steps=3),
        federated=LpFl(versions=6, average="products", soft=SoftLabels(growth=9), training=Training(steps=4)),
        filter=Filter(min_words=2),
        llm=LlmSettings("here", layers=3),
        training=Training(steps=5),
        tuning=Tuning(contrast="none"),
    )


@pytest.mark.parametrize(
    "section",
    [
        "crosslm",
        *("crosslm.filter", "crosslm.llm", "crosslm.alone", "crosslm.training", "crosslm.tuning"),
        *("crosslm.federated", "crosslm.federated.training", "crosslm.federated.soft"),
    ],
)
def test_an_unknown_key_of_a_run_with_an_llm_is_named(tmp_path: Path, section: str) -> None:
    """As everywhere in the file."""
    with pytest.raises(SettingsError, match=r"run\.toml: .*`colour`"):
        run_settings.load(with_crosslm(tmp_path, section, "colour", "1"))


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("crosslm", "prompts", "[]", "prompts"),
        ("crosslm", "prompts", '["a film"]', r"\{label\}"),
        ("crosslm", "names", '["poor"]', "names one name for each"),
        ("crosslm", "names", '["a", "b", "c"]', "names one name for each"),
        ("crosslm", "form", '"words"', "form"),
        ("crosslm", "judges", "0", "judges"),
        ("crosslm", "label_temperature", "0", "label_temperature"),
        ("crosslm", "label_temperature", "inf", "label_temperature"),
        ("crosslm", "federated", '"yes"', r"\$\.crosslm\.federated"),
        ("crosslm.alone", "steps", "0", "steps"),
        ("crosslm.federated", "versions", "0", "versions"),
        ("crosslm.federated.soft", "limit", "1.5", "limit"),
        ("crosslm.filter", "similar", "0", "similar"),
        ("crosslm.llm", "tries", "0", "tries"),
        ("crosslm.training", "steps", "0", "steps"),
        ("crosslm.tuning", "leash", "-1", "weights"),
    ],
)
def test_a_wrong_value_of_a_run_with_an_llm_is_named(tmp_path: Path, section: str, key: str, value: str, said: str) -> None:
    """Before a server starts, with file and setting."""
    with pytest.raises(SettingsError, match=rf"run\.toml: .*{said}"):
        run_settings.load(with_crosslm(tmp_path, section, key, value))


def test_a_run_with_an_llm_needs_its_table_and_labels() -> None:
    """Without prompts there is nothing to write, without labels nothing to judge; a run that averages needs neither."""
    with pytest.raises(SettingsError, match=r"table \[crosslm\]"):
        RunSettings(factories.ENCODER_TASK, "crosslm")
    with pytest.raises(SettingsError, match="needs a task with labels"):
        RunSettings(Task((), "{text}", (), answer_tokens=8), "crosslm", crosslm=CrossLm(("{label}",)))
    assert RunSettings(factories.ENCODER_TASK).crosslm is None


# How updates become a version, in every system ------------------------------------------------------------------------
ONCE = LpFl(versions=3, average="products")


def with_federated(then: LpFl | None, adapter: AdapterSettings = AdapterSettings(), lpfl: LpFl = LpFl()) -> RunSettings:  # noqa: B008  # frozen
    return RunSettings(factories.ENCODER_TASK, "crosslm", adapter, lpfl, CrossLm(("{label}",), federated=then))


def test_what_is_averaged_is_what_the_system_says() -> None:
    """LP-FL's own table; in a run with an LLM what comes after the last sheet, and nothing where nothing does."""
    crosslm = CrossLm(("{label}",), federated=LpFl(versions=7))

    assert RunSettings(factories.ENCODER_TASK, lpfl=ONCE).averaged == ONCE
    assert RunSettings(factories.ENCODER_TASK, lpfl=ONCE, crosslm=crosslm).averaged == ONCE  # its table waits for its system
    assert with_federated(LpFl(versions=7), lpfl=ONCE).averaged == LpFl(versions=7)
    assert with_federated(None, lpfl=ONCE).averaged is None


def test_products_do_not_go_with_a_frozen_a_after_the_last_sheet_either() -> None:
    """Refused where devices average, whatever a table [lpfl] says that nobody reads; fine where they keep what they learn."""
    frozen = AdapterSettings(freeze_a=True)
    with pytest.raises(SettingsError, match="take factors"):
        with_federated(ONCE, frozen)

    assert with_federated(LpFl(), frozen, lpfl=ONCE).averaged == LpFl()
    assert with_federated(None, frozen, lpfl=ONCE).averaged is None


def test_a_smaller_rank_needs_what_can_average_it_after_the_last_sheet_too() -> None:
    """Factors of different ranks are refused where devices average; products, a frozen A or nothing to average make it good."""
    some = AdapterSettings(rank=4, min_rank=2)
    with pytest.raises(SettingsError, match="factors of different ranks have no mean"):
        with_federated(LpFl(), some, lpfl=ONCE)

    assert with_federated(ONCE, some).adapter == some
    assert with_federated(LpFl(), AdapterSettings(rank=4, min_rank=2, freeze_a=True)).averaged == LpFl()
    assert with_federated(LpFl(), AdapterSettings(rank=4, min_rank=4)).averaged == LpFl()
    assert with_federated(None, some).averaged is None


def test_a_file_that_cannot_be_averaged_is_refused(tmp_path: Path) -> None:
    """The check runs when the file is read, and names the file."""
    bad: dict[str, Lines] = {**CROSSLM, "adapter": {"rank": "4", "min_rank": "2"}, "crosslm.federated": {"versions": "2"}}
    with pytest.raises(SettingsError, match=r"run\.toml: .*factors of different ranks"):
        run_settings.load(toml(tmp_path, bad))
    good = run_settings.load(toml(tmp_path, {**bad, "crosslm.federated": {"average": '"products"'}}))

    assert good.averaged == LpFl(average="products")


def test_the_demos_file_loads() -> None:
    """Two small sheets by the LLM of the other example, and then averaged versions that everybody takes part in."""
    demo, example = (run_settings.load(EXAMPLES / f"{name}.toml") for name in ("demo", "crosslm"))

    assert demo.crosslm is not None
    assert example.crosslm is not None
    assert (demo.system, demo.task, demo.adapter) == ("crosslm", example.task, example.adapter)
    assert (demo.crosslm.prompts, demo.crosslm.llm) == (example.crosslm.prompts, example.crosslm.llm)
    assert demo.averaged is not None
    assert demo.averaged == demo.crosslm.federated
    assert demo.averaged.buffer_size == demo.crosslm.judges == 4
    assert example.averaged is None


def test_a_run_may_be_of_another_system_than_the_file_names(tmp_path: Path) -> None:
    """Its settings must be in the file; nothing else changes."""
    path = toml(tmp_path, {"": {"system": '"lpfl"'}, "task": TASK, "fedcollm": {"auxiliary": '"own.jsonl"'}})

    assert run_settings.load(path, "fedcollm").system == "fedcollm"
    assert run_settings.load(path).system == "lpfl"
    with pytest.raises(SettingsError, match="table \\[crosslm\\]"):
        run_settings.load(path, "crosslm")
