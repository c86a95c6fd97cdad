"""Finding and reading config files: recipes by name, relative paths, and unusual or malformed files."""

import json
import re
from pathlib import Path

import pytest

from cpr_fast.config import Config, ConfigError, load
from cpr_fast.config.load import absolute_inputs
from cpr_fast.config.recipes import FOLDER, find_config, recipes


def test_recipes_are_found_by_their_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = recipes()
    assert "cpr_ucf101" in known and len(known) == len(list(FOLDER.glob("*.toml")))
    for name, summary in known.items():
        assert find_config(name) == find_config(f"{name}.toml") == FOLDER / f"{name}.toml"
        assert summary and not summary.startswith("#")


def test_a_file_is_preferred_to_the_recipe_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "cpr_ucf101.toml"
    own.touch()
    assert find_config("cpr_ucf101.toml").samefile(own)
    assert find_config("cpr_ucf101") == FOLDER / "cpr_ucf101.toml"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("crp_ucf101", "did you mean the recipe 'cpr_ucf101'"),
        ("cpr_ucf101.tml", "did you mean the recipe 'cpr_ucf101'"),
        ("cpr_ucf101.tmol", "did you mean the recipe 'cpr_ucf101'"),
        ("configs/cpr_ucf101.toml", "did you mean the recipe 'cpr_ucf101'"),
        ("something", "`cpr-fast recipes` lists the recipes"),
        (".", "is a folder"),
    ],
)
def test_what_is_neither_file_nor_recipe_is_refused(tmp_path, monkeypatch, name, hint):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"^CONFIG: expected a .*{hint}"):
        find_config(name)


def test_inputs_are_relative_to_the_config_where_they_are_there(tmp_path, monkeypatch):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("index.csv", "start.pt"):
        (folder / name).touch()
    path = folder / "config.toml"
    path.write_text('[data]\nindex = "index.csv"\n[model.init]\nrgb = "start.pt"\nflow = "elsewhere.pt"\n')
    monkeypatch.chdir(tmp_path)
    config = load("set/config.toml")
    assert (config.data.index, config.model.init.rgb) == ("set/index.csv", "set/start.pt")
    assert config.model.init.flow == "elsewhere.pt"  # does not exist there: relative to the working directory
    assert config.run.out == Config().run.out  # a path to an output
    monkeypatch.chdir(folder)
    assert Path(load("config.toml").data.index).is_file()
    path.write_text(f'[data]\nindex = "{folder / "index.csv"}"\n')
    assert load(path).data.index == str(folder / "index.csv")


def test_the_config_json_of_a_run_is_read_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "index.csv").touch()
    values = Config().to_dict() | {"videos": {"count": 3}}
    values["data"]["index"] = "index.csv"
    (tmp_path / "run" / "config.json").write_text(json.dumps(values))
    assert load("run/config.json").data.index == "index.csv"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf[data]\r\nbatch_size = 8\r\n",
        b"\xef\xbb\xbf[data]\nbatch_size = 8",
        b"[data]\r\n# caf\xc3\xa9\r\n\r\nbatch_size = 8 # eight\r\n",
    ],
    ids=["BOM and CRLF", "BOM", "CRLF"],
)
def test_files_of_windows_editors_are_read(tmp_path, content):
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    assert load(path).data.batch_size == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.toml", b"[data]\nindex = 'caf\xe9.csv'\n", "c.toml': expected UTF-8 text, got byte 19"),
        ("c.toml", "[data]\n".encode("utf-16"), "c.toml': expected UTF-8 text, got byte 0"),
        ("c.toml", b"[data]\nbatch_size = 8\nbatch_size = 9\n", "c.toml' is not valid TOML: .*line 3"),
        ("c.toml", b"[data]\nsize = 32\n[data]\nframes = 8\n", "c.toml' is not valid TOML"),
        ("c.toml", b"[data\n", "c.toml' is not valid TOML: .*line 1"),
        ("c.toml", b"[data]\nbatch_size: 8\n", "c.toml' is not valid TOML"),
        ("c.toml", b"[data]\nbatchsize = 8\n", "c.toml': unknown key 'data.batchsize'; did you mean 'batch_size'"),
        ("c.json", b"{", "c.json' is not valid JSON"),
        ("c.json", b"[1]", r"c.json': config: expected a table, got \[1\]"),
        ("c.toml", b"PK\x03\x04\x00\x00", "c.toml' is not valid TOML"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_a_file_of_comments_is_the_defaults(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("# nothing is changed\n")
    assert load(path) == Config()
    with pytest.raises(ConfigError, match=rf"expected a recipe \(a TOML file\), but '{tmp_path}' is a folder"):
        load(tmp_path)


def test_the_record_of_a_run_names_its_inputs_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config.from_dict({"data": {"index": "a/index.csv"}, "model": {"init": {"rgb": "x.pt"}}})
    found = absolute_inputs(config)
    assert found.data.index == str(tmp_path / "a" / "index.csv")
    assert (found.model.init.rgb, found.model.init.flow) == (str(tmp_path / "x.pt"), "")
    assert absolute_inputs(found) == found


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.json", '{"data": {"size": 20, "size": 24}}', "the key 'size' occurs twice .* the values 20 and 24"),
        ("c.json", '{"data": {}, "data": {"size": 24}}', "the key 'data' occurs twice"),
        ("c.toml", "[data]\nsize = 20\nsize = 24\n", "Cannot overwrite a value"),
        ("c.json", "", "is empty: expected a recipe"),
        ("c.toml", "", "is empty: expected a recipe"),
        ("last.pt", " \n", "is empty: expected a recipe"),
    ],
)
def test_a_repeated_key_and_an_empty_file_are_refused(tmp_path, name, text, message):
    """Neither the last of two values nor the defaults may stand for what the file does not say."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"config file '{tmp_path}/{name}'.* {message}"):
        load(tmp_path / name)


@pytest.mark.parametrize("home", ["~/", "~"])
def test_the_home_folder_in_the_paths_of_a_recipe(tmp_path, monkeypatch, home):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "recipe.toml"
    path.write_text(f'[data]\nindex = "{home}"\n[model.init]\nflow = "{home}"\n[run]\nout = "{home}"\n')
    config = load(path)
    for found in (config.data.index, config.model.init.flow, config.run.out):
        assert Path(found) == tmp_path
    assert config.model.init.rgb == ""
    path.write_text('[data]\nindex = "a~b/~x.csv"\n[run]\nout = "./~/runs"\n')  # as in a shell, only at the start
    assert (load(path).data.index, load(path).run.out) == ("a~b/~x.csv", "./~/runs")


@pytest.mark.parametrize("key", ["data.index", "model.init.rgb", "model.init.residual", "run.out"])
@pytest.mark.parametrize("value", ["$HOME/set/i.csv", "/data/$USER", "${SCRATCH}/runs", "$UNSET"])
def test_environment_variables_in_a_recipe_are_named(tmp_path, key, value):
    table, _, name = key.rpartition(".")
    (tmp_path / "recipe.toml").write_text(f'[{table}]\n{name} = "{value}"\n')
    with pytest.raises(ConfigError, match=f"recipe.toml': {key}: .*{re.escape(repr(value))}, in which no environment"):
        load(tmp_path / "recipe.toml")


def test_a_dollar_that_is_no_variable_is_part_of_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "$HOME").mkdir()
    for name in ("price$5.csv", "a/$/b", "$HOME", "US$"):
        (tmp_path / "recipe.toml").write_text(f'[run]\nout = "{name}"\n')
        assert load("recipe.toml").run.out == name
