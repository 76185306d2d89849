import re

import pytest

from invdiff import attach, audit, config, evaluate, finetune, generate, save_report, train
from invdiff.errors import ConfigError
from invdiff.options import Config
from runs import hard_audit

NAN, INFINITE = float("nan"), float("inf")


def test_a_wrong_value_is_refused_with_what_was_expected():
    for config_class, name, value, expected in (
        (config.TrainConfig, "steps", 1.5, "a whole number"),
        (config.TrainConfig, "steps", True, "a whole number"),
        *((config.TrainConfig, "penalty", value, "a finite number") for value in ("1", False, NAN, INFINITE, 10**400)),
        (config.TrainConfig, "mode", "fair", "one of 'balanced', 'invariant'"),
        (config.FinetuneConfig, "fresh_denoiser", 1, "true or false"),
        (config.AuditConfig, "vision_encoder", 3, "text"),
        (config.AuditConfig, "contrast_log_snr", -4.0, "a list"),
        (config.AuditConfig, "words", (1,), "text in item 1"),
        (config.EvaluateConfig, "target", {"a": "1"}, "a finite number in 'a'"),
        (config.EvaluateConfig, "target", "dog", "a mapping"),
        (config.ArchitectureConfig, "resolution", 20, "a multiple of 16"),
        (config.ArchitectureConfig, "denoiser_channels", (64,), "at least two levels"),
        (config.ArchitectureConfig, "denoiser_channels", (64, 100), "multiples of 8"),
        (config.ArchitectureConfig, "autoencoder_blocks", (), "at least one level"),
        (config.ArchitectureConfig, "autoencoder_blocks", (1, -1), "at least 0 in item 2"),
        (config.ArchitectureConfig, "text_width", 40, "a multiple of 16"),
        (config.ArchitectureConfig, "vocabulary_size", 100, "at least 514"),
        (config.FinetuneConfig, "steps", 0, "at least 1"),
        (config.FinetuneConfig, "ema_decay", 1, "at least 0 and below 1"),
        (config.TrainConfig, "width", 12, "0 or a multiple of 8"),
        (config.TrainConfig, "width", 16, "nothing with backend 'auto', but with 'module' alone, which reads it"),
        (config.AuditConfig, "num_groups", 1, "0 or at least 2"),
        (config.AuditConfig, "min_share", 0.5, "at least 0 and at most 1 / 3 groups"),
        (config.AuditConfig, "contrast_log_snr", (), "at least one level"),
        (config.AuditConfig, "feature_log_snr", (1.0,), "at least two levels"),
        (config.AuditConfig, "contrast_draws", 1, "at least 2 for solver auto"),
        (config.AuditConfig, "level", 1.0, "more than 0 and below 1"),
        (config.EvaluateConfig, "target", {"land": 0.5, "water": 0.6}, "shares that sum to 1"),
        (config.EvaluateConfig, "target", {"land": 0.0, "water": 1.0}, "more than 0 in 'land'"),
        (config.DemoConfig, "severity", 1.1, "at least 0 and at most 1"),
    ):
        with pytest.raises(ConfigError) as error:
            config_class(**{name: value})
        assert str(error.value).startswith(f"{config_class.__name__}.{name}: expected {expected}, got ")
        assert repr(value)[:200] in str(error.value) or " in " in expected


def test_a_whole_number_does_where_any_number_is_meant():
    assert repr(config.GenerateConfig(guidance_scale=3)) == repr(config.GenerateConfig(guidance_scale=3.0))
    assert repr(config.DemoConfig(guidance_scales=[1, 3])) == repr(config.DemoConfig(guidance_scales=(1.0, 3.0)))


def read(path, text, config_class: type[Config] = config.TrainConfig):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return config_class.from_file(path)


@pytest.mark.parametrize(
    ("text", "rate"), [("1e-3", 1e-3), ("1E-3", 1e-3), ("+2.5e2", 250.0), (".5e-1", 0.05), ("0.25", 0.25), ("3", 3)]
)
def test_yaml_numbers_may_have_an_exponent(tmp_path, text, rate):
    assert read(tmp_path / "c.yaml", f"learning_rate: {text}").learning_rate == rate
    assert read(tmp_path / "c.yaml", f"feature_log_snr: [{text}, 2]", config.AuditConfig).feature_log_snr == (rate, 2)


def test_quoted_numbers_are_text_no_is_a_word_and_a_byte_order_mark_does_not_matter(tmp_path):
    with pytest.raises(ConfigError, match="expected a finite number, got '1e-3'"):
        read(tmp_path / "c.yaml", "learning_rate: '1e-3'")
    text = "\ufeffmixed_precision: no\nhalf_precision_weights: true"
    found = read(tmp_path / "c.yaml", text, config.FinetuneConfig)
    assert (found.mixed_precision, found.half_precision_weights) == ("no", True)


def test_errors_in_a_file_name_it(tmp_path):
    for text, message in (
        ("steps: -1", "TrainConfig.steps: expected at least 0, got -1"),
        ("stepz: 1\n3: 1", "TrainConfig: unknown setting 3, stepz; known are backend, mode,"),
        ("- steps", "expected a mapping of settings"),
        ("", "got NoneType"),
        ("a: [", "Expected JSON or YAML"),
        (b"\xff\xfe\x00", "Expected JSON or YAML"),
    ):
        with pytest.raises(ConfigError) as error:
            read(tmp_path / "mine.yaml", text)
        assert str(tmp_path / "mine.yaml") in str(error.value)
        assert message in str(error.value)


def test_what_is_given_in_place_of_another_kind_is_refused_with_the_way_to_get_that(data, tmp_path):
    to, found = tmp_path / "out", hard_audit(["a"], [0], [0])
    for call, message in (
        (lambda: audit(None, "photos"), "data as CaptionedImages or EncodedImages, got str. Open them with load_capt"),
        (lambda: audit(None, data, config={"seed": 1}), "config as AuditConfig, got dict. Write AuditConfig(...)."),
        (lambda: audit(None, prompts="a photo"), "a list of prompts, got 'a photo'"),
        (lambda: train(None, data, to, to), "audit as Audit, got PosixPath. Load it with Audit.load."),
        (lambda: attach(None, "module"), "module as Guidance, got str. Load it with load_guidance."),
        (lambda: generate(None, [], to, config={}), "config as GenerateConfig, got dict"),
        (lambda: finetune("photos", to), "data as CaptionedImages, got str"),
        (lambda: evaluate("base", found, "sex"), "annotator as GivenLabels or Annotator, got Audit. Load one with"),
        (lambda: save_report(to, audit=found), "audit as str or Path, got Audit. Save it, and give its place."),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            call()
    assert not to.exists()
