"""What editors and ``help`` know of the settings is what the dataclasses say."""

import inspect
import pydoc
import re
from typing import Unpack

import settings_file

import fst_dspy
from fst_dspy.config import ALIASES, DERIVED, PARTS, FSTConfig
from fst_dspy.settings import Settings
from fst_dspy.settings_help import all_settings


def test_the_file_for_editors_is_what_the_dataclasses_say():
    """Names, types, defaults and meanings: after a change run tests/support/settings_file.py."""
    assert settings_file.FILE.read_text() == settings_file.formatted()


def test_every_setting_and_other_name_is_in_it():
    fields = {name for kind in PARTS.values() for name in kind.__dataclass_fields__}
    assert set(Settings.__annotations__) == fields | set(DERIVED) | set(ALIASES) | {"batch_sampler"}
    assert all(setting.meaning for setting in all_settings())


def test_fst_is_typed_and_helps_with_them():
    parameter = inspect.signature(fst_dspy.FST, eval_str=True).parameters["settings"]
    assert parameter.annotation == Unpack[Settings]
    shown = " ".join(pydoc.render_doc(fst_dspy.FST, renderer=pydoc.plaintext).split())
    shown = shown.replace(" | ", " ")  # pydoc's margin, and between types
    usual = FSTConfig.make().to_dict()
    for setting in all_settings():
        assert f" {setting.name}: " in shown
        if setting.part:
            default = re.escape(repr(usual[setting.part][setting.name]))
            assert re.search(rf" {setting.name}: [^.]*? = {default}[. ]", shown), setting.name
