"""A command line's settings as a YAML file, and back: each key is a flag without its dashes."""

import argparse
import contextlib
import json
from itertools import zip_longest
from pathlib import Path

import yaml

from loralib.files import write_text
from loralib.version import __version__

from .errors import UsageError

FILE = "config.yaml"
ENDINGS = (".yaml", ".yml", ".json")
SECRETS = ("token", "hub_token", "push_to_hub_token")


def expanded(argv: list[str]) -> list[str]:
    """The command line with the settings file that it begins with (if it does) in flags; what follows overrides them.

    Raises UsageError for a file that is not there, or is no table of settings.
    """
    if not argv or argv[0].startswith("-") or not argv[0].endswith(ENDINGS):
        return list(argv)
    file = Path(argv[0])
    if not file.is_file():
        raise UsageError(f"{file} does not exist; give a YAML file of settings, or flags alone.")
    try:
        # Words as they stand: for YAML 1.1 `no` is false and 010 eight, and 1e-3 is no number.
        settings = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} is no YAML ({' '.join(str(error).split())}); mend the file.") from None
    if not isinstance(settings, dict) or not all(map(_is_name, settings)):
        raise UsageError(f"{file} holds no table of settings; write one in a line, as in learning_rate: 1e-3.")
    return [word for name, value in settings.items() for word in _as_flag(name, value)] + argv[1:]


def _is_name(key: str) -> bool:
    return key.replace("-", "_").isidentifier()


def _as_flag(name: str, value: str | list | dict) -> list[str]:
    if value in ("", "null", "~"):
        return []
    if isinstance(value, list):
        # A word that begins with a dash would be a flag; flags of several words take them with commas, too.
        dashed = any(str(word).startswith("-") for word in value)
        return [f"--{name}={','.join(map(str, value))}"] if dashed else [f"--{name}", *map(str, value)]
    word = json.dumps(_with_numbers(value)) if isinstance(value, dict) else value
    return [f"--{name}={word}"] if word.startswith("-") else [f"--{name}", word]


def _with_numbers(value):
    """A table's words as JSON reads them: numbers, true, false, null, else text."""
    if isinstance(value, dict):
        return {name: _with_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_with_numbers(each) for each in value]
    try:
        return json.loads(value)
    except ValueError:
        return value


def given(argv: list[str], parser: argparse.ArgumentParser) -> dict:
    """The settings of a command line without a file, by their whole names; the last counts. Tokens are left out."""
    found: dict[str, list[str]] = {}
    actions: dict[str, argparse.Action] = {}
    name = ""
    for word in argv:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            action = _action(flag, parser)
            name, actions[action.dest] = action.dest, action
            found[name] = [value] if "=" in word else []
            if isinstance(action.const, bool) and action.nargs == 0:  # --no_group_by_length
                found[name] = [str(action.const).lower()]
        else:
            found[name].append(word)
    once = (*SECRETS, "resume_from_checkpoint", "resume_anyway", "overwrite_output_dir")  # of this start, not the run
    return {name: _value(values, actions[name]) for name, values in found.items() if name not in once}


def named(argv: list[str], parser: argparse.ArgumentParser) -> set[str]:
    """The flags of a command line by their whole names, ``--do_eval`` for ``--do-eval`` too; unknown ones are left to
    the parser."""
    found = set()
    for flag in (word.partition("=")[0] for word in argv if word.startswith("-")):
        with contextlib.suppress(StopIteration):
            found.add(f"--{_action(flag, parser).dest}")
    return found


def turned_off(argv: list[str], parser: argparse.ArgumentParser) -> set[str]:
    """The flags that a command line sets to false: ``--do_eval false``, ``--do_eval=false``."""
    no = ("false", "f", "no", "n", "0")
    pairs = [(*word.partition("=")[::2], after) for word, after in zip_longest(argv, argv[1:], fillvalue="")]
    return named([flag for flag, value, after in pairs if (value or after).lower() in no], parser)


def without_tokens(words: list[str]) -> list[str]:
    """A command line as it may be shown: the word TOKEN in place of one."""
    shown, secret = [], False
    for word in words:
        flag, equals, _ = word.partition("=")
        name = flag[2:].replace("-", "_")  # an abbreviation, too: argparse takes what begins one flag alone
        is_token = flag.startswith("--") and bool(name) and any(secret.startswith(name) for secret in SECRETS)
        shown.append(
            f"{flag}=TOKEN" if is_token and equals else "TOKEN" if secret and not flag.startswith("--") else word
        )
        secret = is_token and not equals
    return shown


def _action(flag: str, parser: argparse.ArgumentParser) -> argparse.Action:
    """What a flag or an abbreviation of one sets, as argparse takes it."""
    known = parser._option_string_actions
    return known[flag] if flag in known else known[next(name for name in known if name.startswith(flag))]


def _value(words: list[str], action: argparse.Action):
    if not words:
        return True
    if action.nargs in ("+", "*"):
        return words
    word = words[-1]
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            return kind(word) if action.type not in (str, None) else word
        except (TypeError, ValueError):
            continue
    return word


def store_config(directory: str | Path, settings: dict) -> None:
    """Write the settings to the run's ``config.yaml``."""
    head = (
        f"# The settings of this run, made with dylora {__version__}. Again: dylora train {FILE} --output_dir ANOTHER\n"
    )
    write_text(Path(directory) / FILE, head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
