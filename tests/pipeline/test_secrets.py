"""Secrets are kept out of what is shown and saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import dump_config, load_config, parse_config
from pipeline.errors import ConfigError, UserError
from pipeline.runs.resume import changed_settings
from pipeline.secrets import find_redacted, find_secret_override, is_secret_key, redact, redact_text
from pipeline.tuning.folder import SweepFolder, load_sweep, recipe_text
from pipeline.ui.display import PlainDisplay

TOKEN = "hf_" + "a1B2" * 8
RECIPE = {
    "base_model": "m",
    "datasets": [{"path": "s3://user:pass@bucket/pairs.jsonl"}],
    "overrides_of_model_kwargs": {"token": TOKEN, "variant": "fp16"},
    "special_tokens": {"pad_token": "<pad>"},
}


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("s3://key:secret@bucket/x", "s3://***@bucket/x"),
        ("can't reach 'https://me:pw@host/a' now", "can't reach 'https://***@host/a' now"),
        ("https://host/a?X-Amz-Signature=abc&part=1", "https://host/a?X-Amz-Signature=***&part=1"),
        ("https://host/a?sig=abc&sv=2", "https://host/a?sig=***&sv=2"),
        (f"got {TOKEN}!", "got ***!"),
        ("AKIAABCDEFGHIJKLMNOP", "***"),
        ("github_pat_11ABCDEFG0abcdefghijkl and xoxb-1234567890-abc", "*** and ***"),
        ("s3://bucket/x?region=eu", "s3://bucket/x?region=eu"),
        ("host:8265 and user@host", "host:8265 and user@host"),
    ],
)
def test_what_a_text_shows(text: str, redacted: str) -> None:
    assert redact_text(text) == redacted


def test_which_keys_hold_secrets() -> None:
    for name in (
        "token",
        "hub_token",
        "api_key",
        "wandb_api_key",
        "secret_key",
        "aws_secret_access_key",
        "password",
        "HF_TOKEN",
    ):
        assert is_secret_key(name), name
    for name in ("pad_token", "eos_token", "tokens", "tokens_per_forward", "special_tokens", "key", "keystone"):
        assert not is_secret_key(name), name


def test_a_saved_config_has_none() -> None:
    cfg = parse_config(RECIPE)
    for text in (dump_config(cfg), recipe_text(cfg)):
        assert "pass" not in text and TOKEN not in text
        assert "s3://***@bucket/pairs.jsonl" in text and "token: '***'" in text
        assert "variant: fp16" in text and "<pad>" in text
    assert redact({"token": {"value": "x"}, "api_keys": ["y"], "private_key": "z"}) == {
        "token": {"value": "***"},
        "api_keys": ["***"],
        "private_key": "***",
    }
    assert redact({"seed": 1, "token": None, "lr": 0.1}) == {"seed": 1, "token": None, "lr": 0.1}


def test_a_saved_config_is_asked_for_them(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(parse_config(RECIPE)))
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "config.yaml")
    assert sorted(path for path, _ in caught.value.problems) == ["datasets.0.path", "overrides_of_model_kwargs.token"]
    assert "give it again with --set" in str(caught.value)
    given = ["datasets.0.path=s3://user:pass@bucket/pairs.jsonl", f"overrides_of_model_kwargs.token={TOKEN}"]
    assert load_config(tmp_path / "config.yaml", given).datasets[0].path == RECIPE["datasets"][0]["path"]  # type: ignore[index]


def test_a_run_goes_on_with_another_secret() -> None:
    saved = parse_config({**RECIPE, "datasets": [{"path": "s3://***@bucket/pairs.jsonl"}]})
    assert changed_settings(saved, parse_config(RECIPE)) == []
    other = parse_config({**RECIPE, "datasets": [{"path": "s3://user:pass@elsewhere/pairs.jsonl"}]})
    (changed,) = changed_settings(saved, other)
    assert "pass" not in changed and "elsewhere" in changed


def test_a_sweep_whose_recipe_held_a_secret(tmp_path: Path) -> None:
    cfg = parse_config({**RECIPE, "output_dir": str(tmp_path), "tune": {"space": {"rl_beta": {"grid": [0.1]}}}})
    SweepFolder(tmp_path).open(cfg, resume=False)
    with pytest.raises(UserError, match=r"overrides_of_model_kwargs\.token, datasets\.0\.path held a secret, which isn't"):
        load_sweep(str(tmp_path))


def test_what_is_printed_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    PlainDisplay().note("reading s3://user:pass@bucket")
    assert capsys.readouterr().err == "reading s3://***@bucket\n"


def test_a_secret_on_the_command_line() -> None:
    assert (
        find_secret_override(["rl_beta=0.1", f"overrides_of_model_kwargs.token={TOKEN}"]) == "overrides_of_model_kwargs.token"
    )
    assert find_secret_override(["overrides_of_model_kwargs={token: abc}"]) == "overrides_of_model_kwargs"
    assert find_secret_override(["datasets.0.path=s3://u:p@b/x"]) == "datasets.0.path"
    assert find_secret_override(["special_tokens.pad_token=<pad>", "learning_rate=1e-4"]) is None
    assert [path for path, _ in find_redacted({"a": [{"b": "***"}], "c": "x***"})] == ["a.0.b"]


@pytest.mark.parametrize(
    "text",
    [
        "https://u:p@SECRET@host/x",
        "https://u:pa/SECRET@host/x",
        "https://SECRET@host/x",
        "s3://AKIA:se/SECRET@b/x.jsonl",
        "https://host/x?account_key=SECRET",
    ],
)
def test_no_part_of_a_key_in_a_uri_is_left(text: str) -> None:
    assert "SECRET" not in redact_text(text) and redact_text("https://host/x") == "https://host/x"


def test_numbers_and_other_names_of_secrets() -> None:
    given = {"token": 12345678, "Authorization": "SECRET", "refresh_token": "SECRET", "passphrase": "SECRET", "pwd": "SECRET"}
    assert set(redact(given).values()) == {"***"}
    assert redact({"pad_token": "<pad>", "trust_remote_code": True}) == {"pad_token": "<pad>", "trust_remote_code": True}
