"""Arguments that cannot work, found before anything heavy is imported: in a second, not in twenty.

What needs the program, the model or the data is checked where it is used, after this.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fst_dspy.errors import ConfigError, ModelError, StoreError
from fst_dspy.pretrained.adapters import refuse_adapters
from fst_dspy.pretrained.smollm2 import NAMES
from fst_dspy.tasks import check_program

if TYPE_CHECKING:
    from fst_dspy.config import FSTConfig

MODEL_FILES = ("config.json", "*.gguf")
"""A model folder has one of these."""
NAMED_MODELS = ("embedded", *NAMES)
HUB_SECONDS = 10.0
"""How long the hub may take to say whether it has a model."""


def check_arguments(
    programs: Sequence[str],
    model: str,
    settings: Mapping[str, Any],
    *,
    auto: Any = None,
    arm: str | None = None,
    reflection_lm: str | None = None,
    out: Path | None = None,
) -> None:
    """Check what a command was given, as far as text and files tell.

    Without an ``arm`` the settings are for several, and whether they go together is not checked.

    Raises:
        ConfigError, ModelError, ProgramError, StoreError: What cannot work.
    """
    for program in programs:
        check_program(program)
    if arm is None:
        check_each(settings)
    else:
        check_settings(settings, auto, arm)
    check_model(model)
    if reflection_lm is not None and "/" not in reflection_lm.strip("/"):
        raise ConfigError(
            f"--reflection-lm {reflection_lm!r} names no provider; write it as dspy.LM does, "
            "provider/model such as openai/gpt-5-mini"
        )
    if out is not None:
        check_out(out)


def check_each(settings: Mapping[str, Any]) -> None:
    """Names, types and ranges of settings that go to several arms, each by itself.

    Raises:
        ConfigError: What is wrong.
    """
    from fst_dspy.config import ALIASES, check_setting

    for name, value in settings.items():
        check_setting(ALIASES.get(name, name), value)


def check_settings(settings: Mapping[str, Any], auto: Any, arm: str) -> FSTConfig:
    """Names, types and ranges of settings, and whether they go together; what they come to.

    Raises:
        ConfigError: What is wrong.
    """
    from fst_dspy.config import FSTConfig, settings_of_arm

    plain = {name: value for name, value in settings.items() if name != "batch_sampler"}
    return FSTConfig.make(**{"auto": auto, **settings_of_arm(arm, plain)})


def check_model(model: str) -> None:
    """That a folder which is named is there and holds a model, or else that the hub has it.

    Raises:
        ModelError: It is not there, or the hub has no such model or cannot be reached.
    """
    if model in NAMED_MODELS:
        return
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "manifest.json").is_file():
            raise ModelError(
                f"{path} is a bundle, a compiled program; write its model to a folder with "
                f"`fst export {path} FOLDER`"
            )
        refuse_adapters(path)
        if not any(any(path.glob(name)) for name in MODEL_FILES):
            raise ModelError(
                f"{path} holds no model: no {MODEL_FILES[0]} in it; give the folder that "
                "save_pretrained wrote, with weights and tokenizer"
            )
    elif path.is_file() and path.suffix != ".gguf":
        raise ModelError(f"{path} is a file; give the folder that it is in")
    elif not path.exists() and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", model):
        raise ModelError(
            f"there is no model folder {str(path)!r}, and no model on the Hugging Face hub has "
            'such a name; give "embedded", "smollm2", a folder or an id such as Qwen/Qwen3-0.6B'
        )
    elif not path.exists():
        _look_up(model)


def _look_up(model: str) -> None:
    """Ask the hub once: loading asks again and again for half a minute where there is no network.

    What is in the cache is not asked for; where the hub has trouble of its own, loading may try.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(model, MODEL_FILES[0]), str):
        return
    try:
        HfApi().model_info(model, timeout=HUB_SECONDS)
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"there is no folder {model!r}, and no such model on the Hugging Face hub, or one that "
            "takes a login (HF_TOKEN); look at the spelling"
        ) from error
    except HfHubHTTPError:
        return
    except Exception as error:
        raise ModelError(
            f"there is no folder {model!r}, and the Hugging Face hub cannot be reached "
            f'({type(error).__name__}: {error}); where there is no network give "embedded", '
            '"smollm2" or a folder with the model'
        ) from error


def check_source(source: Path) -> None:
    """That a folder is a bundle, or the run folder of a compile that has ended.

    Raises:
        StoreError: It is neither.
    """
    if any((source / name).is_file() for name in ("manifest.json", "result.json")):
        return
    if (source / "config.json").is_file():
        raise StoreError(f"the run in {source} has not ended: start it again to go on with it")
    raise StoreError(
        f"{source} is neither a bundle nor a run folder; give what save() wrote, or "
        "fst compile --out"
    )


def check_out(out: Path) -> None:
    """That a folder can be written to, or made.

    Raises:
        StoreError: It cannot.
    """
    there = out
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise StoreError(f"cannot write to {out}: {there} is a file; choose another --out")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StoreError(
            f"cannot write to {out}: no right to write in {there}; choose another --out"
        )


def check_same_run(out: Path, seed: int, arm: str, auto: Any, settings: Mapping[str, Any]) -> None:
    """That a run folder was begun with the same seed, arm and settings, as far as they are known.

    What depends on the model, the program and the data is compared once they are loaded.

    Raises:
        StoreError: It was not; the message says what differs.
    """
    path = out / "config.json"
    if not path.is_file():
        return
    from fst_dspy.run.store import another_run, differences

    try:
        found = json.loads(path.read_text())
        known = {"arm": found["arm"], "seed": found["seed"], "settings": found["settings"]}
    except (OSError, ValueError, KeyError, TypeError):
        return  # the run itself says what is wrong with the folder
    asked = check_settings(settings, auto, arm).to_dict()
    # What the model and the data settle is known when they are.
    slow = known["settings"].get("slow", {})
    for name, unsettled in (("learning_rate", None), ("lora", "auto")):
        if asked["slow"][name] == unsettled:
            asked["slow"][name] = slow.get(name)
    if asked["budget"].get("max_full_evals") is not None:
        asked["budget"] = known["settings"].get("budget")
    changed = differences(known, {"arm": arm, "seed": seed, "settings": asked})
    if changed:
        raise another_run(out, changed)


def check_names(what: str, given: Sequence[str], known: Sequence[str]) -> None:
    """That comma-separated names are known.

    Raises:
        ConfigError: One is not; the nearest is suggested.
    """
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}" if near else ""
            raise ConfigError(f"there is no {what} {name!r}{hint}; known: {', '.join(known)}")
