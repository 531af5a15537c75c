import dataclasses
import importlib
from pathlib import Path

import pytest

from tfdist import config, configs
from tfdist.models import count


def preset(name: str) -> config.Config:
    return importlib.import_module(f"tfdist.configs.{name}").get_config()


@pytest.mark.parametrize("name", configs.names())
def test_presets_are_valid(name):
    config.validate(preset(name))


@pytest.mark.parametrize(("name", "parameters"), [("gpt2_124m", 124_439_808), ("llama_1b", 1_235_814_400)])
def test_presets_have_the_published_size(name, parameters):
    values = preset(name)
    assert count.num_parameters(values.model, values.data.sequence_length) == parameters


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("train.global_batch_size", 0, "expected at least 1, found 0"),
        ("train.global_batch_size", -8, "expected at least 1, found -8"),
        ("data.sequence_length", 0, "expected at least 1"),
        ("model.num_heads", 3, "expected a multiple of model.num_heads=3"),
        ("model.num_kv_heads", 3, "expected a divisor"),
        ("model.norm", "group", "expected one of layer, rms, found 'group'"),
        ("model.dropout", 1.0, "expected 0 <= x < 1"),
        ("train.accumulate_steps", 1000, "expected at most train.global_batch_size"),
        ("strategy.kind", "horovod", "expected one of auto"),
        ("optimizer.learning_rate", float("nan"), "expected at least 0"),
        ("train.clip_norm", -1.0, "expected at least 0"),
    ],
)
def test_bad_values_are_one_line(field, value, expected):
    values, (section, name) = config.Config(), field.split(".")
    setattr(getattr(values, section), name, value)
    with pytest.raises(ValueError, match="^" + section + r"\.") as error:
        config.validate(values)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_json_round_trip():
    values = config.Config(train=config.TrainConfig(num_steps=7, seed=3))
    assert config.from_json(config.to_json(values)) == values


def test_every_field_says_whether_a_resumed_run_must_match_it():
    for section in dataclasses.fields(config.Config):
        for field in dataclasses.fields(section.type):
            assert field.metadata["resume"] in ("match", "free"), field.name


def test_the_hash_covers_what_determines_the_numbers_and_nothing_else():
    base = config.config_hash(config.Config(), "data")
    for changed, same in [
        (config.Config(train=config.TrainConfig(seed=1)), False),
        (config.Config(model=config.ModelConfig(num_layers=5)), False),
        (config.Config(train=config.TrainConfig(num_steps=9)), True),
        (config.Config(strategy=config.StrategyConfig(kind="mirrored", num_devices=2)), True),
        (config.Config(log=config.LogConfig(every_steps=9)), True),
    ]:
        assert (config.config_hash(changed, "data") == base) is same
    assert config.config_hash(config.Config(), "other data") != base


def test_differing_fields_are_named():
    new = config.Config(train=config.TrainConfig(seed=1, num_steps=9))
    assert config.differing_fields(config.Config(), new) == {"train.seed": (0, 1)}


def test_fields_that_came_later_leave_the_hash_of_older_runs():
    """This is the hash of the default config before there were ema_momentum, label_smoothing and z_loss."""
    assert config.config_hash(config.Config(), "data") == "a836face6d038ba5"
    changed = config.Config()
    changed.train.z_loss = 1e-4
    assert config.config_hash(changed, "data") != "a836face6d038ba5"


def test_a_shipped_config_has_a_name_and_a_file_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert configs.file_of("lm_tiny") == str(Path(configs.__file__).parent / "lm_tiny.py")
    assert configs.file_of("nothing") == "nothing" and "recommender_ps" not in configs.names()
    Path("lm_tiny").write_text("")
    assert configs.file_of("lm_tiny") == "lm_tiny"


def test_the_folder_at_the_top_is_the_one_that_ships():
    assert (Path(__file__).parent.parent / "configs").resolve() == Path(configs.__file__).parent.resolve()
